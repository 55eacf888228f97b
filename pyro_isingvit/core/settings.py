"""Frozen settings of a run. Every run saves one ``RunConfig`` as ``config.json``."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyro_isingvit.core.earlier import brought_up_to_date
from pyro_isingvit.core.errors import UserError, why
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.train_settings import TrainConfig

FORMAT = 1  # raised when older run folders can no longer be read
Granularity = Literal["weight", "unit", "head", "block"]
Tempering = float | Literal["exact", "data_emphasis", "batch_mean", "no_kl"]


@dataclass(frozen=True)
class DataConfig:
    """Which images to learn from."""

    dataset: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, csv:FILE, npz:FILE or npy:FOLDER."""
    data_root: str = "data"
    """Folder of the torchvision data sets; download writes them here."""
    download: bool = False
    """Fetch a missing torchvision data set into data_root, and the weights that `init` names."""
    train_size: int | None = None
    """Train on a stratified, seeded subset of this many images; None: on all except the validation part."""
    val_fraction: float = 0.1
    """Validation images, as a share of the training images."""
    image_size: int | None = None
    """Resize the images to squares with this many pixels a side; image files need it if their sizes differ."""
    resize: Literal["fit", "crop", "stretch"] = "fit"
    """With image_size, images that are no squares are shown whole with dark margins (fit), cut to their middle (crop),
    or lose their shape (stretch)."""
    intensity: str = "full"
    """Which pixel values become 0 and 1. full: the ends of 8 or 16 bits, or the lowest and highest of the training
    images' floats; 'percentile LOW HIGH', such as 'percentile 1 99': of the training pixels, per channel; none: floats
    as they are. A training that starts from a network for pixels of the same type (init) takes the network's."""
    pages: Literal["first", "channels"] = "first"
    """Which pages of a TIFF file are read: the first, or all of them as channels."""
    groups: str | None = None
    """Regular expression that finds the patient, slide or plate in a file's name: what its first parentheses hold, or
    all that it matches. Images of one group stay in one part."""
    columns: str = ""
    """csv: names of columns other than path, label, split, group and weight, as 'path=file,label=finding'."""
    cache: str | None = None
    """Folder where decoded images are kept and read from row by row, for data that do not fit into memory."""


class Tokens:
    """What follows from how a network, whole or compact, makes its tokens."""

    patch_size: int
    patch_stride: int | None
    registers: int
    pool: str

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch_size if self.patch_stride is None else self.patch_stride

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: CLS and registers."""
        return self.registers + (self.pool == "cls")


@dataclass(frozen=True)
class ViTConfig(Tokens):
    """Shape of the pre-norm vision transformer."""

    patch_size: int = 7
    """Side of a patch, in pixels; images are zero-padded to a multiple of it."""
    width: int = 64
    """D, the width of the residual stream."""
    heads: int = 4
    """H, the number of attention heads; must divide the width."""
    depth: int = 4
    """L, the number of blocks."""
    mlp_ratio: int = 4
    """Hidden units of an MLP, as a multiple of the width."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean over the patch tokens, or a CLS token."""
    head: Literal["linear", "mlp"] = "linear"
    """A linear head, or the paper's two layers D -> D/2 -> ReLU -> C."""
    patch_stride: int | None = None
    """Pixels from one patch to the next; patches overlap where it is below patch_size, its default."""
    stem: Literal["none", "conv"] = "none"
    """conv: convolutions halve the image until one vector is left for each patch, and the patch embedding reads it."""
    registers: int = 0
    """Learned tokens beside those of the patches, which the mean over tokens leaves out."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Of the MLPs. quick_gelu is x sigmoid(1.702 x), as in CLIP."""
    norm_eps: float = 1e-5
    """Epsilon of the LayerNorms."""
    norm_pre: bool = False
    """A LayerNorm of the tokens before the first block, as in CLIP."""
    final_norm: Literal["tokens", "pooled"] = "tokens"
    """What the last LayerNorm reads: the tokens, or, with pool mean, their mean."""

    @property
    def plain(self) -> bool:
        """Whether sizes alone describe it: mean pooling, a linear head, nothing between or beside the patches."""
        return self == ViTConfig(self.patch_size, self.width, self.heads, self.depth, self.mlp_ratio)


@dataclass(frozen=True)
class IsingConfig:
    """Prior and likelihood-guided posterior (docs/method.md names the equations)."""

    granularity: Granularity = "unit"
    """What one selection mask covers: a weight, a unit (output row), an attention head, or a whole branch."""
    mask_posterior: str = "likelihood_guided"
    """likelihood_guided: the mean-field equation sets the masks; learned: relaxed-Bernoulli gradients do, with the
    Ising field as prior; hybrid: the equation with learned corrections. The names are in
    pyro_isingvit.ising.masks.MASK_POSTERIORS."""
    saliency: str = "gnb"
    """Curvature estimator; the names are in pyro_isingvit.ising.curvature.SALIENCY."""
    coupling: str = "all_readers"
    """Coupling graph; the names are in pyro_isingvit.ising.coupling.COUPLINGS."""
    kappa_mask: Tempering | Literal["auto"] = "auto"
    """Weight of the likelihood in the mask field: a number, exact (1), data_emphasis (P/N), or auto. auto solves for it
    at each update so that the mean retention equals target_retention times max_keep."""
    target_retention: float = 0.95
    """Mean retention that kappa_mask "auto" aims at, as a share of max_keep. It is about the share of weights that
    stay. A fixed kappa_mask ignores it."""
    kappa_weights: Tempering = "data_emphasis"
    """Weight of the likelihood in the objective: a number, exact (1) or data_emphasis (P/N)."""
    delta: float = 0.99
    """Prior probability that a mask drops its weights."""
    J: float = 1.0
    """Strength of the Ising coupling to the readers."""
    omega: float = 1.0
    """Share of the description cost KL_e in the mask field (1: the ELBO, 0: the paper)."""
    tau_0: float = 0.0
    """Standard deviation of the spike; 0: a dropped weight is exactly 0."""
    tau_1: float = 1.0
    """Standard deviation of the slab."""
    empirical_tau_1: bool = False
    """Set tau_1 per layer by empirical Bayes at each mask update. Around a start it falls to how far weights have moved
    so far, which keeps them there (docs/tuning.md, Starting from a trained network)."""
    posterior_scale: Literal["learned", "shared", "curvature"] = "shared"
    """shared: one frozen posterior scale s for all weights (as in the paper); learned: one per weight; curvature: one
    per weight, set at each update by s^-2 = curvature_factor kappa_weights N h + tau_1^-2."""
    init_scale: float = 0.01
    """Initial posterior scale; a shared scale keeps it."""
    curvature_factor: float = 30.0
    """posterior_scale curvature: factor of the curvature h. 1 is the optimum of the objective for a quadratic loss;
    a larger one gives narrower posteriors."""
    max_keep: float | Literal["auto"] = "auto"
    """Upper limit of the retention, so that every weight is dropped now and then. auto: 0.98, unless the
    validation part is predicted better by more than a standard error after a short training at 0.9 or 0.995, within
    this training."""
    temperature: float = 0.5
    """Temperature of the relaxed-Bernoulli straight-through masks when the Ising phase starts."""
    final_temperature: float = 0.2
    """The same at the end of the Ising phase; in between it falls geometrically."""
    decay: float = 0.5
    """Coupling all_readers: weight of a reader, per step of distance."""
    update_every: int = 10
    """Optimiser steps between updates of curvature and masks."""
    curvature_batch: int = 16
    """Images of a batch that a curvature estimate uses."""
    curvature_decay: float = 0.95
    """Decay of the exponential average of the curvature, per update."""
    mask_damping: float = 0.2
    """Share of the new mask logit taken at each update; 1 takes all of it."""
    bayesian_blocks: int | None = None
    """Masks and noise in this many of the last blocks, and in the head; the blocks before them, and the patch
    embedding, have ordinary weights, and predictions compute them once for all draws. None: everywhere."""
    centre: Literal["start", "zero"] = "start"
    """Where the slab is centred if training starts from a trained network: at its weights, or at 0. A fresh network
    has its slab at 0."""


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of the methods without Ising masks; each method reads its own (methods/)."""

    drop_rate: float = 0.1
    """dropout, dropconnect: probability of a drop; concrete-dropout, l0: the same at the start."""
    members: int = 5
    """ensemble, ising-ensemble: K, networks trained side by side."""
    sparsity: float = 0.6
    """magnitude, gradual-magnitude, hypersparse, lobster: share of the weights that are pruned."""
    l0_penalty: float = 0.03
    """l0: nats per weight that is on."""
    kl_weight: float = 1.0
    """sparse-vd: weight of the KL in the objective after its warm-up (1: the ELBO)."""
    length_scale: float = 0.01
    """concrete-dropout: prior length scale."""
    hypersparse_weight: float = 5e-6
    """hypersparse: weight of its loss in the first epoch after the warm-up."""
    hypersparse_growth: float = 1.05
    """hypersparse: factor by which that weight grows from epoch to epoch."""
    lobster_weight: float = 1e-4
    """lobster: decay of an insensitive weight, per step."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run, saved with it."""

    preset: str = "small"
    method: str = "ising"
    data: DataConfig = field(default_factory=DataConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    ising: IsingConfig = field(default_factory=IsingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    version: str = ""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    format: int = FORMAT
    init: str | None = None
    teacher: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The settings as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def portable(self) -> "RunConfig":
        """The settings without what belongs to a machine, where the data are and the device, and to a version."""
        here = DataConfig()
        data = dataclasses.replace(self.data, data_root=here.data_root, download=here.download, cache=here.cache)
        train = dataclasses.replace(self.train, device="auto")
        return dataclasses.replace(self, data=data, train=train, version="")

    def check_kept(self) -> None:
        """Refuses settings that a folder could not give back: fields of a subclass, made for a trial in memory.

        Raises:
            UserError: there are some.
        """
        for name, kind in PARTS.items():
            strange = {each.name for each in dataclasses.fields(getattr(self, name))} - {
                each.name for each in dataclasses.fields(kind)
            }
            if strange:
                names = ", ".join(sorted(strange))
                raise UserError(
                    f"settings that {kind.__name__} does not have cannot be kept in a folder: {names}; keep the run in "
                    "memory, or add the field to that class."
                )

    @classmethod
    def from_json(cls, text: str, where: str | Path = "config.json") -> "RunConfig":
        """Reads what ``to_json`` wrote.

        Args:
            text: the JSON.
            where: the file's name, for messages.

        Returns:
            the settings, equal to those that were written.

        Raises:
            UserError: not JSON, another format, or unknown or missing settings.

        Examples:
            >>> from pyro_isingvit import RunConfig, TrainConfig
            >>> config = RunConfig(train=TrainConfig(epochs=5))
            >>> RunConfig.from_json(config.to_json()) == config
            True
        """
        try:
            raw = json.loads(text)
            written = raw.get("format")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} is not a readable configuration ({error}); train the run again.") from error
        if written != FORMAT:
            raise UserError(
                f"{where} was written by run format {written}, this version reads format {FORMAT}; "
                f"use the version that wrote it ({raw.get('version', 'unknown')}) or train again."
            )
        try:
            brought_up_to_date(raw)
            parts: dict[str, Any] = {name: kind(**raw.pop(name)) for name, kind in PARTS.items()}
            parts["baseline"] = BaselineConfig(**raw.pop("baseline", {}))  # runs of version 0.1 have none
            teacher = raw.pop("teacher", [])  # JSON has no tuples
            config = cls(**parts, **raw, teacher=tuple(teacher) if isinstance(teacher, list) else teacher)
            check_fields(config)
            return config
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{where} lacks or misnames a setting ({why(error)}); train the run again.") from error


PARTS: dict[str, type] = {"data": DataConfig, "vit": ViTConfig, "ising": IsingConfig, "train": TrainConfig}
