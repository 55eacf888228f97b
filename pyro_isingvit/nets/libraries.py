"""Networks of timm and torchvision by name: with the weights that the library fetches, or with those of a file.

A file may be older than the library, of another image size, or have another head: the library's own loading renames
what it has renamed since, the network is built for the file's positions, and the head is not read.
"""

import difflib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.nets.backbones import from_timm, from_torchvision
from pyro_isingvit.nets.start import Start, check_tensors, named

FAMILIES = ("vit_*", "deit*", "eva02_tiny*", "flexivit_*")  # of timm, that ``convertible`` goes through
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the tensors
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of all names: data parallel, torch.compile, Lightning


@dataclass(frozen=True)
class Known:
    """An architecture of a library.

    Attributes:
        build: (fetch the library's weights, tensors of a file or none) -> the network.
        convert: its converter, to network and matrices.
        mean: by channel, of pixels in [0, 1].
        std: likewise.
        head: what the names of its head's tensors begin with.
        kept: whether the library has fetched the weights before.
    """

    build: Callable[[bool, dict[str, Tensor]], Any]
    convert: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str
    kept: Callable[[], bool]


def load_library(library: str, name: str, file: str, download: bool) -> Start:
    """A network of a library as a start.

    Args:
        library: timm or torchvision.
        name: of the architecture, for timm perhaps with a tag.
        file: with its weights; "": those that the library has, or fetches.
        download: let the library fetch weights that it has not fetched before.

    Raises:
        UserError: no such network or file, a file of another architecture, or a network that our transformer cannot be.
    """
    spec = f"{library}:{name}" + (f"@{file}" if file else "")
    known = LIBRARIES[library](name)
    if file:
        net = _filled(known, read_tensors(Path(file).expanduser()), Path(file), spec)
    else:
        need(
            download or known.kept(),
            f"the weights of {spec} are not in this package: set `download` to let the library fetch them, or give a "
            f"file: {spec}@FILE.",
        )
        try:
            net = known.build(True, {})
        except Exception as error:  # whatever the network stack of either library raises
            raise UserError(f"the weights of {spec} could not be downloaded: {why(error)[:200]}") from error
    try:
        vit, weights = known.convert(net)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    return Start.of(vit, weights, known.mean, known.std, spec, "uint8")


# Files -------------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of one that torch wrote, without what training scripts put around.

    Raises:
        UserError: no such file, or one that holds anything else.
    """
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
    for key in WRAPPERS:
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    need(
        isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values()),
        f"{file} holds no tensors by name.",
    )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _filled(known: Known, state: dict[str, Tensor], file: Path, spec: str) -> nn.Module:
    """The network with all tensors of a file but the head's, whose classes are others."""
    net = known.build(False, state)
    own = net.state_dict()
    heads = {name: value for name, value in own.items() if name.startswith(known.head)}
    state = {name: value for name, value in state.items() if not name.startswith(known.head)} | heads
    other = f"{file} holds no weights of {spec.partition('@')[0]}"
    translate = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # timm's, of this architecture
    try:
        state = state if translate is None else translate(state, net)
    except Exception as error:  # it expects tensors that a file of another architecture has not
        raise UserError(f"{other}: {why(error)[:160]}") from error
    check_tensors({name: own[name] for name in own if name in state}, state, file)
    try:
        found = net.load_state_dict(state, strict=False)  # its own hooks rename
    except RuntimeError as error:  # what they have renamed is of another shape
        raise UserError(f"{other}: {why(error)[:160]}") from error
    named(found.missing_keys, found.unexpected_keys, file)
    check_tensors(own, net.state_dict(), file)
    return net


# Libraries ---------------------------------------------------------------------------------------------------------


def _timm(name: str) -> Known:
    timm = _import_timm()
    known, near = timm.is_model(name), difflib.get_close_matches(name, timm.list_models(), 3)
    close = f" (did you mean {', '.join(near)}?)" if near else ""
    need(known, f"timm has no model {name!r}{close}; ``convertible`` lists what works.")
    try:
        about = timm.get_pretrained_cfg(name)
    except Exception as error:  # a tag that the architecture has not
        raise UserError(f"timm has no weights {name!r}: {why(error)[:160]}") from error
    need(about is not None, f"timm says nothing about {name!r}: its mean and standard deviation are not known.")

    def kept() -> bool:
        from huggingface_hub import try_to_load_from_cache

        if not about.hf_hub_id:
            return bool(about.url) and _fetched(about.url)
        names = (about.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(about.hf_hub_id, each), str) for each in names if each)

    build = lambda fetch, _: timm.create_model(name, pretrained=fetch)  # noqa: E731
    return Known(build, from_timm, tuple(about.mean), tuple(about.std), "head.", kept)


def _torchvision(name: str) -> Known:
    from torchvision import models

    names = models.list_models(include="vit_*")
    need(name in names, f"torchvision has no vision transformer {name!r}; it has {', '.join(names)}.")
    weights = models.get_model_weights(name)["DEFAULT"]
    views = weights.transforms()

    def build(fetch: bool, state: dict[str, Tensor]) -> Any:
        # The checkpoints of one architecture differ in the size of their images.
        place, patch = state.get("encoder.pos_embedding"), int(name.rpartition("_")[2])
        fits = place is not None and place.dim() == 3 and place.shape[1] > 1
        size = {"image_size": math.isqrt(place.shape[1] - 1) * patch} if fits and place is not None else {}
        return models.get_model(name, weights=weights if fetch else None, **size)

    mean, std = tuple(views.mean), tuple(views.std)
    return Known(build, from_torchvision, mean, std, "heads.", lambda: _fetched(weights.url))


LIBRARIES: dict[str, Callable[[str], Known]] = {"timm": _timm, "torchvision": _torchvision}


def _fetched(url: str) -> bool:
    """Whether torch has a copy of what stands at an address."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm is not installed: pip install 'pyro-isingvit[timm]'.") from error
    return timm


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
