"""Methods that end with fewer weights: by variance, by gates, by size at once or step by step.

Shapes: B batch, S samples, T tokens, C classes; x of a layer is (B, T, in), its weight (out, in).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Batches
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.nets.vit import ViT, Weights, linear
from pyro_isingvit.nets.weight_terms import Matrices, trained_matrices


def sparse_vd_kl(log_alpha: Tensor) -> Tensor:
    """KL(N(m, alpha m^2) || log-uniform) up to its constant, elementwise, nats (Molchanov et al. 2017, eq. 14).

    k1 - k1 sigmoid(k2 + k3 log alpha) + 0.5 log(1 + 1 / alpha); falls to 0 as alpha grows.
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * (-(k2 + k3 * log_alpha)).sigmoid() + 0.5 * F.softplus(-log_alpha)


class SparseVD(Plain):
    """Sparse variational dropout (Molchanov, Ashukha & Vetrov 2017), with local reparameterisation.

    w ~ N(m, s^2), alpha = s^2 / m^2; weights with log alpha > 3 are pruned. The KL rises over the first half.
    """

    max_draws = None
    image_noise = True
    fast = ("log_variance",)
    THRESHOLD = 3.0

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        self.log_variance = nn.ParameterDict(
            {kind: nn.Parameter(torch.full_like(weight, -10.0)) for kind, weight in self.loc.items()}
        )
        self.risen = 1.0

    def log_alpha(self, kind: str) -> Tensor:
        """log s^2 / m^2, within +-8: (layers, out, in)."""
        return (self.log_variance[kind] - (self.loc[kind].pow(2) + 1e-8).log()).clamp(-8, 8)

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """The weight of the KL rises over the first half of the training, and stays in fine-tuning."""
        self.risen = min(1.0, 2 * progress) if phase == "train" else 1.0

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Noise on the outputs, drawn for each token: N(x m, x^2 s^2)."""
        variance = linear(x.pow(2), self.log_variance[kind][layer].exp(), torch.zeros_like(bias))
        return linear(x, weight, bias) + (variance + 1e-8).sqrt() * torch.randn_like(variance)

    def penalty(self) -> Tensor:
        """The KL at its present weight, nats over all images; frozen layers have no part in it."""
        alpha = self.moving({kind: self.log_alpha(kind) for kind in self.loc})
        total = torch.stack([sparse_vd_kl(each).sum() for each in alpha.values()]).sum()
        return self.risen * self.settings.kl_weight * total

    def draw_weights(self) -> Weights:
        """Draws of what is not pruned."""
        kept = self.kept()
        return {
            kind: kept[kind] * (m + (0.5 * self.log_variance[kind]).exp() * torch.randn_like(m))
            for kind, m in self.loc.items()
        }

    def kept(self) -> Weights:
        """1 where log alpha is below the threshold."""
        return {kind: (self.log_alpha(kind) < self.THRESHOLD).float() for kind in self.loc}


class L0(Plain):
    """Hard-concrete gates on the inputs of every layer (Louizos, Welling & Kingma 2018, eq. 10 to 13).

    s = sigmoid((log u - log(1 - u) + log a) / beta),   gate = clamp(s (zeta - gamma) + gamma, 0, 1)
    penalty = l0_penalty * sum_inputs (weights read) * sigmoid(log a - beta log(-gamma / zeta))
    """

    fast = ("log_a",)
    image_noise = True
    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        start = math.log((1 - self.settings.drop_rate) / self.settings.drop_rate)
        self.log_a = nn.ParameterDict(
            {
                kind: nn.Parameter(start + 0.01 * torch.randn(layers, columns))
                for kind, (layers, _, columns) in self.vit.matrix_shapes.items()
            }
        )

    def _gate(self, s: Tensor) -> Tensor:
        return (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    def sample_gate(self, log_a: Tensor, batch: int) -> Tensor:
        """One gate per input and image, (B, in)."""
        u = torch.rand(batch, *log_a.shape, device=log_a.device).clamp(1e-6, 1 - 1e-6)
        return self._gate(((u.logit() + log_a) / self.BETA).sigmoid())

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Gated inputs."""
        return linear(x * self.sample_gate(self.log_a[kind][layer], len(x)).unsqueeze(1), weight, bias)

    def penalty(self) -> Tensor:
        """Expected number of weights that are on, times its price in nats; frozen layers cost nothing."""
        shift, gates = self.BETA * math.log(-self.GAMMA / self.ZETA), self.moving(dict(self.log_a.items()))
        active = [(a - shift).sigmoid().sum() * self.loc[kind].shape[1] for kind, a in gates.items()]
        return self.settings.l0_penalty * torch.stack(active).sum()

    def draw_weights(self) -> Weights:
        """Gates at their deterministic value, clamp(sigmoid(log a) (zeta - gamma) + gamma, 0, 1)."""
        return {kind: w * self._gate(self.log_a[kind].sigmoid()).unsqueeze(1) for kind, w in self.loc.items()}

    @torch.no_grad()
    def deployed(self) -> Sequence[tuple[ViT, Weights]]:
        """The network that predicts: its gates are numbers between 0 and 1."""
        return [(self.vit, self.draw_weights())]

    def kept(self) -> Weights:
        """1 where the deterministic gate is open at all."""
        gates = {kind: (self._gate(a.sigmoid()) > 0).float().unsqueeze(1) for kind, a in self.log_a.items()}
        return {kind: gate.expand_as(self.loc[kind]) for kind, gate in gates.items()}


class Magnitude(Plain):
    """Train, drop the smallest weights of the whole network, fine-tune the rest (Han et al. 2015).

    Masks only grow: what is dropped counts as 0 from then on, whatever the optimiser does to the number under it.
    Frozen layers stay whole, and the share is one of the others.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        for kind, weight in self.loc.items():
            self.register_buffer(f"mask_{kind}", torch.ones_like(weight))

    @torch.no_grad()
    def drop(self, share: float) -> None:
        """Drops the smallest weights of the network until ``share`` of all are dropped; those that are stay so."""
        left, masks = self.moving(self.weights()), self.moving(self.kept())
        sizes = torch.cat([weight.abs().flatten() for weight in left.values()])
        rank = int(share * len(sizes))
        gone = len(sizes) - sum(int(kept.count_nonzero()) for kept in masks.values())
        if rank <= gone:
            return
        limit = sizes.kthvalue(rank).values
        for kind, weight in left.items():
            masks[kind].copy_(weight.abs() > limit)  # views of the buffers

    def begin(self, phase: str) -> None:
        """Prunes before fine-tuning."""
        if phase == "finetune":
            self.drop(self.settings.sparsity)

    def finish(self, batches: Batches, held_out: Batches) -> None:
        """Prunes where there was no fine-tuning."""
        self.drop(self.settings.sparsity)

    def weights(self) -> Weights:
        """What is left."""
        return {kind: weight * self.get_buffer(f"mask_{kind}") for kind, weight in self.loc.items()}

    draw_weights = weights

    def matrices(self) -> Matrices:
        """Of what is left."""
        return trained_matrices(self.vit, self.weights())

    def kept(self) -> Weights:
        """The mask."""
        return {kind: self.get_buffer(f"mask_{kind}") for kind in self.loc}


class GradualMagnitude(Magnitude):
    """Magnitude pruning in many small steps while the network trains (Zhu & Gupta 2017, eq. 1).

    kept share = 1 - s (1 - (1 - t)^3),   s = ``sparsity``

    t goes from 0, after the first ``START`` of the training, to 1 at its share ``END``: most weights go early, while
    the others can still make up for them. The last part of the training has masks that stay.
    """

    START, END = 0.15, 0.75
    EVERY = 10  # steps between updates of the masks

    def dropped(self, progress: float) -> float:
        """s (1 - (1 - t)^3), the share that is dropped when ``progress`` of the training is over."""
        t = min(max((progress - self.START) / (self.END - self.START), 0.0), 1.0)
        return self.settings.sparsity * (1 - (1 - t) ** 3)

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Every few steps, and at t = 1 at once, drops what the schedule asks for."""
        if phase == "train" and (step % self.EVERY == 0 or progress >= self.END):
            self.drop(self.dropped(progress))
