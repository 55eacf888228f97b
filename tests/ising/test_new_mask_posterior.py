"""Two new families of mask posteriors, made here alone: a subclass and a row of the registry is all it takes."""

from dataclasses import replace

import pyro
import pytest
import torch
from helpers import CONFIG, TINY, WEIGHTS, make_pair, trainer
from torch import Tensor, nn

from pyro_isingvit import IsingViT, compact, fit, load_run
from pyro_isingvit.core.settings import IsingConfig
from pyro_isingvit.ising.distributions import SelectionMask, log_odds
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.masks import MASK_POSTERIORS, LikelihoodGuided, MaskPosterior
from pyro_isingvit.runs.predict import draw_predictive

KEEP, START = 0.6, 1.5


class Constant(MaskPosterior):
    """DropConnect: every mask is kept with the same probability, whatever the likelihood says."""

    fusible = True

    def start(self) -> None:
        super().start()
        for name in self.layout.sites:
            self.field(name).fill_(log_odds(KEEP))


class TwoComponents(LikelihoodGuided):
    """q(xi) = (q_+ + q_-) / 2: masks whose logits all lie a learned distance above, or below, the field equation."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.distance = nn.Parameter(torch.tensor(START))

    def component(self, site: str, sign: Tensor) -> Tensor:
        """Logits of q_+ or q_-; the sign is 0 in the pilot phase and once the masks are frozen."""
        return self.field(site) + sign * self.distance

    def sign(self, *shape: int) -> Tensor:
        return (torch.randint(2, shape) * 2.0 - 1.0) * (self.phase == "ising")

    def logits(self, site: str) -> Tensor:
        if self.phase != "ising":
            return self.field(site)
        return torch.stack([self.component(site, torch.tensor(s)).sigmoid() for s in (1.0, -1.0)]).mean(0).logit()

    def sample(self):
        sign = self.sign()  # KL(q || p) <= (KL(q_+ || p) + KL(q_- || p)) / 2: the ELBO of a drawn component is a bound
        logits = {name: self.component(name, sign) for name in self.layout.sites}
        masks = {
            name: pyro.sample(f"xi_{name}", SelectionMask(self.temperature, logits=each).to_event(each.dim()))
            for name, each in logits.items()
        }
        return masks, {name: each.sigmoid() for name, each in logits.items()}

    @torch.no_grad()
    def draw(self, num_samples=None):
        lead = () if num_samples is None else (num_samples,)
        sign = self.sign(*lead)
        return {
            name: torch.bernoulli(self.component(name, sign.view(*lead, *[1] * len(site.shape))).sigmoid())
            for name, site in self.layout.sites.items()
        }


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(MASK_POSTERIORS, "constant", Constant)
    monkeypatch.setitem(MASK_POSTERIORS, "mixture", TwoComponents)


def of(family: str, **changes: object) -> IsingConfig:
    return replace(WEIGHTS, mask_posterior=family, update_every=2, **changes)


def trained(data, folder, family: str, **changes: object):
    """The finished trainer of a run that is kept in a folder."""
    made = trainer(data, folder, replace(CONFIG, ising=of(family, **changes)))
    made.fit()
    return made


@pytest.mark.parametrize(("family", "fused"), [("constant", True), ("mixture", False)])
def test_it_trains_predicts_prunes_and_is_loaded_again(data, tmp_path, family, fused) -> None:
    made = trained(data, tmp_path / "run", family, granularity="unit")
    run = made.run
    assert isinstance(run.guide.masks, MASK_POSTERIORS[family])
    assert made.method.fused == fused  # a family that inherits from a fusible one is not taken for one
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    again = load_run(tmp_path / "run")
    assert again.config.ising.mask_posterior == family
    probs = [draw_predictive(each, data.test.images, 8, seed=3).probs for each in (run, again)]
    torch.testing.assert_close(*probs)
    torch.testing.assert_close(probs[0].sum(-1), torch.ones(8, len(data.test)))
    assert float(probs[0].std(0).max()) > 0  # draws differ
    small = compact(run, "bayes", keep=0.5)
    assert sum(p.numel() for p in small.parameters()) < sum(loc.numel() for loc in run.guide.loc.values())
    assert small.predict(data.test.images, 4).isfinite().all()


def test_constant_masks_stay_where_they_are(data) -> None:
    run = fit(
        IsingViT.for_data(data, TINY, of("constant")), data, epochs=4, batch_size=20, device="cpu", progress=False
    )
    for kind in run.guide.kinds:
        torch.testing.assert_close(run.guide.weight_retention(kind), torch.full_like(run.guide.loc[kind], KEEP))
    assert run.history[-1]["retention"] == pytest.approx(KEEP)


def test_masks_of_a_mixture_are_kept_and_dropped_together(data, tmp_path) -> None:
    guide = trained(data, tmp_path / "run", "mixture").run.guide
    masks: MaskPosterior = guide.masks
    assert isinstance(masks, TwoComponents)
    assert abs(masks.distance.item() - START) > 1e-4  # its gradient arrives
    draws = masks.draw(3000)["fc1"].flatten(1)
    pi = masks.retention("fc1").detach().flatten()
    assert ((draws.mean(0) - pi).abs() < 5 * (pi * (1 - pi) / 3000).sqrt() + 1e-3).all()
    variance = draws.mean(1).var()  # of the share that a draw keeps: far above that of independent masks
    assert variance > 4 * (pi * (1 - pi)).sum() / len(pi) ** 2


def test_checkpoints_name_its_tensors_as_the_guide_s_own(data, tmp_path) -> None:
    guide = trained(data, tmp_path / "run", "mixture").run.guide
    state = guide.state_dict()
    assert "distance" in state and "logit_fc1" in state and not [key for key in state if key.startswith("masks.")]
    nested = nn.ModuleDict({"guide": guide}).state_dict()
    assert "guide.distance" in nested and "guide.masks.distance" not in nested
    model, other = make_pair(mask_posterior="mixture")
    nn.ModuleDict({"guide": other}).load_state_dict(nested)
    assert torch.equal(other.masks.distance, guide.masks.distance) and other.phase == guide.phase
    del state["kappa"]
    with pytest.raises(RuntimeError, match="kappa"):
        IsingGuide(model, 50).load_state_dict(state)


def test_a_tensor_of_the_guide_s_name_is_refused(monkeypatch) -> None:
    class Clash(MaskPosterior):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.register_buffer("curvature_fc1", torch.zeros(()))

    monkeypatch.setitem(MASK_POSTERIORS, "clash", Clash)
    with pytest.raises(ValueError, match="curvature_fc1"):
        make_pair(mask_posterior="clash")[1].state_dict()
