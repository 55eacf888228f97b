"""Networks of timm and torchvision by name: with the weights that the library fetches, or with those of a file.

A file may be older than the library, of another image size, or have another head: the library's own loading renames
what it has renamed since, the network is built for the file's positions, and the head is not read.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import is_file, with_home
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.nets.backbones import from_timm, from_torchvision
from pyro_isingvit.nets.start import Start, check_tensors, named

FAMILIES = ("vit_*", "deit*", "eva02_tiny*", "flexivit_*")  # of timm, that ``convertible`` goes through
ANY_PATCH = "flexivit_"  # networks of timm that read patches of every size
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep the tensors
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of all names: data parallel, torch.compile, Lightning


class Architecture(Protocol):
    """A network of a library, by its name.

    Attributes:
        convert: to network and matrices.
        mean: by channel, of pixels in [0, 1].
        std: likewise.
    """

    convert: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def cached(self) -> Any:
        """The network with the weights that the library has fetched before; None where there are none."""

    def fetched(self) -> Any:
        """The network with weights that the library fetches."""

    def filled(self, state: dict[str, Tensor], file: Path) -> nn.Module:
        """The network with all tensors of a file but the head's; raises UserError with what is missing or extra."""


def load_library(library: str, name: str, file: str, download: bool) -> Start:
    """A network of a library as a start.

    Args:
        library: timm or torchvision.
        name: of the architecture, for timm perhaps with a tag.
        file: with its weights; "": those that the library has, or fetches.
        download: let the library fetch weights.

    Raises:
        UserError: no such network or file, a file of another architecture, or a network that our transformer cannot be.
    """
    spec = f"{library}:{name}" + (f"@{file}" if file else "")
    known = LIBRARIES[library](name)
    if file:
        net = known.filled(read_tensors(with_home(file)), Path(file))
    else:
        try:
            net = known.fetched() if download else known.cached()
        except Exception as error:  # whatever the network stack of either library raises
            raise UserError(f"the weights of {spec} could not be downloaded: {why(error)[:200]}") from error
        need(
            net is not None,
            f"the weights of {spec} are not in this package: set `download` to let the library fetch them, or give a "
            f"file: {spec}@FILE.",
        )
    try:
        vit, weights = known.convert(net)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    return Start.of(vit, weights, Scale("uint8", (), (), known.mean, known.std), spec)


# Files -------------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of one that torch wrote, without what training scripts put around.

    Raises:
        UserError: no such file, or one that holds anything else.
    """
    need(is_file(file), f"there is no file {file}.")
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
    names = {name: name for name in state}
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in names)), ""):
        names = {name.removeprefix(prefix): whole for name, whole in names.items()}
    return {name: state[whole] for name, whole in names.items()}


def _without_head(state: dict[str, Tensor], own: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """The tensors of a file with zeros for those whose names begin with ``head``, in the network's own shapes."""
    zeros = {name: torch.zeros(value.shape) for name, value in own.items() if name.startswith(head)}
    return {name: value for name, value in state.items() if not name.startswith(head)} | zeros


# Libraries ---------------------------------------------------------------------------------------------------------


class _Timm:
    """An architecture of timm, perhaps with the tag of one of its weights."""

    convert = staticmethod(from_timm)

    def __init__(self, name: str) -> None:
        self.timm, self.name = _import_timm(), name
        near = difflib.get_close_matches(name, self.timm.list_models(), 3)
        close = f" (did you mean {', '.join(near)}?)" if near else ""
        need(self.timm.is_model(name), f"timm has no model {name!r}{close}; ``convertible`` lists what works.")
        try:
            about = self.timm.get_pretrained_cfg(name)
        except Exception as error:  # a tag that the architecture has not
            raise UserError(f"timm has no weights {name!r}: {why(error)[:160]}") from error
        need(about is not None, f"timm says nothing about {name!r}: its mean and standard deviation are not known.")
        self.about, self.mean, self.std = about, tuple(about.mean), tuple(about.std)

    def cached(self) -> Any:
        from huggingface_hub import try_to_load_from_cache

        file: Any = None
        if self.about.hf_hub_id:
            names = filter(None, (self.about.hf_hub_filename, "model.safetensors", "pytorch_model.bin"))
            found = (try_to_load_from_cache(self.about.hf_hub_id, each) for each in names)
            file = next((each for each in found if isinstance(each, str)), None)
        elif self.about.url:
            file = _in_hub(self.about.url)
        # By its path: with the name alone, timm would ask for a newer one.
        return None if file is None else self._with(file=str(file))

    def fetched(self) -> Any:
        return self.timm.create_model(self.name, pretrained=True)

    def filled(self, state: dict[str, Tensor], file: Path) -> nn.Module:
        with torch.device("meta"):
            usual = self.timm.create_model(self.name)
        size = self._size(state, usual, file)
        try:  # timm's own loading, which knows older names and the authors' own files
            net = self._with(
                {"img_size": size} if size else {}, state_dict=_without_head(state, usual.state_dict(), "head.")
            )
        except Exception as error:  # it expects tensors that a file of another architecture has not
            told = " ".join(str(error).split())  # with the names of what is missing or extra, on lines of their own
            raise UserError(f"{file} holds no weights of timm:{self.name}: {told[:300]}") from error
        own = net.state_dict()
        check_tensors(own, own, file)  # finite; timm has compared the shapes
        return net

    def _size(self, state: dict[str, Tensor], usual: Any, file: Path) -> int | None:
        """Pixels of the images that the file's positions are for; None: those of the network, or it is not known."""
        kernel, places = state.get("patch_embed.proj.weight"), state.get("pos_embed")
        patch = usual.patch_embed.patch_size[0] if hasattr(usual, "patch_embed") else 0
        if kernel is None or kernel.dim() != 4 or not patch:
            return None
        need(
            kernel.shape[-1] == patch or self.name.startswith(ANY_PATCH),
            f"{file} has patches of {kernel.shape[-1]} pixels, timm:{self.name} reads patches of {patch}.",
        )
        if places is None or places.dim() != 3 or usual.pos_embed is None or kernel.shape[-1] != patch:
            return None
        tokens = places.shape[1] - (usual.pos_embed.shape[1] - usual.patch_embed.num_patches)  # without CLS and others
        side = math.isqrt(max(tokens, 0))
        return side * patch if side * side == tokens and tokens != usual.patch_embed.num_patches else None

    def _with(self, more: dict[str, Any] | None = None, **source: Any) -> Any:
        """The network with weights from a place that is named; all of them, or an error."""
        return self.timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=source, **(more or {}))


class _Torchvision:
    """``vit_b_16`` and its like."""

    convert = staticmethod(from_torchvision)

    def __init__(self, name: str) -> None:
        from torchvision import models

        names = models.list_models(include="vit_*")
        need(name in names, f"torchvision has no vision transformer {name!r}; it has {', '.join(names)}.")
        self.name, self.models, self.weights = name, models, models.get_model_weights(name)["DEFAULT"]
        views = self.weights.transforms()
        self.mean, self.std = tuple(views.mean), tuple(views.std)

    def cached(self) -> Any:
        return self.fetched() if _in_hub(self.weights.url) else None

    def fetched(self) -> Any:
        return self.models.get_model(self.name, weights=self.weights)

    def filled(self, state: dict[str, Tensor], file: Path) -> nn.Module:
        place, patch = state.get("encoder.pos_embedding"), int(self.name.rpartition("_")[2])
        fits = place is not None and place.dim() == 3 and place.shape[1] > 1
        size = {"image_size": math.isqrt(place.shape[1] - 1) * patch} if fits and place is not None else {}
        net: nn.Module = self.models.get_model(self.name, weights=None, **size)
        own = net.state_dict()
        state = _without_head(state, own, "heads.")
        check_tensors({name: own[name] for name in own if name in state}, state, file)
        try:
            found = net.load_state_dict(state, strict=False)  # its own hooks rename
        except RuntimeError as error:  # what they have renamed is of another shape
            raise UserError(f"{file} holds no weights of torchvision:{self.name}: {why(error)[:160]}") from error
        named(found.missing_keys, found.unexpected_keys, file)
        check_tensors(own, net.state_dict(), file)
        return net


LIBRARIES: dict[str, Callable[[str], Architecture]] = {"timm": _Timm, "torchvision": _Torchvision}


def _in_hub(url: str) -> Path | None:
    """torch's copy of what stands at an address."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    return path if is_file(path) else None


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
