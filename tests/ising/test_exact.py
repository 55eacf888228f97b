"""Enumeration and mean field of small Ising models, and the guide's retention against exact posterior marginals.

``pytest tests/ising/test_exact.py -s`` prints the tables of docs/exact.md.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers import INFO, make_split
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, ViTConfig
from pyro_isingvit.ising.coupling import COUPLINGS
from pyro_isingvit.ising.curvature import SALIENCY, second_order_gain
from pyro_isingvit.ising.distributions import slab_kl
from pyro_isingvit.ising.exact import energy, enumerate_states, exact_marginals, mean_field
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.nets.vit import ViT, Weights

OBSERVATIONS = {"exact": (1, 256), "lm": (1, 4096)}  # batches whose curvature is averaged, images of each
MANY = (200, 64)  # for all other estimators: one look is noisy


def random_ising(n: int, strength: float) -> tuple[Tensor, Tensor]:
    couplings = strength * torch.randn(n, n).triu(1)
    return torch.randn(n), couplings + couplings.T


def boltzmann(fields: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    return exact_marginals(lambda state: -energy(state, fields, couplings), len(fields))


# Enumeration --------------------------------------------------------------------------------------------------------


def test_states_are_all_binary_words_in_order() -> None:
    assert enumerate_states(4).tolist() == [list(word) for word in itertools.product((0.0, 1.0), repeat=4)]
    assert enumerate_states(16).shape == (65_536, 16)
    for n in (0, 17):
        with pytest.raises(UserError, match="hold some of them fixed"):
            enumerate_states(n)


def test_energy_and_marginals_match_loops() -> None:
    fields, couplings = random_ising(4, 1.0)
    total, kept = 0.0, [0.0] * 4
    for word in itertools.product((0, 1), repeat=4):
        e = -sum(float(fields[i]) * word[i] for i in range(4))
        e -= sum(float(couplings[i, j]) * word[i] * word[j] for i in range(4) for j in range(i + 1, 4))
        assert float(energy(torch.tensor(word).float(), fields, couplings)) == pytest.approx(e, abs=1e-5)
        total += math.exp(-e)
        kept = [k + math.exp(-e) * bit for k, bit in zip(kept, word, strict=True)]
    marginals, log_evidence = boltzmann(fields, couplings)
    assert marginals.dtype == log_evidence.dtype == torch.double
    assert marginals.tolist() == pytest.approx([k / total for k in kept], abs=1e-6)
    assert float(log_evidence) == pytest.approx(math.log(total), abs=1e-5)


def test_independent_masks_are_exact_and_chunks_do_not_matter() -> None:
    fields = torch.randn(7, dtype=torch.double)
    for chunk in (3, 128, 5000):
        marginals, log_evidence = exact_marginals(lambda state: state.double() @ fields, 7, chunk)
        torch.testing.assert_close(marginals, fields.sigmoid())
        torch.testing.assert_close(log_evidence, F.softplus(fields).sum())


def test_two_coupled_masks_by_hand() -> None:
    """Weights 1, e^0.5, e^-1, e^(0.5 - 1 + 2) of the states 00, 01, 10, 11."""
    weights = [1.0, math.exp(0.5), math.exp(-1.0), math.exp(1.5)]
    marginals, log_evidence = boltzmann(torch.tensor([-1.0, 0.5]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    expected = [(weights[2] + weights[3]) / sum(weights), (weights[1] + weights[3]) / sum(weights)]
    assert marginals.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(log_evidence) == pytest.approx(math.log(sum(weights)), abs=1e-6)


def test_large_log_weights_and_forbidden_states() -> None:
    table = torch.tensor([-math.inf, -1e6, -1e6 + math.log(3.0), -math.inf], dtype=torch.double)
    marginals, log_evidence = exact_marginals(lambda state: table[: len(state)], 2)
    assert marginals.tolist() == pytest.approx([0.75, 0.25])
    assert float(log_evidence) == pytest.approx(-1e6 + math.log(4.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_weights_that_cannot_be_normalised_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="finite"):
        exact_marginals(lambda state: torch.full((len(state),), value), 2)
    with pytest.raises(UserError, match="must map states"):
        exact_marginals(lambda state: state, 2)


@pytest.mark.parametrize("couplings", [torch.ones(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.zeros(3, 3)])
def test_couplings_of_the_wrong_form_are_refused(couplings: Tensor) -> None:
    for call in (
        lambda: energy(torch.ones(2), torch.zeros(2), couplings),
        lambda: mean_field(torch.zeros(2), couplings),
    ):
        with pytest.raises(UserError, match="couplings"):
            call()


# Mean field ---------------------------------------------------------------------------------------------------------


def test_mean_field_is_exact_without_coupling() -> None:
    fields = 3 * torch.randn(9, dtype=torch.double)
    torch.testing.assert_close(mean_field(fields, torch.zeros(9, 9)), fields.sigmoid(), rtol=0, atol=1e-9)


def test_mean_field_error_vanishes_with_the_coupling() -> None:
    errors = []
    for strength in (0.4, 0.2, 0.1):
        torch.manual_seed(0)
        fields, couplings = random_ising(8, strength)
        errors.append(float((mean_field(fields, couplings) - boltzmann(fields, couplings)[0]).abs().max()))
    assert errors[2] < 2e-3 and errors[0] > 2.5 * errors[1] > 6 * errors[2]  # second order in the coupling


def test_mean_field_is_stationary_and_starts_from_kept() -> None:
    fields, couplings = random_ising(8, 0.5)
    pi = mean_field(fields, couplings, damping=0.3)
    torch.testing.assert_close((fields + couplings @ pi.float()).sigmoid(), pi.float(), rtol=1e-5, atol=1e-6)
    pair = torch.tensor([[0.0, 20.0], [20.0, 0.0]])  # both kept and both dropped are fixed points
    assert (mean_field(torch.tensor([-10.0, -10.0]) + 1e-3, pair) > 0.99).all()


def test_mean_field_that_does_not_converge_says_so() -> None:
    rivals = torch.tensor([[0.0, -20.0], [-20.0, 0.0]])
    with pytest.raises(UserError, match="lower `damping`"):
        mean_field(torch.tensor([10.0, 10.0]), rivals, damping=1.0)
    assert mean_field(torch.tensor([10.0, 10.0]), rivals, damping=0.1).tolist() == pytest.approx([0.5, 0.5])
    with pytest.raises(UserError, match="damping"):
        mean_field(torch.zeros(2), torch.zeros(2, 2), damping=0.0)


# The guide against the exact posterior of a toy network ---------------------------------------------------------------


@dataclass
class Toy:
    """A trained network, its data, and which masks are free (site -> flat indices); the others are held at 1.

    ``log_likelihood`` holds log p(data | xi o m) of all 2^n states in the order of ``enumerate_states``.
    """

    vit: ViT
    weights: Weights
    images: Tensor
    labels: Tensor
    free: dict[str, Tensor]
    ising: IsingConfig
    log_likelihood: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sites = self.pair()[0].layout.sites
        states = enumerate_states(self.n)
        self.log_likelihood = torch.cat([self._log_likelihood(block) for block in states.split(128)])

    @property
    def n(self) -> int:
        return sum(len(indices) for indices in self.free.values())

    def pair(self, **ising: object) -> tuple[IsingViT, IsingGuide]:
        """Model and guide with the trained means, masks just out of the pilot phase."""
        model = IsingViT(self.vit.config, INFO, replace(self.ising, **ising))
        model.vit.load_state_dict(self.vit.state_dict())
        guide = IsingGuide(model, len(self.images), self.weights)
        guide.start_masks()
        return model, guide

    @torch.no_grad()
    def _log_likelihood(self, states: Tensor) -> Tensor:
        masks = {name: torch.ones(len(states), math.prod(site.shape)) for name, site in self.sites.items()}
        parts = states.split([len(indices) for indices in self.free.values()], -1)
        for (name, indices), part in zip(self.free.items(), parts, strict=True):
            masks[name][:, indices] = part
        values = {name: mask.view(-1, *self.sites[name].shape) for name, mask in masks.items()}
        layout = IsingViT(self.vit.config, INFO, self.ising).layout
        masked = {kind: layout.expand(kind, values) * weight for kind, weight in self.weights.items()}  # w = xi m
        log_p = self.vit(masked, self.images).double().log_softmax(-1)  # (M, N, C)
        return log_p[:, torch.arange(len(self.labels)), self.labels].sum(-1)

    def dropped(self, *masks: int) -> Tensor:
        """log-likelihood with all masks at 1 but these."""
        return self.log_likelihood[2**self.n - 1 - sum(2 ** (self.n - 1 - mask) for mask in set(masks))]

    def pick(self, values: dict[str, Tensor]) -> Tensor:
        """The free masks' entries of fields site -> site shape, (n,)."""
        return torch.cat([values[name].flatten()[indices] for name, indices in self.free.items()]).double()

    def observed(self, saliency: str) -> dict[str, Tensor]:
        """The guide's buffers after its curvature has seen some hundred batches of the training images."""
        torch.manual_seed(0)
        model, guide = self.pair(saliency=saliency)
        count, size = OBSERVATIONS.get(saliency, MANY)
        for _ in range(count):
            batch = torch.randperm(len(self.images))[:size]
            guide.observe(model, self.images[batch], self.labels[batch])
        return dict(guide.named_buffers())


@dataclass
class Fields:
    """What the guide makes of the free masks, each (n,): prior + description cost, Dl, pi."""

    prior: Tensor
    gain: Tensor
    retention: Tensor

    def exact(self, log_likelihood: Tensor) -> Tensor:
        """Marginals of exp(sum_g xi_g (prior_logit_g - omega KL_g) + log-likelihood(xi))."""
        place = 2.0 ** torch.arange(len(self.prior) - 1, -1, -1)
        return exact_marginals(
            lambda state: state.double() @ self.prior + log_likelihood[(state @ place).long()], len(self.prior)
        )[0]


@torch.no_grad()
def settle(toy: Toy, buffers: dict[str, Tensor], saliency: str, coupling: str, **ising: float) -> Fields:
    """Iterates the guide's update to its fixed point, with the masks that are not free held at 1."""
    model, guide = toy.pair(saliency=saliency, coupling=coupling, **ising)
    for name, buffer in buffers.items():
        guide.get_buffer(name).copy_(buffer)
    layout, loc = guide.layout, {kind: weight.detach() for kind, weight in guide.loc.items()}
    gain = {kind: second_order_gain(guide.curvature(kind), m, len(toy.images)) for kind, m in loc.items()}
    cost = {kind: slab_kl(m, guide.log_scale[kind].exp(), model.tau_1(kind)) for kind, m in loc.items()}
    for name, site in layout.sites.items():
        held = torch.ones(math.prod(site.shape))
        held[toy.free.get(name, torch.empty(0, dtype=torch.long))] = 0.0
        for kind, spread in site.spreads.items():
            guide.get_buffer(f"curvature_{kind}").add_(1e9 * spread.expand(held.view(site.shape)))
    for _ in range(30):
        before = toy.pick({name: guide.retention(name) for name in toy.free})
        guide.update(model)
    retention = toy.pick({name: guide.retention(name) for name in toy.free})
    torch.testing.assert_close(before, retention, rtol=0, atol=1e-4)
    omega = model.ising.omega
    prior = {name: model.prior_logits(name) - omega * layout.reduce(layout.sites[name], cost) for name in toy.free}
    return Fields(
        toy.pick(prior), toy.pick({name: layout.reduce(layout.sites[name], gain) for name in toy.free}), retention
    )


def train(shape: ViTConfig, images: Tensor, labels: Tensor, decay: float) -> tuple[ViT, Weights]:
    """Deterministic network, mean NLL + decay |W|^2 / 2N, a few seconds."""
    torch.manual_seed(0)
    vit = ViT(shape, INFO.channels, 4, 4, INFO.num_classes)
    weights = {kind: weight.requires_grad_() for kind, weight in vit.initial_weights().items()}
    optimiser = torch.optim.Adam([*weights.values(), *vit.parameters()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 200)
    for _ in range(200):
        optimiser.zero_grad()
        penalty = 0.5 * decay / len(images) * sum(weight.pow(2).sum() for weight in weights.values())
        (F.cross_entropy(vit(weights, images), labels) + penalty).backward()
        optimiser.step()
        schedule.step()
    return vit, {kind: weight.detach() for kind, weight in weights.items()}


ISING = IsingConfig(
    granularity="weight",
    tau_0=1e-3,
    kappa_mask=1.0,
    max_keep=1.0,
    mask_damping=1.0,
    curvature_decay=0.995,
    tau_1=0.5,
    init_scale=0.05,
)


@pytest.fixture(scope="module")
def small() -> list[Toy]:
    """Three networks where every mask is a small step: one weight of each of fc1's 8 units, many noisy labels."""
    shape, toys = ViTConfig(patch_size=4, width=8, heads=2, depth=1, mlp_ratio=1), []
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randn(4096, 1, 4, 4)
        labels = torch.distributions.Categorical(logits=0.1 * images.flatten(1) @ torch.randn(16, 3)).sample()
        vit, weights = train(shape, images, labels, 16.0)
        toys.append(Toy(vit, weights, images, labels, {"fc1": 9 * torch.arange(8)}, replace(ISING, delta=0.5)))
    return toys


@pytest.fixture(scope="module")
def whole() -> list[Toy]:
    """Every mask of a whole network, 13 units and heads, on separable data: dropping one is no small perturbation."""
    split = make_split(60, torch.Generator().manual_seed(0))
    images = INFO.normalise(split.images)
    shape = ViTConfig(patch_size=2, width=3, heads=1, depth=1, mlp_ratio=1)
    vit, weights = train(shape, images, split.labels, 1.0)
    ising = replace(ISING, granularity="head", delta=0.5, tau_1=1.0, init_scale=0.3)
    sites = IsingViT(shape, INFO, ising).layout.sites
    free = {name: torch.arange(math.prod(site.shape)) for name, site in sites.items()}
    return [Toy(vit, weights, images, split.labels, free, ising)]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def measure(toys: list[Toy], saliency: str, **ising: float) -> dict[str, float]:
    """Mean absolute gap between retention and exact marginals over masks and networks, coupling -> gap."""
    gaps = dict.fromkeys(COUPLINGS, 0.0)
    for toy in toys:
        buffers = toy.observed(saliency)
        for coupling in COUPLINGS:
            fields = settle(toy, buffers, saliency, coupling, **ising)
            gaps[coupling] += gap(fields.retention, fields.exact(toy.log_likelihood)) / len(toys)
    return gaps


def references(toys: list[Toy], **ising: float) -> dict[str, float]:
    """What gap is left without the likelihood, with each true single drop, and with the true drops of pairs too."""
    gaps = {"prior alone": 0.0, "true single drops": 0.0, "true drops of one and two": 0.0}
    for toy in toys:
        fields = settle(toy, toy.observed("lm"), "lm", "all_readers", **ising)
        exact, n = fields.exact(toy.log_likelihood), toy.n
        single = torch.stack([toy.dropped() - toy.dropped(i) for i in range(n)])
        pairs = torch.stack([toy.dropped(i, j) - toy.dropped() for i in range(n) for j in range(n)]).view(n, n)
        couplings = (pairs + single + single[:, None]).fill_diagonal_(0.0)
        couplings = (couplings + couplings.T) / 2
        # log-likelihood(xi) = const - sum_i single_i (1 - xi_i) + sum_{i<j} couplings_ij (1 - xi_i)(1 - xi_j) + ...
        both = mean_field(fields.prior + single - couplings.sum(1), couplings, damping=0.05)
        rows = (fields.prior.sigmoid(), (fields.prior + single).sigmoid(), both)
        gaps = {name: old + gap(row, exact) / len(toys) for (name, old), row in zip(gaps.items(), rows, strict=True)}
    return gaps


def show(title: str, row: str, gaps: dict[str, float]) -> None:
    print(f"\n{title} | {row} | " + " | ".join(f"{name} {value:.3f}" for name, value in gaps.items()), end="")


@pytest.mark.parametrize("saliency", SALIENCY)
def test_retention_is_close_to_exact_marginals_where_the_expansion_holds(small: list[Toy], saliency: str) -> None:
    gaps = measure(small, saliency)
    show("small", saliency, gaps)
    assert all(0.0 <= value < 1.0 for value in gaps.values())
    if saliency in ("gnb", "exact"):
        assert gaps["all_readers"] < 0.1 and gaps["nearest"] < 0.1 and max(gaps.values()) < 0.12


@pytest.mark.parametrize("saliency", SALIENCY)
def test_retention_is_not_exact_where_masks_are_large_steps(whole: list[Toy], saliency: str) -> None:
    gaps = measure(whole, saliency)
    show("whole", saliency, gaps)
    assert 0.1 < min(gaps.values()) <= max(gaps.values()) < 0.7


@pytest.mark.parametrize("delta", [0.5, 0.9, 0.99])
def test_what_the_guide_leaves_out(small: list[Toy], delta: float) -> None:
    """The curvature's error goes with true single drops, most of the rest with true drops of two masks at once."""
    gaps = references(small, delta=delta) | measure(small, "gnb", delta=delta)
    show("small", f"delta {delta}", gaps)
    assert gaps["true drops of one and two"] < 0.5 * gaps["true single drops"] < 0.5 * gaps["all_readers"]
    if delta == 0.5:
        assert gaps["prior alone"] > 2 * max(gaps[coupling] for coupling in COUPLINGS)


def test_references_of_the_whole_network(whole: list[Toy]) -> None:
    gaps = references(whole)
    show("whole", "references", gaps)
    assert min(gaps.values()) > 0.1


def test_masks_that_do_not_interact_are_exact(small: list[Toy]) -> None:
    """With a log-likelihood that is the sum of the guide's own gains, its retention is the exact marginal."""
    toy = small[0]
    fields = settle(toy, toy.observed("lm"), "lm", "all_readers")
    assert gap(fields.retention, fields.exact(enumerate_states(toy.n).double() @ fields.gain)) < 1e-4
