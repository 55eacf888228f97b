"""Processes that work for a script and do not outlive it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
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


def threads_of(jobs: int) -> int:
    """Threads for each of ``jobs`` processes: an even share of the cores, and no more than OMP_NUM_THREADS asks for.

    More threads than cores wait for one another: a training takes several times as long.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # of this process; not on every system
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(asked) if asked.isdecimal() and int(asked) else cores))


def outcomes[T, R](work: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[tuple[T, R | Exception]]:
    """Does ``work`` on every item in ``jobs`` processes; yields each item with its result or its error.

    A process that dies (out of memory, killed) fails the items that it may have had. New processes do the rest.

    Args:
        work: can be pickled, as items and results can.
        items: begun in this order; yielded as they are done.
        jobs: processes.
    """
    left = [*range(len(items))]
    while left:
        done: list[int] = []
        with workers(min(jobs, len(left))) as pool:
            futures = {pool.submit(work, items[number]): number for number in left}
            for future in as_completed(futures):
                number, error = futures[future], future.exception()
                if isinstance(error, BrokenProcessPool):
                    # The cause may be another item: those nearest the front of the queue were being done.
                    for lost in [number for number in left if number not in done][:jobs]:
                        done.append(lost)
                        yield items[lost], RuntimeError("the process died (out of memory, or killed)")
                    break
                done.append(number)
                yield items[number], error if isinstance(error, Exception) else future.result()
        left = [number for number in left if number not in done]


def _follow() -> None:
    """Ignores Ctrl-C, which the script handles for the whole group; ends when the script ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a thread cannot end its process more gently; files are written atomically
