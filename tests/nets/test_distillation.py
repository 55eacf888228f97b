"""Distillation as a training term: its formula by hand, its teachers, every method and engine, resuming, processes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import ranks, script
from helpers import CONFIG, INFO, refuses, resumed_like_whole, trainer
from torch import Tensor
from torch.nn import functional as F

from pyro_isingvit import TrainedRun, fit, load_run
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.earlier import EARLIER
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.distillation import distillation
from pyro_isingvit.nets.penalties import Penalties, Seen
from pyro_isingvit.nets.view import View
from pyro_isingvit.runs.checks import check_training
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import IN_MEMORY, Teacher, mean_prediction
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.sharing.names import shared_config

VIT = ViTConfig(patch_size=2, width=8, heads=2, depth=1, mlp_ratio=2)
SMALL = [
    "--dataset", "digits", "--train-size", 88, "--depth", 1, "--width", 8, "--epochs", 3, "--samples", 2,
    "--val-samples", 2, "--batch-size", 32, "--update-every", 2, "--device", "cpu", "--rate-rule", "uniform",
]  # fmt: skip


@pytest.fixture
def teacher(data: ImageData) -> Run:
    return trainer(data, config=replace(CONFIG, vit=VIT), epochs=2, seed=5).fit()


def taught(teachers: list[Run], config: RunConfig = CONFIG):
    """A trainer with teachers, as ``helpers.trainer`` makes one without."""

    def make(data: ImageData, folder: Path | None = None, **train: object) -> Trainer:
        settings = {"distillation": 0.5, **train}
        changed = replace(config, train=replace(config.train, **settings))
        return Trainer(changed, data, folder, progress=False, teachers=teachers)

    return make


# The term -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("power", [0.1, 1.0, 2.0])
def test_by_hand_with_samples_and_weighted_images(power: float, weighted: bool) -> None:
    logits, told = torch.randn(2, 4, 3), torch.rand(4, 3).softmax(-1)
    labels = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 0], [0.2, 1.0, 0.8]])
    value = distillation(logits, told, labels, power, weighted)
    for s in range(2):
        each = []
        for i in range(4):
            total = sum(float(t) ** power for t in told[i])
            q = [float(t) ** power / total for t in told[i]]
            p = logits[s, i].softmax(-1).tolist()
            kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
            each.append((total if weighted else 1.0) * kl * float(labels[i].sum()))
        assert float(value[s]) == pytest.approx(sum(each) / 4, rel=1e-5)


@pytest.mark.parametrize("power", [0.1, 1.0])
def test_a_student_that_agrees_has_no_gradient(power: float) -> None:
    told = torch.randn(5, 4).softmax(-1)
    logits = (power * told.log()).requires_grad_()
    value = distillation(logits, told, torch.zeros(5, dtype=torch.long), power, weighted=True)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(value.detach().abs()) < 1e-6 and float(gradient.abs().max()) < 1e-7


def test_the_gradient_with_power_1_is_that_of_the_mixed_label() -> None:
    """Of CE + beta KL, p - y + beta (p - t); certain teachers are no trouble."""
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, 1])
    told = torch.stack([torch.tensor([1.0, 0, 0, 0]), *torch.rand(2, 4).softmax(-1)])
    term = Penalties(TrainConfig(distillation=0.7), 3, 4)
    term.told = told
    (F.cross_entropy(logits, labels) + term.terms(Seen(logits, labels))["distillation"]).backward()
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, (p - F.one_hot(labels, 4) + 0.7 * (p - told)) / 3)


def test_a_term_without_a_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="needs a teacher"):
        Penalties(TrainConfig(distillation=1.0), 3, 4).terms(Seen(torch.zeros(2, 4), torch.zeros(2).long()))


# Teachers -------------------------------------------------------------------------------------------------------------


def test_the_target_is_the_mean_over_teachers_on_the_views_of_the_student(data, teacher: Run, monkeypatch) -> None:
    other = trainer(data, config=replace(CONFIG, method="ensemble"), epochs=1).fit()
    seen: list[tuple[Tensor, Tensor]] = []
    call = Teacher.__call__

    def spy(self: Teacher, x: Tensor, step: int) -> Tensor:
        state = torch.get_rng_state()
        told = call(self, x, step)
        assert torch.equal(torch.get_rng_state(), state)  # what is drawn otherwise stays as it is
        with torch.random.fork_rng():
            torch.manual_seed(3 * 1_000_003 + step)
            each = [mean_prediction(run, x, data.info, 4, step) for run in (teacher, other)]
        torch.testing.assert_close(told, (each[0] + each[1]) / 2)
        seen.append((x, told))
        return told

    monkeypatch.setattr(Teacher, "__call__", spy)
    taught([teacher, other])(data, epochs=2, augment="crop", seed=3, teacher_draws=4).fit()
    known = data.info.normalise(data.train.images[:])
    assert len(seen) == 6 and not torch.equal(seen[0][1], seen[3][1])
    assert not all(bool((x[:, None] == known[None]).flatten(2).all(2).any(1).all()) for x, _ in seen)


@pytest.mark.parametrize(("members", "draws"), [(5, 2), (3, 2), (2, 5), (1, 2)])
def test_every_member_of_a_teacher_is_asked_equally_often(members: int, draws: int) -> None:
    asked = []

    def draw_networks(count: int, first: int):
        asked.extend((first + i) % members for i in range(count))
        return lambda x: torch.zeros(count, len(x), 2)

    run = SimpleNamespace(
        info=INFO, max_draws=members, draw_networks=draw_networks, temperature=torch.ones(()), device="cpu"
    )
    for step in range(members):
        mean_prediction(run, torch.zeros(4, 1, 4, 4), INFO, draws, step)
    assert len({asked.count(member) for member in range(members)}) == 1


def test_a_weight_that_is_next_to_nothing_changes_no_bit(data, teacher: Run) -> None:
    """The teacher takes no random number away: with beta -> 0 it is the cross entropy."""
    with_one = taught([teacher])(data, distillation=1e-30).fit().history
    without = trainer(data).fit().history
    assert [{k: v for k, v in record.items() if k != "distillation"} for record in with_one] == without


def test_mixed_states_have_mixed_targets(data, teacher: Run) -> None:
    views = taught([teacher])(data, mix="manifold").views
    x = data.info.normalise(data.train.images[:6])
    view = views.draw(x, 7)
    assert view.mix is not None and view.told is not None
    torch.testing.assert_close(view.told, view.mix.labels(views.teacher(x, 7)))
    parts = view[slice(2, 6)].chunk(2)
    assert torch.equal(torch.cat([part.told for part in parts]), view.told[2:6])
    assert all(part is view.mix for part in (each.mix for each in parts))
    assert View()[slice(2)].chunk(3) == [View()] * 3


@pytest.mark.parametrize(("change", "words"), [
    ({"classes": ("a", "b", "d")}, "other classes"), ({"height": 8}, "reads images"), ({"kind": "uint16"}, "uint16"),
    ({"low": (0.1,), "high": (0.9,)}, "`intensity`"),
])  # fmt: skip
def test_teachers_of_other_images_are_refused_by_name(data, teacher: Run, change: dict, words: str) -> None:
    teacher.method.info = replace(teacher.info, **change)
    with pytest.raises(UserError, match=f"the teacher ising .*{words}"):
        taught([teacher])(data)


def test_what_cannot_be(data, teacher: Run) -> None:
    for teachers, settings, words in [
        ([], {}, "`distillation` needs a trained run"), ([teacher], {"distillation": 0.0}, "`teacher` is for"),
        ([teacher], {"balance": "loss"}, "shares of the classes"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            taught(teachers)(data, **settings)
    with pytest.raises(UserError, match="is the network that is trained"):
        fit(teacher.model, data, teacher=teacher, distillation=1.0, progress=False)
    for settings, words in (({"distillation_power": 0.0}, "positive"), ({"teacher_draws": 0}, "at least 1")):
        with pytest.raises(UserError, match=words):
            check_training(TrainConfig(**settings))


def test_teachers_that_balance_as_the_student_does(data) -> None:
    equal = trainer(data, balance="logit", epochs=1).fit()
    run = taught([equal])(data, balance="loss", epochs=1).fit()
    assert math.isfinite(run.history[-1]["distillation"])


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_a_teacher(data, teacher: Run, method: str) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    train = replace(METHODS[method].train, epochs=2, finetune_epochs=1, batch_size=20, val_samples=1, device="cpu")
    config = replace(CONFIG, method=method, ising=METHODS[method].ising, train=train)
    run = taught([teacher], config)(data).fit()
    assert all(math.isfinite(record["loss"]) and record["distillation"] > 0 for record in run.history)


def test_a_student_comes_closer_to_its_teacher(data, teacher: Run) -> None:
    plain = replace(CONFIG, method="deterministic")
    x = data.info.normalise(data.test.images[:])
    with torch.random.fork_rng():
        wanted = mean_prediction(teacher, x, data.info, 100, 0)
    distances = []
    for run in (
        taught([teacher], plain)(data, distillation=20.0, epochs=12).fit(),
        trainer(data, None, plain, epochs=12).fit(),
    ):
        distances.append(float(F.kl_div(mean_prediction(run, x, data.info, 1, 0).log(), wanted, reduction="batchmean")))
    assert distances[0] < 0.5 * distances[1]


def test_both_engines_agree(data, teacher: Run) -> None:
    both = [taught([teacher])(data, epochs=2, engine=engine, draws=1).fit().history for engine in ("fused", "pyro")]
    for fused, plain in zip(*both, strict=True):
        for name in ("loss", "distillation"):
            assert fused[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6)


TTM = {"distillation": 45.0, "distillation_power": 0.1, "distillation_weighted": False}


@pytest.mark.parametrize("more", [{}, TTM])
def test_half_precision_is_finite(data, teacher: Run, more: dict) -> None:
    history = taught([teacher])(data, precision="bf16", **more).fit().history
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["distillation"]) for record in history)


@pytest.mark.parametrize("more", [{}, TTM])
@pytest.mark.parametrize("draws", [1, 2, "image"])
def test_micro_batches_leave_the_loss_as_it_is(data, teacher: Run, draws, more: dict) -> None:
    config = replace(CONFIG, ising=replace(CONFIG.ising, granularity="unit"))
    settings = {"draws": draws, "rate_rule": "uniform", "augment": "crop", **more}
    whole, parts = (taught([teacher], config)(data, accumulate=n, **settings).fit().history for n in (1, 2))
    for record, expected in zip(parts, whole, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["distillation"] == pytest.approx(expected["distillation"], rel=1e-3)


@pytest.mark.parametrize("more", [{}, TTM])
def test_resumed_equals_uninterrupted_bit_for_bit(data, teacher: Run, tmp_path, more: dict) -> None:
    resumed_like_whole(data, tmp_path, taught([teacher]), augment="crop", mix="mixup", **more)


def test_a_teacher_that_has_changed_since_is_refused(data, teacher: Run, tmp_path) -> None:
    made = taught([teacher])(data, tmp_path, epochs=2)
    made.fit()
    digest = made.session.taught
    taught([teacher])(data, tmp_path, epochs=2).restore()
    with torch.no_grad():
        next(teacher.method.parameters()).view(-1)[0] += 1e-3
    changed = taught([teacher])(data, tmp_path, epochs=2)
    assert len(digest) == 32 != changed.session.taught
    with pytest.raises(UserError, match=r"a `teacher` has other weights .*bring them back"):
        changed.restore()


# By name --------------------------------------------------------------------------------------------------------------


def test_in_python_the_settings_keep_the_teachers_name(data, teacher: Run, tmp_path) -> None:
    run = fit(VIT, data, teacher=teacher, distillation=1.0, epochs=1, progress=False)
    assert run.config.teacher == (IN_MEMORY,)
    kept = TrainedRun.of(teacher, {}, None)
    kept.folder = tmp_path / "far" / "teacher"
    run = fit(VIT, data, method="dropout", teacher=[kept, teacher], distillation=1.0, epochs=1, progress=False)
    assert run.config.teacher == (str(kept.folder), IN_MEMORY)
    assert RunConfig.from_json(run.config.to_json()) == run.config
    assert shared_config(run.config).teacher == ("teacher", IN_MEMORY)  # a shared run tells no path
    raw = json.loads(run.config.to_json())
    del raw["teacher"]  # as earlier versions wrote it
    assert RunConfig.from_json(json.dumps(raw)).teacher == () and "teacher" not in EARLIER["train"]
    for wrong in ("run", [1], None):
        with pytest.raises(UserError, match="`teacher` cannot be"):
            RunConfig.from_json(json.dumps(raw | {"teacher": wrong}))


def test_the_command_line(tmp_path: Path, capsys) -> None:
    """Trains, resumes and refuses; two processes train the run of one."""
    first, second = tmp_path / "teacher", tmp_path / "student"
    assert script("inference.train", *SMALL, "--out", first).returncode == 0
    words = [*SMALL, "--regularise", "distillation:0.7", "--teacher", first, first]
    done = script("inference.train", *words, "--out", second)
    assert done.returncode == 0, done.stderr
    run = load_run(second)
    assert run.config.teacher == (str(first), str(first)) and run.history[-1]["distillation"] > 0
    codes = [process.wait() for process in ranks(2, "inference.train", *words, "--out", tmp_path / "two")]
    assert not any(done.returncode for done in codes), codes
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (tmp_path / "two", second))
    for record, expected in zip(ours["history"], theirs["history"], strict=True):
        assert record["distillation"] == pytest.approx(expected["distillation"], rel=1e-3)
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert torch.equal(ours["rng"], theirs["rng"])
    assert script("inference.train", "--resume", second).returncode == 0
    from inference.train import main

    out = ["--out", str(tmp_path / "no")]
    small = [str(word) for word in SMALL]
    refuses(capsys, lambda: main([*small, *out, "--teacher", str(first)]), "--teacher is for", "distillation")
    refuses(capsys, lambda: main([*small, *out, "--regularise", "ttm"]), "--distillation needs", "--teacher")
    refuses(capsys, lambda: main([*small, *out, "--regularise", "ttm", "--teacher", "nowhere"]), "nowhere")
    assert not (tmp_path / "no").exists()
