"""The description of who writes and reads what, against what the network computes."""

import pytest
import torch
from helpers import INFO, network

from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.nets.readers import Matrix, Readers, Space
from pyro_isingvit.nets.vit import ViT, Weights, plain

SHAPES = {
    "mean-linear": ViTConfig(patch_size=2, width=6, heads=2, depth=2, mlp_ratio=2),
    "cls-mlp": ViTConfig(patch_size=2, width=8, heads=4, depth=3, mlp_ratio=1, pool="cls", head="mlp"),
}


@pytest.fixture(params=SHAPES)
def made(request) -> tuple[ViT, Weights, torch.Tensor]:
    return *network(SHAPES[request.param], INFO, 0), torch.randn(3, INFO.channels, INFO.height, INFO.width)


def inputs(vit: ViT, weights: Weights, x: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """What every matrix is given, in the order of computation."""
    seen = {}

    def rule(kind, layer, x, weight, bias):
        seen[kind, layer] = x
        return plain(kind, layer, x, weight, bias)

    vit(weights, x, layer_rule=rule)
    return seen


def gradients(vit: ViT, weights: Weights, x: torch.Tensor) -> Weights:
    leaves = {kind: weight.clone().requires_grad_() for kind, weight in weights.items()}
    loss = vit(leaves, x).square().sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def without_columns(weights: Weights, matrices, columns) -> Weights:
    cut = {kind: weight.clone() for kind, weight in weights.items()}
    for matrix in matrices:
        cut[matrix.kind][matrix.layer][:, columns] = 0.0
    return cut


def test_matrices_stand_in_the_order_of_computation(made) -> None:
    vit, weights, x = made
    seen = inputs(vit, weights, x)
    assert [*seen] == [(matrix.kind, matrix.layer) for matrix in vit.readers.matrices]
    for matrix in vit.readers.matrices:
        assert seen[matrix.kind, matrix.layer].shape[-1] == matrix.reads.size
        assert weights[matrix.kind][matrix.layer].shape == matrix.shape
    assert {kind: tuple(weight.shape) for kind, weight in weights.items()} == vit.readers.shapes


def test_rows_do_nothing_without_their_readers(made) -> None:
    """A row's gradient is 0 where no column reads what it writes, and only there."""
    vit, weights, x = made
    for space in {m.writes for m in vit.readers.matrices if m.writes.name in ("attention", "mlp", "top")}:
        [writer], readers = vit.readers.writers(space), vit.readers.readers(space)
        for j in range(space.size):
            head = range(j // space.head_size * space.head_size, (j // space.head_size + 1) * space.head_size)
            one = gradients(vit, without_columns(weights, readers, [j]), x)[writer.kind][writer.layer]
            whole = gradients(vit, without_columns(weights, readers, [*head]), x)[writer.kind][writer.layer]
            for part, (alone, together) in zip(
                writer.parts, zip(one.split(space.size), whole.split(space.size), strict=True), strict=True
            ):
                assert (alone[j] == 0).all() == (part == "own") or space.head_size == 1
                assert (together[j] == 0).all() or space.heads is None


def test_columns_do_nothing_without_their_norm(made) -> None:
    """A LayerNorm row that gives 0 for a channel stops the columns that are said to read through it, and no others."""
    vit, weights, x = made
    assert {m.norm for m in vit.readers.matrices} == {None, *range(len(vit.norm_gain))}
    for row in range(len(vit.norm_gain)):
        kept = vit.norm_gain.detach().clone(), vit.norm_bias.detach().clone()
        with torch.no_grad():
            vit.norm_gain[row, 1] = vit.norm_bias[row, 1] = 0.0
        found = gradients(vit, weights, x)
        for matrix in vit.readers.matrices:
            stopped = bool((found[matrix.kind][matrix.layer][:, 1] == 0).all())
            assert stopped == (matrix.norm == row), (row, matrix.kind, matrix.layer)
        with torch.no_grad():
            vit.norm_gain.copy_(kept[0]), vit.norm_bias.copy_(kept[1])


def test_channels_that_no_weight_writes_are_constants(made) -> None:
    """activation(bias): what pruning folds away."""
    vit, weights, x = made
    for matrix in vit.readers.matrices:
        space = matrix.reads
        if space.name not in ("attention", "mlp", "top"):
            continue
        [writer] = vit.readers.writers(space)
        [rows] = writer.own_rows
        cut = {kind: weight.clone() for kind, weight in weights.items()}
        cut[writer.kind][writer.layer, rows] = 0.0
        given = inputs(vit, cut, x)[matrix.kind, matrix.layer]
        bias = vit.bias[writer.kind][writer.layer, rows]
        expected = bias if space.activation is None else space.activation(bias)
        torch.testing.assert_close(given, expected.expand_as(given))


def test_branches_are_attention_and_mlp(made) -> None:
    vit, _, _ = made
    found = {b.name: (len(b.inner), b.written, b.read) for b in vit.readers.branches}
    depth = vit.config.depth
    assert found == {"attention": (depth, ("qkv",), ("attn_out",)), "mlp": (depth, ("fc1",), ("fc2",))}


def test_matrices_that_cannot_be_stacked_are_refused() -> None:
    a, b = Space("a", 2), Space("b", 3)
    with pytest.raises(ValueError, match="one shape"):
        Readers((Matrix("x", 0, a, b), Matrix("x", 1, b, a)))
    with pytest.raises(ValueError, match="numbered"):
        Readers((Matrix("x", 1, a, b),))
    with pytest.raises(KeyError, match="y, layer 3"):
        Readers((Matrix("x", 0, a, b),)).matrix("y", 3)
