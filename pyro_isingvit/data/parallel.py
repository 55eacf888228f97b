"""Work on many files at once: threads, since decoding, hashing and reading all leave the interpreter's lock."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

MANY = 500  # items, from which a progress bar is shown
BLOCK = 64  # items of one task


def in_parallel[Item, Result](
    work: Callable[[Item], Result], items: Sequence[Item], what: str | None, done: int = 0, ahead: int = 0
) -> Iterator[Result]:
    """``work`` of every item, in order; only a few blocks are ahead of what has been taken.

    The work goes on in the background while nothing is taken.

    Args:
        work: called in threads.
        items: what is left to do.
        what: name of the progress bar; None: there is none.
        done: items that were done before, for the bar.
        ahead: as many items at least may be ahead.

    Raises:
        what ``work`` raises, for the first item where it does.
    """
    from PIL import Image
    from tqdm import tqdm

    threads = min(32, 2 * (os.cpu_count() or 1))
    blocks = (items[i : i + BLOCK] for i in range(0, len(items), BLOCK))
    waiting: deque[Future[list[Result]]] = deque()
    hidden, most = what is None or len(items) <= MANY, max(2 * threads, -(-ahead // BLOCK))
    bar = tqdm(total=done + len(items), initial=done, desc=what, disable=hidden, dynamic_ncols=True)
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings(), bar:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for block in blocks:
                waiting.append(pool.submit(lambda part: [work(item) for item in part], block))
                if len(waiting) > most:
                    yield from waiting.popleft().result()
                    bar.update(BLOCK)
            while waiting:
                results = waiting.popleft().result()
                yield from results
                bar.update(len(results))
        finally:
            pool.shutdown(cancel_futures=True)
