"""Two gradient passes in a step: quadratics by hand, the same draws in both passes, and nothing left behind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import CONFIG, INFO, trainer
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.base import Method, Terms
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.runs.checks import check_training
from pyro_isingvit.runs.flatness import step_gradient

METHOD_NAMES = [name for name in METHODS if name != "laplace"]  # which needs an extra
NONE = torch.zeros(4, 0)
FABRIC = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())


class Quadratic(Method):
    """L = theta^T A theta / 2 + b^T theta, b random in every pass."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(replace(CONFIG, method="deterministic"), INFO, 4)
        root = torch.randn(5, 5)
        self.A, self.noise_scale, self.seen = root @ root.T / 5, noise, list[Tensor]()
        self.theta, self.unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        b = self.noise_scale * torch.randn(5)
        self.seen.append(b)
        return {"nll": 0.5 * self.theta @ self.A @ self.theta + b @ self.theta}


def gradient_of(method: Quadratic, **settings: float) -> Tensor:
    before = method.theta.detach().clone()
    step_gradient(FABRIC, method, method, TrainConfig(**settings), NONE, NONE, NONE)  # type: ignore[arg-type]
    assert torch.equal(method.theta, before) and method.unused.grad is None
    assert method.theta.grad is not None
    return method.theta.grad


def test_the_gradient_norm_on_a_quadratic() -> None:
    """(1 + gamma H) g, exactly, since H is the same everywhere."""
    method = Quadratic()
    g = (method.A @ method.theta).detach()
    torch.testing.assert_close(gradient_of(method, gradient_norm=0.3), g + 0.3 * method.A @ g)


@pytest.mark.parametrize("radius", [0.1, 1e3])
def test_the_perturbation_on_a_quadratic(radius: float) -> None:
    """H (theta + d), d the gradient, at most ``radius`` long."""
    method = Quadratic()
    g = (method.A @ method.theta).detach()
    wanted = g + method.A @ g * min(1.0, radius / float(g.norm()))
    torch.testing.assert_close(gradient_of(method, weight_perturbation=radius), wanted)


def test_both_passes_draw_the_same_and_the_next_step_draws_anew() -> None:
    method = Quadratic(noise=1.0)
    g = (method.A @ method.theta).detach()
    state = torch.get_rng_state()
    found = gradient_of(method, gradient_norm=0.3)
    first, second = method.seen
    assert torch.equal(first, second)
    torch.testing.assert_close(found, (g + first) + 0.3 * method.A @ (g + first))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(5)
    assert torch.equal(torch.get_rng_state(), after)


def test_weights_come_back_where_a_pass_is_interrupted() -> None:
    method = Quadratic()
    before, calls = method.theta.detach().clone(), []

    def backward(loss: Tensor) -> None:
        calls.append(loss)
        if len(calls) == 2:
            raise KeyboardInterrupt
        loss.backward()

    fabric = SimpleNamespace(device=torch.device("cpu"), backward=backward)
    with pytest.raises(KeyboardInterrupt):
        step_gradient(fabric, method, method, TrainConfig(gradient_norm=0.1), NONE, NONE, NONE)  # type: ignore[arg-type]
    assert torch.equal(method.theta, before)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}])
@pytest.mark.parametrize(
    ("method", "engine"), [("ising", "fused"), ("ising", "pyro"), ("dropout", "auto"), ("ensemble", "auto")]
)
def test_a_perturbation_of_nothing_changes_nothing(method: str, engine: str, settings: dict, data: ImageData) -> None:
    """Draws, what penalties remember of each image, and random numbers are those of a single pass, bit for bit."""
    config = replace(CONFIG, method=method)
    settings = settings | {"engine": engine, "early_learning": 1.0, "confusion": 0.3, "epochs": 3}
    runs = [trainer(data, config=config, weight_perturbation=radius, **settings).fit() for radius in (0.0, 1e-30)]
    assert runs[0].history == runs[1].history
    ours, theirs = (run.state()["model"] for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], Tensor))


@pytest.mark.parametrize("name", ["gradient_norm", "weight_perturbation"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_methods_take_each(method: str, name: str, data: ImageData) -> None:
    config = replace(CONFIG, method=method)
    plain, run = (trainer(data, config=config, epochs=2, **{name: strength}).fit() for strength in (0.0, 0.1))
    assert all(record["loss"] < float("inf") for record in run.history)
    assert run.history[-1]["loss"] != plain.history[-1]["loss"]


@pytest.mark.parametrize("name", ["gradient_norm", "weight_perturbation"])
def test_both_engines_agree(name: str, data: ImageData) -> None:
    history = [
        trainer(data, epochs=2, engine=engine, draws=1, **{name: 0.1}).fit().history for engine in ("fused", "pyro")
    ]
    for fused, plain in zip(*history, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_each_member_moves_by_its_own_norm(data: ImageData) -> None:
    config = replace(CONFIG, method="ensemble", baseline=replace(CONFIG.baseline, members=2))
    made = trainer(data, config=config)
    first, second = made.method.clipped()  # they differ by their start alone
    x, y = INFO.normalise(data.train.images[:20]), data.train.labels[:20]

    def gradients(radius: float) -> list[list[Tensor]]:
        made.optimizer.zero_grad(set_to_none=True)
        settings = replace(made.settings, weight_perturbation=radius)
        step_gradient(made.fabric, made.loss, made.method, settings, x, y, torch.arange(20))
        return [[p.grad.clone() for p in part.parameters() if p.grad is not None] for part in (first, second)]

    together = gradients(0.05)
    scale = gradients(0.0)
    with torch.no_grad():  # by hand, for the second member
        parameters = [p for p in second.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in scale[1]]).norm()
        for p, g in zip(parameters, scale[1], strict=True):
            p.add_(g * min(1.0, 0.05 / float(norm)))
    moved = gradients(0.0)
    for found, wanted in zip(together[1], moved[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="one of them"):
        check_training(TrainConfig(gradient_norm=0.1, weight_perturbation=0.1))
    with pytest.raises(UserError, match="negative"):
        check_training(TrainConfig(gradient_norm=-0.1))
