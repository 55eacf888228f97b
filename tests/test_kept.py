"""What is on disk stays, and is of one run: nothing of somebody else's is replaced, nothing of two runs is mixed."""

import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, INFO, QUICK_FIT, TINY, pixels
from PIL import Image

from pyro_isingvit import CompactViT, ImageData, UserError, ViTConfig, fit, load_run
from pyro_isingvit.core.checkpoint import load_checkpoint, remove_leftovers, save_checkpoint
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.experiment import train_run
from pyro_isingvit.predictive import datatree
from pyro_isingvit.report.attention_figures import attention_margins
from pyro_isingvit.runs.folder import clear_run, need_room
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.run import build_run, least_numbers
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.sharing.names import shared_config


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, which workers of pytest-xdist ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["report/thesis.tex", "metrics.json", "posterior.nc", "compact.json"])
def test_no_run_is_written_over_files_that_are_no_runs(run, name: str, tmp_path: Path) -> None:
    mine = tmp_path / "project" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    config = replace(CONFIG, data=DataConfig("digits", train_size=60), train=replace(CONFIG.train, epochs=1))
    for write in (
        lambda: train_run(config, tmp_path / "project", progress=False),
        lambda: run.save(tmp_path / "project", overwrite=True),
    ):
        with pytest.raises(UserError, match=rf"holds {Path(name).parts[0]} but no run"):
            write()
    assert content(tmp_path / "project") == {name: b"mine"}


def test_leftovers_are_those_of_mkstemp_alone(tmp_path: Path) -> None:
    for name in (".out.csv.swp", ".out.csv.abcd1234.csv", ".outXcsv.abcd1234.csv"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, ["out.csv"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.csv.swp", ".outXcsv.abcd1234.csv"]


def test_a_run_that_cannot_be_written_leaves_the_one_before(run, tmp_path: Path, monkeypatch) -> None:
    before = content(run.save(tmp_path / "run"))
    other = pickle.loads(pickle.dumps(run))
    other.folder = None

    def full(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("pyro_isingvit.trained.save_checkpoint", full)
    with pytest.raises(UserError, match="disk is full"):
        other.save(tmp_path / "run", overwrite=True)
    assert content(tmp_path / "run") == before and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_metrics_and_draws_of_one_evaluation(run, images, tmp_path: Path, monkeypatch) -> None:
    run.evaluate(images.test)
    folder = run.save(tmp_path / "run")
    write = datatree.save_datatree

    def interrupted(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(*given)

    monkeypatch.setattr(datatree, "save_datatree", interrupted)
    few = run.evaluate(images.test.take(np.arange(7)))
    with pytest.raises(KeyboardInterrupt):
        run.save(folder, overwrite=True)
    tree = datatree.load_datatree(folder / "posterior.nc")
    assert few["test_size"] == 7 and '"test_size": 7' in (folder / "metrics.json").read_text()
    assert tree["predictive_summary"].sizes["image_all"] == 7


def test_a_run_whose_folder_holds_another_is_not_mixed_with_it(run, images, tmp_path: Path) -> None:
    run.evaluate(images.test)
    run.save(tmp_path / "run")
    first = load_run(tmp_path / "run")
    classes = replace(INFO, classes=("mole", "naevus", "zoster"))
    skin = fit(TINY, replace(images, info=classes), **QUICK_FIT)
    skin.save(tmp_path / "run", overwrite=True)
    after = content(tmp_path / "run")
    for use in (
        lambda: first.save(tmp_path / "copy"),
        lambda: first.evaluate(images.test),
        lambda: first.save_pretrained(tmp_path / "shared"),
    ):
        with pytest.raises(UserError, match="load the run again"):
            use()
    with pytest.raises(UserError, match="holds a run"):
        run.save(tmp_path / "run")
    assert content(tmp_path / "run") == after and load_run(tmp_path / "run").info.classes == classes.classes
    run.save(tmp_path / "run", overwrite=True)  # it was trained in this process and knows itself
    assert load_run(tmp_path / "run").info.classes == INFO.classes
    assert not (tmp_path / "copy").exists() and run.save(tmp_path / "run") == tmp_path / "run"


def test_classes_of_another_data_set_count_by_their_names(run, images) -> None:
    keep = (images.test.labels > 0).numpy()
    some = images.test.take(np.flatnonzero(keep))
    fewer = replace(INFO, classes=INFO.classes[1:], counts=())
    site = replace(images, info=fewer, test=replace(some, labels=some.labels - 1), train=some.take(np.arange(0)))
    assert run.evaluate(site)["accuracy"] == run.evaluate(some)["accuracy"]
    with pytest.raises(UserError, match=r"`data` has the class other; the run knows"):
        run.evaluate(replace(site, info=replace(fewer, classes=("other", INFO.classes[2]))))


def test_validation_images_of_another_site_are_not_taken_where_there_are_own_ones(run, images) -> None:
    site = replace(images, val=images.val.take(np.arange(3)))
    assert run.evaluate(site)["val_size"] == 15
    assert run.evaluate(replace(images, val=images.val.take(np.arange(0))))["val_size"] == 15


def test_the_prior_is_that_of_the_weighted_classes() -> None:
    """Images that say nothing of the class: what is predicted is the share of the weights."""
    torch.manual_seed(0)
    labels = torch.tensor([0] * 160 + [1] * 40)
    weights = torch.where(labels == 0, 1.0, 4.0)
    data = ImageData.from_arrays(torch.zeros(200, 1, 4, 4, dtype=torch.uint8), labels, weights=weights,
                                 val_fraction=0, test_fraction=0)  # fmt: skip
    vit = ViTConfig(patch_size=4, width=8, heads=2, depth=1)
    run = fit(vit, data, method="deterministic", epochs=30, lr=1e-2, progress=False)
    assert data.info.counts == (160, 40) and run.class_prior == pytest.approx((0.5, 0.5))
    assert run.predict(data.train.images[:1], 1).mean[0].tolist() == pytest.approx(run.class_prior, abs=0.05)
    balanced = fit(vit, data, method="deterministic", epochs=30, lr=1e-2, balance="loss", progress=False)
    assert balanced.predict(data.train.images[:1], 1).mean[0].tolist() == pytest.approx((0.5, 0.5), abs=0.05)
    with pytest.raises(UserError, match="set `balance` to loss"):
        fit(vit, data, method="deterministic", epochs=1, balance="sampler", progress=False)


def test_weights_that_move_the_classes_are_judged_as_balance_is() -> None:
    """The same loss, by weights or by `balance`, gives the same temperature and the same validation scores."""
    torch.manual_seed(0)
    labels = (torch.arange(240) % 8 == 0).long()
    images = ((0.3 + 0.25 * labels)[:, None, None, None] + 0.2 * torch.randn(240, 1, 4, 4)).clamp(0, 1)
    weights = torch.where(labels == 0, 240 / (2 * 210), 240 / (2 * 30))
    vit = ViTConfig(patch_size=4, width=8, heads=2, depth=1)
    runs = []
    for own, balance in ((None, "loss"), (weights, "none"), (None, "none")):
        data = ImageData.from_arrays(images, labels, weights=own, val_fraction=0.3, test_fraction=0)
        runs.append(fit(vit, data, method="temperature", epochs=20, lr=1e-2, balance=balance, progress=False))
    balanced, weighted, plain = runs
    assert weighted.moved_prior == pytest.approx(balanced.class_prior, abs=0.02) and plain.moved_prior is None
    assert float(weighted.temperature) == pytest.approx(float(balanced.temperature), rel=0.03)
    last = [run.history[-1]["val_nll"] for run in runs]
    assert last[1] == pytest.approx(last[0], rel=0.03)


def test_a_run_finds_its_folder_from_anywhere(run, images, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    run.save("mine")
    monkeypatch.chdir(tmp_path / "other")
    run.evaluate(images.test)
    assert run.report() == tmp_path / "mine" / "report" / "index.html"
    monkeypatch.chdir(tmp_path)
    again = load_run("mine")
    monkeypatch.chdir(tmp_path / "other")
    assert again.evaluate(images.test)["accuracy"] == run.evaluation.metrics["accuracy"]
    assert pickle.loads(pickle.dumps(again)).folder == tmp_path / "mine"
    assert not [*(tmp_path / "other").iterdir()]


def test_a_compact_network_replaces_nothing_of_a_run_or_of_the_one_before(run, images, tmp_path: Path) -> None:
    small = run.prune(keep=0.5)
    run.save_pretrained(tmp_path / "shared")
    for folder in (run.save(tmp_path / "run"), tmp_path / "shared"):
        before = content(folder)
        with pytest.raises(UserError, match="holds a run"):
            small.save_pretrained(folder, metrics={"accuracy": 0.5})
        assert content(folder) == before
    target = tmp_path / "small"
    small.save_pretrained(target, metrics={"accuracy": 0.91, "test_size": 30})
    assert "0.91" in (target / "README.md").read_text() and (target / "metrics.json").exists()
    before = content(target)
    with pytest.raises(UserError, match="a/b/c"):
        small.save_pretrained(target, repo="a/b/c")
    assert content(target) == before
    run.prune(keep=0.4).save_pretrained(target)
    assert not (target / "metrics.json").exists() and "not evaluated" in (target / "README.md").read_text()
    assert CompactViT.from_pretrained(target).predict(images.test.images[:2]).shape == (1, 2, 3)


def test_own_pictures_stay_beside_a_shared_run(run, tmp_path: Path) -> None:
    folder = run.save_pretrained(tmp_path / "shared")
    (folder / "README.md").write_text("![x](figures/mine.png)")
    (folder / "figures").mkdir(exist_ok=True)
    for name in ("mine.png", "calibration.png", "ood-0.png"):
        (folder / "figures" / name).write_text("")
    run.save_pretrained(folder, overwrite=True)
    assert [path.name for path in (folder / "figures").iterdir()] == ["mine.png"]


def test_the_least_size_counts_every_token() -> None:
    changes = ({}, {"registers": 20_000_000}, {"patch_size": 2, "patch_stride": 1}, {"stem": "conv", "patch_size": 4})
    few, many, dense, stem = (replace(CONFIG, vit=replace(TINY, **change)) for change in changes)
    for config in (few, dense, stem):
        assert least_numbers(config, INFO) <= sum(p.numel() for p in fit_free(config).parameters())
    assert least_numbers(many, INFO) > 1e8


def fit_free(config):
    """Model and guide of a run that is not trained, as one module."""
    run = build_run(config, INFO, 50)
    return torch.nn.ModuleList([run.model, run.guide])


@pytest.mark.parametrize(
    ("cls", "token", "name"), [(True, 0, "CLS token"), (True, 2, "register 1"), (False, 1, "register 1")]
)
def test_tokens_before_the_patches_have_their_names(cls: bool, token: int, name: str) -> None:
    margins = np.full((1, 1, 2 + cls + 4), 0.5)
    margins[0, 0, token] = 0.1
    figure = attention_margins(margins, pixels(1, 1, 4, 4), np.array([0]), 2, cls=cls)
    titles = [ax.get_title() for part in figure.subfigs for ax in part.axes]
    assert any(f"layer 0, {name}" in title for title in titles)


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ("/home/anna@clinic/runs/a", "a"),
        ("timm:vit_tiny@/home/anna/w.pth", "timm:vit_tiny@w.pth"),
        ("torchvision:vit_b_16", "torchvision:vit_b_16"),
    ],
)
def test_a_start_is_shared_without_its_folder(init: str, told: str) -> None:
    assert shared_config(replace(CONFIG, init=init)).init == printable(told)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_run_is_replaced_leaves_one_run(run, images, tmp_path: Path, monkeypatch) -> None:
    fit(TINY, images, method="dropout", **QUICK_FIT).save(tmp_path / "run")
    replace_file, moved = Path.replace, list[str]()

    def interrupted(path: Path, target: Path) -> Path:
        if path.parent.name.startswith(".run.") and target.parent.name == "run":
            moved.append(path.name)
            if len(moved) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path / "run", overwrite=True)
    assert len(moved) == 4 and load_run(tmp_path / "run").config == run.config
    assert torch.equal(load_run(tmp_path / "run").predict(images.test.images, 3).probs,
                       run.predict(images.test.images, 3).probs)  # fmt: skip


def test_a_run_that_is_half_removed_can_be_removed_again(run, tmp_path: Path, monkeypatch) -> None:
    folder = run.save(tmp_path / "run")
    (folder / "report").mkdir()
    unlink, gone = Path.unlink, list[str]()

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clear_run(folder)
    need_room(folder)  # it is a run still
    clear_run(folder)
    assert not [*folder.iterdir()]


def test_a_folder_that_changes_while_it_is_read_is_noticed(run, images, tmp_path: Path, monkeypatch) -> None:
    run.save(tmp_path / "run")
    other = fit(TINY, images, **QUICK_FIT)

    def overtaken(folder: Path, device: str):
        opened = open_run(folder, device)
        other.save(folder, overwrite=True)
        return opened

    monkeypatch.setattr("pyro_isingvit.trained.open_run", overtaken)
    loaded = load_run(tmp_path / "run")
    with pytest.raises(UserError, match="load the run again"):
        loaded.save(tmp_path / "copy")


def test_pickles_of_version_0_13_open(run) -> None:
    build, given = run.__reduce__()
    assert build(*given[:6]).config == run.config


def test_a_run_of_before_is_resumed_with_its_shares(tmp_path: Path, monkeypatch) -> None:
    """Version 0.13 knew no weighted shares; its training goes on with those of the images."""
    rng = np.random.default_rng(0)
    rows = "".join(f"{i}.png,{'a' if i % 5 else 'b'},{1 if i % 5 else 4}\n" for i in range(50))
    for i in range(50):
        Image.fromarray(rng.integers(0, 255, (4, 4), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("path,label,weight\n" + rows)
    config = replace(CONFIG, method="deterministic", data=DataConfig(f"csv:{tmp_path / 't.csv'}", val_fraction=0.0),
                     train=replace(CONFIG.train, epochs=2, balance="logit", calibrate=False))  # fmt: skip
    train_run(config, tmp_path / "run", progress=False)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["info"]["weighted"][0] == pytest.approx(state["info"]["weighted"][1])
    del state["info"]["weighted"]
    for _ in range(2):
        save_checkpoint(tmp_path / "run" / "checkpoint.pt", state)
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: seen.append(trainer.run.info.shares) or trainer.run)
    train_run(config, tmp_path / "run", resume=True, progress=False)
    assert seen == [(0.8, 0.2)] or seen[0] == pytest.approx((0.8, 0.2), abs=0.02)
