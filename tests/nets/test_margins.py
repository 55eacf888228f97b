"""The attention log-barrier: the determinant against the paper's formula, its gradient, and what training does."""

import json
import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import tyro
from helpers import CONFIG, INFO, TINY, around, make_pair, make_split, trainer
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.autograd.functional import jacobian

from inference.cli import FLAT
from inference.train import TrainArguments
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.nets.margins import FLOOR, least_margins, log_barrier, log_margin, log_margins
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Penalty, attention_log_barrier
from pyro_isingvit.nets.vit import ViT, Watch
from pyro_isingvit.runs import tree as posterior
from pyro_isingvit.runs.predict import attention_margins, draw_predictive
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.tree import run_to_datatree

X, Y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def barrier(strength: float) -> Penalties:
    return Penalties(TrainConfig(log_barrier=strength))


def attention_of(vit, weights, x):
    watch: Watch = {"attention": []}
    vit(weights, x, watch)
    return watch["attention"]


def make_layer(tokens: int = 5, width: int = 7, d: int = 3, biased: bool = False):
    """Tokens (T, D), W_Q and W_K (d, D) and biases (d,), in double precision."""
    options = {"dtype": torch.double}
    x, wq, wk = (
        torch.randn(tokens, width, **options),
        torch.randn(d, width, **options),
        torch.randn(d, width, **options),
    )
    return x, wq, wk, torch.randn(2, d, **options) * biased


def attended(x, query, k):
    """sum_j alpha_ij x_j for one query (d,)."""
    return (k @ query / math.sqrt(len(query))).softmax(0) @ x


# -- the determinant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_determinant_of_the_paper(biased: bool) -> None:
    """I - Sigma_i A of size D x D, in loops."""
    x, wq, wk, (bq, bk) = make_layer(biased=biased)
    q, k = x @ wq.T + bq, x @ wk.T + bk
    a = wk.T @ wq / math.sqrt(3)  # A = W_K^T W_Q / sqrt(d)
    for i in range(5):
        score = torch.stack([q[i] @ k[j] / math.sqrt(3) for j in range(5)])
        alpha = score.exp() / score.exp().sum()
        mean = sum(alpha[j] * x[j] for j in range(5))
        sigma = sum(alpha[j] * torch.outer(x[j] - mean, x[j] - mean) for j in range(5))
        expected = torch.linalg.det(torch.eye(7, dtype=torch.double) - sigma @ a).abs().log()
        torch.testing.assert_close(log_margin(q, k)[i], expected)


def test_it_is_the_jacobian_of_a_token_less_what_it_attends_to() -> None:
    """d/dx_i [x_i - sum_j alpha_ij x_j] where x_i asks and the attended tokens stay, by automatic differentiation."""
    x, wq, wk, _ = make_layer()
    for i in range(5):
        matrix = jacobian(lambda asking: asking - attended(x, wq @ asking, x @ wk.T), x[i])
        assert matrix.shape == (7, 7)
        torch.testing.assert_close(log_margin(x @ wq.T, x @ wk.T)[i], torch.linalg.det(matrix).abs().log())


def test_gradient_against_finite_differences() -> None:
    q, k = torch.randn(2, 2, 4, 3, dtype=torch.double), torch.randn(2, 2, 4, 3, dtype=torch.double)
    assert (log_margin(q, k) > math.log(FLOOR)).all()
    assert torch.autograd.gradcheck(log_margin, (q.requires_grad_(), k.requires_grad_()))


def singular(shift: float):
    """Two tokens of equal weight, d = 1: Cov = q_1 k_1 = shift, and the determinant is 1 - shift."""
    q, k = torch.tensor([[shift], [-shift]]), torch.tensor([[1.0], [-1.0]])
    return q.requires_grad_(), k


@pytest.mark.parametrize("shift", [1.0, 1.0 - 1e-7, 1.0 + 1e-7, 1.0 + 1e-3, 2.0])
def test_no_nan_near_the_boundary(shift: float, monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: torch.full_like(x, 0.5))  # whatever the scores
    q, k = singular(shift)
    value = log_margin(q, k)
    value.sum().backward()
    expected = max(math.log(max(abs(1.0 - shift), 1e-30)), math.log(FLOOR))
    torch.testing.assert_close(value, torch.full((2,), expected), rtol=2e-3, atol=1e-6)
    assert torch.isfinite(q.grad).all() and (q.grad.abs().sum() > 0) == (abs(1.0 - shift) > FLOOR)


def test_one_singular_token_does_not_spoil_the_others(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: torch.full_like(x, 0.5))
    q = torch.stack([singular(1.0)[0], singular(0.5)[0]]).detach().requires_grad_()
    log_margin(q, singular(1.0)[1].expand(2, 2, 1)).sum().backward()
    assert (q.grad[0] == 0).all() and torch.isfinite(q.grad).all() and q.grad[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_it(dtype) -> None:
    q, k = torch.randn(2, 4, 3).to(dtype), torch.randn(2, 4, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = log_margin(q, k)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, log_margin(q.double(), k.double()).float(), rtol=1e-4, atol=1e-5)


def test_support_token_is_where_the_least_margin_is() -> None:
    margins = torch.full((2, 3, 2, 4), 1.0)
    margins[0, 2, 1, 3], margins[1, 0, 0, 1], margins[1, 1, 1, 2] = 0.1, 0.3, 0.2
    least, support = least_margins(margins)
    assert support.tolist() == [3, 2]
    torch.testing.assert_close(least, torch.tensor([[1, 1, 1, 0.1], [1, 0.3, 0.2, 1]]))


# -- in the network and the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_network_hands_over_queries_and_keys(pool: str) -> None:
    vit = ViT(ViTConfig(patch_size=2, width=8, heads=2, depth=2, pool=pool), 1, 4, 4, 3)
    torch.nn.init.normal_(vit.bias["qkv"])
    each = [vit.initial_weights() for _ in range(3)]
    tokens = 4 + (pool == "cls")
    plain = []
    for weights in each:
        watch: Watch = {"attention": []}
        torch.testing.assert_close(vit(weights, X, watch), vit(weights, X), rtol=0, atol=0)
        attention = watch["attention"]
        assert [q.shape for pair in attention for q in pair] == [(6, 2, tokens, 4)] * 4
        plain.append(attention)
    x = vit.patchify(X) @ each[0]["patch"][0].T
    x = torch.cat([vit.cls.expand(6, 1, -1), x], 1) if pool == "cls" else x
    qkv = (
        torch.nn.functional.layer_norm(x + vit.position, (8,), vit.norm_gain[0], vit.norm_bias[0]) @ each[0]["qkv"][0].T
        + vit.bias["qkv"][0]
    )
    for part, got in enumerate(plain[0][0]):
        for head in range(2):
            columns = qkv[..., 8 * part + 4 * head : 8 * part + 4 * head + 4]
            torch.testing.assert_close(got[:, head], columns, rtol=1e-4, atol=1e-5)
    stacked = attention_of(vit, {kind: torch.stack([w[kind] for w in each]) for kind in each[0]}, X)
    assert log_margins(stacked).shape == (3, 6, 2, 2, tokens)
    expected = torch.stack([log_margins(attention) for attention in plain])
    torch.testing.assert_close(log_margins(stacked), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_barrier(stacked), -expected.mean((1, 2, 3, 4)), rtol=1e-4, atol=1e-5)


def loss(elbo, model, guide, seed: int = 1, **options):
    torch.manual_seed(seed)
    return elbo(**options)(model, guide)(X, Y)


@pytest.mark.parametrize("elbo", [ClosedFormELBO, TraceMeanField_ELBO])
def test_the_loss_gains_lambda_times_the_penalty_and_kappa_does_not_scale_it(elbo: type) -> None:
    model, guide = make_pair(num_data=50, kappa_weights=7.0)
    without = loss(elbo, model, guide)
    model.penalties = barrier(0.5)
    with_barrier = loss(elbo, model, guide)
    torch.manual_seed(1)
    attention = attention_of(model.vit, drawn_weights(guide), X)
    expected = -0.5 * torch.stack([log_margin(q, k) for q, k in attention]).mean()
    torch.testing.assert_close((with_barrier - without) / 50, expected, rtol=1e-3, atol=1e-5)


def drawn_weights(guide):
    trace = poutine.trace(guide).get_trace(X, Y)
    return {kind: trace.nodes[f"w_{kind}"]["value"] for kind in guide.kinds}


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}])
def test_both_elbos_agree_on_value_and_gradient(options: dict) -> None:
    model, guide = make_pair()
    model.penalties = barrier(0.5)
    params = [*model.parameters(), *guide.parameters()]
    params = [p for p in params if p.requires_grad]
    results = []
    for elbo in (ClosedFormELBO, TraceMeanField_ELBO):
        value = loss(elbo, model, guide, **options)
        results.append([value, *torch.autograd.grad(value, params, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_vectorised_particles_average_the_penalty() -> None:
    model, guide = make_pair(num_data=50)
    options = {"num_particles": 6, "vectorize_particles": True, "max_plate_nesting": 1}  # 6 is the batch size
    without = loss(TraceMeanField_ELBO, model, guide, **options)
    model.penalties = barrier(0.5)
    seen: list[torch.Tensor] = []
    recorded = {
        "log_barrier": Penalty(lambda found: seen.append(attention_log_barrier(found)) or seen[-1], ("attention",))
    }
    with patch.dict(PENALTIES, recorded):
        gained = loss(TraceMeanField_ELBO, model, guide, **options) - without
    assert seen[0].shape == (6,)  # one for each particle
    torch.testing.assert_close(gained / 50, 0.5 * seen[0].detach().mean(), rtol=1e-3, atol=1e-5)


def test_without_lambda_nothing_changes(monkeypatch) -> None:
    model, guide = make_pair()
    assert not model.penalties and TrainConfig().log_barrier == 0.0
    plain = loss(ClosedFormELBO, model, guide)
    model.penalties = barrier(0.1)
    assert not torch.equal(loss(ClosedFormELBO, model, guide), plain)
    model.penalties = barrier(0.0)
    monkeypatch.setattr("pyro_isingvit.nets.penalties.log_barrier", None)  # calling it would fail
    assert torch.equal(loss(ClosedFormELBO, model, guide), plain)
    assert "log_barrier" not in poutine.trace(model).get_trace(X, Y).nodes


def test_predictions_ignore_it() -> None:
    model, _ = make_pair()
    model.penalties = barrier(3.0)
    assert "log_barrier" in poutine.trace(model).get_trace(X, Y).nodes
    assert "log_barrier" not in poutine.trace(model).get_trace(X).nodes


def test_gradient_through_the_network_against_finite_differences() -> None:
    vit = ViT(TINY, 1, 4, 4, 3).double()
    weights = {kind: weight.double() for kind, weight in vit.initial_weights().items()}

    def penalty(qkv):
        attention = attention_of(vit, weights | {"qkv": qkv}, X[:2].double())
        return log_barrier(attention)

    assert torch.autograd.gradcheck(penalty, weights["qkv"].requires_grad_())


# -- training ------------------------------------------------------------------------------------------------


def test_training_raises_the_margins(data) -> None:
    mean = {}
    for strength in (0.0, 0.5):
        t = trainer(data, epochs=8, lr=1e-2, log_barrier=strength)
        run = t.fit()
        mean[strength] = float(attention_margins(run, data.test.images).log().mean())
        assert all(("log_barrier" in record) == (strength > 0) for record in run.history)
        assert all(math.isfinite(value) for value in run.history[-1].values() if not isinstance(value, str))
    assert mean[0.5] > mean[0.0] + 0.05
    assert run.history[-1]["log_barrier"] < run.history[0]["log_barrier"]


def test_the_record_keeps_the_penalty_out_of_the_nll(data) -> None:
    settings = {"epochs": 1, "batch_size": 60}
    nll = [trainer(data, log_barrier=strength, **settings).fit().history[0] for strength in (0.0, 2.0)]
    assert nll[1]["nll"] == pytest.approx(nll[0]["nll"], abs=1e-4)
    expected = nll[0]["loss"] + nll[1]["log_barrier"]
    assert nll[1]["loss"] == pytest.approx(expected, abs=1e-4) and abs(nll[1]["log_barrier"]) > 1e-3


def test_training_in_bfloat16(data) -> None:
    run = trainer(data, epochs=2, precision="bf16", log_barrier=0.1).fit()
    assert math.isfinite(run.history[-1]["loss"]) and math.isfinite(run.history[-1]["log_barrier"])


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_negative_lambda_is_refused(data, value: float) -> None:
    with pytest.raises(UserError, match=r"log_barrier`? (must not be negative|cannot be nan)"):
        trainer(data, log_barrier=value)


def test_flag_and_configuration(tmp_path, capsys) -> None:
    arguments = tyro.cli(
        TrainArguments, args=["--out", str(tmp_path), "--preset", "digits", "--log-barrier", "0.03"], config=FLAT
    )
    assert arguments.train.log_barrier == 0.03
    config = RunConfig(train=arguments.train)
    assert RunConfig.from_json(config.to_json()).train.log_barrier == 0.03
    older = json.loads(config.to_json())
    del older["train"]["log_barrier"]  # a run folder from before
    assert RunConfig.from_json(json.dumps(older)).train.log_barrier == 0.0


# -- diagnostics ---------------------------------------------------------------------------------------------


def make_run(**vit) -> Run:
    config = replace(CONFIG, vit=replace(TINY, **vit))
    model, guide = IsingMethod(config, INFO, 50).posterior
    for name in guide.layout.sites:
        guide.logits(name).uniform_(-2.1, 2.1)
    return around(model, guide, config)


def test_margins_are_those_of_the_posterior_mean() -> None:
    run, images = make_run(pool="cls"), make_split(7, torch.Generator().manual_seed(1)).images
    margins = attention_margins(run, images)
    assert margins.shape == (7, 2, 2, 5) and (margins > 0).all() and not margins.requires_grad
    weights = {kind: run.guide.weight_retention(kind) * loc for kind, loc in run.guide.loc.items()}
    attention = attention_of(run.model.vit, weights, run.info.normalise(images))
    torch.testing.assert_close(margins.log(), log_margins(attention).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(attention_margins(run, images, batch=3), margins, rtol=1e-4, atol=1e-6)
    assert attention_margins(run, images[:0]).shape == (0, 2, 2, 5)
    with pytest.raises(UserError, match="batch"):
        attention_margins(run, images, batch=0)
    with pytest.raises(UserError):
        attention_margins(run, images[:, :, :2])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_posterior_keeps_margins_and_support_tokens(depth: int, monkeypatch) -> None:
    run, split = make_run(depth=depth), make_split(9, torch.Generator().manual_seed(1))
    draws = draw_predictive(run, split.images, 2)
    monkeypatch.setattr(posterior, "MARGIN_IMAGES", 3)
    kept = run_to_datatree(run, split, draws, max_images=8).constant_data
    assert kept["margin"].dims == ("image_margin", "token") and kept["margin"].shape == (3, 4)
    assert kept["margin_by_layer"].dims == ("image_margin", "layer", "token")
    chosen = kept["image_margin"].values.copy()
    assert set(chosen) <= set(kept["image"].values)
    margins = attention_margins(run, split.images[chosen]).numpy()
    np.testing.assert_allclose(kept["margin"], margins.min((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(kept["margin_by_layer"], margins.min(2), rtol=1e-5)
    np.testing.assert_array_equal(kept["support_token"], margins.min((1, 2)).argmin(-1))
    monkeypatch.setattr(posterior, "MARGIN_WORK", 10)
    kept = run_to_datatree(run, split, draws).constant_data
    assert "margin" not in kept and "pixels" in kept and "image_margin" not in kept.coords
