"""Networks compute in single precision, whatever torch's default type is."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def single_precision() -> Iterator[None]:
    """float32 as torch's default type within a block or, as a decorator, a function; Pyro users often set float64.

    The type is that of all threads of the process; where it is float32 already, nothing is set.
    """
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
