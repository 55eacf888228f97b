"""Penalties of the weight matrices: groups towards 0, groups of rows orthonormal, small singular values, rows apart.

They see the matrices without noise: the slab means m of the Ising posterior, ordinary weights of a baseline. m is what
pruning keeps and the mean network predicts with; it is one for all draws and both engines, while images may each have
drawn weights of their own, and a group whose mask was drawn 0 would get no gradient from a norm.

Shapes: (layers, out, in) for the matrices of a kind; of queries, keys and values each is a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_isingvit.nets.readers import Readers
from pyro_isingvit.nets.vit import ViT, Weights

MOST_GROUPS, LEAST_ROWS = 32, 4  # of ``group_orthogonality``, as in its authors' code


@dataclass(frozen=True)
class Matrices:
    """What is penalised.

    Attributes:
        weights: the matrices that are trained, kind -> (layers, out, in); frozen layers are left out.
        readers: of the whole network, which says what rows and columns are.
    """

    weights: Weights
    readers: Readers


def trained_matrices(vit: ViT, weights: Weights) -> Matrices:
    """The matrices that are given and those of the trunk, without frozen layers.

    Args:
        vit: the network.
        weights: the matrices that are given, kind -> (layers, out, in).
    """
    found = {}
    for kind, (layers, _, _) in vit.all_readers.shapes.items():
        parts = [part[kind] for part in (vit.trunk, weights) if kind in part]
        whole, frozen = parts[0] if len(parts) == 1 else torch.cat(parts), vit.frozen_layers(kind)
        if frozen < layers:
            found[kind] = whole[frozen:] if frozen else whole
    return Matrices(found, vit.all_readers)


def _each(matrices: Matrices, classifier: bool) -> Iterator[Tensor]:
    """Stacks of single matrices, (matrices, rows, in), with or without the one that writes the logits."""
    for kind, weight in matrices.weights.items():
        matrix = matrices.readers.matrix(kind)
        if classifier or matrices.readers.readers(matrix.writes):
            yield weight.unflatten(1, (len(matrix.parts), -1)).flatten(0, 1)


def group_lasso(matrices: Matrices, over: str) -> Tensor:
    """Sum of the norms of all groups of weights, sum_g |w_g| (Yuan & Lin 2006; Wen et al. 2016, arXiv 1608.03665).

    The gradient is w_g / |w_g|, and 0 at w_g = 0: while |w_g| is above the step, a step along it is that of the
    proximal operator (1 - step / |w_g|)_+ w_g. Groups come close to 0 and are not set to it.

    Args:
        matrices: what is penalised.
        over: the groups, those that masks of this granularity cover: ``unit``, rows, and columns of the classifier;
            ``head``, the q, k, v rows and output columns of a head; ``block``, an attention or MLP branch. What the
            larger ones leave out is in groups of units.

    Returns:
        a scalar.
    """
    left, readers, norms = dict(matrices.weights), matrices.readers, []
    for branch in readers.branches if over != "unit" else ():
        heads = branch.inner[0].heads if over == "head" else 1
        if heads is None or branch.written[0] not in left:
            continue
        # (layers, heads, weights of the head in this matrix)
        pieces = [
            left.pop(kind).unflatten(1, (len(readers.matrix(kind).parts), heads, -1)).movedim(2, 1).flatten(2)
            for kind in branch.written
        ]
        pieces += [left.pop(kind).unflatten(2, (heads, -1)).movedim(2, 1).flatten(2) for kind in branch.read]
        norms.append(torch.linalg.vector_norm(torch.cat(pieces, -1), dim=-1).sum())
    for kind, weight in left.items():
        along = -1 if readers.readers(readers.matrix(kind).writes) else -2
        norms.append(torch.linalg.vector_norm(weight, dim=along).sum())
    return torch.stack(norms).sum()


def group_orthogonality(matrices: Matrices) -> Tensor:
    """Sum over groups of rows of |W_g W_g^T - I|^2, or |W_g^T W_g - I|^2 if W_g has more rows than columns.

    Group orthogonalization regularization between the rows of a group (Kurtz, Bar & Giryes 2023, arXiv 2306.10001,
    whose code calls it "inter"): a matrix has 32 groups of neighbouring rows, or the next smaller number that divides
    its rows into groups of at least 4. The classifier is left out, as there.

    Returns:
        a scalar, 0 where the rows of every group are orthonormal.
    """
    values = []
    for weight in _each(matrices, classifier=False):
        rows = weight.shape[1]
        most = max(1, min(MOST_GROUPS, rows // LEAST_ROWS))
        groups = max(count for count in range(1, most + 1) if rows % count == 0)
        w = weight.unflatten(1, (groups, -1))
        gram = w.mT @ w if w.shape[-2] >= w.shape[-1] else w @ w.mT
        values.append((gram - torch.eye(gram.shape[-1], dtype=w.dtype, device=w.device)).square().sum())
    return torch.stack(values).sum()


def spectral(matrices: Matrices) -> Tensor:
    """Half the sum over matrices of the squared largest singular value (Yoshida & Miyato 2017, arXiv 1705.10941).

    Exact, as the largest eigenvalue of W W^T or W^T W, where the source takes a step of the power iteration; the
    gradient is sigma u v^T.

    Returns:
        a scalar.
    """
    values = []
    for w in _each(matrices, classifier=True):
        gram = w @ w.mT if w.shape[-2] < w.shape[-1] else w.mT @ w
        values.append(torch.linalg.eigvalsh(gram)[..., -1].sum())
    return 0.5 * torch.stack(values).sum()


CLOSEST = 1e-6  # least half of the squared distance of two rows


class _Energy(torch.autograd.Function):
    """Energy of a stack (matrices, rows, in), summed; its gradient is made with it: a third less time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        inverse = (weight.square().sum(-1, keepdim=True) + 1e-4).rsqrt()
        u, rows = weight * inverse, weight.shape[1]
        # |u_i - u_j|^2 / 2 = 1 - u_i . u_j, and infinite on the diagonal, where energy and gradient are then 0.
        start = torch.ones(rows, rows, dtype=u.dtype, device=u.device).fill_diagonal_(torch.inf)
        # Rows closer than 1e-3 count as so far apart: float32 knows no better, and would find negative squares.
        energy = torch.baddbmm(start, u, u.mT, alpha=-1).clamp_(min=CLOSEST).reciprocal_()
        total = energy.sum() / (2 * rows * (rows - 1))
        if ctx.needs_input_grad[0]:
            energy.masked_fill_(energy > 0.99 / CLOSEST, 0.0)  # the floor has no slope
            pull = (energy.square_() @ u).div_(rows * (rows - 1))
            pull.sub_(u * (u * pull).sum(-1, keepdim=True))  # du/dw = (1 - u u^T) / length
            ctx.save_for_backward(pull.mul_(inverse))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient


def hyperspherical_energy(matrices: Matrices) -> Tensor:
    """Sum over matrices of the mean over pairs of rows of 1 / |w_i - w_j|^2 of the rows at length 1.

    Minimum hyperspherical energy with s = 2 (Liu et al. 2018, arXiv 1805.09298); lengths are (|w|^2 + 1e-4)^(1/2), as
    in its authors' code, so that equal rows have a finite energy. A matrix of one row has no pair, and 0.

    Returns:
        a scalar; a matrix of orthogonal rows has 1/2.
    """
    stacks = [weight for weight in _each(matrices, classifier=True) if weight.shape[1] > 1]
    return torch.stack([_Energy.apply(weight) for weight in stacks]).sum()
