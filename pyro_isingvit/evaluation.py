"""The one look at the test part: its metrics, and metrics.json and posterior.nc of a run folder."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_isingvit.core.checkpoint import uninterrupted, write_json
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.data.split import UNLABELLED, Split
from pyro_isingvit.predictive.by_class import class_metrics
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature, temper
from pyro_isingvit.predictive.coverage import uncertainty_metrics
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.predictive.rel_u import misclassification_metrics
from pyro_isingvit.predictive.validation import Validation
from pyro_isingvit.pruning.deployed import deployment_cost
from pyro_isingvit.runs.folder import METRICS, POSTERIOR
from pyro_isingvit.runs.predict import draw_predictive, need_numbers
from pyro_isingvit.runs.run import Run


@dataclass(frozen=True)
class Evaluation:
    """What a run says about labelled images, and how good that is.

    Attributes:
        split: the images and their labels.
        draws: what the run predicts for them.
        metrics: as in metrics.json.
        seed: of the draws.
        validation: what the same networks say about the validation part; None: there is none.
    """

    split: Split
    draws: PredictiveDraws
    metrics: dict[str, Any]
    seed: int
    validation: Validation | None = None


@single_precision()
def evaluate(
    run: Run,
    split: Split,
    val: Split | None,
    *,
    train_size: int,
    train_seconds: float,
    num_samples: int | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Draws predictions for labelled images and judges them; nothing is written.

    Args:
        run: a trained run.
        split: the images to judge it by, with labels.
        val: validation images, for the metrics ``*_calibrated`` and ``*_rel_u``; None: there are none.
        train_size: N, the images that it was trained on.
        train_seconds: wall time of the training.
        num_samples: S, draws; None: ``TrainConfig.samples`` of the run.
        seed: of the draws; None: the run's.
        progress: show a progress bar.

    Raises:
        UserError: no images, images without labels, or images or labels that do not fit the run.
    """
    need(len(split) > 0, f"{run.info.dataset} has no such part: there are no images to evaluate on.")
    need(bool((split.labels != UNLABELLED).all()), "an evaluation needs a label for every image; use `predict`.")
    samples = run.config.train.samples if num_samples is None else num_samples
    seed = run.config.train.seed if seed is None else seed
    val = None if val is None or len(val) == 0 else val
    draws = draw_predictive(run, split.images, samples, seed=seed, progress=progress)
    need_numbers(draws, split.images)
    val_draws, val_labels, validation = None, None, None
    if val is not None:
        drawn = draw_predictive(run, val.images, max(samples, CALIBRATION_SAMPLES), seed=seed)
        val_draws, val_labels = PredictiveDraws(drawn.probs[:CALIBRATION_SAMPLES]), val.labels
        same = drawn.probs[: len(draws.probs)]  # the networks that the images of ``split`` were shown to
        validation = Validation(same.mean(0), val.labels.cpu(), len(same), seed)
    temperature = float(run.temperature)
    plain = temper(draws.probs, 1.0 / temperature)  # at T = 1
    has_own = run.config.train.calibrate and temperature != 1  # 1: training had no validation part
    fitted = temperature if has_own else _fit(val_draws, val_labels, run.moved_prior)
    at_one, calibrated = (
        classification_metrics(probs.mean(0), split.labels) for probs in (plain, temper(plain, fitted))
    )
    cost = deployment_cost(run.method)
    metrics: dict[str, Any] = {
        **classification_metrics(draws.mean, split.labels),
        **class_metrics(draws.mean, split.labels, run.info.classes),
        **uncertainty_metrics(draws, split.labels),
        **misclassification_metrics(draws, split.labels, val_draws, val_labels),
        **run.mask_summary(),
        "dropped_layers": len(run.dropped_layers()),
        "temperature": temperature,
        **{f"{name}_uncalibrated": at_one[name] for name in ("nll", "ece", "brier")},
        **{f"{name}_calibrated": calibrated[name] for name in ("nll", "ece", "brier")},  # T on the validation part
        "train_seconds": train_seconds,
        "samples": len(draws.probs),
        "seed": run.config.train.seed,
        "train_size": train_size,
        "val_size": 0 if val is None else len(val),
        "test_size": len(split),
        "dataset": run.info.dataset,
        "method": run.config.method,
        "preset": run.config.preset,
        "parameters": run.method.num_parameters(),
        **({"macs": None, "ms_per_image": None} if cost is None else asdict(cost)),
    }
    if run.has_masks:
        metrics |= {"kappa_mask": run.guide.kappa_mask, "kappa_weights": run.guide.kappa_weights}
    return Evaluation(split, draws, metrics, seed, validation)


@single_precision()
def write_evaluation(run: Run, evaluation: Evaluation, folder: Path, full: bool = False) -> None:
    """Writes posterior.nc, then metrics.json, each atomically; Ctrl-C waits for both, which belong together.

    Args:
        run: the run that was judged.
        evaluation: its draws and metrics.
        folder: the run's folder.
        full: keep every mask and weight draw in posterior.nc.

    Raises:
        UserError: the folder cannot be written to.
    """
    from pyro_isingvit.predictive.datatree import save_datatree
    from pyro_isingvit.runs.tree import run_to_datatree

    tree = run_to_datatree(
        run, evaluation.split, evaluation.draws, full=full, seed=evaluation.seed, validation=evaluation.validation
    )
    with uninterrupted():
        save_datatree(tree, folder / POSTERIOR)
        write_json(folder / METRICS, evaluation.metrics)


def _fit(val_draws: PredictiveDraws | None, labels: Tensor | None, prior: tuple[float, ...] | None) -> float:
    """The temperature that a method trained without one would get; 1 without a validation part."""
    return 1.0 if val_draws is None or labels is None else fit_temperature(val_draws.probs, labels, prior)
