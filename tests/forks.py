"""Scripts run in forks of the tests' process, which imports torch and the rest once; or in new processes."""

import gc
import importlib
import logging
import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "error::UserWarning"}
PATIENCE_S = 300.0
# What a fork would otherwise import again, each time.
HEAVY = ("torch", "pyro", "torchvision.transforms.v2", "lightning_fabric", "torchmetrics", "sklearn.datasets",
         "scipy.stats", "pandas", "xarray", "netCDF4", "arviz", "matplotlib.pyplot", "PIL.Image", "rich.table",
         "jinja2")  # fmt: skip


def lone_progress_bars() -> None:
    """Progress bars of this process no longer share a lock with its forks.

    tqdm's own lock is shared: a fork killed while it holds it never gives it back, and from then on every bar of
    this process and of its forks waits for ever. Its monitor is a thread, which does not live through a fork.
    """
    for kind in tqdm.__mro__:
        if hasattr(kind, "set_lock"):
            kind.set_lock(threading.RLock())
            kind.monitor_interval = 0


lone_progress_bars()


@cache
def import_everything() -> None:
    """The library, the figures and what they stand on, once for all forks of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages' imports
        for name in HEAVY:
            importlib.import_module(name)
        for package in ("pyro_isingvit", "analysis"):
            found = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
            for module in found:
                importlib.import_module(module.name)
    gc.freeze()  # the collector of a fork need not look at all that again


def fork(action: Callable[[], object], out: int, err: int) -> int:
    """Runs ``action`` in a child that prints to two file descriptors and exits as a script would.

    Returns:
        The child's process id.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # xdist has a thread, which only reads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        _become_a_script(out, err)
        action()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_a_script(out: int, err: int) -> None:
    """Undoes what pytest did to this process: streams, handlers of signals and logs, filters of warnings."""
    import torch

    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    lone_progress_bars()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.simplefilter("error", UserWarning)
    context = multiprocessing.get_context("fork")  # a script's own workers would import everything again
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]


def exit_code(child: int, patience_s: float = PATIENCE_S) -> int:
    """Waits for a fork; negative: the signal that ended it.

    Raises:
        TimeoutError: It took longer than ``patience_s`` and was killed.
    """
    limit = time.monotonic() + patience_s
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a fork took longer than {patience_s:.0f} s")


class Started:
    """What was begun in a fork, and goes on beside the test.

    Args:
        action: what it does.
        words: the command line that it stands for.
        environment: variables to add; with any, the scripts' own modules are imported anew, as they look at some.
    """

    def __init__(self, action: Callable[[], object], words: list[str], **environment: object) -> None:
        import_everything()
        self.words, self.out, self.err = words, tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115

        def act() -> None:
            os.chdir(ROOT)
            os.environ.update(ENVIRONMENT | {name: str(value) for name, value in environment.items()})
            sys.argv = words
            for name in [name for name in sys.modules if name.startswith("inference.") and environment]:
                del sys.modules[name]
            action()

        self.child = fork(act, self.out.fileno(), self.err.fileno())

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What came of it."""
        with self.out, self.err:
            code, texts = exit_code(self.child), []
            for stream in (self.out, self.err):
                stream.seek(0)
                texts.append(stream.read().decode())
        return subprocess.CompletedProcess(self.words, code, *texts)


def start(module: str, *arguments: object, **environment: object) -> Started:
    """``python -m module arguments`` in the root of the repository, without the imports."""
    argv = [*map(str, arguments)]
    return Started(lambda: importlib.import_module(module).main(argv), [module, *argv], **environment)


def can_fork() -> bool:
    """Whether a fork can train: CUDA and its threads do not live through it."""
    import torch

    return hasattr(os, "fork") and not torch.cuda.is_available()


def script(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What comes of ``python -m module arguments``; in a fork where that can be."""
    return start(module, *arguments).wait() if can_fork() else new_process(module, *arguments)


def ranks(count: int, module: str, *arguments: object) -> list[Started]:
    """Processes that train together, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
    return [start(module, *arguments, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(count)]


def new_process(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, env={**os.environ, **ENVIRONMENT},
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
