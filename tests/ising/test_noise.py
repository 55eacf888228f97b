"""Levels of the masks' noise: which one held-out images choose, and how masks come to a new one."""

import math

import pytest
import torch
from helpers import make_pair

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.ising.guide import IsingGuide
from pyro_isingvit.ising.noise import LEVELS, USUAL_KEEP, chosen_keep


def losses(gain: float, spread: float, count: int = 400) -> dict[float, torch.Tensor]:
    """Two levels; on average the second is better by ``gain``, with a standard deviation of ``spread``."""
    generator = torch.Generator().manual_seed(0)
    usual = torch.rand(count, generator=generator, dtype=torch.double)
    noise = torch.randn(count, generator=generator, dtype=torch.double)
    noise = (noise - noise.mean()) / noise.std()
    return {0.98: usual, 0.995: usual - gain - spread * noise}


def test_a_level_must_be_better_by_more_than_a_standard_error() -> None:
    assert chosen_keep(losses(gain=0.011, spread=0.2)) == 0.995  # the standard error is .2 / 20
    assert chosen_keep(losses(gain=0.009, spread=0.2)) == 0.98
    assert chosen_keep(losses(gain=-0.1, spread=0.0)) == 0.98
    assert chosen_keep(losses(gain=0.009, spread=0.2), usual=0.995) == 0.995


@pytest.mark.parametrize("count", [60, 200, 2000])
def test_how_often_it_leaves_the_usual_level(count: int) -> None:
    """However many images: by chance in three of ten trainings, for a gain of three standard errors always."""
    generator = torch.Generator().manual_seed(count)

    def share_left(gain: float) -> float:
        left = 0
        for _ in range(400):
            usual = torch.rand(count, generator=generator, dtype=torch.double)
            noise = 0.3 * torch.randn(2, count, generator=generator, dtype=torch.double)
            left += chosen_keep({0.98: usual, 0.9: usual - noise[0], 0.995: usual - gain - noise[1]}) != 0.98
        return left / 400

    assert 0.2 < share_left(0.0) < 0.38  # 1 - .84^2 = .29
    assert share_left(3 * 0.3 / count**0.5) > 0.95


def test_of_several_certain_levels_the_one_of_the_largest_certain_gain() -> None:
    found = losses(0.05, 0.1)
    found[0.9] = found[0.98] - 0.048  # less on average, but on every image
    assert chosen_keep(found) == 0.9


def test_too_few_images_and_broken_predictions_are_clear_errors() -> None:
    with pytest.raises(UserError, match="fewer than 2"):
        chosen_keep({level: torch.ones(1) for level in LEVELS})
    with pytest.raises(UserError, match=r"`max_keep` 0\.9 are not finite"):
        chosen_keep({0.98: torch.ones(3), 0.9: torch.tensor([1.0, math.inf, 1.0])})


def test_the_usual_level_is_one_of_those_tried() -> None:
    assert USUAL_KEEP in LEVELS and list(LEVELS) == sorted(LEVELS)


@pytest.mark.parametrize("level", [0.9, 0.98])
def test_masks_at_the_clip_follow_it_and_others_stay_unless_above(level: float) -> None:
    _, guide = make_pair(max_keep=0.95)
    guide.masks.start()
    field = guide.field("fc1")
    field[0, 0, :3] = torch.tensor([2.5, -1.0, 1.0])
    guide.set_noise(level)
    top = math.log(level / (1 - level))
    torch.testing.assert_close(field[0, 0, :3], torch.tensor([min(2.5, top), -1.0, 1.0]))
    torch.testing.assert_close(field[0, 0, 3], torch.tensor(top))
    assert float(guide.retention("qkv").min()) == pytest.approx(level)


@pytest.mark.parametrize("posterior", ["learned", "hybrid"])
def test_learned_masks_follow_by_their_whole_logit(posterior: str) -> None:
    for level, wanted in ((0.9, [0.7, 0.9, 0.9]), (0.995, [0.7, 0.947, 0.995])):
        _, guide = make_pair(max_keep=0.98, mask_posterior=posterior)
        guide.masks.start()
        with torch.no_grad():
            top = guide.field("fc1")[0, 0, 0]
            for place, pi in enumerate((0.7, 0.947)):
                guide.masks.mask_logit["fc1"][0, 0, place] = math.log(pi / (1 - pi)) - top
        guide.set_noise(level)
        torch.testing.assert_close(guide.retention("fc1")[0, 0, :3].detach(), torch.tensor(wanted), rtol=1e-4, atol=0)


def test_before_and_after_the_ising_phase_no_mask_moves() -> None:
    model, guide = make_pair()
    guide.phase = "pilot"
    before = guide.field("fc1").clone()
    guide.set_noise(0.9)
    guide.set_noise(0.8)
    assert torch.equal(guide.field("fc1"), before)
    guide.start_masks()
    assert guide.retention("fc1").max() == pytest.approx(0.8)
    guide.set_noise(0.9)
    assert guide.retention("fc1").max() == pytest.approx(0.9)
    guide.freeze(model)
    before = guide.field("fc1").clone()
    guide.set_noise(0.98)
    assert torch.equal(guide.field("fc1"), before)


def test_it_travels_with_the_state_and_older_states_have_none() -> None:
    model, guide = make_pair()
    guide.set_noise(0.91)
    state = guide.state_dict()
    other = IsingGuide(model, 50)
    other.load_state_dict(state)
    assert other.max_keep == guide.max_keep != IsingGuide(model, 50).max_keep
    state["_extra_state"] = {"phase": "ising"}
    old = IsingGuide(model, 50)
    old.load_state_dict(state)
    assert old.phase == "ising" and old.max_keep == pytest.approx(0.9)
    for strange in (2.0, math.nan, -1.0):
        state["_extra_state"] = {"phase": "ising", "max_keep": strange}
        with pytest.raises(UserError, match="max_keep is"):
            old.load_state_dict(state)
