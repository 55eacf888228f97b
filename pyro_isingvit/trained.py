"""What training gives: a run that can be saved, evaluated, asked for predictions, pruned and shown on a page."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyro_isingvit.core.checkpoint import fingerprint, load_checkpoint, save_checkpoint, write_atomically, write_text
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.given import Labelled, labelled, own_validation, pixels
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.evaluation import Evaluation, evaluate, write_evaluation
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.validation import Validation
from pyro_isingvit.pruning.choose import Form, Weighting, compact
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.runs.folder import (
    CHECKPOINT,
    CONFIG,
    FILES,
    HISTORY,
    METRICS,
    POSTERIOR,
    clear_report,
    holds_run,
    is_evaluated,
    is_shared,
    need_folder,
    need_room,
    to_lines,
)
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.predict import CHUNK, draw_predictive, need_numbers
from pyro_isingvit.runs.run import Run, blank_run
from pyro_isingvit.runs.validation import validation_of
from pyro_isingvit.shareable import Shareable
from pyro_isingvit.sharing.folder import staged

log = logging.getLogger(__name__)


class TrainedRun(Shareable):
    """A trained network: what ``fit`` and ``load_run`` return.

    It adds ``save``, ``save_pretrained``, ``push_to_hub``, ``evaluate``, ``predict``, ``prune`` and ``report`` to what
    ``Run`` has, such as ``model``, ``guide`` and ``history``.

    Attributes:
        val: validation images, which ``evaluate`` and ``prune`` use; None where the run does not know them, as after
            ``load_run``.
        evaluation: what ``evaluate`` found last; None before.
    """

    val: Split | None
    evaluation: Evaluation | None
    _training: dict[str, Any] | None  # what a checkpoint holds besides the network; None: read it from the folder
    _kept: Evaluation | None  # the evaluation that the folder holds
    _seen: tuple[int, bytes]  # the checkpoint of the folder, as it was when it held this run

    @classmethod
    def of(cls, run: Run, training: dict[str, Any] | None = None, val: Split | None = None) -> "TrainedRun":
        """A run as a ``TrainedRun``; both share network, history and settings.

        Args:
            run: trained.
            training: what a checkpoint holds besides the network; None: it is read from the run's folder when needed.
            val: validation images.
        """
        trained = cls.__new__(cls)
        vars(trained).update(vars(run))
        trained._training, trained.val = training, val
        trained.evaluation = trained._kept = None
        trained._seen = trained._found()
        return trained

    def __repr__(self) -> str:
        """Method, data and folder."""
        kept = f"in {self.folder}" if self.folder else "in memory"
        return f"<TrainedRun of {self.config.method} on {self.info.dataset}, {len(self.info.classes)} classes, {kept}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is built from the settings and takes the state: modules hold functions that cannot be pickled."""
        state = {**self._rest(), **self.state()}
        return _rebuilt, (self.config, state, self.folder, self.val, self.evaluation, self._kept, self._seen)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Saves the run to a folder that ``load_run`` and every script can open.

        Writes config.json, checkpoint.pt and the one before it, metrics.jsonl, and, once the run is evaluated,
        metrics.json and posterior.nc; each file atomically. A run that lived in memory alone has this folder from
        then on.

        Training on images that were given as arrays cannot be resumed from the folder alone, which does not hold them.

        Args:
            folder: made if it is not there.
            overwrite: replace the run that the folder holds; other files in it are left alone.

        Returns:
            the folder.

        Raises:
            UserError: the folder holds a run or other files of these names, cannot be written to, or is a file.

        Examples:
            >>> import tempfile
            >>> from pyro_isingvit import ViTConfig, fit, load_data, load_run
            >>> data = load_data("digits", train_size=100)
            >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
            >>> with tempfile.TemporaryDirectory() as place:
            ...     folder = run.save(f"{place}/first")
            ...     print(sorted(path.name for path in folder.iterdir()))
            ...     again = load_run(folder)
            ['checkpoint.previous.pt', 'checkpoint.pt', 'config.json', 'metrics.jsonl']
            >>> bool((again.predict(data.test.images, 5).mean == run.predict(data.test.images, 5).mean).all())
            True
        """
        folder = Path(folder)
        need_room(folder)
        if self.method.posterior is not None and (own_kind := type(self.model)) is not IsingViT:
            log.warning("the settings of %s are saved, not its code: load_run gives an IsingViT", own_kind.__name__)
        self.config.check_kept()
        own, held = self._has_folder(folder), holds_run(folder)
        need(own or overwrite or not held, f"{folder} holds a run; name another `folder` or pass `overwrite=True`.")
        if not own or overwrite:
            state = {**self._rest(), **self.state()}
            with staged(folder, () if own else FILES) as new:
                write_text(new / CONFIG, self.config.to_json())
                for _ in range(2):  # checkpoint.previous.pt holds the same state: either will do
                    save_checkpoint(new / CHECKPOINT, state)
                write_text(new / HISTORY, to_lines(self.history))
            if held and not own:
                clear_report(folder)
        if self.folder is None or self.folder.resolve() == folder.resolve():
            self.folder, self._seen = self.folder or folder.absolute(), fingerprint(folder / CHECKPOINT)
        self._save_evaluation(folder, own, overwrite)
        return folder

    def _save_evaluation(self, folder: Path, own: bool, overwrite: bool) -> None:
        if self.evaluation is None:
            if not own and self.folder is not None and self._has_folder(self.folder) and is_evaluated(self.folder):
                for name in (POSTERIOR, METRICS):
                    write_atomically(folder / name, partial(shutil.copyfile, self.folder / name))
            return
        if own and self._kept is self.evaluation:
            return
        told = f"{folder} holds another evaluation; name another `folder` or pass `overwrite=True`."
        need(overwrite or not is_evaluated(folder), told)
        write_evaluation(self, self.evaluation, folder)
        if self._has_folder(folder):
            self._kept = self.evaluation

    def _has_folder(self, folder: Path) -> bool:
        """Whether a folder is the run's own and still holds it."""
        own = self.folder is not None and self.folder.resolve() == folder.resolve()
        return own and holds_run(folder) and self._seen == self._found()

    def _found(self) -> tuple[int, bytes]:
        """The checkpoint that the run's folder has now."""
        return (0, b"") if self.folder is None else fingerprint(self.folder / CHECKPOINT)

    def _need_own_folder(self) -> None:
        told = f"{self.folder} is not as it was when the run was loaded from it; load the run again."
        need(self._seen == self._found(), told)

    def _rest(self) -> dict[str, Any]:
        """What a checkpoint holds besides the network."""
        if self._training is not None:
            return self._training
        assert self.folder is not None  # a run without a folder was trained in this process
        self._need_own_folder()
        return load_checkpoint(self.folder / CHECKPOINT)

    def evaluate(
        self,
        data: Labelled,
        *,
        val: Labelled | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Judges the run by labelled images, which it must not have been trained on.

        ``run.evaluation`` keeps the draws for ``save`` and ``report``; nothing is written.

        Args:
            data: a part of a data set such as ``data.test``, (images, labels) as ``predict`` and
                ``ImageData.from_arrays`` take them, or an ``ImageData``, of which the test part counts.
            val: validation images, for the metrics ``*_calibrated`` and ``*_rel_u``; None: those of training, or where
                the run does not know them any more, those of an ``ImageData`` that is divided as in training.
            num_samples: S, draws; None: ``samples`` of the run's settings.
            seed: of the draws; None: the run's.
            progress: show a progress bar.

        Returns:
            what metrics.json holds: accuracy, nll (nats per image), brier, ece, retention_mean and many more; the
            page of ``report`` explains each.

        Raises:
            UserError: no images or labels, or some that do not fit the run.

        Examples:
            >>> from pyro_isingvit import ViTConfig, fit, load_data
            >>> data = load_data("digits", train_size=400)
            >>> run = fit(ViTConfig(patch_size=4, width=32, heads=4, depth=1), data, epochs=20, progress=False)
            >>> metrics = run.evaluate(data.test, num_samples=10)
            >>> metrics["accuracy"] > 0.8, metrics["test_size"]
            (True, 360)
        """
        if isinstance(data, ImageData) and val is None and self.val is None:
            val = own_validation(data, self.info, self.config)
        training = self._rest()
        self.evaluation = evaluate(
            self, labelled(data, self.info, "data"), self.val if val is None else labelled(val, self.info, "val"),
            train_size=training["num_data"], train_seconds=training.get("seconds", 0.0),
            num_samples=num_samples, seed=seed, progress=progress,
        )  # fmt: skip
        return self.evaluation.metrics

    def predict(
        self, images: Any, num_samples: int = 100, *, seed: int = 0, chunk: int = CHUNK, progress: bool = False
    ) -> PredictiveDraws:
        """Class probabilities of images under networks drawn from the posterior.

        Args:
            images: (N, channels, height, width), (N, height, width, channels) or (N, height, width) of the training
                images' size and type; where that is uint8, floats in [0, 1] too.
            num_samples: S, at most as many as the method has networks (1, or the members of an ensemble).
            seed: of the draws; the global random state is left as it was.
            chunk: at most this many (draw, image) pairs pass through the network at a time.
            progress: show a progress bar.

        Returns:
            draws (S, N, C), with ``mean``, ``interval()``, ``entropy`` and ``mutual_information``, both in nats.

        Raises:
            UserError: images that do not fit the run or are predicted by no numbers, or a count below 1.

        Examples:
            >>> from pyro_isingvit import ViTConfig, fit, load_data
            >>> data = load_data("digits", train_size=100)
            >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
            >>> draws = run.predict(data.test.images[:3], num_samples=20)
            >>> draws.probs.shape, draws.mean.shape, draws.mutual_information.shape
            (torch.Size([20, 3, 10]), torch.Size([3, 10]), torch.Size([3]))
        """
        read = pixels(images, self.info)
        return need_numbers(draw_predictive(self, read, num_samples, chunk, seed, progress), read)

    def validation(self) -> Validation:
        """What the run predicts for its validation images: what ``conformal_sets`` and ``acceptance`` learn from.

        Images that are compared with them are predicted with the same networks, so with its ``samples`` and ``seed``.

        Returns:
            probabilities (n, C), labels (n,), ``samples`` and ``seed``: of the last evaluation, of the run's folder, or
            drawn anew.

        Raises:
            UserError: there is no validation part, or the run does not know it any more, as after ``load_run`` of a run
                that was not evaluated on data that can be loaded by name.

        Examples:
            >>> from pyro_isingvit import ViTConfig, conformal_sets, fit, load_data
            >>> data = load_data("digits", train_size=400)
            >>> run = fit(ViTConfig(patch_size=4, width=16, heads=2, depth=1), data, epochs=5, progress=False)
            >>> val = run.validation()
            >>> draws = run.predict(data.test.images, val.samples, seed=val.seed)
            >>> sets = conformal_sets(draws, val.probs, val.labels, coverage=0.8)
            >>> sets.shape, bool((sets.sum(1) >= 1).all())
            (torch.Size([360, 10]), True)
        """
        if self.evaluation is not None and self.evaluation.validation is not None:
            return self.evaluation.validation
        if self.val is None:
            self._need_own_folder()
        return validation_of(self, self.val)

    def prune(
        self,
        *,
        threshold: float | None = None,
        keep: float | None = None,
        macs: float | None = None,
        form: Form = "mean",
        weighting: Weighting = "auto",
        val: Labelled | None = None,
        merge: Any = None,
    ) -> CompactViT:
        """Cuts the run down to a smaller, ordinary network, as ``compact`` does.

        Args:
            threshold: keep masks with a retention above it, in (0, 1); 0.5 unless ``keep`` or ``macs`` is given.
            keep: keep this share of the masked weights instead.
            macs: keep as much as this share of the dense network's multiply-accumulates allows instead.
            form: ``mean``, one deterministic network, or ``bayes``, which can be sampled.
            weighting: of the form ``mean``: ``slab``, ``mean``, or ``auto``: whichever has the lower NLL on ``val``.
            val: validation images, on which the temperature is fitted anew; None: those of training, while the run
                knows them.
            merge: of the form ``mean``: training images, as ``predict`` takes them, on which what is left is refitted
                to what the dropped units wrote; None: they are only dropped.

        Returns:
            the network in evaluation mode, on the CPU; ``save_pretrained`` writes it.

        Raises:
            UserError: a method without masks, values out of their range, or nothing left.

        Examples:
            >>> from pyro_isingvit import ViTConfig, fit, load_data
            >>> data = load_data("digits", train_size=200)
            >>> vit = ViTConfig(patch_size=4, width=16, heads=4, depth=1)
            >>> run = fit(vit, data, epochs=4, granularity="unit", progress=False)
            >>> small = run.prune(keep=0.5)
            >>> small(small.normalise(data.test.images[:2])).shape
            torch.Size([2, 10])
        """
        part = self.val if val is None else val
        with torch.random.fork_rng(devices=[]):
            return compact(
                self, form, threshold=threshold, keep=keep, macs=macs, weighting=weighting, val=part, merge=merge
            )

    def report(
        self, folder: str | Path | None = None, data: Labelled | None = None, *, overwrite: bool = False
    ) -> Path:
        """Writes a page of metrics, calibration, uncertainty and masks that needs no other file.

        The page belongs to a run's folder: the run is saved there with its evaluation, as ``save`` does, and the page
        and its figures go to ``report/`` in it.

        Args:
            folder: of the run; None: its own.
            data: labelled images to evaluate it on first; None: its last evaluation counts.
            overwrite: replace another run or another evaluation that the folder holds.

        Returns:
            ``report/index.html`` in the folder; of its own, as seen from the working directory where it lies below.

        Raises:
            UserError: the run is not evaluated, or has no folder, or the folder holds something else.

        Examples:
            >>> import tempfile
            >>> from pyro_isingvit import ViTConfig, fit, load_data
            >>> data = load_data("digits", train_size=100)
            >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
            >>> metrics = run.evaluate(data.test, num_samples=5)
            >>> with tempfile.TemporaryDirectory() as place:
            ...     page = run.report(f"{place}/first")
            ...     print(page.name, page.stat().st_size > 100_000)
            index.html True
        """
        target = self.folder if folder is None else Path(folder)
        if target is None:
            raise UserError("this run has no folder yet; name the `folder` of the report.")
        need_folder(target)
        if data is not None:
            self.evaluate(data)
        known = self.evaluation is not None or (self.folder is not None and is_evaluated(self.folder))
        need(known, "the report shows an evaluation: call `run.evaluate(data.test)` first, or pass `data`.")
        self.save(target, overwrite=overwrite)
        from pyro_isingvit.report.run_report import write_report

        page, here = write_report(target), Path.cwd()
        return page.relative_to(here) if folder is None and page.is_relative_to(here) else page


def _rebuilt(
    config: RunConfig,
    state: dict[str, Any],
    folder: Path | None,
    val: Split | None,
    evaluation: Evaluation | None,
    kept: Evaluation | None,
    seen: tuple[int, bytes] | None = None,
) -> TrainedRun:
    run = blank_run(config, DataInfo.from_dict(state["info"]), state["num_data"], folder)
    run.load_state(state)
    trained = TrainedRun.of(run, {name: value for name, value in state.items() if name not in run.state()}, val)
    trained.evaluation, trained._kept = evaluation, kept
    if seen is not None:  # pickles of version 0.13 lack it
        trained._seen = seen
    return trained


def load_run(folder: str | Path, device: str = "cpu") -> TrainedRun:
    """Opens a run's folder.

    Args:
        folder: what ``TrainedRun.save``, ``save_pretrained`` or a training script wrote.
        device: where to put it, such as "cpu" or "cuda".

    Returns:
        the run with its settings, weights, masks and history.

    Raises:
        UserError: the folder is missing, cut short, damaged or of another version.

    Examples:
        >>> import tempfile
        >>> from pyro_isingvit import ViTConfig, fit, load_data, load_run
        >>> data = load_data("digits", train_size=100)
        >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     again = load_run(run.save(f"{place}/first"))
        >>> again.config == run.config, again.history == run.history
        (True, True)
    """
    folder = Path(folder).absolute()  # a script may go to another folder
    if is_shared(folder):
        return TrainedRun.from_pretrained(folder, device=device)
    seen = fingerprint(folder / CHECKPOINT)  # before it is read: whatever is written there later is another run's
    run = TrainedRun.of(open_run(folder, device))
    run._seen = seen
    return run
