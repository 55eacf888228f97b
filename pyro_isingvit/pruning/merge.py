"""What the dropped units wrote, refitted into the units that are left.

Pruning leaves out the columns of a matrix whose inputs are gone. Here each matrix that writes to the residual stream,
and the classifier, is fitted anew so that the small network follows the large one on given images: ridge regression in
closed form, from the first block to the last, towards the weights that are there.

    W', b' = argmin E |y - W' h - b'|^2 + ridge g |W' - W|^2
    W' = W + Cov(y - W h, h) (Cov(h, h) + ridge g I)^-1,   b' = E y - W' E h,   g = mean of the diagonal of Cov(h, h)

h is what the small network's matrix reads, y what the stream lacks: the large network's stream after the branch minus
the small one's before it. So a matrix also takes over what branches before it, now gone, have written. A unit that
duplicates another one is taken over exactly (ridge to 0).

The idea is that of reconstruction after channel pruning (He et al. 2017, arXiv 1707.06168).

Shapes: B images, T tokens, D width, k inputs that are left.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.pruning.network import Block, CompactViT

RIDGE = 1e-4
BATCH = 64
VALUES = 2**26  # numbers of a stream that are kept: images beyond are left out


@torch.no_grad()
def merge_units(model: CompactViT, reference: CompactViT, images: Images, ridge: float = RIDGE) -> CompactViT:
    """Fits what is left to what a larger network does, in place; see above. Calibrate again afterwards.

    Shapes and multiply-accumulates stay; zeros in the matrices that are fitted do not.

    Args:
        model: the form ``mean``, smaller.
        reference: the network that it was cut from, such as that with nothing removed.
        images: training images; as many as fit 2^26 numbers of a stream are used.
        ridge: pull towards the present weights, relative to the mean variance of the inputs; above 0.

    Returns:
        the model.

    Raises:
        UserError: the form is ``bayes``, networks of different width, depth, stem or classes, or no images.
    """
    need(model.config.form == "mean", "only the form 'mean' can be merged; make the network with `form` mean.")
    alike = all(
        getattr(model.config, name) == getattr(reference.config, name)
        for name in ("width", "classes", "image_shape", "patch_size", "patch_stride", "stem", "pool", "registers")
    ) and len(model.blocks) == len(reference.blocks)
    need(alike, "the network was not cut from the reference: their tokens, width, depth or classes differ.")
    need(len(images) > 0, "`images` has no images to fit on.")
    need(ridge > 0, f"`ridge` must be above 0, not {ridge}.")
    count = min(len(images), max(1, VALUES // model.position.numel()))
    ready = [model.normalise(part) for part in spread_out(as_images(images), count)]
    ours, theirs = [model.embed(x) for x in ready], [reference.embed(x) for x in ready]
    for block, large in zip(model.blocks, reference.blocks, strict=True):
        assert isinstance(block, Block) and isinstance(large, Block)
        theirs = [large.attend(x) for x in theirs]
        if block.has_attention:
            attention = block.attention
            writers = [attention.out] if attention.shape.heads else []
            writers += [attention.uniform_out] if attention.shape.uniform else []  # of heads that average
            _refit(writers, block.attend, ours, theirs, ridge)
        ours = [block.attend(x) for x in ours]
        theirs = [large.feed(x) for x in theirs]
        if block.has_mlp:
            _refit(block.fc2, block.feed, ours, theirs, ridge)
        ours = [block.feed(x) for x in ours]
    _refit(model.head, model.classify, ours, [reference.classify(x) for x in theirs], ridge)
    return model


def spread_out(images: Images, count: int) -> list[Tensor]:
    """Evenly spaced images, in batches."""
    return [images[part].cpu() for part in spread_rows(len(images), count).split(BATCH)]


def spread_rows(size: int, count: int) -> Tensor:
    """At most ``count`` ascending numbers below ``size``, evenly spaced: training parts may be sorted by class."""
    return torch.linspace(0, size - 1, min(count, size)).round().long()


def _refit(
    linears: nn.Linear | Sequence[nn.Linear], branch: Callable[[Tensor], Tensor], streams: list[Tensor],
    wanted: list[Tensor], ridge: float,
) -> None:  # fmt: skip
    """Fits matrices so that ``branch(stream)``, which they end, comes close to what is wanted.

    Args:
        linears: whose outputs add to that of the branch, several as one matrix of all their inputs; the first bias
            takes the constant.
        branch: (B, T, D) -> (B, T, D), or the classifier: -> (B, C).
        streams: its input, in batches.
        wanted: its output as it should be.
        ridge: see ``merge_units``.
    """
    linears = [linears] if isinstance(linears, nn.Linear) else linears
    sizes, out = [linear.in_features for linear in linears], linears[0].out_features
    size = sum(sizes)
    gram, cross = torch.zeros(size, size).double(), torch.zeros(out, size).double()
    mean_input, mean_rest, rows = torch.zeros(size).double(), torch.zeros(out).double(), 0
    caught: dict[nn.Module, Tensor] = {}
    handles = [linear.register_forward_pre_hook(lambda me, read: caught.update({me: read[0]})) for linear in linears]
    try:
        for stream, target in zip(streams, wanted, strict=True):
            rest = (target - branch(stream)).flatten(0, -2).double()  # what is still missing
            each = [caught[linear] for linear in linears]
            if each[0].dim() == 3:  # one input for all tokens, where attention is a mean over them
                each = [inputs.expand(-1, stream.shape[1], -1) for inputs in each]
            inputs = torch.cat(each, -1).flatten(0, -2).double()
            gram += inputs.mT @ inputs
            cross += rest.mT @ inputs
            mean_input += inputs.sum(0)
            mean_rest += rest.sum(0)
            rows += len(inputs)
    finally:
        for handle in handles:
            handle.remove()
    mean_input, mean_rest = mean_input / rows, mean_rest / rows
    covariance = gram / rows - mean_input[:, None] * mean_input
    pull = ridge * covariance.diagonal().mean().clamp(min=1e-12)
    change = torch.linalg.solve(
        covariance + pull * torch.eye(size).double(), (cross / rows - mean_rest[:, None] * mean_input).mT
    ).mT
    for linear, part in zip(linears, change.split(sizes, 1), strict=True):
        linear.weight.add_(part.float())
    bias = next(linear.bias for linear in linears if linear.bias is not None)
    bias.add_((mean_rest - change @ mean_input).float())
