"""What users would do otherwise, on the same network: each method a class of one file, trained by the same trainer.

Shapes: B batch, S samples, T tokens, C classes; x of a layer is (B, T, in), its weight (out, in).
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.baseline import Baseline, Networks, check_baseline
from pyro_isingvit.config import RunConfig, TrainConfig
from pyro_isingvit.data import DataInfo
from pyro_isingvit.errors import UserError
from pyro_isingvit.objective import Objective
from pyro_isingvit.vit import Layer, Weights, linear, plain


class Dropout(Baseline):
    """Dropout on the embedding, after attention and in the MLP, kept on at prediction (Gal & Ghahramani 2016)."""

    max_draws = None
    image_noise = True

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Drops the hidden units that fc2 reads and what is added to the residual stream."""
        rate = self.settings.drop_rate
        y = linear(F.dropout(x, rate) if kind == "fc2" else x, weight, bias)
        return F.dropout(y, rate) if kind in ("patch", "attn_out", "fc2") else y

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Every image has noise of its own, as in training."""
        return self.noisy_networks(count, self.layer_rule)


class DropConnect(Baseline):
    """Each weight is dropped with a fixed probability, at prediction too (Wan et al. 2013): w M / (1 - p)."""

    max_draws = None

    def weights(self) -> Weights:
        """One mask a step."""
        return {kind: F.dropout(weight, self.settings.drop_rate) for kind, weight in self.loc.items()}

    draw_weights = weights


class ConcreteDropout(Baseline):
    """Dropout of every layer's inputs with learned rates (Gal, Hron & Kendall 2017, eq. 3 and 4).

    penalty = sum_layers [ l^2 / (2 (1 - p)) |W|^2 - K H(p) ],   K inputs, H the Bernoulli entropy in nats
    """

    max_draws = None
    image_noise = True
    fast = ("drop_logit",)
    TEMPERATURE = 0.1

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        start = math.log(self.settings.drop_rate / (1 - self.settings.drop_rate))
        self.drop_logit = nn.ParameterDict(
            {kind: nn.Parameter(torch.full(shape[:1], start)) for kind, shape in self.vit.matrix_shapes.items()}
        )

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Concrete relaxation of dropping the inputs."""
        logit = self.drop_logit[kind][layer]
        u = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
        drop = ((logit + u.logit()) / self.TEMPERATURE).sigmoid()
        return linear(x * (1 - drop) / (1 - logit.sigmoid()), weight, bias)

    def penalty(self) -> Tensor:
        """-log prior and entropy terms, nats over all images."""
        total = torch.zeros((), device=self.temperature.device)
        for kind, logit in self.drop_logit.items():
            p = logit.sigmoid()  # (layers,)
            squares = self.loc[kind].pow(2).sum((1, 2))
            entropy = torch.special.entr(p) + torch.special.entr(1 - p)
            total = total + (self.settings.length_scale**2 / (2 * (1 - p)) * squares).sum()
            total = total - self.loc[kind].shape[2] * entropy.sum()
        return total

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Hard masks with the learned rates, an image's own."""
        rates = {kind: logit.sigmoid().tolist() for kind, logit in self.drop_logit.items()}

        def rule(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(F.dropout(x, rates[kind][layer]), weight, bias)

        return self.noisy_networks(count, rule)


def sparse_vd_kl(log_alpha: Tensor) -> Tensor:
    """KL(N(m, alpha m^2) || log-uniform) up to its constant, elementwise, nats (Molchanov et al. 2017, eq. 14).

    k1 - k1 sigmoid(k2 + k3 log alpha) + 0.5 log(1 + 1 / alpha); falls to 0 as alpha grows.
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * (-(k2 + k3 * log_alpha)).sigmoid() + 0.5 * F.softplus(-log_alpha)


class SparseVD(Baseline):
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
        """The weight of the KL rises."""
        self.risen = min(1.0, 2 * progress)

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Noise on the outputs, a token's own: N(x m, x^2 s^2)."""
        variance = linear(x.pow(2), self.log_variance[kind][layer].exp(), torch.zeros_like(bias))
        return linear(x, weight, bias) + (variance + 1e-8).sqrt() * torch.randn_like(variance)

    def penalty(self) -> Tensor:
        """The KL, as far as it has risen."""
        total = torch.stack([sparse_vd_kl(self.log_alpha(kind)).sum() for kind in self.loc]).sum()
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


class L0(Baseline):
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
        """One gate an input and image, (B, in)."""
        u = torch.rand(batch, *log_a.shape, device=log_a.device).clamp(1e-6, 1 - 1e-6)
        return self._gate(((u.logit() + log_a) / self.BETA).sigmoid())

    def layer_rule(self, kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Gated inputs."""
        return linear(x * self.sample_gate(self.log_a[kind][layer], len(x)).unsqueeze(1), weight, bias)

    def penalty(self) -> Tensor:
        """Expected number of weights that are on, times its price in nats."""
        shift = self.BETA * math.log(-self.GAMMA / self.ZETA)
        active = [(a - shift).sigmoid().sum() * self.loc[kind].shape[1] for kind, a in self.log_a.items()]
        return self.settings.l0_penalty * torch.stack(active).sum()

    def draw_weights(self) -> Weights:
        """Gates at their deterministic value, clamp(sigmoid(log a) (zeta - gamma) + gamma, 0, 1)."""
        return {kind: w * self._gate(self.log_a[kind].sigmoid()).unsqueeze(1) for kind, w in self.loc.items()}

    def kept(self) -> Weights:
        """1 where the deterministic gate is open at all."""
        gates = {kind: (self._gate(a.sigmoid()) > 0).float().unsqueeze(1) for kind, a in self.log_a.items()}
        return {kind: gate.expand_as(self.loc[kind]) for kind, gate in gates.items()}


class Magnitude(Baseline):
    """Train, drop the smallest weights of the whole network, fine-tune the rest (Han et al. 2015)."""

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        for kind, weight in self.loc.items():
            self.register_buffer(f"mask_{kind}", torch.ones_like(weight))

    @torch.no_grad()
    def begin(self, phase: str) -> None:
        """Prunes before fine-tuning."""
        if phase != "finetune":
            return
        sizes = torch.cat([weight.abs().flatten() for weight in self.loc.values()])
        rank = int(self.settings.sparsity * len(sizes))
        limit = sizes.kthvalue(rank).values if rank else -1.0
        for kind, weight in self.loc.items():
            self.get_buffer(f"mask_{kind}").copy_(weight.abs() > limit)

    def weights(self) -> Weights:
        """What is left."""
        return {kind: weight * self.get_buffer(f"mask_{kind}") for kind, weight in self.loc.items()}

    draw_weights = weights

    def kept(self) -> Weights:
        """The mask."""
        return {kind: self.get_buffer(f"mask_{kind}") for kind in self.loc}


class Ensemble(Objective):
    """K networks from different random starts (Lakshminarayanan et al. 2017), trained side by side on the same batches.

    Attributes:
        max_draws: K.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__()
        self.info, self.max_draws = info, config.baseline.members
        check_baseline(config.baseline)
        self.networks = [Baseline(config, info, num_data) for _ in range(self.max_draws)]
        self.members = nn.ModuleList(self.networks)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the members' losses, so that each is trained as it would be alone."""
        return torch.stack([member(x, y) for member in self.members]).sum()

    def terms(self, loss: float) -> dict[str, float]:
        """Nll of the mean member."""
        return {"nll": loss / len(self.members)}

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """All members' groups."""
        return [group for member in self.networks for group in member.parameter_groups(settings)]

    def clipped(self) -> list[nn.Module]:
        """Each member alone."""
        return list(self.members)

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """The members, in order, over and over."""
        chosen = [self.networks[i % len(self.networks)] for i in range(first, first + count)]
        return lambda x: torch.cat([member.draw_networks(1)(x) for member in chosen])

    def kept(self) -> Weights:
        """Nothing is selected: 1, of all members."""
        parts = [member.kept() for member in self.networks]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


class LastLayerLaplace(Baseline):
    """Deterministic training, then a Laplace posterior of the last layer (Daxberger et al. 2021), by laplace-torch.

    Kronecker-factored curvature, prior precision by marginal likelihood; the posterior is kept as a set of draws.
    """

    max_draws = 200

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        _import_laplace()
        _, classes, width = self.vit.matrix_shapes["head"]
        self.heads: Tensor
        self.register_buffer("heads", torch.zeros(self.max_draws, classes * width + classes))

    def _features(self, x: Tensor) -> Tensor:
        """What the last layer reads, (B, width)."""
        seen: list[Tensor] = []

        def rule(kind: str, layer: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if kind == "head":
                seen.append(x.squeeze(1))
            return plain(kind, layer, x, weight, bias)

        keep: Layer = rule
        self.vit(dict(self.loc.items()), x, layer_rule=keep)
        return seen[0]

    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fits the posterior on the training images and keeps draws of it."""
        laplace = _import_laplace()
        with torch.no_grad():
            pairs = [(self._features(x).float(), y) for x, y in batches]
        features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        head = nn.Linear(features.shape[1], self.loc["head"].shape[1], device=features.device)
        with torch.no_grad():
            head.weight.copy_(self.loc["head"][0])
            head.bias.copy_(self.vit.bias["head"][0])
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=512)
        posterior = laplace(head, "classification", subset_of_weights="all", hessian_structure="kron")
        posterior.fit(loader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a link function that sampling does not use
            posterior.optimize_prior_precision(method="marglik")
        self.heads.copy_(posterior.sample(len(self.heads)))

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """``count`` of the last layers that were drawn, in order, over and over, on features they share."""
        chosen = self.heads[torch.arange(first, first + count, device=self.heads.device) % len(self.heads)]
        classes, width = self.loc["head"].shape[1:]
        weight, bias = chosen[:, : classes * width].view(-1, classes, width), chosen[:, classes * width :]
        return lambda x: torch.einsum("bd,scd->sbc", self._features(x).float(), weight) + bias.unsqueeze(1)


def _import_laplace() -> Any:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise UserError("method laplace needs laplace-torch: pip install 'pyro-isingvit[peers]'.") from error
    return Laplace


BASELINES: dict[str, type[Baseline] | type[Ensemble]] = {
    "deterministic": Baseline,
    "temperature": Baseline,  # the same, with T fitted on the validation part
    "dropout": Dropout,
    "dropconnect": DropConnect,
    "concrete-dropout": ConcreteDropout,
    "sparse-vd": SparseVD,
    "l0": L0,
    "magnitude": Magnitude,
    "ensemble": Ensemble,
    "laplace": LastLayerLaplace,
}
