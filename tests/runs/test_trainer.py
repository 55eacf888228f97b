"""Training: phases, learning, resuming, and stopping when the numbers go wrong."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pyro
import pytest
import torch
from helpers import CONFIG, TINY, product, tensors, trainer

from pyro_isingvit import IsingViT, draw_predictive, fit, load_data, load_run
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import IsingConfig, ViTConfig
from pyro_isingvit.data.batches import batches
from pyro_isingvit.ising.coupling import COUPLINGS
from pyro_isingvit.ising.curvature import SALIENCY
from pyro_isingvit.ising.layout import GRANULARITIES
from pyro_isingvit.methods.registry import PAPER_ISING, PAPER_TRAIN
from pyro_isingvit.runs.optimiser import halving_factor, learning_rate_factor
from pyro_isingvit.runs.trainer import Trainer, TrainingDiverged

MODES = ("likelihood_guided", "learned", "hybrid")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", train_size=60)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scale", ["learned", "shared", "curvature"])
def test_it_learns(data, granularity: str, scale: str) -> None:
    ising = IsingConfig(granularity=granularity, posterior_scale=scale, update_every=2, target_retention=0.6)
    run = fit(IsingViT.for_data(data, TINY, ising), data, epochs=40, batch_size=10, lr=1e-2, seed=1, progress=False)
    mean = draw_predictive(run, data.test.images, 10).mean
    assert (mean.argmax(-1) == data.test.labels).float().mean() >= 0.8  # chance is a third
    assert run.history[-1]["nll"] < run.history[0]["nll"]


def test_phases_and_their_masks(data) -> None:
    t = trainer(data, finetune_epochs=2)
    run = t.fit()
    assert [r["phase"] for r in run.history] == ["pilot"] * 2 + ["ising"] * 4 + ["finetune"] * 2
    assert run.history[1]["retention"] == pytest.approx(1.0) and run.history[1]["mask_kl"] == pytest.approx(0, abs=1e-3)
    assert run.history[4]["retention"] < 0.95 and run.history[4]["mask_kl"] > 0
    final = torch.cat([run.guide.retention(name).flatten() for name in run.guide.layout.sites])
    assert ((final < 1e-6) | (final > 1 - 1e-6)).all()


def test_the_record_of_an_epoch_adds_up(data) -> None:
    run = trainer(data).fit()
    for record in run.history:
        assert {"val_accuracy", "val_nll", "val_ece", "lr", "retention", "pruned_fraction"} <= set(record)
        assert all(math.isfinite(v) for v in record.values() if not isinstance(v, str))
        scale = 1 / run.guide.kappa_weights / len(data.train)
        parts = record["nll"] + scale * (record["weight_kl"] + record["mask_kl"])
        assert record["loss"] == pytest.approx(parts, rel=0.2)  # parts: the steps at which the masks were updated


def test_validation_part_may_be_empty(data) -> None:
    empty = replace(data, val=replace(data.val, images=data.val.images[:0], labels=data.val.labels[:0]))
    assert "val_nll" not in trainer(empty).fit().history[-1]


def test_same_seed_same_run_and_another_seed_another(data) -> None:
    first, again, other = (trainer(data, seed=seed).fit() for seed in (1, 1, 2))
    ours, theirs = tensors(first.guide), tensors(again.guide)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not torch.equal(first.guide.loc["qkv"], other.guide.loc["qkv"])


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (1, {}), (2, {}), (5, {}), (3, {"augment": "randaugment", "mix": "cutmix"}),
        (1, {"augment": "crop-flip", "mix": "mixup", "engine": "pyro"}),
        (3, {"augment": "crop", "margin": 1, "mix": "regmixup", "label_smoothing": 0.1, "token_masking": 0.5}),
        (1, {"scale": "curvature"}), (4, {"scale": "curvature"}),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, stop: int, changes: dict) -> None:
    ising = replace(CONFIG.ising, posterior_scale=changes.pop("scale", CONFIG.ising.posterior_scale))
    changes["config"] = replace(CONFIG, ising=ising)
    whole = trainer(data, tmp_path / "whole", **changes).fit()
    broken = trainer(data, tmp_path / "broken", **changes)

    def stop_after(at: Trainer) -> None:
        if at.epoch == stop:
            raise KeyboardInterrupt

    broken.on_epoch = stop_after
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    torch.manual_seed(99)
    resumed = trainer(data, tmp_path / "broken", **changes)
    resumed.restore()
    assert resumed.epoch == stop
    run = resumed.fit()
    for module in ("model", "guide"):
        ours, theirs = tensors(getattr(run, module)), tensors(getattr(whole, module))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert run.history == whole.history
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


def test_saved_and_reloaded_run_predicts_bit_identically(data, tmp_path) -> None:
    run = trainer(data, tmp_path).fit()
    again = load_run(tmp_path)
    assert again.config == run.config and again.history == run.history
    expected = draw_predictive(run, data.test.images, 5).probs
    assert torch.equal(draw_predictive(again, data.test.images, 5).probs, expected)


def test_nan_stops_with_the_cause_and_keeps_the_last_good_epoch(data, tmp_path) -> None:
    t = trainer(data, tmp_path)

    def poison(at: Trainer) -> None:
        if at.epoch == 3:
            with torch.no_grad():
                at.run.guide.log_scale["fc1"].fill_(float("nan"))

    t.on_epoch = poison
    with pytest.raises(TrainingDiverged, match=r"epoch 4, step 9: the weight KL.*after epoch 3 is kept"):
        t.fit()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 3
    assert all(torch.isfinite(value).all() for value in state["guide"].values() if isinstance(value, torch.Tensor))


def test_extreme_learning_rate_is_caught_or_survived(data) -> None:
    try:
        run = trainer(data, lr=1e4).fit()
        assert math.isfinite(run.history[-1]["loss"])
    except TrainingDiverged as error:
        assert "Lower `lr`" in str(error)


def test_resume_with_other_data_is_refused(data, tmp_path) -> None:
    trainer(data, tmp_path).fit()
    fewer = replace(data, train=replace(data.train, images=data.train.images[:-3], labels=data.train.labels[:-3]))
    with pytest.raises(UserError, match="other images"):
        trainer(fewer, tmp_path).restore()


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"clip_norm": -1.0}, {"pilot_fraction": 2.0},
        {"finetune_epochs": -1}, {"samples": 0}, {"augment": "flip"}, {"mix": "both"}, {"mix_alpha": 0.0},
        {"mix_alpha": 2e3}, {"margin": -1}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"token_masking": 1.0},
        {"token_masking": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(data, setting: dict) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        trainer(data, **setting)


def test_training_leaves_pyro_as_it_was(data) -> None:
    before = pyro.settings.get()
    trainer(data, epochs=1).fit()
    assert pyro.settings.get() == before and not pyro.get_param_store()


def test_unknown_setting_is_named(data) -> None:
    with pytest.raises(UserError, match="epoch_count"):
        fit(IsingViT.for_data(data, TINY), data, epoch_count=3)


def test_learning_rate_rises_falls_and_starts_again_to_finetune() -> None:
    factors = [learning_rate_factor(step, 80, 100, 10, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1.0) and factors[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[10:80]))
    assert factors[79] < 0.01 and factors[80] == pytest.approx(0.1) and factors[99] < 0.01
    assert learning_rate_factor(100, 80, 100, 10, 0.1) == 0 == learning_rate_factor(80, 80, 80, 10, 0.1)  # the end


def test_batches_cover_the_data_once_and_depend_on_seed_and_epoch(data) -> None:
    def labels(seed: int, epoch: int):
        return torch.cat([y for _, y, _ in batches(data.train, 16, seed, epoch)])

    assert [len(y) for _, y, _ in batches(data.train, 16, 0, 0)] == [16, 16, 16, 12]
    assert torch.equal(labels(0, 1).bincount(), data.train.labels.bincount())
    assert torch.equal(labels(0, 1), labels(0, 1)) and not torch.equal(labels(0, 1), labels(0, 2))


def test_batches_say_which_rows_they_are(data) -> None:
    for images, labels, rows in batches(data.train, 16, 0, 0):
        assert torch.equal(images, data.train.images[rows]) and torch.equal(labels, data.train.labels[rows])


def test_on_epoch_is_called_when_the_epoch_is_kept(data, tmp_path) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(at: Trainer) -> None:
        kept = load_checkpoint(tmp_path / "checkpoint.pt")["epoch"]
        seen.append((at.epoch, kept, len(at.run.history)))

    t = trainer(data, tmp_path, epochs=3)
    t.on_epoch = look
    t.fit()
    assert seen == [(1, 1, 1), (2, 2, 2), (3, 3, 3)] and len(t.epoch_seconds) == 3


def test_bf16_trains(data) -> None:
    run = trainer(data, precision="bf16").fit()
    assert math.isfinite(run.history[-1]["loss"])
    assert all(p.dtype == torch.float32 for p in run.guide.parameters())


def test_paper_method_trains(data) -> None:
    config = replace(CONFIG, ising=PAPER_ISING, train=replace(PAPER_TRAIN, epochs=4, device="cpu"))
    run = trainer(data, config=config).fit()
    last = run.history[-1]
    assert last["loss"] == pytest.approx(last["nll"], rel=0.5)  # no KL in the loss
    assert [halving_factor(epoch) for epoch in (0, 19, 20, 40, 60)] == [1.0, 1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_target_retention_is_met_at_the_end(data, target: float) -> None:
    run = fit(
        IsingViT.for_data(data, TINY, IsingConfig(target_retention=target, update_every=1)), data, epochs=40,
        batch_size=20, progress=False,
    )  # fmt: skip
    assert run.mask_summary()["retention_mean"] == pytest.approx(target * run.guide.max_keep, abs=0.02)


@pytest.mark.parametrize(
    ("granularity", "mode", "coupling", "saliency"), product(list(GRANULARITIES), MODES, list(COUPLINGS), SALIENCY)
)
def test_no_combination_gives_nan_on_digits(digits, granularity, mode, coupling, saliency) -> None:
    tiny = ViTConfig(patch_size=4, width=8, heads=2, depth=1, mlp_ratio=2)
    ising = IsingConfig(granularity, mode, saliency, coupling, update_every=2)
    run = fit(IsingViT.for_data(digits, tiny, ising), digits, epochs=3, batch_size=20, progress=False, lr=5e-3)
    assert all(math.isfinite(record[key]) for record in run.history for key in ("loss", "nll", "mask_kl", "val_nll"))
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_a_layer_whose_masks_all_drop_leaves_the_signal_alone(data) -> None:
    run = fit(IsingViT.for_data(data, TINY), data, epochs=2, batch_size=20, progress=False)
    for kind in ("qkv", "attn_out", "fc1", "fc2"):
        run.guide.field(kind)[1] = -20.0
    assert run.dropped_layers() == [(kind, 1) for kind in ("qkv", "attn_out", "fc1", "fc2")]
    probs = draw_predictive(run, data.test.images, 5).probs
    assert torch.isfinite(probs).all() and probs.std(1).mean() > 1e-4  # predictions still depend on the image
    run.guide.update(run.model)  # nor does an update break on it
    assert all(torch.isfinite(run.guide.logits(name)).all() for name in run.guide.layout.sites)


def test_shrinkage_sets_the_decay_of_every_step(data) -> None:
    long, short = (trainer(data, shrinkage=1.5, epochs=epochs, finetune_epochs=0) for epochs in (8, 4))
    decays = [max(group["weight_decay"] for group in each.optimizer.param_groups) for each in (long, short)]
    assert decays[0] == pytest.approx(decays[1] / 2, rel=0.1)
    with pytest.raises(UserError, match="`shrinkage` must not be negative"):
        trainer(data, shrinkage=-1.0)
    with pytest.raises(UserError, match="`seed` must not be negative"):
        trainer(data, seed=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is something to look for")
def test_without_a_gpu_no_step_looks_for_one(data, monkeypatch) -> None:
    looks: list[None] = []
    fit(IsingViT.for_data(data, TINY), data, epochs=1, progress=False)  # the first training imports Fabric
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as that import leaves it
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: looks.append(None) or -1)
    made = trainer(data, epochs=3, batch_size=10)
    looks.clear()
    made.fit()
    assert not looks
