"""The one look at the test part: metrics.json and posterior.nc of a finished run."""

from typing import Any

from torch import Tensor

from pyro_isingvit.core.checkpoint import write_json
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.processes import is_first, on_first
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, fit_temperature, temper
from pyro_isingvit.predictive.coverage import uncertainty_metrics
from pyro_isingvit.predictive.datatree import save_datatree
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.metrics import classification_metrics
from pyro_isingvit.predictive.rel_u import misclassification_metrics
from pyro_isingvit.runs.folder import METRICS, POSTERIOR
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.tree import run_to_datatree


def evaluate(
    run: Run, data: ImageData, train_seconds: float, full: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Draws predictions for the test part, writes posterior.nc and metrics.json, returns the metrics.

    Args:
        run: a trained run with a folder.
        data: the data that it was trained on.
        train_seconds: wall time of the training.
        full: keep every mask and weight draw in posterior.nc.
        progress: show a progress bar.

    Raises:
        UserError: the run has no folder, or the data have no test part.
    """
    if run.folder is None:
        raise UserError("this run lives in memory; evaluate needs one with a folder (train_run).")
    if len(data.test) == 0:
        raise UserError(f"{data.info.dataset} has no test part to evaluate on.")
    samples, seed = run.config.train.samples, run.config.train.seed
    draws = draw_predictive(run, data.test.images, samples, seed=seed, progress=progress and is_first())
    val_draws = draw_predictive(run, data.val.images, CALIBRATION_SAMPLES, seed=seed) if len(data.val) else None
    temperature = float(run.temperature)
    plain = temper(draws.probs, 1.0 / temperature)  # at T = 1
    fitted = temperature if run.config.train.calibrate else _fit(val_draws, data.val.labels)
    at_one, calibrated = (
        classification_metrics(probs.mean(0), data.test.labels) for probs in (plain, temper(plain, fitted))
    )
    metrics: dict[str, Any] = {
        **classification_metrics(draws.mean, data.test.labels),
        **uncertainty_metrics(draws, data.test.labels),
        **misclassification_metrics(draws, data.test.labels, val_draws, data.val.labels),
        **run.mask_summary(),
        "dropped_layers": len(run.dropped_layers()),
        "temperature": temperature,
        **{f"{name}_uncalibrated": at_one[name] for name in ("nll", "ece", "brier")},
        **{f"{name}_calibrated": calibrated[name] for name in ("nll", "ece", "brier")},  # T on the validation part
        "train_seconds": train_seconds,
        "samples": len(draws.probs),
        "seed": seed,
        "train_size": len(data.train),
        "val_size": len(data.val),
        "test_size": len(data.test),
        "dataset": data.info.dataset,
        "method": run.config.method,
        "preset": run.config.preset,
        "parameters": sum(p.numel() for p in run.network.parameters()),
    }
    if run.has_masks:
        metrics |= {"kappa_mask": run.guide.kappa_mask, "kappa_weights": run.guide.kappa_weights}
    folder = run.folder

    def write() -> None:
        save_datatree(run_to_datatree(run, data.test, draws, full=full, seed=seed), folder / POSTERIOR)
        write_json(folder / METRICS, metrics)

    on_first(write)
    return metrics


def _fit(val_draws: PredictiveDraws | None, labels: Tensor) -> float:
    """The temperature that a method trained without one would get; 1 without a validation part."""
    return 1.0 if val_draws is None else fit_temperature(val_draws.probs, labels)
