"""Where a training may start: a pretrained network of timm or torchvision, a file, or an earlier run.

- ``timm:NAME``, ``torchvision:NAME``: downloaded, only where that is asked for
- ``timm:NAME@FILE``, ``torchvision:NAME@FILE``: the weights of that architecture in a file of yours
- ``FILE.safetensors``: what a pretraining (runs/pretrain.py) or ``Start.save`` wrote
- ``FOLDER``: a run, or a pruned network
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.nets.backbones import from_timm, from_torchvision
from pyro_isingvit.nets.start import Start, compare_names
from pyro_isingvit.pruning.expand import expanded
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.shapes import CONFIG as COMPACT
from pyro_isingvit.runs.folder import CONFIG
from pyro_isingvit.runs.load import open_run

LIBRARIES = ("timm", "torchvision")
FAMILIES = ("vit_*", "deit*", "eva02_tiny*", "flexivit_*")  # of timm, that ``convertible`` goes through


def load_start(spec: str, *, download: bool = False) -> Start:
    """The network that a training shall start from.

    Args:
        spec: see the head of ``pyro_isingvit.starts``.
        download: let timm or torchvision fetch the weights that they know under a name.

    Raises:
        UserError: nothing there, a file that is damaged or of another architecture, a network that our transformer
            cannot be, or weights that would have to be downloaded.
    """
    library, _, rest = spec.partition(":")
    if library in LIBRARIES and rest:
        name, _, file = rest.partition("@")
        return (_timm if library == "timm" else _torchvision)(name, file, download, spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path)
    need(
        path.suffix == ".safetensors",
        f"`init` {spec!r} is no folder and no .safetensors file; known besides: timm:NAME, torchvision:NAME, and both "
        "with @FILE.",
    )
    return Start.load(path)


def _folder(path: Path) -> Start:
    if (path / COMPACT).is_file():
        network = CompactViT.from_pretrained(path)
        vit, weights = expanded(network)
        return Start.of(vit, weights, network.config.mean, network.config.std, str(path))
    need((path / CONFIG).is_file(), f"{path} holds neither a run ({CONFIG}) nor a pruned network ({COMPACT}).")
    run = open_run(path)
    networks = run.method.trained_networks()
    need(len(networks) == 1, f"{path} was trained by {run.config.method}, which has several networks; start from one.")
    vit, matrices = networks[0]
    return Start.of(vit, dict(matrices.items()), run.info.mean, run.info.std, str(path))


# Libraries ---------------------------------------------------------------------------------------------------------


def _timm(name: str, file: str, download: bool, spec: str) -> Start:
    timm = _import_timm()
    need(
        timm.is_model(name),
        f"timm has no model {name!r}{_close(name, timm.list_models())}; ``convertible`` lists what works.",
    )
    net: Any = _built(lambda fetch: timm.create_model(name, pretrained=fetch), file, download, spec)
    about = net.pretrained_cfg
    return _named(net, from_timm, tuple(about["mean"]), tuple(about["std"]), spec)


def _torchvision(name: str, file: str, download: bool, spec: str) -> Start:
    from torchvision import models

    known = models.list_models(include="vit_*")
    need(name in known, f"torchvision has no vision transformer {name!r}; it has {', '.join(known)}.")
    weights = models.get_model_weights(name)["DEFAULT"]
    # The checkpoints of one architecture may want larger images than the plain network.
    size = {"image_size": weights.transforms().crop_size[0]} if not file else {}
    build = lambda fetch: models.get_model(name, weights=weights if fetch else None, **({} if fetch else size))  # noqa: E731
    net = _built(build, file, download, spec)
    views = weights.transforms()
    return _named(net, from_torchvision, tuple(views.mean), tuple(views.std), spec)


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm is not installed: pip install 'pyro-isingvit[timm]'.") from error
    return timm


def _close(name: str, known: list[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, known, 3)
    return f" (did you mean {', '.join(found)}?)" if found else ""


def _built(build: Any, file: str, download: bool, spec: str) -> nn.Module:
    """The library's network with weights from a file, or from its own download."""
    if file:
        net = build(False)
        _fill(net, Path(file).expanduser())
        return net
    need(
        download,
        f"the weights of {spec} are not in this package: set `download` to let the library fetch them, or give a file: "
        f"{spec}@FILE.",
    )
    try:
        return build(True)
    except Exception as error:  # whatever the network stack of either library raises
        raise UserError(f"the weights of {spec} could not be downloaded: {why(error)[:200]}") from error


def _fill(net: nn.Module, file: Path) -> None:
    """Loads a state dict from a file, which must have every tensor of the network and no other."""
    need(file.is_file(), f"there is no file {file}.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file can be damaged in any way
        raise UserError(
            f"{file} cannot be read as safetensors or as tensors alone (a pickle that may run code is not loaded): "
            f"{why(error)[:120]}"
        ) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    need(
        isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
        f"{file} holds no tensors by name.",
    )
    compare_names(net.state_dict(), state, file)
    net.load_state_dict(state)


def _named(net: nn.Module, convert: Any, mean: tuple[float, ...], std: tuple[float, ...], spec: str) -> Start:
    try:
        vit, weights = convert(net)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    return Start.of(vit, weights, mean, std, spec)


def convertible(library: str) -> Iterator[tuple[str, str]]:
    """Architectures of a library, each with "" if it can be converted, or with the reason why not.

    Args:
        library: timm or torchvision.

    Raises:
        UserError: another library, or timm is not installed.
    """
    need(library in LIBRARIES, f"unknown library {library!r}; known: {', '.join(LIBRARIES)}.")
    if library == "timm":
        timm = _import_timm()
        names, convert = timm.list_models(list(FAMILIES)), from_timm
        build: Any = timm.create_model
    else:
        from torchvision import models

        names, convert, build = models.list_models(include="vit_*"), from_torchvision, models.get_model
    for name in names:
        try:
            with torch.device("meta"):
                convert(build(name))
            yield name, ""
        except UserError as error:
            yield name, str(error)
        except Exception as error:  # an architecture that cannot be built without weights
            yield name, f"it cannot be built: {why(error)[:80]}"
