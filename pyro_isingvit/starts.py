"""Where a training may start: a pretrained network of timm or torchvision, a file, or an earlier run.

- ``timm:NAME``, ``torchvision:NAME``: from the library's cache, or downloaded where that is asked for
- ``timm:NAME@FILE``, ``torchvision:NAME@FILE``: the weights of that architecture in a file of yours
- ``FILE.safetensors``: what a pretraining (runs/pretrain.py) or ``Start.save`` wrote
- ``FOLDER``: a run, or a pruned network
"""

from pathlib import Path

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.paths import is_dir, is_file, with_home
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.nets.libraries import LIBRARIES, load_library
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT, Weights
from pyro_isingvit.pruning.expand import expanded
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.shapes import CONFIG as COMPACT
from pyro_isingvit.runs.folder import CONFIG
from pyro_isingvit.runs.load import open_run


def load_start(spec: str | Path, *, download: bool = False) -> Start:
    """The network that a training shall start from.

    Args:
        spec: see the head of ``pyro_isingvit.starts``.
        download: let timm or torchvision fetch the weights that they know under a name.

    Raises:
        UserError: nothing there, a file that is damaged or of another architecture, a network that our transformer
            cannot be, or weights that would have to be downloaded.
    """
    spec = str(spec)
    library, _, rest = spec.partition(":")
    if library in LIBRARIES and rest:
        name, _, file = rest.partition("@")
        return load_library(library, name, file, download)
    path = with_home(spec)
    if is_dir(path):
        return _folder(path)
    need(
        path.suffix == ".safetensors",
        f"`init` {spec!r} is no folder and no .safetensors file; known besides: timm:NAME, torchvision:NAME, and both "
        "with @FILE.",
    )
    return Start.load(path)


def _folder(path: Path) -> Start:
    if is_file(path / COMPACT):
        network = CompactViT.from_pretrained(path)
        vit, weights = expanded(network)
        return _of(vit, weights, network.config.scale, path)
    need(is_file(path / CONFIG), f"{path} holds neither a run ({CONFIG}) nor a pruned network ({COMPACT}).")
    run = open_run(path)
    networks = run.method.trained_networks()
    need(len(networks) == 1, f"{path} was trained by {run.config.method}, which has several networks; start from one.")
    [(vit, matrices)] = networks
    trained: Weights = dict(matrices.items())
    posterior = run.method.posterior
    off_for_good = run.method.deployed() if posterior is None or posterior[1].phase == "frozen" else ()
    [(vit, trained)] = off_for_good or [(vit, trained)]  # what was off while the rest was trained stays off
    return _of(vit, trained, run.info.scale, path)


def _of(vit: ViT, weights: Weights, scale: Scale, path: Path) -> Start:
    return Start.of(vit, weights, scale, str(path))
