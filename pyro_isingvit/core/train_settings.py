"""Frozen settings of a training."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How to train and how to evaluate."""

    epochs: int = 80
    """Passes over the training images, including the pilot phase but not the fine-tuning. Chosen without
    `finetune_epochs` for a method that fine-tunes by default: all passes, of which fine-tuning keeps its share."""
    pilot_fraction: float = 0.15
    """Share of the epochs before the Ising phase, with every mask at one."""
    finetune_epochs: int = 0
    """Epochs after the others: with the masks frozen at retention > 0.5, or without the weights that were cut."""
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
    speaks for it."""
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
    shrinkage_epochs: int | None = 120
    """Longer trainings shrink weights in proportion, by shrinkage times epochs / shrinkage_epochs, up to 3. None: all
    alike."""
