"""Settings of learning from images without labels."""

from dataclasses import dataclass
from typing import Literal

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.fields import check_fields


@dataclass(frozen=True)
class PretrainConfig:
    """How to learn from images without labels, by masked-image modelling."""

    epochs: int = 50
    """Passes over the images."""
    batch_size: int = 256
    """Images per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW for width 64; wider and deeper networks take smaller ones (rate_rule transfer)."""
    weight_decay: float = 0.05
    """AdamW's decoupled decay of the weight matrices."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises; then it falls to zero as a cosine."""
    masked: float = 0.75
    """Share of the patches that the network does not see, and whose pixels it must guess."""
    decoder_width: int = 64
    """Width of the decoder, which is thrown away."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    augment: Literal["none", "crop", "crop-flip"] = "crop"
    """New views of the images in every epoch: random crops of the zero-padded image, with or without mirroring."""
    margin: int | None = None
    """Zero-padding of a random crop in pixels. None: an eighth of the side."""
    val_fraction: float = 0.02
    """Share of the images that is held out to watch the loss."""
    seed: int = 0
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["32", "bf16"] = "32"
    """Arithmetic of the forward pass."""

    def check(self) -> None:
        """Raises UserError where a setting is out of its range."""
        check_fields(self)
        for name in ("epochs", "batch_size", "decoder_width", "decoder_depth"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.lr <= 1:
            raise UserError(f"`lr` must lie in (0, 1], not {self.lr}.")
        for name, most in (("weight_decay", 1e3), ("warmup_fraction", 1.0), ("val_fraction", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"`{name}` must lie in [0, {most:g}], not {getattr(self, name)}.")
        if self.margin is not None and self.margin < 0:
            raise UserError(f"`margin` must not be negative, but is {self.margin}.")
        if not 0 < self.masked < 1:
            raise UserError(f"`masked` must lie strictly between 0 and 1, not {self.masked}.")
