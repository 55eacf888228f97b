"""Logits that change little where the image does: two penalties on Jacobians.

    jacobian        C |v^T J|^2 / 2,  v uniform on the unit sphere of R^C, one for each image
    nuclear_norm    (|g(h + s e) - g(h)|^2 + |h(x + s e') - h(x)|^2) / (2 s^2),  e, e' ~ N(0, I)

J is that of the logits by the image as the network reads it, normalised. The first is |J|_F^2 / 2 on average (Hoffman
et al. 2019, arXiv 1908.02729). The second is (|J_g|_F^2 + |J_h|_F^2) / 2 on average, up to O(s^2); over all ways to
write a function as g of h, the least of it is the nuclear norm of its Jacobian (Scarvelis & Solomon 2024, arXiv
2405.14544). Here g is the last matrix and h all before it: the one place where every network of this library has a
single vector for each image.

Both look at one network: that of the step's draw, with the same weights, masks and noise.

Shapes: S samples, B batch, C classes, F features.
"""

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.train_settings import TrainConfig

STEP = 1e-2  # s; the published 1e-3 leaves differences of single precision too few digits


def own_normal(part: tuple[int, int], like: Tensor) -> Tensor:
    """N(0, 1) numbers for the images of one of several equal parts of a batch, of the shape of ``like`` (B, ...).

    They are drawn for the whole batch, so that its parts together have the numbers of the batch in one piece.
    """
    number, parts = part
    count = len(like)
    return torch.randn((parts * count, *like.shape[1:]), device=like.device)[number * count : (number + 1) * count]


def squared_jacobian(logits: Tensor, images: Tensor, noise: Tensor) -> Tensor:
    """Mean over images of C |v^T J|^2 / 2, v = noise / |noise|.

    Args:
        logits: (B, C), or (S, B, C) where S networks read the same images.
        images: (B, ...), from which the logits follow, with gradients.
        noise: (B, C), N(0, 1).

    Returns:
        a scalar, or (S,), that can be differentiated again.
    """
    v = noise / noise.norm(dim=-1, keepdim=True)

    def of(z: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((z * v).sum(), images, create_graph=True)
        return 0.5 * z.shape[-1] * gradient.flatten(1).square().sum(-1).mean()

    return of(logits) if logits.dim() == 2 else torch.stack([of(z) for z in logits])


def half_differences(outputs: Tensor, moved: Tensor) -> Tensor:
    """Mean over images of |moved - outputs|^2 / (2 s^2), of (B, F) or (S, B, F); a scalar or (S,)."""
    return 0.5 * (moved - outputs).square().sum(-1).mean(-1) / STEP**2


def check_smoothness(config: TrainConfig) -> None:
    """Raises UserError where settings do not go with these penalties."""
    for name in ("jacobian", "nuclear_norm", "rationale"):
        on = getattr(config, name) > 0
        need(not (on and config.compile), f"`{name}` needs a network that is not compiled; leave out `compile`.")
    need(
        not (config.jacobian and config.frozen_blocks),
        "`jacobian` needs gradients by the image, which `frozen_blocks` stops; set `nuclear_norm` instead, or leave "
        "out `frozen_blocks`.",
    )
    need(
        not (config.jacobian and config.checkpoint_activations),
        "`jacobian` takes second derivatives, which need what `checkpoint_activations` leaves out; set one of them.",
    )
    need(
        not (config.nuclear_norm and config.precision == "bf16"),
        "`nuclear_norm` compares two outputs that differ by less than the rounding of bf16; set `precision` to 32, or "
        "`jacobian` instead.",
    )
