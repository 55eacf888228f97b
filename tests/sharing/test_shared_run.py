"""A run as others get it: what it predicts, what it does not tell, and what of it is refused."""

import errno
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, here, refused, write_npz
from safetensors.torch import load, load_file, save_file

from pyro_isingvit import CompactViT, TrainedRun, compact, load_run
from pyro_isingvit.core import checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import BaselineConfig, DataConfig, IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.report.share import OOD
from pyro_isingvit.runs.folder import is_shared
from pyro_isingvit.runs.load import open_run
from pyro_isingvit.runs.run import build_run
from pyro_isingvit.runs.shared import open_shared, write_shared
from pyro_isingvit.shareable import Shareable
from pyro_isingvit.sharing.folder import MARK
from pyro_isingvit.sharing.names import is_path_free, shared_config, shared_metrics, shared_name

SECRET = "/home/somebody/secret"


@pytest.fixture
def run(digits_run: Path) -> TrainedRun:
    return load_run(digits_run)


def tiny(data: ImageData, method: str = "ising", init: str | None = None, **settings) -> TrainedRun:
    config = replace(CONFIG, init=init, method=method, baseline=BaselineConfig(members=2), ising=IsingConfig(),
                     train=replace(CONFIG.train, epochs=2, **settings))  # fmt: skip
    run = build_run(config, data.info, len(data.train))
    return TrainedRun.of(run, {"info": data.info.to_dict(), "num_data": len(data.train), "epoch": 0})


@pytest.mark.filterwarnings("ignore:`torch.jit")  # laplace-torch's
@pytest.mark.parametrize("method", METHODS)
def test_every_method_predicts_the_same_bit_for_bit(method: str, data: ImageData, tmp_path: Path) -> None:
    if method == "laplace":
        pytest.importorskip("laplace")
    run = tiny(data, method)
    again = TrainedRun.from_pretrained(run.save_pretrained(tmp_path / "shared"))
    assert torch.equal(again.predict(data.test.images, 3, seed=1).probs, run.predict(data.test.images, 3, seed=1).probs)
    assert again.config.method == method and again.info == run.info and again.history == []
    assert (
        isinstance(again, Shareable) and open_run(tmp_path / "shared").config == again.config
    )  # every script opens it


def test_a_folder_with_files_of_those_names_is_refused(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "paper" / "figures").mkdir(parents=True)
    mine = [tmp_path / "paper" / name for name in ("figures/mine.png", "metrics.json")]
    for path in mine:
        path.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"paper holds .*which would be replaced"):
            run.save_pretrained(tmp_path / "paper", overwrite=overwrite)
    assert all(path.read_text() == "mine" for path in mine) and len(list((tmp_path / "paper").iterdir())) == 2


def test_scripts_that_need_the_training_say_so(run: TrainedRun, tmp_path: Path) -> None:
    folder = run.save_pretrained(tmp_path / "shared")
    for words in (("analysis.report", "--run", folder), ("inference.train", "--resume", folder)):
        refused(here(*words), "holds a shared run", "its own folder")


def test_phase_noise_and_temperature_come_along(run: TrainedRun, tmp_path: Path) -> None:
    again = TrainedRun.from_pretrained(run.save_pretrained(tmp_path / "shared"))
    assert float(again.temperature) == float(run.temperature) != 1
    kept = {name: x for name, x in run.guide.state_dict().items() if not isinstance(x, torch.Tensor)}
    assert kept and all(again.guide.state_dict()[name] == x for name, x in kept.items())  # phase and max_keep
    assert again.method.noise == run.method.noise and again.mask_summary() == run.mask_summary()
    test = load_data("digits").test
    first, second = (each.evaluate((test.images, test.labels), num_samples=4) for each in (run, again))
    assert (first["accuracy"], first["nll"], first["train_size"]) == (
        second["accuracy"],
        second["nll"],
        second["train_size"],
    )
    small, same = (compact(each, keep=0.5) for each in (again, run))
    assert torch.equal(small.predict(test.images), same.predict(test.images))


def test_a_shared_run_can_be_saved_and_loaded_as_a_run(run: TrainedRun, tmp_path: Path) -> None:
    shared = run.save_pretrained(tmp_path / "shared")
    again = load_run(shared)
    with pytest.raises(UserError, match="overwrite"):
        again.save(shared)
    kept = load_run(again.save(tmp_path / "run"))
    images = load_data("digits").test.images[:4]
    assert torch.equal(kept.predict(images, 3).probs, run.predict(images, 3).probs)


def test_what_loss_terms_remember_of_images_is_not_shared(data: ImageData, tmp_path: Path) -> None:
    run = tiny(data, early_learning=3.0)
    assert any("penalties" in name for name in run.method.state_dict())
    shared = run.save_pretrained(tmp_path / "shared")
    assert not any("penalties" in name for name in load_file(shared / "model.safetensors"))
    again = TrainedRun.from_pretrained(shared)
    assert torch.equal(again.predict(data.test.images, 3).probs, run.predict(data.test.images, 3).probs)
    change(shared, num_data=2**50)
    with pytest.raises(UserError, match="too large"):
        TrainedRun.from_pretrained(shared)


def test_many_classes_are_too_many_only_for_terms_that_remember_them(data: ImageData, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pyro_isingvit.runs.shared.MOST", 50)  # 3 classes squared, times a width of 8, are 72
    for name in ("rationale", "logit_penalty"):
        change(tiny(data, **{name: 0.1}).save_pretrained(tmp_path / name), num_data=2)
    with pytest.raises(UserError, match="too many classes"):
        TrainedRun.from_pretrained(tmp_path / "rationale")
    TrainedRun.from_pretrained(tmp_path / "logit_penalty")


def test_a_shared_run_does_not_take_other_images_for_its_own(data: ImageData, tmp_path: Path, monkeypatch) -> None:
    """A folder of the same name that is there by chance is not its validation part: its groups are not known."""
    run = tiny(data)
    run.config = replace(run.config, data=DataConfig(write_npz(tmp_path / "scans.npz"), groups="(.*)"))
    again = TrainedRun.from_pretrained(run.save_pretrained(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="keeps no predictions for its validation part"):
        again.validation()


def test_scripts_open_a_shared_run(run: TrainedRun, tmp_path: Path) -> None:
    shared, out = run.save_pretrained(tmp_path / "shared"), tmp_path / "p.nc"
    told = here(
        "inference.predict", "--run", shared, "--input", "digits", "--out", out, "--samples", 3, "--device", "cpu"
    )
    assert told.returncode == 0 and out.is_file(), told.stderr


def change(folder: Path, **values: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | values))


# Nothing of this machine ------------------------------------------------------------------------------------------


def test_no_local_path_is_shared(data: ImageData, digits_run: Path, tmp_path: Path) -> None:
    """data_root, cache, the images' folder, the run's folder, the start's file and metrics' texts."""
    source = DataConfig(
        f"imagefolder:{SECRET}/scans", data_root=SECRET, cache=f"{SECRET}/cache", groups=f"{SECRET}/(.*)"
    )
    run = tiny(data, init=f"timm:vit@{SECRET}/vit.safetensors")
    run.config = replace(run.config, data=source)
    run.method.info = replace(data.info, dataset=f"imagefolder:{SECRET}/scans")
    run.evaluate(data.test)
    run.evaluation.metrics.update({"run": SECRET, "list": [SECRET], "dataset": f"imagefolder:{SECRET}/scans"})
    run.save(tmp_path / "secret-run")
    score = {"auroc": 0.9, "fpr95": 0.2, "aupr": 0.5}
    results = {
        name: {"images": 7, "figure": "a.png", "runs": {"secret-run": {"entropy": score, "mutual_information": score}}}
        for name in (f"imagefolder:{SECRET}/strange", "noise")
    }
    (tmp_path / "secret-run" / "ood").mkdir()
    tmp_path.joinpath("secret-run", *OOD).write_text(json.dumps({"ood": results}))
    (tmp_path / "secret-run" / "ood" / "a.png").write_bytes(b"a figure whose title names the folder")
    shared = run.save_pretrained(tmp_path / "shared")
    small = compact(load_run(digits_run), keep=0.5)
    small.config = replace(small.config, dataset=f"imagefolder:{SECRET}/scans")
    small.save_pretrained(tmp_path / "small", metrics=run.evaluation.metrics)
    for folder in (shared, tmp_path / "small"):
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            for word in (b"somebody", b"secret", str(tmp_path).encode()):
                assert word not in content, (path.name, word)
    card = (shared / "README.md").read_text()
    assert "scans (imagefolder)" in card and "strange (imagefolder)" in card and "0.900" in card
    assert not list(shared.glob("figures/ood*"))  # its title may name a folder
    TrainedRun.from_pretrained(shared)
    CompactViT.from_pretrained(tmp_path / "small")


def test_figures_of_other_images_are_copied_where_no_title_names_a_folder(data: ImageData, tmp_path: Path) -> None:
    run = tiny(data)
    folder = run.save(tmp_path / "run")
    score = {"auroc": 0.9, "fpr95": 0.2}
    results = {
        "noise": {"images": 7, "figure": "noise.png", "runs": {"run": {"entropy": score, "mutual_information": score}}}
    }
    (folder / "ood").mkdir()
    (folder / "ood" / "results.json").write_text(json.dumps({"ood": results}))
    (folder / "ood" / "noise.png").write_bytes(b"png")
    shared = run.save_pretrained(tmp_path / "shared")
    assert (shared / "figures" / "ood-0.png").read_bytes() == b"png"
    assert "(figures/ood-0.png)" in (shared / "README.md").read_text()
    results["noise"]["figure"] = "../../config.json"  # names of results choose no folder
    (folder / "ood" / "results.json").write_text(json.dumps({"ood": results}))
    run.save_pretrained(tmp_path / "shared", overwrite=True)
    assert not (tmp_path / "shared" / "figures" / "ood-0.png").exists()
    for content in ("{", "[]", '{"ood": {"x": 3}}'):
        (folder / "ood" / "results.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            run.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "shared"), [
    ("digits", "digits"), ("imagefolder:/a/b/scans/", "scans (imagefolder)"), ("npz:C:\\me\\x.npz", "x.npz (npz)"),
    ("C:\\me\\x", "x"), ("/a/b", "b"), ("csv:a.csv", "a.csv (csv)"), ("a/b:c/d", "d"), ("npz:/x/mnist", "mnist (npz)"),
    ("x\ny", "x\\ny"), ("", ""),
])  # fmt: skip
def test_shared_names(name: str, shared: str) -> None:
    assert shared_name(name) == shared
    assert "\n" in name or (shared_name(shared) == shared and is_path_free(shared))
    assert is_path_free(name) == ("/" not in name and "\\" not in name)


def test_shared_settings_and_metrics() -> None:
    config = RunConfig(data=DataConfig("digits", image_size=8), init="runs/mine/small", train=TrainConfig(epochs=3))
    assert shared_config(config) == replace(config, init="small")
    for init in ("timm:vit_tiny", None):
        assert shared_config(replace(config, init=init)).init == init
    metrics = {
        "a": 1,
        "b": None,
        "method": "ising",
        "x": "/p",
        "by_class": [{"class": "c", "y": "/p", "n": 2.0}],
        "l": ["/p", 1],
    }
    assert shared_metrics(metrics) == {
        "a": 1,
        "b": None,
        "method": "ising",
        "by_class": [{"class": "c", "n": 2.0}],
        "l": [1],
    }


# What is refused --------------------------------------------------------------------------------------------------


def test_folders_that_hold_something_else(run: TrainedRun, digits_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can be resumed"):
        run.save_pretrained(digits_run, overwrite=True)
    shared = run.save_pretrained(tmp_path / "shared")
    with pytest.raises(UserError, match="`overwrite`"):
        run.save_pretrained(shared)
    run.save_pretrained(shared, overwrite=True)
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/none/x")):
        with pytest.raises(UserError, match=r"is a file|cannot write"):
            run.save_pretrained(wrong)
    for licence in ("My own", "mit\nx: y", "", "MIT"):
        with pytest.raises(UserError, match="identifier"):
            run.save_pretrained(tmp_path / "other", license=licence)
    with pytest.raises(UserError, match="owner/name"):
        run.save_pretrained(tmp_path / "other", repo="a/b/c")
    assert not (tmp_path / "other").exists()


def test_a_card_of_your_own_stays(run: TrainedRun, tmp_path: Path) -> None:
    shared = run.save_pretrained(tmp_path / "shared")
    card = shared / "README.md"
    card.write_text(card.read_text().replace("# digits", "# My digits"))
    run.save_pretrained(shared, overwrite=True)
    assert "# My digits" not in card.read_text()  # the mark is still there
    card.write_text(card.read_text().replace(MARK, ""))
    own = card.read_text()
    run.save_pretrained(shared, overwrite=True)
    assert card.read_text() == own
    small = compact(run, keep=0.5)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README.md").write_text("mine")
    small.save_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("write", range(6))
def test_a_disk_that_fills_at_any_write_leaves_nothing_new(
    write: int, run: TrainedRun, tmp_path: Path, monkeypatch
) -> None:
    shared = run.save_pretrained(tmp_path / "shared")
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    left, sync = [write], checkpoint.os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    for target in (shared, tmp_path / "new"):
        left[0] = write
        with pytest.raises(UserError, match="No space left"):
            run.save_pretrained(target, overwrite=True, license="mit")
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


@pytest.mark.parametrize("what", ["run", "compact"])
def test_a_disk_that_is_really_full(what: str, run: TrainedRun, tmp_path: Path) -> None:
    """A limit of a file's size: the library of safetensors has an error of its own for it."""
    small = compact(run, keep=0.5)
    with Limited(), pytest.raises(UserError, match="cannot write"):
        run.save_pretrained(tmp_path / "x") if what == "run" else small.save_pretrained(tmp_path / "x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Limited:
    """No file may grow beyond 1,000 bytes."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def damaged(folder: Path) -> list:
    tensors = load((folder / "model.safetensors").read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    name = next(name for name, x in tensors.items() if x.dim() == 2 and len(x) > 1)
    one = {"run": raw["run"] | {"vit": raw["run"]["vit"] | {"width": 4096, "heads": 4}}}
    weights, config = folder / "model.safetensors", folder / "config.json"
    return [
        lambda: weights.write_bytes(weights.read_bytes()[:100]), lambda: weights.write_bytes(b""), weights.unlink,
        lambda: save_file({k: x for k, x in tensors.items() if k != name}, weights),
        lambda: save_file(tensors | {name: tensors[name][:1].clone()}, weights),
        lambda: config.write_text("{"), lambda: config.write_text("[]"), config.unlink,
        lambda: config.write_text(json.dumps(raw["run"])), lambda: config.write_text("[" * 100_000),
        lambda: change(folder, format=9), lambda: change(folder, info={}), lambda: change(folder, num_data="x"),
        lambda: change(folder, state=3), lambda: change(folder, state={}), lambda: change(folder, **one),
        lambda: change(folder, run=None), lambda: change(folder, model_type="bert"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(18))
def test_damaged_folders_are_refused(number: int, run: TrainedRun, tmp_path: Path) -> None:
    shared = run.save_pretrained(tmp_path / "shared")
    ways = damaged(shared)
    assert len(ways) == 18
    ways[number]()
    with pytest.raises(UserError, match="shared"):
        TrainedRun.from_pretrained(shared)


def test_other_folders_are_no_shared_runs(digits_run: Path, tmp_path: Path) -> None:
    assert not is_shared(digits_run) and not is_shared(tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        TrainedRun.from_pretrained(digits_run)
    write_shared(load_run(digits_run), 100, tmp_path)
    assert is_shared(tmp_path) and open_shared(tmp_path).method.num_data == 100
