"""More training for what pruning left: on labels, or towards the predictions of a posterior.

Both leave zeros at zero, and the temperature at 1: calibrate again afterwards (``calibrated``).

Shapes: S samples, B batch, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F
from tqdm.auto import tqdm

from pyro_isingvit.core.errors import need, need_whole
from pyro_isingvit.core.random_state import undisturbed
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.images import Images
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import Split
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import check_teachers, mean_prediction


@dataclass(frozen=True)
class Distillation:
    """How ``distil`` trains; the defaults were chosen on training images alone (docs/pruning.md)."""

    epochs: int = 120
    """Passes over the images, with the unlabelled ones."""
    lr: float = 3e-3
    """Peak learning rate."""
    batch_size: int = 64
    """Images of a step."""
    mixed: float = 0.0
    """Share of each batch whose images are mixtures of two."""
    mix_alpha: float = 1.0
    """The share of the first image in a mixture is drawn from Beta(mix_alpha, mix_alpha)."""
    draws: int = 2
    """Networks drawn from each teacher in a step."""
    seed: int = 0
    """Of the order of the images, their augmentation and the teachers' draws."""

    def check(self) -> None:
        """Raises UserError for values out of their range."""
        need_whole(1, epochs=self.epochs, batch_size=self.batch_size, draws=self.draws)
        for name in ("lr", "mix_alpha"):
            need(getattr(self, name) > 0, f"`{name}` of a distillation must be above 0, not {getattr(self, name)}.")
        need(0 <= self.mixed <= 1, f"`mixed` of a distillation is a share, 0 to 1, not {self.mixed}.")


def finetune(
    model: CompactViT,
    train: Split,
    epochs: int,
    lr: float = 2e-4,
    batch_size: int = 64,
    seed: int = 0,
    balanced: bool = False,
) -> CompactViT:
    """Trains what is left on cross entropy, in place; zeros stay zeros.

    Images with weights count by them. AdamW without weight decay, the learning rate falling to 0 by a cosine. All that
    is left is trained, also blocks that were frozen in training. The temperature becomes 1: calibrate again.

    Args:
        model: the form ``mean``.
        train: training images.
        epochs: passes over them.
        lr: peak learning rate.
        batch_size: images per step.
        seed: of the order of the images.
        balanced: the network's probabilities are those under equal classes, and stay so: logits are adjusted by the
            classes' shares in ``train`` (nets/likelihood.py), however the run had balanced them (``Run.balanced``).

    Raises:
        UserError: the form is ``bayes``, epochs below 0, no images, or a loss that is not finite.
    """
    need(epochs >= 0, f"`epochs` must be at least 0, not {epochs}.")
    need(epochs == 0 or len(train) > 0, "`train` has no images to fine-tune on.")
    shift = log_shares(train, len(model.config.classes)) if balanced else torch.zeros(1)
    _need_mean(model)
    forward: Callable[[Tensor], Tensor] = lambda x: model(model.normalise(x)) * model.temperature + shift  # noqa: E731
    finetune_any(model, forward, train, epochs, lr, batch_size, seed)
    if epochs:
        model.temperature.fill_(1.0)
    return model


def log_shares(train: Split, classes: int) -> Tensor:
    """log of the classes' shares in a training part, by the images' weights where they have some, (C,).

    Args:
        train: training images.
        classes: C.
    """
    sizes = torch.bincount(train.labels, train.weights, minlength=classes)
    return (sizes / sizes.sum()).log().float()


def finetune_any(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    train: Split,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    """``finetune`` for any network; ``forward`` takes images as they are read to logits (B, C)."""

    def loss(rows: Tensor) -> Tensor:
        logits, labels = forward(train.images[rows]), train.labels[rows]
        if train.weights is None:
            return F.cross_entropy(logits, labels)
        return (train.weights[rows] * F.cross_entropy(logits, labels, reduction="none")).mean()

    def losses() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(train), generator=generator).split(batch_size):
                yield loss(rows)

    optimise(network, losses(), epochs * -(-len(train) // batch_size), lr)


def distil(
    model: CompactViT,
    teachers: Run | Sequence[Run],
    train: Split | Images,
    unlabelled: Images | None = None,
    how: Distillation | None = None,
    progress: bool = False,
) -> CompactViT:
    """Trains what is left towards the mean prediction of posteriors, in place; zeros stay zeros.

        loss = E_x CE(q(x), p(x)),   q(x) = mean over teachers of E_{W ~ q} softmax(f_W(x) / T)

    p is the network's softmax. The gradient by its logits is p - q: none where both agree. The loss is linear in q, so
    that a few networks drawn anew in each step give an unbiased gradient at a few forward passes (KL and loss differ by
    the entropy of q, a constant). Labels play no part. On training images themselves a posterior is nearly certain, so
    images are augmented as in the run's training; part of each batch may be mixtures l x + (1 - l) x', on which the
    teacher is asked as well (the targets are not mixed). The temperature becomes 1: calibrate afterwards.

    Args:
        model: the form ``mean``, on the CPU.
        teachers: the run that was cut, or several, such as runs of other seeds.
        train: images whose augmentation the first teacher's settings name.
        unlabelled: further images of the same shape and type; each step takes as many of them as of ``train``.
        how: epochs, rate, mixtures; None: the defaults.
        progress: show a progress bar.

    Returns:
        the model.

    Raises:
        UserError: the form is ``bayes``, no images, images or a teacher that do not fit, values out of their range, or
            a loss that is not finite.

    Examples:
        >>> from pyro_isingvit import Distillation, ViTConfig, calibrated, compact, distil, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=16, heads=4, depth=1), data, epochs=3, progress=False)
        >>> small = distil(compact(run, keep=0.5), run, data.train, how=Distillation(epochs=2))
        >>> float(small.temperature), calibrated(small, data.val) is small
        (1.0, True)
        >>> small.predict(data.test.images[:2]).shape
        torch.Size([1, 2, 10])
    """
    teachers = [teachers] if isinstance(teachers, Run) else list(teachers)
    _need_mean(model)
    config = model.config
    check_teachers(teachers, config.classes, config.image_shape, config.scale)
    info = teachers[0].info.with_scale_of(config.scale)
    distil_any(model, lambda x: model(x) * model.temperature, info, teachers, train, unlabelled, how, progress)
    model.temperature.fill_(1.0)
    return model


def distil_any(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    info: DataInfo,
    teachers: Sequence[Run],
    train: Split | Images,
    unlabelled: Images | None = None,
    how: Distillation | None = None,
    progress: bool = False,
) -> None:
    """``distil`` for any network.

    Args:
        network: whose parameters are trained.
        forward: images normalised by ``info`` (B, channels, height, width) -> logits (B, C).
        info: of the images, with the network's scale.
        teachers: see ``distil``, like the other arguments.
        train: images.
        unlabelled: further images.
        how: epochs, rate, mixtures.
        progress: show a progress bar.

    Raises:
        UserError: as ``distil``.
    """
    how = how or Distillation()
    how.check()
    labels = train.labels if isinstance(train, Split) else torch.zeros(len(train), dtype=torch.long)
    split = Split(train.images if isinstance(train, Split) else train, labels)
    need(len(split) > 0, "`train` has no images to distil on.")
    need(unlabelled is None or len(unlabelled) > 0, "`unlabelled` has no images.")
    for what, images in (("train", split.images), ("unlabelled", unlabelled)):
        if images is not None:
            shape = tuple(images.shape[1:])
            need(
                shape == info.image_shape and images.kind == info.kind,
                f"the images of `{what}` are {shape} {images.kind}, the network reads {info.image_shape} {info.kind}.",
            )
    settings = replace(teachers[0].config.train, mix="none", label_smoothing=0.0, balance="none")
    view = Augmentation(settings, info)
    steps = how.epochs * count_steps(len(split), how.batch_size)

    def losses() -> Iterator[Tensor]:
        more = None if unlabelled is None else _endless(unlabelled, how)
        step = 0
        for epoch in range(how.epochs):
            for images, _, _ in batches(split, how.batch_size, how.seed, epoch):
                images = images if more is None else torch.cat([images, next(more)])
                x = _mixed(view(images, torch.zeros(len(images)))[0], how)
                target = torch.stack([mean_prediction(run, x, view.info, how.draws, step) for run in teachers]).mean(0)
                yield F.cross_entropy(forward(x), target)
                step += 1

    with undisturbed(how.seed, *(run.device for run in teachers)):
        optimise(network, losses(), steps, how.lr, progress)


def _need_mean(model: CompactViT) -> None:
    need(
        model.config.form == "mean",
        "only the form 'mean' can be fine-tuned with cross entropy; make the network with `form` mean.",
    )


def _endless(images: Images, how: Distillation) -> Iterator[Tensor]:
    """Batches of images in random order, over and over; every image once before any comes again."""
    generator, rows = torch.Generator().manual_seed(how.seed), torch.zeros(0, dtype=torch.long)
    while True:
        while len(rows) < how.batch_size:
            rows = torch.cat([rows, torch.randperm(len(images), generator=generator)])
        yield images[rows[: how.batch_size]].cpu()
        rows = rows[how.batch_size :]


def _mixed(x: Tensor, how: Distillation) -> Tensor:
    """The batch, the first ``mixed`` share of it as mixtures with other images, each with a share of its own."""
    count = round(how.mixed * len(x))
    if count == 0:
        return x
    share = Beta(how.mix_alpha, how.mix_alpha).sample((count, 1, 1, 1))
    others = x[torch.randperm(len(x))[:count]]
    return torch.cat([share * x[:count] + (1 - share) * others, x[count:]])


def optimise(network: nn.Module, losses: Iterator[Tensor], steps: int, lr: float, progress: bool = False) -> None:
    """One step of AdamW for every loss, the learning rate falling to 0 by a cosine; zeros stay zeros.

    Args:
        network: whose parameters are trained.
        losses: each computed when it is asked for.
        steps: their number.
        lr: peak learning rate.
        progress: show a progress bar.

    Raises:
        UserError: a loss that is not finite.
    """
    trained = list(network.parameters())
    alive = [value.detach() != 0 for value in trained]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    bar = tqdm(losses, desc="distil", total=steps, unit="step", disable=not progress, dynamic_ncols=True)
    for loss in bar:
        need(bool(loss.isfinite()), "fine-tuning diverged: the loss is not finite; lower `lr`.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for value, on in zip(trained, alive, strict=True):
            if value.grad is not None:
                value.grad *= on  # Adam's step is 0 where the gradient always was
        optimizer.step()
        scheduler.step()
