"""Model and guide in Pyro's own tools: SVI trains them, and every ELBO agrees with the closed form."""

import copy
import math
import pickle
from collections.abc import Iterator

import pyro
import pytest
import torch
from helpers import QUICK_FIT, TINY, make_pair, pixels
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_isingvit import ImageData, IsingGuide, IsingViT, UserError, fit, load_run
from pyro_isingvit.ising.distributions import SelectionMask, SpikeAndSlab, SpikeAndSlabPosterior
from pyro_isingvit.ising.elbo import ClosedFormELBO
from pyro_isingvit.ising.fused import FusedELBO, fusible

Y = torch.arange(6) % 3


def images() -> torch.Tensor:
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(5))


def fresh(**ising: object) -> tuple[IsingViT, IsingGuide]:
    model, _ = make_pair(**ising)
    model.num_data, model.kappa_weights = None, 1.0  # as if the guide were the first that it meets
    return model, IsingGuide(model, num_data=50)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, ClosedFormELBO])
def test_svi_trains_every_parameter(loss) -> None:
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide = fresh(posterior_scale="learned")
    before = copy.deepcopy({**model.state_dict(), **guide.state_dict()})
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02}), loss())
    losses = [svi.step(images(), Y) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    after = {**model.state_dict(), **guide.state_dict()}
    names = [name for module in (model, guide) for name, p in module.named_parameters() if p.requires_grad]
    assert names and all((after[name] != before[name]).any() for name in names)
    assert not pyro.get_param_store()  # a second model does not meet the first one's weights


def test_the_guide_tells_the_model_what_both_must_share() -> None:
    model, guide = fresh()
    assert (model.num_data, model.kappa_weights) == (50, guide.kappa_weights) and guide.kappa_weights != 1
    torch.manual_seed(1)
    loss = ClosedFormELBO().loss(model, guide, images(), Y)
    torch.manual_seed(1)
    torch.testing.assert_close(FusedELBO(model, guide, 1)(images(), Y).detach(), torch.as_tensor(loss))


@pytest.mark.parametrize("tau_0", [0.0, 0.05])
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_scored_traces_have_the_mean_of_the_closed_form(granularity: str, tau_0: float) -> None:
    """log p - log q of hard masks and of spikes without a width; pilot masks (logit 20) too."""
    torch.manual_seed(0)
    model, guide = make_pair(granularity=granularity, tau_0=tau_0)
    for start in (lambda: None, lambda: guide.freeze(model)):
        start()
        for kind in (Trace_ELBO, TraceGraph_ELBO):
            many = {"num_particles": 60, "vectorize_particles": True, "max_plate_nesting": 1}
            scored, closed = (
                torch.tensor([float(elbo.loss(model, guide, images(), Y)) for _ in range(8)])
                for elbo in (kind(**many), ClosedFormELBO(**many))
            )
            error = (scored.var() / 8 + closed.var() / 8).sqrt()
            assert abs(float(scored.mean() - closed.mean())) < 5 * float(error)


def test_masks_and_spikes_are_scored_by_mass() -> None:
    mask = SelectionMask(torch.tensor(0.5), logits=torch.tensor([1.5, -2.0]))
    hard = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(mask.log_prob(hard), torch.distributions.Bernoulli(logits=mask.logits).log_prob(hard))
    drawn = mask.rsample()
    torch.testing.assert_close(mask.log_prob(drawn), mask.log_prob(drawn.clone()))
    prior = SpikeAndSlab(hard, 0.0, 2.0)
    assert prior.log_prob(torch.tensor([0.0, 0.0]))[0] == pytest.approx(-0.5 * math.log(2 * math.pi * 4))
    assert prior.log_prob(torch.tensor([0.3, 0.0]))[1] == 0
    assert prior.log_prob(torch.tensor([0.3, 0.1]))[1] == -math.inf
    q = SpikeAndSlabPosterior(torch.ones(2), torch.ones(2), hard, torch.full((2,), 0.5), 0.0)
    assert q.log_prob(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([-0.5 * math.log(2 * math.pi), 0.0])


def test_a_whole_trace_has_a_log_probability() -> None:
    model, guide = make_pair(tau_0=0.0)
    drawn = poutine.trace(guide).get_trace(images())
    scored = poutine.trace(poutine.replay(model, drawn)).get_trace(images(), Y)
    for trace in (drawn, scored):
        assert math.isfinite(trace.log_prob_sum().item())


def test_pyro_users_who_set_float64(double: None) -> None:
    model, guide = fresh()
    assert {p.dtype for p in [*model.parameters(), *guide.parameters()]} == {torch.float32}
    x = images().float()
    for parallel in (False, True):
        probs = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(x)["probs"]
        assert probs.shape[0] == 3 and probs.dtype == torch.float32
    assert {w.dtype for w in guide.draw(2).values()} == {torch.float32}
    assert math.isfinite(float(TraceMeanField_ELBO().loss(model, guide, x, Y)))


def test_labels_of_another_shape_are_refused() -> None:
    model, guide = fresh()
    for wrong in (Y[:, None], Y[:1], torch.full((6, 2), 0.5)):
        with pytest.raises(UserError, match=r"give \(B,\) class numbers or \(B, C\) probabilities"):
            ClosedFormELBO().loss(model, guide, images(), wrong)


def test_weights_to_start_from_must_be_those_of_the_network() -> None:
    model, _ = fresh()
    weights = model.initial_weights()
    guide = IsingGuide(model, 50, {kind: each.double() for kind, each in reversed(weights.items())})
    assert set(guide.loc) == set(weights) and guide.loc["qkv"].dtype == torch.float32
    for wrong in (
        {"qkv": weights["qkv"]},
        weights | {"other": weights["qkv"]},
        weights | {"qkv": torch.zeros(1, 1, 1)},
    ):
        with pytest.raises(UserError, match="but the network has"):
            IsingGuide(model, 50, wrong)
    with pytest.raises(UserError, match="`num_data` must be at least 1"):
        IsingGuide(model, 0)


def test_noise_out_of_its_range_is_refused() -> None:
    _, guide = fresh()
    for wrong in (0.0, -1.0, 2.0, math.nan):
        with pytest.raises(UserError, match=r"`max_keep` must lie in \(0, 1\]"):
            guide.set_noise(wrong)


@pytest.mark.parametrize("granularity", ["weight", "unit", "head", "block"])
def test_models_and_guides_can_be_pickled_and_copied(granularity: str) -> None:
    model, guide = make_pair(granularity=granularity)
    for again in (lambda pair: pickle.loads(pickle.dumps(pair)), copy.deepcopy):
        other, posterior = again((model, guide))
        for pair in ((model, guide), (other, posterior)):
            torch.manual_seed(3)
            pair[1].observe(pair[0], images(), Y)
            pair[1].update(pair[0])
        for name in guide.layout.sites:
            assert (posterior.field(name) == guide.field(name)).all()
        torch.manual_seed(3)
        drawn = guide.draw(2)
        torch.manual_seed(3)
        assert all((drawn[kind] == w).all() for kind, w in posterior.draw(2).items())


class OwnPrior(IsingViT):
    """A model whose weights are sampled by code of its own."""

    calls = 0

    def sample_weights(self):
        type(self).calls += 1
        return super().sample_weights()


@pytest.fixture
def data() -> ImageData:
    return ImageData.from_arrays(pixels(60, 1, 4, 4), torch.arange(60) % 3)


def test_a_model_of_ones_own_is_trained_by_its_own_code(data: ImageData, tmp_path, caplog) -> None:
    model = OwnPrior.for_data(data, TINY)
    assert not fusible(model) and fusible(IsingViT.for_data(data, TINY))
    run = fit(model, data, epochs=1, progress=False)
    assert OwnPrior.calls > 0 and not run.method.fused
    run.save(tmp_path / "own")
    assert "the settings of OwnPrior are saved, not its code" in caplog.text
    assert type(load_run(tmp_path / "own").model) is IsingViT
    with pytest.raises(UserError, match=r"OwnPrior.sample_weights is overridden, which it does not call"):
        fit(OwnPrior.for_data(data, TINY), data, epochs=1, engine="fused", progress=False)


def test_training_where_torch_records_nothing_is_refused(data: ImageData) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(UserError, match="training needs gradients"):
            fit(TINY, data, **QUICK_FIT)
