"""Frozen settings of a run. Every run saves one ``RunConfig`` as ``config.json``."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyro_isingvit.core.earlier import brought_up_to_date
from pyro_isingvit.core.errors import UserError, why
from pyro_isingvit.core.fields import check_fields

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
    as they are."""
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
    """Set tau_1 per layer by empirical Bayes at each mask update."""
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
    validation part is certainly predicted better after a short training at 0.9 or 0.995, within this training."""
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
class TrainConfig:
    """How to train and how to evaluate."""

    epochs: int = 40
    """Passes over the training images, including the pilot phase but not the fine-tuning."""
    pilot_fraction: float = 0.15
    """Share of the epochs before the Ising phase, with every mask at one."""
    finetune_epochs: int = 0
    """Epochs after the Ising phase with the masks frozen at retention > 0.5."""
    finetune_lr: float = 0.1
    """Peak learning rate of these epochs, as a share of lr."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 6e-3
    """Peak learning rate of AdamW."""
    rate_rule: Literal["transfer", "uniform"] = "transfer"
    """transfer: lr is for width 64; the matrices of wider and deeper networks get less, so that one lr serves all;
    uniform: every matrix gets lr."""
    scale_lr_factor: float = 5.0
    """Learning rate of learned posterior log-scales and mask logits, as a multiple of lr."""
    shrinkage: float = 1.5
    """Decay of the weight matrices over the whole training: exp(-shrinkage) of a weight is left where no gradient
    speaks for it. One value serves short and long trainings."""
    weight_decay: float | None = None
    """AdamW's decoupled decay of the weight matrices, per unit of learning rate and step. None: by shrinkage."""
    schedule: Literal["cosine", "halving"] = "cosine"
    """cosine: to zero; halving: every 20 epochs, as in the paper."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises."""
    accumulate: int = 1
    """Number of micro-batches into which a step's batch is cut: the same loss with less memory."""
    checkpoint_activations: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass: less memory, more time."""
    layer_decay: float = 1.0
    """Rates fall by this factor from each block to the one before it; 1: all alike. 0.65 to 0.8 suit trained
    networks."""
    frozen_blocks: int = 0
    """The first blocks that stay as they start, with everything before them; for trained networks."""
    clip_norm: float = 1.0
    """Upper limit of the global gradient norm."""
    average: float = 0.2
    """Predict with weights averaged over about this last share of the steps; 0: with those of the last step."""
    augment: Literal["none", "crop", "crop-flip", "randaugment"] = "none"
    """New views of the training images in every epoch: random crops of the zero-padded image, crops and horizontal
    flips, or both with RandAugment. Use crop for digits, letters and other images that a mirror changes."""
    margin: int | None = None
    """Zero-padding of a random crop in pixels, the farthest that it shifts an image. None: an eighth of the side."""
    mix: Literal["none", "mixup", "cutmix", "regmixup", "manifold"] = "none"
    """Mix each training image and its label with another: mixup sums both, cutmix pastes a box of the other, regmixup
    sums both for every second image and leaves the others clean, manifold sums what a block makes of both."""
    mix_alpha: float | None = None
    """With mix, the share is drawn from Beta(alpha, alpha). Small values mix little; 1: any share alike; large ones:
    halves. None: 10 for regmixup, 2 for manifold, 0.2 otherwise."""
    label_smoothing: float = 0.0
    """Share of each training label that goes to all classes alike."""
    token_masking: float = 0.0
    """Share of the patch tokens that are dropped from each training image, at random, in training steps alone."""
    log_barrier: float = 0.0
    """Weight of the attention log-barrier, a heuristic for vision (0.02 to 0.05 for text); 0: none."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["32", "bf16"] = "32"
    """Arithmetic of the forward pass."""
    engine: Literal["auto", "pyro", "fused"] = "auto"
    """pyro: the ELBO through Pyro's handlers; fused: the same formula without them; auto: fused if possible."""
    draws: int | Literal["image"] | None = None
    """Posterior draws of the masks in a training step: a number, which split the batch, or image: every image has its
    own (masks on units, heads or blocks). None: image where that can be, else 4 with the fused engine, otherwise 1."""
    noise: Literal["weights", "activations"] = "weights"
    """Draw weights, or activations by their first two moments (local reparameterisation; masks on single weights)."""
    compile: bool = False
    """Run the network of the training step through torch.compile (engine fused; a CPU needs a C++ compiler)."""
    val_samples: int = 4
    """Posterior draws for the validation metrics of each epoch."""
    calibrate: bool = True
    """Fit the temperature of the predictions on the validation part after training."""
    samples: int = 50
    """Posterior predictive draws of the final evaluation on the test part."""
    early_learning: float = 0.0
    """Weight of early-learning regularisation, which holds an image to what the network said of it before it learned
    its label by heart; for labels of which many are wrong, 3 is usual. 0: none."""
    early_learning_momentum: float = 0.7
    """Share of an image's earlier predictions that stays each time it is seen again."""
    confusion: float = 0.0
    """Weight of confusion-aware regularisation, against classes that are mistaken for others, small ones above all; 0.3
    is usual. 0: none."""
    balance: Literal["none", "sampler", "loss", "logit"] = "none"
    """What makes up for classes of different sizes: sampler draws every class alike often, loss weights the images of
    small classes higher, logit learns the classes' shares apart from the network (logit adjustment). With any of them
    the probabilities are those under equal classes, with none those under the classes' shares in training."""
    logit_penalty: float = 0.0
    """Weight of half the squared length of the logits; 0.1 is usual. 0: none."""
    self_distillation: float = 0.0
    """Share that an image's own last prediction has in its target by the end of training, growing from 0; 0.8 is usual.
    0: none."""
    attention_entropy: float = 0.0
    """Weight of the negative entropy of attention, against heads that look at few patches; 0.1 is usual. 0: none."""
    attention_spread: float = 0.0
    """Weight of log(1 + A^2) over attention A, likewise. 0: none."""
    attention_log: float = 0.0
    """Weight of -log A over attention A, likewise. 0: none."""
    feature_entropy: float = 0.0
    """Weight of the negative von Neumann entropy of the features, for features in many directions. 0: none."""
    group_lasso: float = 0.0
    """Weight of the sum of the norms of groups of weights, which sends whole groups towards 0. 0: none."""
    lasso_groups: Literal["unit", "head", "block"] = "unit"
    """What a group of group_lasso is: output rows, attention heads or whole branches; units where there are no larger
    ones."""
    group_orthogonality: float = 0.0
    """Weight of the distance of groups of rows from orthonormal ones. 0: none."""
    spectral: float = 0.0
    """Weight of half the sum of the squared largest singular values of the matrices. 0: none."""
    hyperspherical_energy: float = 0.0
    """Weight of the energy that keeps the directions of a matrix's rows apart. 0: none."""
    jacobian: float = 0.0
    """Weight of half the squared Jacobian of the logits by the image, for smooth functions; 0.01 is usual. 0: none."""
    nuclear_norm: float = 0.0
    """Weight of the nuclear norm of that Jacobian, by a bound on it; 0.01 is usual. 0: none."""
    rationale: float = 0.0
    """Weight of rationale invariance: the same reasons for all images of a class; 0.01 is usual. 0: none."""
    gradient_norm: float = 0.0
    """Weight of half the squared gradient of the loss by the weights, for flat minima. 0: none."""
    weight_perturbation: float = 0.0
    """Radius within which the weights are moved against the loss before its gradient is taken, likewise. 0: none."""
    distillation: float = 0.0
    """Weight of the divergence from the mean prediction of trained runs, the teachers; 1 is usual. 0: none."""
    distillation_power: float = 1.0
    """The teachers' probabilities are raised to this power: below 1 they are flattened, 1 leaves them calibrated."""
    distillation_weighted: bool = True
    """Weight each image by the sum of these powers, which is larger where the teachers are less certain."""
    teacher_draws: int = 2
    """Networks drawn from each teacher in a step."""
    nested_dropout: float = 0.0
    """Share of the training images that keep the first units of each MLP alone, a number drawn uniformly: orders units
    by what they are worth. 0: none."""
    sigma_reparam: float = 0.0
    """Matrices have a trained spectral norm, which starts at this multiple of their own; 1 is usual. 0: none."""
    weight_compander: float = 0.0
    """Weights are a arctan(v / a), a this multiple of the largest weight at the start; 1 is usual. 0: none."""


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
                    "memory, or add the field in core/settings.py."
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
