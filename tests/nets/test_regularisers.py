"""Regularisers of the literature: each formula by hand, its minimum, and every method and engine with each."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, TINY, refuses, trainer
from kills import same
from torch.nn import functional as F

from pyro_isingvit import fit
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.regularise import REGULARISERS, regularised
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS, with_defaults
from pyro_isingvit.nets import vit
from pyro_isingvit.nets.attention_terms import negative_entropy, negative_log, spread
from pyro_isingvit.nets.feature_terms import negative_von_neumann_entropy
from pyro_isingvit.nets.penalties import PENALTIES, Penalties, Seen
from pyro_isingvit.nets.self_distillation import first_predictions, self_distillation
from pyro_isingvit.runs.checks import check_asked, check_training

NEW = [
    "logit_penalty",
    "self_distillation",
    "attention_entropy",
    "attention_spread",
    "attention_log",
    "feature_entropy",
]
ATTENTION = {
    "entropy": (negative_entropy, lambda a: (a * a.log()).sum(-1).mean()),
    "spread": (spread, lambda a: (1 + a**2).log().mean()),
    "log": (negative_log, lambda a: -a.log().mean()),
}


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_hand_and_with_samples(name: str) -> None:
    term, by_hand = ATTENTION[name]
    torch.manual_seed(0)
    layers = [(torch.randn(3, 2, 2, 5, 4), torch.randn(3, 2, 2, 5, 4)) for _ in range(2)]  # S, B, H, T, d
    value = term(layers)
    for s in range(3):
        each = [by_hand((q[s] @ k[s].mT / 2).softmax(-1)) for q, k in layers]
        torch.testing.assert_close(value[s], sum(each) / 2)
        torch.testing.assert_close(term([(q[s], k[s]) for q, k in layers]), value[s])


@pytest.mark.parametrize("name", ATTENTION)
def test_uniform_attention_is_the_minimum(name: str) -> None:
    term, tokens = ATTENTION[name][0], 6
    uniform = float(term([(torch.zeros(1, 1, tokens, 4), torch.randn(1, 1, tokens, 4))]))
    least = {"entropy": -math.log(tokens), "spread": math.log(1 + tokens**-2), "log": math.log(tokens)}[name]
    assert uniform == pytest.approx(least, abs=1e-6)
    torch.manual_seed(1)
    for scale in (0.1, 1.0, 10.0):
        assert float(term([(scale * torch.randn(4, 2, tokens, 4), torch.randn(4, 2, tokens, 4))])) > least


def test_sharp_attention_stays_finite() -> None:
    q = torch.full((1, 1, 3, 2), 1e3, requires_grad=True)
    k = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]).view(1, 1, 3, 2)
    for term, _ in ATTENTION.values():
        (gradient,) = torch.autograd.grad(term([(q, k)]), q)
        assert bool(gradient.isfinite().all())


# Logits, features -----------------------------------------------------------------------------------------------------


def test_the_gradient_with_the_logit_penalty() -> None:
    """p - y + lambda z, for each image of the mean."""
    z = torch.randn(4, 3, requires_grad=True)
    y = torch.tensor([0, 2, 1, 1])
    term = Penalties(TrainConfig(logit_penalty=0.3), 4, 3).terms(Seen(z, y))["logit_penalty"]
    (F.cross_entropy(z, y) + term).backward()
    wanted = (z.softmax(-1) - F.one_hot(y, 3) + 0.3 * z).detach() / 4
    torch.testing.assert_close(z.grad, wanted)


def test_von_neumann_entropy() -> None:
    """Orthonormal features give log N, one direction gives 0; by hand for two; samples apart."""
    torch.testing.assert_close(negative_von_neumann_entropy(3.0 * torch.eye(5, 8)), torch.tensor(-math.log(5)))
    assert float(negative_von_neumann_entropy(torch.ones(6, 4))) == pytest.approx(0.0, abs=1e-5)
    cosine = 0.6
    pair = torch.tensor([[1.0, 0.0], [cosine, 0.8]])
    values = [(1 + cosine) / 2, (1 - cosine) / 2]
    torch.testing.assert_close(
        negative_von_neumann_entropy(pair), torch.tensor(sum(value * math.log(value) for value in values))
    )
    both = torch.randn(2, 7, 4)
    torch.testing.assert_close(
        negative_von_neumann_entropy(both), torch.stack([negative_von_neumann_entropy(each) for each in both])
    )
    narrow = torch.randn(9, 4)  # B above F and below F take different products
    for features in (narrow, narrow.mT):
        h = F.normalize(features, dim=-1)
        values = torch.linalg.eigvalsh(h.mT @ h / len(h)).clamp(min=1e-12)
        wanted = (values * values.log()).sum()
        torch.testing.assert_close(negative_von_neumann_entropy(features), wanted, atol=1e-5, rtol=0)


# Self-distillation ----------------------------------------------------------------------------------------------------


def test_two_images_by_hand() -> None:
    memory, rows = first_predictions(3, 2), torch.tensor([2, 0])
    labels, first = torch.tensor([1, 0]), torch.tensor([[0.2, 0.1], [1.0, -1.0]])
    assert float(self_distillation(first, labels, memory, rows, 4)) == 0.0  # nothing was said yet
    said = first.softmax(-1)
    torch.testing.assert_close(memory["said"][rows], said)
    assert memory["seen"].tolist() == [1, 0, 1] and not memory["said"][1].any()
    second = torch.tensor([[0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    share = 0.25  # seen once of four epochs
    value = self_distillation(second, labels, memory, rows, 4)
    log_p, y = second.log_softmax(-1), F.one_hot(labels, 2).float()
    target = (1 - share) * y + share * said
    change = -(target * log_p).sum(-1).mean() - F.cross_entropy(second, labels)
    torch.testing.assert_close(value, change)
    (gradient,) = torch.autograd.grad(F.cross_entropy(second, labels) + value, second)
    torch.testing.assert_close(gradient, (second.softmax(-1) - target).detach() / 2)


def test_under_masks_what_was_said_is_a_mean_since_the_pilot_phase(data: ImageData) -> None:
    memory, rows, labels = first_predictions(2, 2), torch.arange(2), torch.tensor([0, 1])
    passes = torch.randn(3, 2, 2)
    for logits in passes:
        self_distillation(logits, labels, memory, rows, 4, mean=True)
    torch.testing.assert_close(memory["said"], passes.softmax(-1).mean(0))
    seen = []
    run = trainer(data, epochs=4, pilot_fraction=0.5, self_distillation=0.8)
    run.on_epoch = lambda at: seen.append(float(at.method.penalties.memory("self_distillation")["seen"].max()))
    history = run.fit().history
    assert seen == [0, 0, 1, 2]
    assert [record["self_distillation"] != 0 for record in history] == [False, False, False, True]


def test_samples_apart_and_weighted_images() -> None:
    memory = {"said": torch.rand(4, 3).softmax(-1), "seen": torch.full((4,), 2.0)}
    logits, rows = torch.randn(5, 4, 3), torch.arange(4)
    labels = F.one_hot(rows % 3, 3).float() * torch.tensor([1.0, 0.5, 2.0, 0.0])[:, None]
    parts = [
        self_distillation(each, labels, {name: x.clone() for name, x in memory.items()}, rows, 4) for each in logits
    ]
    value = self_distillation(logits, labels, memory, rows, 4)
    torch.testing.assert_close(value, torch.stack(parts))
    torch.testing.assert_close(memory["said"], logits.softmax(-1).mean(0))


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ising", "deterministic", "dropout", "ensemble", "mean-field"])
@pytest.mark.parametrize("name", NEW)
def test_methods_take_each(method: str, name: str, data: ImageData) -> None:
    run = trainer(data, config=replace(CONFIG, method=method), epochs=2, **{name: 0.1}).fit()
    assert all(math.isfinite(record[name]) and math.isfinite(record["loss"]) for record in run.history)


@pytest.mark.parametrize("name", NEW)
def test_both_engines_agree(name: str, data: ImageData) -> None:
    history = [
        trainer(data, epochs=2, engine=engine, draws=1, **{name: 0.5}).fit().history for engine in ("fused", "pyro")
    ]
    for fused, plain in zip(*history, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert fused[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6)


def test_resumed_equals_uninterrupted_bit_for_bit(data: ImageData, tmp_path: Path) -> None:
    strengths = dict.fromkeys(NEW, 0.1)
    whole = trainer(data, tmp_path / "whole", **strengths).fit()

    def stop(at) -> None:
        if at.epoch == 3:
            raise KeyboardInterrupt

    cut = trainer(data, tmp_path / "cut", **strengths)
    cut.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = trainer(data, tmp_path / "cut", **strengths)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0})
    assert any(name.endswith("self_distillation.said") for name in theirs["model"])
    assert whole.history == again.run.history


# By name --------------------------------------------------------------------------------------------------------------


def test_every_name_sets_a_field_that_training_takes() -> None:
    for name, row in REGULARISERS.items():
        train = regularised(TrainConfig(), [name])
        check_training(train)
        assert getattr(train, row.setting) == row.strength and train != TrainConfig()
    assert {row.setting for row in REGULARISERS.values()} >= set(PENALTIES)
    several = regularised(TrainConfig(), ["logit-penalty:0.2", "token-masking:0.5", "regmixup:20"])
    assert (several.logit_penalty, several.token_masking, several.mix, several.mix_alpha) == (
        0.2,
        0.5,
        "regmixup",
        20.0,
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["nope"], ("unknown regulariser", "logit-penalty")), (["ps-kd:1.5"], ("ps-kd", "at most 1")),
        (["token-masking:1"], ("below 1",)), (["vne:0"], ("above 0",)), (["vne:nan"], ("vne",)),
        (["car:x"], ("'x'", "0.3 is usual")), (["mixup", "regmixup"], ("mixup and regmixup", "contradict")),
        (["vne", "vne:2"], ("contradict",)), (["logit-penalty:inf"], ("logit-penalty",)),
    ],
)  # fmt: skip
def test_names_that_cannot_be(names: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        regularised(TrainConfig(), names)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"self_distillation": 0.5, "balance": "sampler"}, "sampler shows some more often"),
        ({"early_learning": 3.0, "balance": "sampler"}, "sampler shows some more often"),
        ({"attention_entropy": 0.1, "checkpoint_activations": True}, "`attention_entropy` looks at attention"),
        ({"log_barrier": 0.1, "checkpoint_activations": True}, "`checkpoint_activations` does not keep"),
        ({"margin": 1}, "`margin` 1 does nothing where `augment` is none"),
    ],
)  # fmt: skip
def test_settings_that_a_new_training_cannot_have(changes: dict[str, object], word: str, data: ImageData) -> None:
    """Trainings of earlier versions with them can still be resumed."""
    with pytest.raises(UserError, match=word):
        check_asked(TrainConfig(**changes))
    with pytest.raises(UserError, match=word):
        fit(TINY, data, epochs=1, progress=False, method="deterministic", **changes)
    check_training(TrainConfig(**changes))


def test_under_mean_field_every_pass_counts(data: ImageData) -> None:
    config = with_defaults("mean-field", CONFIG)
    run = trainer(data, config=replace(config, train=replace(CONFIG.train, pilot_fraction=1.0)), self_distillation=0.8)
    assert run.fit().history[-1]["self_distillation"] != 0


def test_names_that_contradict_the_settings() -> None:
    with pytest.raises(UserError, match="regmixup of `regularise` sets `mix` to regmixup, and it is cutmix"):
        regularised(TrainConfig(mix="cutmix"), ["regmixup"])
    with pytest.raises(UserError, match=r"ttm of `regularise` sets `distillation_power` to 0\.1, and it is 0\.5"):
        regularised(TrainConfig(distillation_power=0.5), ["ttm"])
    assert regularised(TrainConfig(mix="mixup", mix_alpha=1.0), ["mixup:0.5"]).mix_alpha == 0.5


@pytest.mark.parametrize("name", ["feature_entropy", "rationale"])
def test_blocks_are_computed_again_beside_terms_of_the_features(name: str, data: ImageData, monkeypatch) -> None:
    again, used = vit.checkpoint, []
    monkeypatch.setattr(vit, "checkpoint", lambda *args, **kwargs: used.append(0) or again(*args, **kwargs))
    one, two = (
        trainer(data, epochs=1, checkpoint_activations=flag, **{name: 0.1}).fit().history for flag in (False, True)
    )
    assert used and one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"self_distillation": 0.5, "mix": "mixup"}, "mix"), ({"self_distillation": 1.5}, "at most 1"),
        ({"self_distillation": 0.5, "balance": "logit"}, "balance"), ({"logit_penalty": -1.0}, "negative"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_training(TrainConfig(**changes))


def test_the_command_line_names_them(capsys, tmp_path: Path) -> None:
    from inference.train import main

    words = ["--dataset", "digits", "--preset", "digits", "--out", str(tmp_path / "r"), "--regularise"]
    refuses(capsys, lambda: main([*words, "nope"]), "unknown regulariser", "attention-entropy")
    assert not (tmp_path / "r").exists()
    assert set(METHODS) >= {"ising"}


def test_a_strength_of_ones_own_is_not_overridden_unasked() -> None:
    with pytest.raises(
        UserError, match=r"logit-penalty of `regularise` would set `logit_penalty` to 0\.1, and it is 0\.5"
    ):
        regularised(TrainConfig(logit_penalty=0.5), ["logit-penalty"])
    with pytest.raises(UserError, match=r"mixup of `regularise` would set `mix_alpha` to 0\.2, and it is 0\.0"):
        regularised(TrainConfig(mix_alpha=0.0), ["mixup"])
    assert regularised(TrainConfig(logit_penalty=0.5), ["logit-penalty:0.3"]).logit_penalty == 0.3
    assert regularised(TrainConfig(logit_penalty=0.1), ["logit-penalty"]).logit_penalty == 0.1
