"""Processes that work for a script and do not outlive it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``count`` fresh processes. Ctrl-C or an error in the block terminates them at once.

    They also end when the script is killed.
    """
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_follow) as pool:
        try:
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()  # otherwise the pool would let them finish first
            raise


def _follow() -> None:
    """Ignores Ctrl-C, which the script handles for the whole group; ends when the script ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a thread cannot end its process more gently; files are written atomically
