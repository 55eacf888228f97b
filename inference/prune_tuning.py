"""What trains a pruned network further: on labels, or towards the predictions of posteriors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from pyro_isingvit.data.load import load_unlabelled
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.pruning.choose import calibrated
from pyro_isingvit.pruning.finetune import Distillation, distil, distil_any, finetune, finetune_any, log_shares
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import check_teachers

AFTER_CUTTING = 5  # epochs of peers that were not trained with masks, where ours needs none


@dataclass(frozen=True)
class Tuning:
    """The same training for the compact network and for its peers."""

    improved: Callable[[CompactViT], CompactViT]
    """Trains a compact network in place, and calibrates it."""
    peer: Callable[[nn.Module], None]
    """Trains another network of normalised images, in place."""


def make_tuning(
    run: Run,
    data: ImageData,
    epochs: int,
    distil_epochs: int,
    teachers: Sequence[Path],
    unlabelled: str | None,
    data_root: str | None,
) -> Tuning | None:
    """What the arguments ask for; None: nothing.

    Args:
        run: the run that is pruned.
        data: its data.
        epochs: on labels.
        distil_epochs: towards posteriors' mean predictions.
        teachers: folders of other runs that teach; none: the run itself.
        unlabelled: further images to teach on.
        data_root: folder of the torchvision data sets; None: the run's own.

    Raises:
        UserError: a teacher or images that cannot be read.
    """
    settings = run.config.train
    if distil_epochs:
        runs, source = [open_run(folder) for folder in teachers] or [run], run.config.data
        check_teachers(runs, run.info.classes, run.info.image_shape, run.info.scale, run.balanced)
        root, size = data_root or source.data_root, source.image_size
        more = None
        if unlabelled:
            more = load_unlabelled(unlabelled, data_root=root, image_size=size, source=source)
        how = Distillation(distil_epochs, batch_size=settings.batch_size, seed=settings.seed)
        taught = partial(distil, teachers=runs, train=data.train, unlabelled=more, how=how, progress=True)
        return Tuning(
            lambda model: calibrated(taught(model), data.val, run.moved_prior),
            lambda network: distil_any(network, network, run.info, runs, data.train, more, how, progress=True),
        )
    return on_labels(run, data, epochs) if epochs else None


def on_labels(run: Run, data: ImageData, epochs: int) -> Tuning:
    """Cross entropy on the training part, at a tenth of the run's rate."""
    settings = run.config.train
    rest = epochs, 0.1 * settings.lr, settings.batch_size, settings.seed
    shift = log_shares(data.train, run.info.num_classes) if run.balanced else 0.0

    def peer(network: nn.Module) -> None:
        def forward(images: Tensor) -> Tensor:
            return network(run.info.normalise(images)) + shift

        finetune_any(network, forward, data.train, *rest)

    return Tuning(
        lambda model: calibrated(finetune(model, data.train, *rest, run.balanced), data.val, run.moved_prior), peer
    )


def after_cutting(run: Run, data: ImageData) -> Tuning:
    """For peers where the compact network is not trained further."""
    return on_labels(run, data, AFTER_CUTTING)
