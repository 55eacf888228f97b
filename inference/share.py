"""Put a run or a compact network into a folder for others, with a model card, and send it to the Hugging Face Hub.

python -m inference.share --run runs/mine --out shared/mine --license mit
python -m inference.share --run shared/mine --repo owner/name --private
"""

from dataclasses import dataclass
from pathlib import Path

from inference.cli import print_table, run_script
from pyro_isingvit.core.errors import need


@dataclass(frozen=True)
class ShareArguments:
    """What is shared, and where."""

    run: Path
    """Folder of a trained run or of a compact network; or a folder that this script wrote, to send it as it is."""
    out: Path | None = None
    """Folder for others: settings, weights, metrics, figures and README.md, without a path of this machine."""
    repo: str | None = None
    """owner/name on the Hugging Face Hub, to which the folder is sent; made if it is not there (extra hub)."""
    private: bool = False
    """Make a new repository private."""
    commit_message: str | None = None
    """Of the commit on the Hub."""
    license: str | None = None
    """Identifier of a licence for the card, such as mit."""
    intended_use: str | None = None
    """What the network is meant for, for the card."""
    overwrite: bool = False
    """Replace what this script wrote to --out before."""


def share(arguments: ShareArguments) -> None:
    """Write a folder for others, with a model card, and send it to the Hugging Face Hub if asked to."""
    from pyro_isingvit.pruning import card
    from pyro_isingvit.pruning.shapes import CONFIG
    from pyro_isingvit.runs import shared
    from pyro_isingvit.runs.folder import is_shared
    from pyro_isingvit.sharing.card import check_license
    from pyro_isingvit.sharing.hub import check_repo, upload

    run, out, repo = arguments.run, arguments.out, arguments.repo
    need(repo is not None or not arguments.private, "`private` is for a repository; name it with `repo`.")
    if repo is not None:
        check_repo(repo)
    check_license(arguments.license)
    need(run.is_dir(), f"there is no folder {run}; name a run's or a compact network's.")
    is_compact = (run / CONFIG).is_file()
    files = card.FILES if is_compact else shared.FILES
    if out is None:
        need(repo is not None, "name the folder for others with `out`, or a repository with `repo`.")
        ready = is_shared(run) or (is_compact and _names_no_folder(run))
        need(ready, f"{run} is not for others yet: name a folder for that with `out`.")
        told = "the folder is sent as it is; `{}` belongs to `out`."
        for name in ("license", "intended_use"):
            need(getattr(arguments, name) is None, told.format(name))
    else:
        need(not out.exists() or out.is_dir(), f"{out} is a file; `out` takes a folder.")
        need(out.resolve() != run.resolve(), "`out` is the folder of `run`; name another.")
        (_write_compact if is_compact else _write_run)(arguments, out)
    folder = run if out is None else out
    found = {str(path.relative_to(folder)): f"{path.stat().st_size:,} bytes"
             for pattern in files for path in sorted(folder.glob(pattern))}  # fmt: skip
    print_table(f"{folder}", found)
    if repo is not None:
        private = True if arguments.private else None
        print(f"sent: {upload(folder, repo, files, private=private, commit_message=arguments.commit_message)}")
    else:
        print(f"card: {folder / shared.README}")


def _names_no_folder(compact: Path) -> bool:
    """Whether a compact network has its card, and metrics without the folder of its run."""
    from pyro_isingvit.report.run_report import read_metrics
    from pyro_isingvit.runs.folder import METRICS
    from pyro_isingvit.sharing.folder import README
    from pyro_isingvit.sharing.names import shared_metrics

    metrics = read_metrics(compact) if (compact / METRICS).is_file() else {}
    return (compact / README).is_file() and shared_metrics(metrics) == metrics


def _write_run(arguments: ShareArguments, out: Path) -> None:
    from pyro_isingvit.trained import load_run

    load_run(arguments.run).save_pretrained(
        out, license=arguments.license, intended_use=arguments.intended_use, repo=arguments.repo,
        overwrite=arguments.overwrite,
    )  # fmt: skip


def _write_compact(arguments: ShareArguments, out: Path) -> None:
    from pyro_isingvit.pruning.card import METRICS
    from pyro_isingvit.pruning.network import CompactViT
    from pyro_isingvit.pruning.shapes import CONFIG
    from pyro_isingvit.report.run_report import read_metrics
    from pyro_isingvit.runs.folder import holds_run

    need(not holds_run(out), f"{out} holds a run; name another `out`.")
    need(arguments.overwrite or not (out / CONFIG).exists(), f"{out} holds a compact network; name another `out` or "
         "add `overwrite`.")  # fmt: skip
    metrics = read_metrics(arguments.run) if (arguments.run / METRICS).is_file() else None
    CompactViT.from_pretrained(arguments.run).save_pretrained(
        out, metrics=metrics, license=arguments.license, intended_use=arguments.intended_use, repo=arguments.repo
    )


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(share, ShareArguments, argv)


if __name__ == "__main__":
    main()
