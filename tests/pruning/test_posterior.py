"""A draw of one matrix of the form ``bayes``: its moments, and what goes with a row that is off."""

import pytest
import torch

from pyro_isingvit.pruning.posterior import Posterior
from pyro_isingvit.pruning.shapes import PosteriorShape

DRAWS = 4000


@pytest.mark.parametrize("by_row", [True, False])
def test_moments_of_a_draw(by_row: bool) -> None:
    """w = xi (m + s e), and of the bias pi (f + g e) - f by row, f + g e otherwise."""
    torch.manual_seed(0)
    index = torch.tensor([[0], [1], [2]] if by_row else [[0, 1]], dtype=torch.int32)
    part = Posterior(PosteriorShape("s", (), tuple(index.shape), by_row), 3)
    part.index.copy_(index)
    part.scale.fill_(0.2)
    part.fold_loc.copy_(torch.tensor([1.0, -2.0, 0.5]))
    part.fold_scale.fill_(0.3)
    pi, loc = torch.tensor([0.9, 0.5, 1.0]), torch.randn(3, 2)
    drawn = [part.draw(loc, {"s": torch.bernoulli(pi)}, None) for _ in range(DRAWS)]
    weights, more = (torch.stack(each) for each in zip(*drawn, strict=True))
    kept = pi[index.long()].expand(3, 2)
    error = 5 * (weights.std(0) / DRAWS**0.5 + 1e-3)
    assert ((weights.mean(0) - kept * loc).abs() < error).all()
    wanted = (kept[:, 0] - 1) * part.fold_loc if by_row else part.fold_loc
    assert ((more.mean(0) - wanted).abs() < 5 * more.std(0) / DRAWS**0.5).all()
    if by_row:
        off = (weights[:, 1] == 0).all(-1)
        assert off.any() and (more[off, 1] == 2.0).all()  # the bias loses what it has of the constants
