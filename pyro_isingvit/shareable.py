"""How a trained run is shared: as a folder or repository in the manner of the Hugging Face Hub, and back."""

from pathlib import Path
from typing import Any, Self

from pyro_isingvit.evaluation import Evaluation
from pyro_isingvit.runs.folder import is_evaluated
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.shared import FILES, open_shared
from pyro_isingvit.sharing.folder import temporary_folder
from pyro_isingvit.sharing.hub import check_repo, locate, upload


class Shareable(Run):
    """A run with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``."""

    evaluation: Evaluation | None

    @classmethod
    def of(cls, run: Run, training: dict[str, Any] | None = None) -> Self:
        """A run as this class."""
        raise NotImplementedError

    def _rest(self) -> dict[str, Any]:
        """What a checkpoint holds besides the network."""
        raise NotImplementedError

    def _has_folder(self, folder: Path) -> bool:
        """Whether a folder is the run's own and still holds it."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        license: str | None = None,
        intended_use: str | None = None,
        repo: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes what others need to predict with the run, with a model card (docs/sharing.md).

        config.json, model.safetensors, README.md and, once the run is evaluated, metrics.json and figures. Optimiser,
        history and images are left out, and so are folders of this machine: it cannot be resumed. The files appear
        together or not at all.

        Args:
            folder: made if it is not there; not the run's own.
            license: identifier for the card, such as "mit".
            intended_use: for the card, in your words.
            repo: "owner/name" for the card, where it will be found.
            overwrite: replace a shared run that the folder holds. A README.md that you have changed stays, if you took
                out its first comment.

        Returns:
            the folder.

        Raises:
            UserError: the folder holds something else, cannot be written to, or is a file; no such licence or name.

        Examples:
            >>> import tempfile
            >>> from pyro_isingvit import TrainedRun, ViTConfig, fit, load_data
            >>> data = load_data("digits", train_size=100)
            >>> run = fit(ViTConfig(patch_size=4, width=8, heads=2, depth=1), data, epochs=2, progress=False)
            >>> with tempfile.TemporaryDirectory() as place:
            ...     folder = run.save_pretrained(f"{place}/shared", license="mit")
            ...     print(sorted(path.name for path in folder.iterdir()))
            ...     again = TrainedRun.from_pretrained(folder)
            ['README.md', 'config.json', 'model.safetensors']
            >>> bool((again.predict(data.test.images, 5).mean == run.predict(data.test.images, 5).mean).all())
            True
        """
        from pyro_isingvit.report.run_report import read_metrics
        from pyro_isingvit.report.share import kept_predictions, share_run

        folder, evaluation, own = Path(folder), self.evaluation, self.folder
        metrics, probs, labels = None, None, None
        if evaluation is not None:
            metrics = evaluation.metrics
            probs, labels = evaluation.draws.mean.numpy(), evaluation.split.labels.cpu().numpy()
        elif own is not None and self._has_folder(own) and is_evaluated(own):
            metrics, (probs, labels) = read_metrics(own), kept_predictions(own)
        share_run(
            self, folder, num_data=self._rest()["num_data"], metrics=metrics, probs=probs, labels=labels,
            license=license, intended_use=intended_use, repo=None if repo is None else check_repo(repo),
            overwrite=overwrite,
        )  # fmt: skip
        return folder

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        intended_use: str | None = None,
    ) -> str:
        """Sends what ``save_pretrained`` writes to a repository of the Hugging Face Hub (extra ``hub``).

        Args:
            repo: "owner/name"; made if it is not there.
            private: of a new repository.
            token: of the Hub, with the right to write; None: the one that ``hf auth login`` keeps.
            commit_message: of the commit.
            license: identifier for the card.
            intended_use: for the card.

        Returns:
            the address of the commit.

        Raises:
            UserError: a wrong name, huggingface_hub is missing, or the Hub refuses.
        """
        check_repo(repo)
        with temporary_folder() as place:
            folder = self.save_pretrained(place / "run", license=license, intended_use=intended_use, repo=repo)
            return upload(folder, repo, FILES, private=private, token=token, commit_message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Opens what ``save_pretrained`` wrote or ``push_to_hub`` sent; no code in it runs.

        A folder wins over a repository of the same spelling; a ``Path`` is always a folder.

        Args:
            source: a folder, or "owner/name" of a repository (extra ``hub``).
            device: where to put it, such as "cpu" or "cuda".
            revision: branch, tag or commit of a repository.
            token: of the Hub, for private repositories.
            cache_dir: of huggingface_hub; None: its own.
            local_files_only: open no connection.

        Returns:
            the run; its history is empty, and it cannot be resumed.

        Raises:
            UserError: nothing there, or files that are damaged or do not fit each other.
        """
        folder = locate(source, FILES, revision=revision, token=token, cache_dir=cache_dir,
                        local_files_only=local_files_only)  # fmt: skip
        run = open_shared(folder, device)
        run.folder = None  # a copy in a cache is not a place to write to
        return cls.of(run, {"info": run.info.to_dict(), "num_data": run.method.num_data, "epoch": 0})
