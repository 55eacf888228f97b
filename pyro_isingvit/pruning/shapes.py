"""What a compact network is built from: everything but its numbers."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.pixels import Kind, Scale
from pyro_isingvit.core.settings import Tokens
from pyro_isingvit.nets.shape import ACTIVATIONS
from pyro_isingvit.runs.folder import COMPACT

FORMAT = 2  # 1: biases of the form bayes lacked what dropped inputs send through their matrix
CONFIG = COMPACT


@dataclass(frozen=True)
class LayerShape:
    """What is left of one block; a branch of size 0 is not there at all."""

    heads: int
    """Attention heads."""
    query: int
    """Query (and key) channels a head; the smaller heads of the layer are padded with zeros to the largest."""
    value: int
    """Value channels a head, padded likewise."""
    uniform: int
    """Value channels of heads without query or key channels: their attention is the mean over the tokens."""
    hidden: int
    """Hidden units of the MLP."""


@dataclass(frozen=True)
class CompactConfig(Tokens):
    """Everything but the numbers: images, classes, shapes."""

    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # of the training pixels in [0, 1], by channel
    std: tuple[float, ...]
    patch_size: int
    width: int
    head_dim: int  # of the network before pruning: scores are divided by its root
    pool: str
    features: int  # of the width D, that the classifier reads
    head_hidden: int | None  # units of a two-layer classifier
    layers: tuple[LayerShape, ...]
    form: str = "mean"
    sites: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # bayes: masks, by site
    posteriors: Mapping[str, "PosteriorShape"] = dataclasses.field(default_factory=dict)  # bayes: by matrix
    patch_stride: int | None = None
    stem: str = "none"
    registers: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_pre: bool = False
    final_norm: str = "tokens"
    format: int = FORMAT
    kind: Kind = "uint8"  # of the pixels
    low: tuple[float, ...] = ()  # pixels that become 0, by channel; empty: 0, or no change for floats
    high: tuple[float, ...] = ()  # pixels that become 1; empty: the largest whole number
    class_prior: tuple[float, ...] = ()  # shares of the classes that the probabilities stand for; empty: not known

    @property
    def scale(self) -> Scale:
        """Which pixel values become 0 and 1, and how the result is normalised."""
        return Scale(self.kind, self.low, self.high, self.mean, self.std)

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def check(self) -> None:
        """Checks that a network can have such fields; raises TypeError or ValueError."""
        layers = [n for layer in self.layers for n in dataclasses.astuple(layer)]
        sizes = (self.patch_size, self.stride, self.width, self.head_dim, self.features, self.registers)
        for n in (*self.image_shape, *sizes, *layers):
            if type(n) is not int or not 0 <= n < 2**24:
                raise TypeError(f"{n!r:.60} is no size")
        channels, *_ = self.image_shape
        if len(self.image_shape) != 3 or min(*self.image_shape, self.patch_size, self.width, self.head_dim) < 1:
            raise ValueError("images, patches and width need a size")
        if not self.scale.fits(channels):
            raise ValueError("mean, std, low and high are not those of the channels")
        if not all(isinstance(name, str) for name in (self.dataset, *self.classes)):
            raise ValueError("names that cannot be")
        shares = self.class_prior
        if len(shares) not in (0, len(self.classes)) or not all(0 <= share <= 1 for share in shares):
            raise ValueError("class_prior has no share for each class")
        if self.pool not in ("mean", "cls") or self.form not in ("mean", "bayes"):
            raise ValueError(f"unknown pool or form {self.pool!r:.20}, {self.form!r:.20}")
        if self.stem not in ("none", "conv"):
            raise ValueError(f"unknown stem {self.stem!r:.20}")
        if self.activation not in ACTIVATIONS or self.final_norm not in ("tokens", "pooled"):
            raise ValueError(f"unknown activation or final norm {self.activation!r:.20}, {self.final_norm!r:.20}")
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1 or self.norm_pre not in (True, False):
            raise ValueError("LayerNorms that cannot be")
        if not 1 <= self.stride <= self.patch_size:
            raise ValueError("a stride that leaves pixels out")

    @classmethod
    def from_json(cls, text: str, where: str | Path = CONFIG) -> "CompactConfig":
        """Reads what ``to_json`` wrote.

        Raises:
            UserError: not JSON, another format, or unknown or missing fields.
        """
        try:
            raw = json.loads(text)
            need(
                raw["format"] in (1, FORMAT),
                f"{where} is of format {raw['format']}, this version reads 1 and {FORMAT}.",
            )
            raw["layers"] = tuple(LayerShape(**layer) for layer in raw["layers"])
            raw["sites"] = {name: tuple(shape) for name, shape in raw["sites"].items()}
            raw["posteriors"] = {
                name: PosteriorShape(**{**shape, "scale": tuple(shape["scale"]), "index": _maybe(shape["index"])})
                for name, shape in raw["posteriors"].items()
            }
            for name in ("classes", "image_shape", "mean", "std", "low", "high", "class_prior"):
                raw[name] = tuple(raw.get(name, ()))
            config = cls(**raw)
            config.check()
            return config
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} describes no compact network ({why(error)}); prune the run again.") from error


def _maybe(shape: list[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


@dataclass(frozen=True)
class PosteriorShape:
    """How the posterior of one matrix is kept."""

    site: str  # the masks that cover it
    scale: tuple[int, ...]  # shape of s: () where one is shared
    index: tuple[int, ...] | None  # which mask of the site covers what; None: the site has a mask for every weight
    by_row: bool  # one mask covers a whole row
