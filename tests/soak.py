"""Train, kill, resume, interrupt, predict and prune, over and over in one process; memory and open files are watched.

python tests/soak.py --minutes 30 --out runs/soak.json

Each round trains a small network on digits in a child that is killed at a random moment, resumes it here, stops that
with Ctrl-C, resumes again to the end, predicts and prunes. After a warm-up of a quarter of the rounds, a
line is fitted to resident memory over rounds. It fails (exit code 1) where the line's growth over the watched rounds,
plus two standard errors of the fit, is above MOST, where files stay open, or where a run folder holds a stray file.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import numpy as np
from forks import lone_progress_bars

sys.path[:0] = [str(Path(__file__).parents[1])]
MOST = 64.0  # MiB of growth over all the watched rounds; the process holds some 900
FILES = {"config.json", "checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "metrics.json", "posterior.nc"}
TRAIN = ["--dataset", "digits", "--train-size", "200", "--depth", "1", "--width", "16", "--epochs", "8", "--samples",
         "4", "--device", "cpu", "--overwrite"]  # fmt: skip


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """Files and pipes that this process holds."""
    return len(os.listdir("/proc/self/fd"))


def killed(argv: list[str], most: float) -> None:
    """Trains in a child that is killed within ``most`` seconds."""
    from inference.train import main

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            main(argv)
        os._exit(0)
    time.sleep(random.uniform(0.2 * most, most))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def interrupted(argv: list[str], seconds: float) -> None:
    """Trains here until a timer presses Ctrl-C, or to the end."""
    from inference.train import main

    def press(_: int, __: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        main(argv)
    except SystemExit as leave:
        assert leave.code == 130, leave.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def round_trip(folder: Path, seed: int) -> None:
    """One round; what is left must be a whole run, its predictions and its compact network."""
    from inference.predict import main as predict
    from inference.prune import main as prune
    from inference.train import main as train
    from pyro_isingvit.runs.folder import CHECKPOINT

    run = folder / "run"
    argv = [*TRAIN, "--seed", str(seed), "--out", str(run)]
    killed(argv, 2.0)
    resume = ["--resume", str(run)]
    interrupted(resume if (run / CHECKPOINT).exists() else argv, random.uniform(0.1, 1.5))
    train(resume if (run / CHECKPOINT).exists() else argv)
    found = {path.name for path in run.iterdir()}
    assert found == FILES, found ^ FILES
    out = ["--run", str(run), "--overwrite"]
    predict([*out, "--input", "digits", "--samples", "8", "--out", str(folder / "p.nc"), "--device", "cpu"])
    prune([*out, "--out", str(folder / "small"), "--keep", "0.3", "--repeats", "2", "--no-plot"])


def growth(values: list[float]) -> tuple[float, float]:
    """Growth of a fitted line from the first value to the last, and its standard error."""
    rounds = np.arange(len(values), dtype=float)
    if len(values) < 4:
        return 0.0, float("inf")
    (slope, _), covariance = np.polyfit(rounds, values, 1, cov=True)
    span = float(rounds[-1])
    return float(slope) * span, float(np.sqrt(covariance[0, 0])) * span


def soak(minutes: float) -> dict[str, object]:
    """Rounds for so many minutes; figures of memory and open files."""
    lone_progress_bars()
    random.seed(0)
    folder, memory, files = Path(tempfile.mkdtemp(prefix="soak-")), [], []
    end, start = time.monotonic() + 60 * minutes, time.monotonic()
    try:
        while time.monotonic() < end:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                round_trip(folder, seed=len(memory))
            memory.append(resident())
            files.append(open_files())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    warm = len(memory) // 4
    grown, error = growth(memory[warm:])
    stays = max(files[warm:]) <= min(files[warm:]) and files[-1] <= files[0]
    return {
        "minutes": (time.monotonic() - start) / 60, "rounds": len(memory), "warm_up_rounds": warm,
        "memory_mib": [round(value, 1) for value in memory], "open_files": files,
        "median_memory_mib": statistics.median(memory[warm:]), "growth_mib": grown, "growth_error_mib": error,
        "bound_mib": MOST, "memory_ok": grown + 2 * error <= MOST, "files_ok": stays,
    }  # fmt: skip


def main() -> None:
    """Soaks, writes the figures, says whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak.json"))
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it
    figures = soak(arguments.minutes)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(
        f"{figures['rounds']} rounds in {figures['minutes']:.1f} minutes; resident memory "
        f"{figures['median_memory_mib']:.0f} MiB, growth {figures['growth_mib']:+.1f} "
        f"(standard error {figures['growth_error_mib']:.1f}, bound {MOST:.0f}) MiB; open files "
        f"{min(figures['open_files'])} to {max(figures['open_files'])}: {arguments.out}"  # type: ignore[call-overload]
    )
    raise SystemExit(0 if figures["memory_ok"] and figures["files_ok"] else 1)


if __name__ == "__main__":
    main()
