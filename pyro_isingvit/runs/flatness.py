"""Flat minima: the gradient of a step from two passes, at the weights and at weights moved along the gradient.

    gradient_norm          g + gamma [g(theta + e g) - g] / e,  e = 0.5: to first order in e (1 + gamma H) g, the
                           gradient of L + gamma |g|^2 / 2 (Karakida et al. 2023, arXiv 2210.02720)
    weight_perturbation    g(theta + d),  d = g min(1, r / |g|): that of the worst loss within r of theta, looked for by
                           one step of ascent (adversarial model perturbation, Zheng et al. 2021, arXiv 2010.04925)

g is the gradient of the mean loss of the batch, penalties included. Both passes see the same images and start from the
same random numbers, so that a posterior's draws are the same and the difference is the curvature's. |g| is over all
parameters, of each member of an ensemble. A step takes twice as long.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.random_state import RandomState
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.base import Method, Terms
from pyro_isingvit.nets.penalties import Penalties
from pyro_isingvit.nets.view import View
from pyro_isingvit.runs.steps import backward

if TYPE_CHECKING:
    import lightning_fabric as lf
    from lightning_fabric.wrappers import _FabricModule

ASCENT = 0.5  # e


def check_flatness(config: TrainConfig) -> None:
    """Raises UserError where both are asked for."""
    need(
        not (config.gradient_norm and config.weight_perturbation),
        "`gradient_norm` and `weight_perturbation` both take the gradient at other weights; set one of them to 0.",
    )


def step_gradient(
    fabric: "lf.Fabric",
    wrapped: "_FabricModule",
    method: Method,
    settings: TrainConfig,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    view: View | None = None,
) -> Terms:
    """Fills the parameters' gradients, which are None or 0, with that of a step, and ends the step for the penalties.

    Args:
        fabric: holds the processes together.
        wrapped: ``method`` as Fabric wraps it.
        method: what is trained; its weights are the same bits afterwards.
        settings: of training.
        x: (B, channels, height, width) normalised, the whole batch.
        y: (B,) or (B, C).
        rows: (B,) numbers of the images.
        view: what was drawn for the whole batch besides; None: nothing.

    Returns:
        the mean terms of this process's parts at the weights themselves, detached.
    """

    def once() -> Terms:
        return backward(fabric, wrapped, method, x, y, rows, settings.accumulate, view)

    if settings.gradient_norm or settings.weight_perturbation:
        penalties = [module for module in method.modules() if isinstance(module, Penalties)]
        memory = [tensor for each in penalties for tensor in each.buffers()]
        before, start = [tensor.clone() for tensor in memory], RandomState.now(fabric.device)
        terms = once()
        after, end = [tensor.clone() for tensor in memory], RandomState.now(fabric.device)
        _write(memory, before)
        start.restore(fabric.device)
        parts = [[p for p in part.parameters() if p.grad is not None] for part in method.clipped()]
        parameters = [p for part in parts for p in part]
        weights = [p.detach().clone() for p in parameters]
        gradients = [[_gradient(p).clone() for p in part] for part in parts]
        try:
            for part, first in zip(parts, gradients, strict=True):
                _move(part, first, settings.weight_perturbation)
            once()
        finally:
            _write(parameters, weights)
            _write(memory, after)
            end.restore(fabric.device)
        if gamma := settings.gradient_norm:
            for p, gradient in zip(parameters, [g for part in gradients for g in part], strict=True):
                _gradient(p).mul_(gamma / ASCENT).add_(gradient, alpha=1 - gamma / ASCENT)
    else:
        terms = once()
    method.settle(rows)
    return terms


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@torch.no_grad()
def _move(parameters: Sequence[Tensor], gradients: list[Tensor], radius: float) -> None:
    """Moves parameters along their gradients, by ``radius`` at most or by e times the gradient, and forgets these."""
    scale = torch.tensor(ASCENT, device=gradients[0].device) if gradients else torch.zeros(())
    if radius and gradients:
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (radius / norm.clamp(min=1e-12)).clamp(max=1.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient * scale)
        _gradient(parameter).zero_()  # in place: it may be a view of what the processes exchange


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
