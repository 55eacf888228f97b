"""Going back to earlier random numbers."""

import torch

from pyro_isingvit.core.random_state import RandomState

CPU = torch.device("cpu")


def test_the_same_numbers_again() -> None:
    torch.randn(3)
    state = RandomState.now(CPU)
    first = torch.randn(5)
    assert not torch.equal(torch.randn(5), first)
    state.restore(CPU)
    assert torch.equal(torch.randn(5), first) and state.cuda is None
    state.restore(CPU)
    assert torch.equal(torch.randn(5), first)  # as often as one likes
