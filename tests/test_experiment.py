"""The door: what ``fit`` takes, and what the run that it gives can do."""

import json
import pickle
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import digest
from helpers import INFO, QUICK_FIT, TINY, write_npz
from kills import untimed

from pyro_isingvit import (
    BaselineConfig,
    CompactViT,
    DataConfig,
    ImageData,
    IsingConfig,
    IsingViT,
    RunConfig,
    TrainConfig,
    UserError,
    compact,
    fit,
    load_data,
    load_run,
)
from pyro_isingvit.core import settings as settings_module
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.data.images import Images
from pyro_isingvit.experiment import train_run
from pyro_isingvit.methods.registry import METHODS, READS, epochs_in_all
from pyro_isingvit.predictive.datatree import load_datatree
from pyro_isingvit.pruning.choose import calibrated
from pyro_isingvit.runs.folder import alone_in
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.starts import load_start

KEPT = ["checkpoint.previous.pt", "checkpoint.pt", "config.json", "metrics.jsonl"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ising-paper"])
def test_every_method_is_trained_with_its_own_defaults_and_kept(images, method: str, tmp_path: Path) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    run = fit(TINY, images, method=method, members=2, **{**QUICK_FIT, "epochs": 1})
    row = METHODS[method]
    assert run.config.ising == row.ising
    assert run.config.train == replace(
        row.train,
        **{k: v for k, v in QUICK_FIT.items() if k != "progress"}
        | {"epochs": 1}
        | epochs_in_all(row.train, {"epochs": 1}),
    )
    metrics = run.evaluate(images.test)
    assert 0 <= metrics["accuracy"] <= 1 and metrics["method"] == method
    again = load_run(run.save(tmp_path / "run"))
    assert torch.equal(again.predict(images.test.images, 3).probs, run.predict(images.test.images, 3).probs)
    if run.has_masks and method != "mean-field":
        assert isinstance(again.prune(keep=0.5), CompactViT)
    else:
        with pytest.raises(UserError, match=method):
            again.prune(keep=0.5)


def test_it_computes_what_the_trainer_computes(images) -> None:
    run = fit(TINY, images, method="dropout", drop_rate=0.3, **QUICK_FIT)
    train = replace(METHODS["dropout"].train, **{key: value for key, value in QUICK_FIT.items() if key != "progress"})
    config = RunConfig(method="dropout", vit=TINY, train=train, baseline=BaselineConfig(drop_rate=0.3))
    again = Trainer(config, images, None, progress=False).fit()
    for (name, one), two in zip(run.method.state_dict().items(), again.method.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_models_and_their_settings(images) -> None:
    quick = {**QUICK_FIT, "epochs": 1}
    assert fit("digits", images, **quick).config.preset == "digits"
    model = IsingViT(TINY, INFO, IsingConfig(delta=0.9))
    run = fit(model, images, **quick)
    assert run.model is model and run.config.ising.delta == 0.9 and run.config.preset == "custom"
    mixed = fit(TINY, images, ising=IsingConfig(delta=0.9), train=TrainConfig(seed=3), J=0.5, **quick)
    assert (mixed.config.ising.delta, mixed.config.ising.J, mixed.config.train.seed) == (0.9, 0.5, 3)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("huge", {}, "unknown `preset` 'huge'"),
        (TINY, {"method": "magic"}, "unknown `method` 'magic'"),
        (TINY, {"method": "dropout:0.1"}, "give 'dropout', and the number as `drop_rate`"),
        (7, {}, "`model` must be"),
        (TINY, {"epoch": 3, "kepe": 1}, "`epoch`, `kepe`"),
        (TINY, {"epochs": 0}, "`epochs`"),
        (TINY, {"epochs": "many"}, "epochs"),
        ("ising model", {"ising": IsingConfig()}, "`ising`"),
        ("ising model", {"delta": 0.5}, "`delta`"),
        ("ising model", {"method": "dropout"}, "`model`"),
    ],
)
def test_what_fit_refuses_is_named(images, model, settings: dict, words: str) -> None:
    model = IsingViT(TINY, INFO) if model == "ising model" else model
    with pytest.raises(UserError, match=words):
        fit(model, images, **QUICK_FIT | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"posterior_scale": "per_weight"}, "posterior_scale"), ({"kappa_mask": "data"}, "kappa_mask"),
        ({"empirical_tau_1": "no"}, "empirical_tau_1"), ({"J": float("nan")}, "J"), ({"tau_1": "1"}, "tau_1"),
        ({"max_keep": "off"}, "max_keep"), ({"update_every": 2.5}, "update_every"), ({"members": "3"}, "members"),
        ({"target_retention": np.float32(0.5)}, "target_retention"), ({"teacher": ["runs/a"]}, "teacher"),
        ({"noise": "activations", "draws": 8}, "draws"), ({"granularity": 3}, "granularity"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_named(images, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(TINY, images, **{**QUICK_FIT, **settings})


@pytest.mark.parametrize("change", [{"width": "8"}, {"pool": "avg"}, {"depth": np.int64(2)}, {"activation": "relu"}])
def test_shapes_of_another_kind_are_named(images, change: dict) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        fit(replace(TINY, **change), images, **QUICK_FIT)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_lm_has_rules_for_gelu_alone(images, activation: str) -> None:
    with pytest.raises(UserError, match=f"no rule for `activation` {activation}"):
        fit(replace(TINY, activation=activation), images, saliency="lm", **QUICK_FIT)


def test_a_model_is_for_data_as_it_was_made_for_and_begins_anew(images) -> None:
    model = IsingViT(TINY, replace(INFO, classes=("a", "b", "c", "d")))
    with pytest.raises(UserError, match=r"made for images .* of 4 classes; `data` has others"):
        fit(model, images, **QUICK_FIT)
    model = IsingViT(TINY, INFO)
    model.temperature.fill_(2.5)
    for name in model.layout.sites:
        model.get_buffer(f"prior_logit_{name}").fill_(-3.0)
    model.tau_1("qkv").fill_(7.0)
    run = fit(model, images, **QUICK_FIT, calibrate=False)
    assert run.model is model and float(run.temperature) == 1.0
    assert float(model.tau_1("qkv").max()) == pytest.approx(run.config.ising.tau_1)


def test_numbers_of_numpy_and_paths_say_which_images(tmp_path: Path) -> None:
    data = load_data("digits", train_size=np.int64(60), val_fraction=np.float32(0.25), cache=tmp_path / "c")
    assert fit(TINY.__class__(4, 8, 2, 1), data, **{**QUICK_FIT, "epochs": 1}).config.data.train_size == 60


def test_parts_of_the_settings_are_of_their_kind(images) -> None:
    with pytest.raises(UserError, match=r"`train` must be a TrainConfig, not {'epochs': 3}"):
        fit(TINY, images, train={"epochs": 3}, progress=False)


def test_fit_wants_image_data() -> None:
    with pytest.raises(UserError, match="`data` must be an ImageData, not tuple: use `load_data`"):
        fit(TINY, (torch.zeros(9, 1, 4, 4), torch.zeros(9)))  # type: ignore[arg-type]


def test_a_saved_run_finds_the_very_parts_again(tmp_path: Path) -> None:
    data = load_data("digits", train_size=60, val_fraction=0.2, seed=3)
    run = fit(TINY, data, epochs=1, seed=3, progress=False)
    source = load_run(run.save(tmp_path / "same")).config.data
    again = load_data(**asdict(source), seed=3)
    assert torch.equal(again.val.images[:], data.val.images[:]) and len(again.train) == 60
    other = fit(TINY, data, epochs=1, seed=4, progress=False)  # a script would divide the images with seed 4
    name = load_run(other.save(tmp_path / "other")).config.data.dataset
    with pytest.raises(UserError, match=r"unknown data set 'digits .divided with seed 3.'"):
        load_data(name)
    assert run.config.data.train_size == 60 and other.info.dataset == "digits"


# save, load_run, resume -----------------------------------------------------------------------------------------


def test_a_saved_run_is_what_training_into_a_folder_writes(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz")
    train = TrainConfig(**{key: value for key, value in QUICK_FIT.items() if key != "progress"})
    config = RunConfig("custom", data=DataConfig(source), vit=replace(TINY, patch_size=3), train=train)
    metrics = train_run(config, tmp_path / "script", progress=False)
    data = load_data(source)
    run = fit(config.vit, data, train=train, progress=False)
    assert run.save(tmp_path / "api") == tmp_path / "api" == run.folder
    assert names(tmp_path / "api") == KEPT
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("script", "api"))
    assert one.keys() == two.keys() and torch.equal(one["rng"], two["rng"]) and two["finished"]
    for part in ("model", "guide", "optimizer"):
        assert digest(one[part]) == digest(two[part])
    assert load_run(tmp_path / "api").history == load_run(tmp_path / "script").history
    judged = run.evaluate(data)
    assert untimed(judged) == untimed(metrics)
    run.save(tmp_path / "api")
    assert names(tmp_path / "api") == sorted([*KEPT, "metrics.json", "posterior.nc"]) == names(tmp_path / "script")
    assert list(json.loads((tmp_path / "api" / "metrics.json").read_text())) == list(metrics)
    again = train_run(run.config, tmp_path / "api", resume=True, progress=False)  # it is finished: evaluated again
    assert again["nll"] == metrics["nll"]


def test_what_was_given_in_memory_cannot_be_resumed_and_says_so(run, tmp_path: Path) -> None:
    run.save(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="in memory"):
        train_run(run.config, tmp_path / "run", resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_save_replaces_a_run_only_when_told(run, tmp_path: Path) -> None:
    run.save(tmp_path / "one")
    other = pickle.loads(pickle.dumps(run))
    other.folder = None
    (tmp_path / "one" / "notes.txt").write_text("mine")
    (tmp_path / "one" / "metrics.json").write_text("{}")  # of the run that is replaced
    with pytest.raises(UserError, match="`overwrite=True`"):
        other.save(tmp_path / "one")
    assert (tmp_path / "one" / "metrics.json").exists()
    other.history[0]["loss"] = -1.0
    other.save(tmp_path / "one", overwrite=True)
    assert names(tmp_path / "one") == sorted([*KEPT, "notes.txt"])
    assert load_run(tmp_path / "one").history[0]["loss"] == -1.0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run.save(tmp_path / "file")


def test_a_loaded_run_is_saved_elsewhere_whole(run, images, tmp_path: Path) -> None:
    run.evaluate(images.test)
    run.save(tmp_path / "one")
    loaded = load_run(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert loaded.folder == tmp_path / "one" and names(tmp_path / "two") == names(tmp_path / "one")
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in ("config.json", "metrics.jsonl", "metrics.json", "posterior.nc"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# evaluate, predict, prune ---------------------------------------------------------------------------------------


def test_evaluate_takes_any_labelled_images(run, images) -> None:
    whole = run.evaluate(images.test)
    assert whole["test_size"] == 30 and whole["train_size"] == 60 and whole["val_size"] == 15
    assert run.evaluation.metrics is whole and run.folder is None
    part, pixels = images.test, images.test.images[:]
    for labels in (part.labels, part.labels.numpy(), [INFO.classes[i] for i in part.labels.tolist()]):
        for given in (pixels, pixels[:, 0].numpy(), pixels.permute(0, 2, 3, 1), pixels.float() / 255):
            assert untimed(run.evaluate((given, labels))) == untimed(whole)
    assert untimed(run.evaluate(images)) == untimed(whole)
    few = run.evaluate((pixels[:9], part.labels[:9]), num_samples=2, seed=5)
    assert few["test_size"] == 9 and few["samples"] == 2
    assert run.evaluation.draws.probs.shape == (2, 9, 3)


def test_validation_images_are_those_of_training_while_they_are_known(run, images, tmp_path: Path) -> None:
    assert run.val is images.val or torch.equal(run.val.labels, images.val.labels)
    loaded = load_run(run.save(tmp_path / "run"))
    assert loaded.val is None
    without = loaded.evaluate(images.test)
    assert without["val_size"] == 0 and without["auroc_wrong_rel_u"] is None
    known = untimed(run.evaluate(images.test))
    assert untimed(loaded.evaluate(images.test, val=images.val)) == known
    assert untimed(loaded.evaluate(images)) == known


def test_validation_images_of_another_division_are_left_out(tmp_path: Path, caplog) -> None:
    """The run has learned from some of them: guarantees that rest on them would not hold."""
    config = {**QUICK_FIT, "epochs": 1, "seed": 3}
    own, other = (load_data("digits", train_size=200, seed=seed) for seed in (3, 0))
    loaded = load_run(fit(TINY, own, **config).save(tmp_path / "named"))
    assert loaded.evaluate(own)["val_size"] == len(own.val) and "not divided" not in caplog.text
    assert loaded.evaluate(other)["val_size"] == 0 and "not divided as for the run's training" in caplog.text
    assert loaded.evaluate(other, val=other.val)["val_size"] == len(other.val)
    made = np.random.default_rng(0).integers(0, 256, (90, 4, 4), np.uint8), [0, 1, 2] * 30
    own, other = (ImageData.from_arrays(*made, seed=seed) for seed in (3, 0))
    loaded = load_run(fit(TINY, own, **config).save(tmp_path / "arrays"))
    assert [loaded.evaluate(data)["val_size"] for data in (own, other)] == [len(own.val), 0]


def test_a_run_that_began_with_another_knows_its_division(tmp_path: Path) -> None:
    own, other = (load_data("digits", train_size=100, seed=seed) for seed in (3, 0))
    first = fit(TINY, own, **{**QUICK_FIT, "epochs": 1, "seed": 3}).save(tmp_path / "first")
    run = fit(load_start(str(first)), own, **{**QUICK_FIT, "epochs": 1, "seed": 3})
    loaded = load_run(run.save(tmp_path / "second"))
    assert [loaded.evaluate(data)["val_size"] for data in (own, other)] == [len(own.val), 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda d: (d.test.images[:, :, :3], d.test.labels), "`images`"),
        (lambda d: (d.test.images[:], d.test.labels[:5]), "`data`"),
        (lambda d: (d.test.images[:], ["z"] * 30), "'z'"),
        (lambda d: (d.test.images[:], d.test.labels + 1), "labels"),
        (lambda d: d.test.images, "`data`"),
        (lambda d: d.test.take(np.arange(0)), "no images"),
        (lambda d: replace(d.test, labels=torch.full((30,), -1)), "label"),
    ],
)
def test_what_cannot_be_judged_is_named(run, images, data, words) -> None:
    with pytest.raises(UserError, match=words):
        run.evaluate(data(images))
    assert run.evaluation is None


@pytest.mark.parametrize("seed", ["a", 1.5, 2**70, True])
def test_a_seed_is_a_whole_number(run, images, seed) -> None:
    with pytest.raises(UserError, match="`seed` must be a whole number"):
        run.predict(images.test.images[:2], seed=seed)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"method": None}, "`method` must be the name"), ({"method": 5}, "`method` must be the name"),
     ({"teacher": 5}, "`teacher` takes a trained run")],
)  # fmt: skip
def test_what_is_no_method_and_no_teacher(images, settings: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        fit(TINY, images, **settings)


@pytest.mark.parametrize("count", [3.0, 0, "5", True])
def test_a_number_of_draws_is_a_whole_one(run, images, count) -> None:
    with pytest.raises(UserError, match="`num_samples` must be a whole number and at least 1"):
        run.predict(images.test.images[:2], count)


def test_a_share_to_keep_is_a_number(run) -> None:
    with pytest.raises(UserError, match=r"`keep` must be a number strictly between 0 and 1, not '0.5'"):
        run.prune(keep="0.5")


def test_predictions_of_every_layout_are_the_same(run, images) -> None:
    pixels = images.test.images[:]
    draws = run.predict(pixels, 5, seed=2)
    assert draws.probs.shape == (5, 30, 3)
    for given in (pixels.numpy(), pixels[:, 0], pixels.permute(0, 2, 3, 1), (pixels / 255).numpy()):
        assert torch.equal(run.predict(given, 5, seed=2).probs, draws.probs)
    with pytest.raises(UserError, match="`images`"):
        run.predict(pixels.float())


def test_images_on_demand_are_read_a_chunk_at_a_time(run, images) -> None:
    asked: list[int] = []

    class OnDemand(Images):
        shape = images.test.images.shape

        def rows(self, index: torch.Tensor) -> torch.Tensor:
            asked.append(len(index))
            return images.test.images[index]

    draws = run.predict(OnDemand(), 2, chunk=10)
    assert torch.equal(draws.probs, run.predict(images.test.images, 2, chunk=10).probs)
    assert max(asked) == 10


def test_pruning_is_compact(run, images) -> None:
    from pyro_isingvit import compact

    small, same = run.prune(keep=0.4), compact(run, keep=0.4, val=images.val)
    assert small.config == same.config and float(small.temperature) == float(same.temperature)
    assert run.prune(threshold=0.3, form="bayes").config.form == "bayes"
    with pytest.raises(UserError, match="threshold"):
        run.prune(threshold=2.0)


# report ---------------------------------------------------------------------------------------------------------


def test_a_report_makes_a_folder_whole(run, images, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.evaluate"):
        run.report(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    page = run.report(tmp_path / "run", data=images)
    assert page == tmp_path / "run" / "report" / "index.html" and "<html" in page.read_text()
    assert names(tmp_path / "run") == sorted([*KEPT, "metrics.json", "posterior.nc", "report"])
    tree = load_datatree(tmp_path / "run" / "posterior.nc")
    assert tree["predictive_summary"].sizes["image_all"] == 30
    page.unlink()
    assert load_run(tmp_path / "run").report() == page and page.is_file()  # from what the folder holds


def test_a_report_does_not_replace_another_evaluation_unasked(run, images, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`folder`"):
        run.report(data=images)
    run.report(tmp_path / "run", data=images)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="`overwrite=True`"):
        run.report(data=images.val)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    run.report(data=images.val, overwrite=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_size"] == 15
    run.report()  # its own evaluation is there already


def test_a_copy_has_everything(run, images) -> None:
    run.evaluate(images.test)
    again = pickle.loads(pickle.dumps(run))
    assert again.evaluation.metrics == run.evaluation.metrics and len(again.val) == 15
    assert torch.equal(again.predict(images.test.images).probs, run.predict(images.test.images).probs)


def test_the_callers_random_numbers_go_on(images, tmp_path: Path) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    run = fit(TINY, images, **{**QUICK_FIT, "epochs": 1})
    load_run(run.save(tmp_path / "run"))
    pickle.loads(pickle.dumps(run))
    run.prune(keep=0.5)
    assert torch.equal(torch.rand(3), wanted)


def test_another_default_type_changes_nothing(images, tmp_path: Path) -> None:
    """Pyro's users often set float64."""
    run = fit(TINY, images, **QUICK_FIT)
    torch.set_default_dtype(torch.float64)
    try:
        again = fit(TINY, images, **QUICK_FIT)
        probs = again.predict(images.test.images, 3).probs
        copy = pickle.loads(pickle.dumps(again))
        assert torch.get_default_dtype() == torch.float64
        assert again.evaluate(images.test)["nll"] == run.evaluate(images.test)["nll"]
        again.save(tmp_path / "run")
        small = again.prune(keep=0.5)
        assert torch.equal(small.predict(images.test.images)[0], run.prune(keep=0.5).predict(images.test.images)[0])
        model = IsingViT(TINY, images.info)
        fit(model, images, **{**QUICK_FIT, "epochs": 1})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(probs, run.predict(images.test.images, 3).probs) and probs.dtype == torch.float32
    assert {p.dtype for p in copy.method.parameters()} == {torch.float32}


def test_validation_is_not_that_of_a_run_that_came_later(images, tmp_path: Path) -> None:
    run, other = (fit(TINY, images, seed=seed, **QUICK_FIT) for seed in (0, 1))
    run.evaluate(images)
    old = load_run(run.save(tmp_path / "run"))
    assert torch.allclose(old.validation().probs, run.validation().probs)
    other.evaluate(images)
    other.save(tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="is not as it was when the run was loaded"):
        old.validation()


def test_a_temperature_is_fitted_where_training_had_no_images_for_it(images) -> None:
    bare = replace(images, val=images.val.take(np.arange(0)))
    run = fit(TINY, bare, **{**QUICK_FIT, "max_keep": 0.98})
    found = run.evaluate(images.test, val=images.val)
    assert found["temperature"] == 1 and found["nll_calibrated"] != found["nll"]


def test_settings_that_a_method_does_not_read_are_told(images, caplog) -> None:
    fit(TINY, images, method="dropout", members=3, target_retention=0.3, **{**QUICK_FIT, "epochs": 1})
    assert "method dropout does not read `members`, `target_retention`" in caplog.text
    caplog.clear()
    fit(TINY, images, method="dropout", drop_rate=0.3, **{**QUICK_FIT, "epochs": 1})
    assert "does not read" not in caplog.text and "changes nothing" not in caplog.text
    fit(TINY, images, method="dropout", mix_alpha=0.3, teacher_draws=3, **{**QUICK_FIT, "epochs": 1})
    assert "`mix_alpha` changes nothing without `mix`" in caplog.text
    assert "`teacher_draws` changes nothing without `distillation`" in caplog.text


def test_which_method_reads_what_is_as_the_settings_say() -> None:
    """Every field's own text names the methods in front of its colon."""
    text = Path(settings_module.__file__).read_text()
    for name, readers in READS.items():
        said = re.search(rf'    {name}: [^\n]*\n    """([^"]*)"""', text)
        assert said and set(re.findall(r"[a-z0-9]+(?:-[a-z]+)*", said[1])) & METHODS.keys() == set(readers), name
    assert set(READS) == {each.name for each in fields(BaselineConfig)}


def test_few_updates_of_the_masks_are_told(images, caplog) -> None:
    few = {**QUICK_FIT, "epochs": 4, "pilot_fraction": 0.5, "update_every": 5}
    steps = 2 * -(-60 // QUICK_FIT.get("batch_size", 64))
    fit(TINY, images, **few)
    assert f"{-(-2 * steps // 5) - -(-steps // 5)} updates of the masks in the whole training" in caplog.text
    caplog.clear()
    fit(TINY, images, method="ising-ensemble", members=2, max_keep=0.9, **few)
    assert caplog.text.count("updates of the masks") == 1
    caplog.clear()
    for enough in ({"method": "dropout"}, {"mask_damping": 1.0}, {"mask_posterior": "learned", "max_keep": 0.9}):
        fit(TINY, images, **few, **enough)
    assert "updates of the masks" not in caplog.text


def test_lm_and_frozen_blocks_do_not_go_together(images, tmp_path: Path) -> None:
    start = load_start(fit(replace(TINY, depth=2), images, **{**QUICK_FIT, "epochs": 1}).save(tmp_path / "run"))
    with pytest.raises(UserError, match="`saliency` lm has no rule for blocks that stay"):
        fit(start, images, saliency="lm", frozen_blocks=1, bayesian_blocks=1, **QUICK_FIT)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "x.npz")
    train = TrainConfig(epochs=1, device="cpu", calibrate=False, samples=2)
    config = RunConfig(data=DataConfig(spec), vit=TINY, train=train, ising=IsingConfig(max_keep=0.98), preset="custom")
    train_run(config, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with alone_in(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(UserError, match="another process is training in"):
                train_run(config, tmp_path / "run", resume=resume, progress=False)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    train_run(config, tmp_path / "run", resume=True, progress=False)
    assert names(tmp_path / "run") == sorted([*KEPT, "metrics.json", "posterior.nc"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"epochs": 5}, (3, 2)), ({"epochs": 5, "finetune_epochs": 1}, (5, 1)), ({"epochs": np.int64(5)}, (3, 2)),
     ({"train": TrainConfig(epochs=2), "epochs": 3}, (3, 0))],
)  # fmt: skip
def test_epochs_are_those_in_all(settings: dict, expected: tuple[int, int]) -> None:
    data = load_data("digits", train_size=60)
    run = fit(TINY, data, method="ising-sparse", samples=2, device="cpu", progress=False, **settings)
    assert (run.config.train.epochs, run.config.train.finetune_epochs) == expected
    assert len(run.history) == sum(expected)


def test_cutting_takes_what_predict_and_evaluate_take(run, images) -> None:
    pixels, labels = images.val.images[:], images.val.labels
    expected = run.prune(keep=0.5, val=images.val, merge=images.train.images).state_dict()
    raw = images.train.images[:].permute(0, 2, 3, 1).numpy()
    for val in (images, (pixels, labels), (pixels[:, 0].numpy(), labels.tolist())):
        found = compact(run, keep=0.5, val=val, merge=raw).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match="`weighting` must be auto, slab or mean, not 'means'"):
        run.prune(keep=0.5, weighting="means")
    with pytest.raises(UserError, match=r"`val` must be a part of a data set, such as data\.val, not tuple"):
        calibrated(run.prune(keep=0.5), (pixels, labels))


@pytest.mark.parametrize("bad", [{"samples": 2.5}, {"chunk": 0}, {"samples": True}, {"seed": "a"}])
def test_numbers_of_a_cut_network(run, images, bad: dict) -> None:
    with pytest.raises(UserError, match=f"`{next(iter(bad))}` must be a whole number"):
        compact(run, "bayes", keep=0.5).predict(images.test.images[:2], **bad)


def test_training_on_a_cpu_seeds_no_gpu(images, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    fit(TINY, images, **{**QUICK_FIT, "epochs": 1}).evaluate(images.test)
