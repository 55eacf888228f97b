"""Branches ranked by transfer entropy, and networks without them."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import INFO, make_split, network

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.branches import (
    Branch,
    branches,
    feature_entropy,
    rank_branches,
    skipping,
    without_branches,
)
from pyro_isingvit.pruning.cost import macs
from pyro_isingvit.pruning.network import CompactViT

SHAPE = ViTConfig(patch_size=2, width=8, heads=2, depth=4, mlp_ratio=2)
BOTH: list[Branch] = ["attention", "mlp"]


def images(count: int = 60) -> Images:
    return as_images(make_split(count, torch.Generator().manual_seed(1)).images)


def model(seed: int = 0, config: ViTConfig = SHAPE) -> CompactViT:
    return assemble(*_network(seed, config))


def _network(seed: int, config: ViTConfig) -> tuple:
    vit, weights = network(config, INFO, seed)
    return vit, INFO, weights


def silent(found: CompactViT, branch: Branch, block: int) -> None:
    """A branch that adds nothing to the stream."""
    last = found.blocks[block].attention.out if branch == "attention" else found.blocks[block].fc2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)


@pytest.mark.parametrize("branch", BOTH)
@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("seed", range(3))
def test_an_identity_ranks_first(branch: Branch, block: int, seed: int) -> None:
    found = model(seed)
    silent(found, branch, block)
    order = rank_branches(found, images(), branch)
    assert order[0].block == block and order[0].transfer == 0.0
    assert sorted(removal.block for removal in order) == [0, 1, 2, 3]
    assert all(abs(removal.transfer) > 0 for removal in order[1:])


@pytest.mark.parametrize("config", [SHAPE, ViTConfig(2, 8, 2, 3, 2, "cls", "mlp")])
def test_the_entropy_by_hand(config: ViTConfig) -> None:
    """sum_d log sigma_d of what the classifier reads, over images, whatever their batches."""
    vit, _, weights = _network(2, config)
    found, x = assemble(vit, INFO, weights), INFO.normalise(images()[torch.arange(60)])
    stream = found.embed(x)
    for block in found.blocks:
        stream = block(stream)
    stream = found.norm(stream)
    f = (stream[:, 0] if config.pool == "cls" else stream.mean(1)).detach()
    variance = (f - f.mean(0)).square().mean(0)
    by_hand = 0.5 * float(variance.log().sum())
    assert feature_entropy(found, [x]) == pytest.approx(by_hand, abs=1e-4)
    assert feature_entropy(found, [x[:7], x[7:]]) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("branch", BOTH)
def test_the_order_is_greedy_and_adds_up(branch: Branch) -> None:
    """Every step makes the change by all that are gone the smallest it can be; TE is that of the cut network."""
    found = model(5)
    x = [found.normalise(images()[torch.arange(60)])]
    whole, gone = feature_entropy(found, x), []
    for removal in rank_branches(found, images(), branch, 3):
        change = {}
        for block in {0, 1, 2, 3} - {*gone}:
            change[block] = whole - feature_entropy(without_branches(found, branch, [*gone, block]), x)
        assert removal.block == min(change, key=lambda block: abs(change[block]))
        assert removal.transfer == pytest.approx(change[removal.block], abs=1e-4)
        gone.append(removal.block)


@pytest.mark.parametrize("branch", BOTH)
@pytest.mark.parametrize("gone", [[0], [3], [0, 1, 2, 3]])
def test_the_cut_network_is_the_whole_one_that_skips(branch: Branch, gone: list[int], tmp_path: Path) -> None:
    found = model(1)
    before = copy.deepcopy(found.state_dict())
    small, x = without_branches(found, branch, gone), found.normalise(images()[torch.arange(9)])
    with skipping(found, branch, gone):
        assert torch.equal(small(x), found(x))
    assert branches(found, branch) == [0, 1, 2, 3] and branches(small, branch) == sorted({0, 1, 2, 3} - {*gone})
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in before.items())
    assert macs(small, (1, 4, 4)) < macs(found, (1, 4, 4)) and not torch.equal(small(x), found(x))
    small.save_pretrained(tmp_path)
    assert torch.equal(CompactViT.from_pretrained(tmp_path)(x), small(x))
    # by hand: the branch's last matrix and bias at 0
    by_hand = model(1)
    for block in gone:
        silent(by_hand, branch, block)
    torch.testing.assert_close(by_hand(x), small(x))


def test_what_cannot_be() -> None:
    found = model()
    with pytest.raises(UserError, match="5 attention branches of 4"):
        rank_branches(found, images(), count=5)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        rank_branches(found, images(1))
    with pytest.raises(UserError, match="no mlp branch in block"):
        without_branches(without_branches(found, "mlp", [2]), "mlp", [1, 2])
    assert rank_branches(found, images(), count=0) == []
