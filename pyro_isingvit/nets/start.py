"""A trained network to begin from: its shape, its numbers, and how its images were normalised.

``fitted`` makes it read other images: position embeddings are interpolated, and a network for colour images reads grey
ones as if their one channel stood in all of its own. The head is left out: training needs one for its own classes.

Shapes: T tokens, D width, C channels.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.checkpoint import write_atomically
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.vit import ViT, Weights

log = logging.getLogger(__name__)
FORMAT = "pyro-isingvit start 1"
HEAD = ("head", "head_hidden")  # kinds that belong to the classes
STEM = "stem.stages.0"  # the convolution that reads the pixels, where there is a stem


@dataclass(frozen=True)
class Start:
    """A trained network without its head.

    Attributes:
        vit: its shape.
        image_shape: (channels, height, width) that it reads.
        scale: of the pixels that it was trained on.
        weights: matrices, kind -> (layers, out, in).
        others: the other parameters by their names in ``ViT``: biases, LayerNorms, positions, tokens.
        source: where it comes from, for messages and records.
    """

    vit: ViTConfig
    image_shape: tuple[int, int, int]
    scale: Scale
    weights: Weights
    others: Mapping[str, Tensor]
    source: str

    @classmethod
    def of(cls, vit: ViT, weights: Weights, scale: Scale, source: str) -> "Start":
        """What a network and its matrices are as a start; tensors are copied.

        Args:
            vit: the network.
            weights: kind -> (layers, out, in).
            scale: of the pixels that it was trained on.
            source: where it comes from.
        """
        vit, weights = vit.whole(weights)
        others = {
            name: _kept(value) for name, value in vit.named_parameters()
            if name.removeprefix("bias.") not in HEAD
        }  # fmt: skip
        kept = {kind: _kept(value) for kind, value in weights.items() if kind not in HEAD}
        return cls(vit.config, vit.image_shape, scale, kept, others, source)

    def fitted(self, image_shape: tuple[int, int, int]) -> "Start":
        """The same network for other images.

        Args:
            image_shape: (channels, height, width) of the images.

        Returns:
            the start for images that are normalised with the mean and standard deviation that it has itself.

        Raises:
            UserError: channels that cannot be brought together.
        """
        start, reads = self, self.image_shape[0]
        channels, height, width = image_shape
        if channels == 1 and reads > 1:
            start = start._grey()
        need(
            start.image_shape[0] == channels,
            f"{self.source} reads {reads} channel(s), the images have {channels}; convert the images.",
        )
        return start if start.image_shape == image_shape else start._resized(height, width)

    def _grey(self) -> "Start":
        """A network of one channel that computes what this one does where all channels are alike.

        A grey pixel g stands for a_c g + b_c in channel c: g itself, unless the channels have ranges of their own. With
        x = (g - m) / s, channel c would hold (a_c g + b_c - m_c) / s_c = (a_c s x + a_c m + b_c - m_c) / s_c.
        """
        channels, scale = self.image_shape[0], self.scale
        mean, std = torch.tensor(scale.mean), torch.tensor(scale.std)
        m, s = mean.mean(), std.mean()
        a, b = torch.ones(channels), torch.zeros(channels)
        if scale.low:
            low, high = torch.tensor(scale.low), torch.tensor(scale.high)
            a, b = (high.mean() - low.mean()) / (high - low), (low.mean() - low) / (high - low)
        factor, shift = (a * s / std)[:, None], ((a * m + b - mean) / std)[:, None]
        log.warning("%s reads %d channels: grey images are read as if they stood in all of them", self.source, channels)
        others, weights = {**self.others}, {**self.weights}
        name = "bias.patch" if self.vit.stem == "none" else f"{STEM}.bias"
        if self.vit.stem == "none":
            first = weights["patch"].unflatten(-1, (channels, -1))  # (1, D, C, p p)
            weights["patch"] = (first * factor).sum(-2)
        else:
            first = others[f"{STEM}.weight"].flatten(2)  # (out, C, 9); exact but for the padding around the image
            grey = (first * factor).sum(-2, keepdim=True)
            others[f"{STEM}.weight"] = grey.unflatten(-1, (3, 3))
        others[name] = others[name] + (first * shift).sum((-1, -2))
        one = Scale(scale.kind, _one(scale.low), _one(scale.high), (float(m),), (float(s),))
        return replace(self, image_shape=(1, *self.image_shape[1:]), scale=one, weights=weights, others=others)

    def _resized(self, height: int, width: int) -> "Start":
        """Position embeddings of another grid, bicubic; those of CLS and registers stay."""
        old = ViT(self.vit, *self.image_shape, classes=2).grid
        new = ViT(self.vit, self.image_shape[0], height, width, classes=2).grid
        position, prefix = self.others["position"], self.vit.prefix
        if old != new:
            grid = position[prefix:].T.reshape(1, -1, *old)
            grid = F.interpolate(grid.float(), size=new, mode="bicubic", antialias=True)
            position = torch.cat([position[:prefix], grid.flatten(2)[0].T])
            log.info("%s: positions of %dx%d patches are interpolated to %dx%d", self.source, *old, *new)
        return replace(
            self, image_shape=(self.image_shape[0], height, width), others={**self.others, "position": position}
        )

    @torch.no_grad()
    def copy_to(self, vit: ViT, weights: nn.ParameterDict | None = None) -> None:
        """Writes all but the head into a network, into its centre if it has one, and into matrices.

        Args:
            vit: of the same shape and images.
            weights: kind -> (layers, out, in); None: nothing but the network.

        Raises:
            UserError: another shape.
        """
        shape = replace(vit.config, head=self.vit.head)
        need(
            shape == self.vit and vit.image_shape == self.image_shape,
            f"{self.source} is another network: {self.vit} for images of {self.image_shape}.",
        )
        for kind, value in self.weights.items():
            below = len(vit.trunk[kind]) if kind in vit.trunk else 0
            if below:
                vit.trunk[kind].copy_(value[:below])
                if vit.centred:
                    vit.trunk_centre(kind).copy_(value[vit.frozen_layers(kind) : below])
            if kind in vit.matrix_shapes and weights is not None:
                weights[kind].copy_(value[below:])
            if kind in vit.matrix_shapes and vit.centred:
                vit.centre(kind).copy_(value[below:])
        own = dict(vit.named_parameters())
        for name, value in self.others.items():
            own[name].copy_(value)

    # Files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {f"weights.{kind}": value for kind, value in self.weights.items()}
        tensors |= {f"vit.{name}": value for name, value in self.others.items()}
        about = {
            "format": FORMAT, "vit": json.dumps(asdict(self.vit)), "image_shape": json.dumps(self.image_shape),
            **{name: json.dumps(value) for name, value in asdict(self.scale).items()},
        }  # fmt: skip
        ready = {name: value.contiguous() for name, value in tensors.items()}
        write_atomically(Path(path), lambda place: save_file(ready, place, about))

    @classmethod
    def load(cls, path: str | Path) -> "Start":
        """Reads what ``save`` wrote.

        Raises:
            UserError: no such file, a file of another kind, or tensors that are missing, extra or of another shape.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                need(
                    about.get("format") == FORMAT,
                    f"{path} was not written by this library; for a file of timm or torchvision give the architecture "
                    "too: timm:NAME@FILE or torchvision:NAME@FILE.",
                )
                vit = ViTConfig(**json.loads(about["vit"]))
                check_fields(vit)
                shape, scale = tuple(json.loads(about["image_shape"])), _scale(about)
                with torch.device("meta"):
                    wanted = Start.of(*_with_matrices(ViT(vit, shape[0], shape[1], shape[2], 2)), scale, str(path))
                names = {f"weights.{kind}": value for kind, value in wanted.weights.items()}
                names |= {f"vit.{name}": value for name, value in wanted.others.items()}
                compare_names(names, {name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118
                found = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError as error:
            raise UserError(f"there is no file {path}.") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged or no start ({why(error)[:160]}).") from error
        parts = {
            part: {n.partition(".")[2]: v for n, v in found.items() if n.startswith(f"{part}.")}
            for part in ("weights", "vit")
        }
        return replace(wanted, weights=parts["weights"], others=parts["vit"])


def _one(ends: tuple[float, ...]) -> tuple[float, ...]:
    """The mean over channels, of one channel; nothing of nothing."""
    return (sum(ends) / len(ends),) if ends else ()


def _kept(value: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor without numbers, the like."""
    return value.detach().clone() if value.is_meta else value.detach().cpu().clone()


def _with_matrices(vit: ViT) -> tuple[ViT, Weights]:
    return vit, {kind: torch.zeros(shape) for kind, shape in vit.matrix_shapes.items()}


def _scale(about: Mapping[str, str]) -> Scale:
    """What a file says of its pixels; ValueError or TypeError where that cannot be."""
    mean, std, low, high = (tuple(json.loads(about.get(name, "[]"))) for name in ("mean", "std", "low", "high"))
    kind = json.loads(about.get("kind", "null"))  # not known before version 0.12
    if not Scale(kind or "uint8", low, high, mean, std).fits(json.loads(about["image_shape"])[0]):
        raise ValueError("mean, std, kind, low or high of the pixels cannot be")
    return Scale(kind, low, high, mean, std)


def compare_names(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError with the names of tensors that are missing, extra, or of another shape, or not finite."""
    named([n for n in wanted if n not in found], [n for n in found if n not in wanted], path)
    check_tensors(wanted, found, path)


def named(missing: Sequence[str], extra: Sequence[str], path: str | Path) -> None:
    """Raises UserError with the names of tensors that a file lacks, or has beyond those of the network."""
    for what, names in (("lacks", missing), ("has, beyond those of the network,", extra)):
        need(not names, f"{path} {what} {len(names)} tensor(s): {', '.join(names[:5])}{', ...' if names[5:] else ''}.")


def check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises UserError with the name of a tensor of ``wanted`` that is of another shape in the file, or not finite."""
    for name, value in wanted.items():
        shapes = tuple(found[name].shape), tuple(value.shape)
        need(shapes[0] == shapes[1], f"{path}: {name} is of shape {shapes[0]}, the network needs {shapes[1]}.")
        need(bool(found[name].float().isfinite().all()), f"{path}: {name} is not finite.")
