"""The ELBO of ``ClosedFormELBO()(model, guide)`` without effect handlers, in little more than a plain step.

Value, gradients and random numbers are the same.
Only for masks that the guide sets itself (mask_posterior "likelihood_guided"), whose gradient nobody needs, and
without a log-barrier; everything else takes the Pyro path.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.distributions import bernoulli_kl, slab_kl
from pyro_isingvit.guide import IsingGuide
from pyro_isingvit.model import IsingViT
from pyro_isingvit.vit import Weights


def fusible(model: IsingViT) -> bool:
    """Whether the fused path computes this model's objective."""
    return model.ising.mask_posterior == "likelihood_guided" and model.log_barrier == 0


class FusedELBO(nn.Module):
    """loss = -(N / B) sum_b log p(y_b | W_g(b)) + (weight KL + mask KL) / kappa_weights, nats.

    The batch is cut into ``draws`` parts, each with its own draw W_g of the guide: the same expectation as with one
    draw for all, at the cost of one forward pass, and with less noise from the draw in its gradient.

    Args:
        model: for which ``fusible`` holds.
        guide: its posterior.
        draws: parts of a batch; one that it does not divide takes the largest number below that does.
    """

    def __init__(self, model: IsingViT, guide: IsingGuide, draws: int = 1) -> None:
        super().__init__()
        self.model, self.guide, self.draws = model, guide, draws
        self._seen: tuple[int, ...] = ()
        self._constant = torch.zeros(())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch: x (B, channels, height, width) normalised, y (B,) or (B, C)."""
        model, guide, layout = self.model, self.guide, self.guide.layout
        draws = max(count for count in range(1, self.draws + 1) if len(x) % count == 0)
        with torch.no_grad():
            retention = {name: guide.field(name).sigmoid() for name in layout.sites}
            kept = {name: draw_masks(pi, draws) for name, pi in retention.items()}
        weights, kl = {}, self.constant_kl(retention)
        for kind in guide.kinds:  # the order in which Pyro draws
            loc, log_scale = guide.loc[kind], guide.log_scale[kind]
            # Parts of the batch share the Gaussian noise, which is small: each is a draw of q all the same.
            noise = torch.randn_like(loc)
            spike = guide.config.tau_0 * noise
            slab = torch.addcmul(loc, log_scale.exp(), noise)
            weights[kind] = torch.addcmul(spike, layout.expand(kind, kept), slab - spike)  # ([S,] layers, out, in)
            pi, tau_1 = layout.expand(kind, retention), model.tau_1(kind)
            cost = slab_kl(loc, log_scale.exp(), tau_1) if log_scale.requires_grad else 0.5 * (loc / tau_1) ** 2
            kl = kl + (pi * cost).sum()
        images = x if draws == 1 else x.unflatten(0, (draws, -1))
        nll = F.cross_entropy(model.vit(weights, images).float().flatten(0, -2), y)
        size = len(x) if model.num_data is None else model.num_data
        return size * nll + kl / model.kappa_weights

    @torch.no_grad()
    def constant_kl(self, retention: Weights) -> Tensor:
        """What does not move with the means, in nats: the masks' KL, and the slabs' share of scales that are frozen.

        Computed again only when a tensor that it reads was written to.
        """
        model, guide, layout = self.model, self.guide, self.guide.layout
        pairs = [(guide.field(name), model.prior_logits(name)) for name in layout.sites]
        frozen = [kind for kind in guide.kinds if not guide.log_scale[kind].requires_grad]
        slabs = [(guide.log_scale[kind], model.tau_1(kind)) for kind in frozen]
        versions = tuple(tensor._version for pair in (*pairs, *slabs) for tensor in pair)
        if versions != self._seen:
            total = torch.stack([bernoulli_kl(q, p).sum() for q, p in pairs]).sum()
            for kind, (log_scale, tau_1) in zip(frozen, slabs, strict=True):
                cost = slab_kl(torch.zeros_like(log_scale), log_scale.exp(), tau_1)
                total = total + (layout.expand(kind, retention) * cost).sum()
            self._constant, self._seen = total, versions
        return self._constant


def draw_masks(pi: Tensor, draws: int) -> Tensor:
    """Independent Bernoulli(pi) draws as 0.0 and 1.0: of pi's shape, or (draws, *shape) for more than one.

    One draw takes the numbers that Pyro's guide takes. More are cut from 64 random bits, 16 each, which is four times
    as fast on a CPU; pi is then rounded to a multiple of 2^-16.
    """
    if draws == 1:
        return (torch.rand_like(pi) > 1.0 - pi).float()
    words = torch.empty(-(-draws // 4), *pi.shape, dtype=torch.int64, device=pi.device).random_(-(2**63), None)
    numbers = words.view(torch.int16).view(-1, *pi.shape)[:draws]  # uniform on -2^15 .. 2^15 - 1
    return (numbers < (pi * 2**16 - 2**15).round()).float()
