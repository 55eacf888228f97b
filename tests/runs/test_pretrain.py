"""Pretraining without labels: it learns, resumes bit for bit, and a training starts from it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, make_split
from PIL import Image
from torch.testing import assert_close

from inference.pretrain import main
from pyro_isingvit import UserError, fit
from pyro_isingvit.core.pretraining import PretrainConfig
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.images import InMemory
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import load_data, load_unlabelled
from pyro_isingvit.nets.start import Start
from pyro_isingvit.report.pretrain_figure import draw_guesses
from pyro_isingvit.runs.pretrain import SETTINGS as FILE
from pyro_isingvit.runs.pretrain import Pretraining, PretrainSettings

TRAIN = PretrainConfig(
    epochs=3, batch_size=16, masked=0.5, decoder_width=16, margin=1, val_fraction=0.1, device="cpu", lr=5e-3
)
SETTINGS = PretrainSettings("made", "data", None, TINY, TRAIN)


def images(count=60):
    return make_split(count, torch.Generator().manual_seed(0)).images


def made(folder=None, **changes):
    return Pretraining(replace(SETTINGS, train=replace(TRAIN, **changes)), images(), folder, progress=False)


def test_the_loss_falls_on_images_that_were_held_out():
    training = made(epochs=40, augment="none")
    first = training.held_loss()
    training.run()
    assert training.history[-1]["held_out_loss"] < 0.8 * first and len(training.history) == 40
    assert training.held_loss() == training.held_loss()  # the same masks each time


class Stopped(Exception):
    pass


def test_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = made(epochs=4)
    whole.run()
    first, epoch = made(tmp_path, epochs=4), Pretraining._epoch

    def stops(self, bar):
        if self.epoch == 2:
            raise Stopped
        return epoch(self, bar)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_epoch", stops)
        with pytest.raises(Stopped):
            first.run()
    again = Pretraining(PretrainSettings.read(tmp_path), images(), tmp_path, progress=False)
    again.restore()
    assert again.epoch == 2
    start = again.run()
    assert_close(dict(again.network.state_dict()), dict(whole.network.state_dict()), rtol=0, atol=0)
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]
    kept = Start.load(tmp_path / "start.safetensors")
    assert_close(dict(kept.weights), dict(start.weights), rtol=0, atol=0)


def test_an_interruption_says_what_is_kept(tmp_path, monkeypatch):
    def interrupted(self, bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretraining, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 1; nothing is kept"):
        made(tmp_path).run()


def test_a_training_starts_from_it(data):
    start = made(epochs=1).run()
    assert "head" not in start.weights
    run = fit(start, data, epochs=2, batch_size=20, device="cpu", progress=False, samples=2)
    assert run.config.init == "pretrained on made" and run.info.mean == start.scale.mean
    assert run.predict(data.test.images[:3], 2).mean.shape == (3, 3)


def test_other_images_and_damaged_folders_are_refused(tmp_path):
    training = made(tmp_path, epochs=1)
    training.run()
    other = Pretraining(replace(SETTINGS, train=replace(TRAIN, epochs=1)), images(50), tmp_path, progress=False)
    with pytest.raises(UserError, match="other images"):
        other.restore()
    (tmp_path / FILE).write_text('{"format": 1}')
    with pytest.raises(UserError, match="damaged"):
        PretrainSettings.read(tmp_path)
    (tmp_path / FILE).write_text('{"format": 9}')
    with pytest.raises(UserError, match="format 9"):
        PretrainSettings.read(tmp_path)
    with pytest.raises(UserError, match="holds no pretraining"):
        PretrainSettings.read(tmp_path / "none")


def test_too_few_images():
    with pytest.raises(UserError, match="too few"):
        Pretraining(SETTINGS, images(1), None)


def test_a_loss_that_is_not_finite_is_said(monkeypatch):
    training = made()
    with torch.no_grad():
        training.network.hidden.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss became nan in epoch 1; lower `lr`"):
        training.run()


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("lr", 0.0), ("lr", 2.0), ("masked", 1.0), ("weight_decay", -1.0), ("val_fraction", 0.6),
    ("warmup_fraction", 1.5), ("decoder_depth", 0),
])  # fmt: skip
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=f"`{name}`"):
        made(**{name: value})


def test_guesses_are_pictures(tmp_path):
    training = made()
    real, seen, guessed = training.guesses(4)
    x = training.held.images[:4].float() / 255
    assert_close(real, x, rtol=0, atol=1e-5)
    shown = seen == real
    assert shown.float().mean() >= 0.5 and guessed.shape == real.shape
    assert draw_guesses(training, tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("channels", [2, 5])
def test_guesses_of_other_channels_are_pictures_too(channels, tmp_path):
    stacked = InMemory(torch.randint(0, 256, (40, channels, 4, 4), dtype=torch.uint8))
    training = Pretraining(SETTINGS, stacked, None, progress=False)
    assert draw_guesses(training, tmp_path / "a.png").stat().st_size > 1000


def test_its_scale_goes_with_the_start(tmp_path):
    deep = InMemory((torch.rand(40, 1, 4, 4) * 60000).to(torch.uint16))
    training = Pretraining(replace(SETTINGS, intensity="percentile 5 95"), deep, tmp_path, progress=False)
    training.run()
    start = Start.load(tmp_path / "start.safetensors")
    assert start.scale.kind == "uint16" and start.scale.low == training.info.low != ()
    assert PretrainSettings.read(tmp_path).intensity == "percentile 5 95"


def test_a_first_epoch_that_is_interrupted_is_begun_again(tmp_path, monkeypatch, capfd):
    command = ["--images", "digits", "--preset", "digits", "--out", str(tmp_path / "p"), "--epochs", "1"]

    def interrupted(self, bar):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_epoch", interrupted)
        with pytest.raises(SystemExit):
            main(command)
    assert "nothing is kept; run the same command again" in capfd.readouterr().err
    main(command)
    assert (tmp_path / "p" / "start.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(command)  # now there is something to lose


def test_a_folder_test_is_left_out(tmp_path, caplog):
    for folder, count in (("a", 3), ("b/c", 2), ("test/a", 4)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), 20 * number).save(tmp_path / folder / f"{number}.png")
    assert len(load_unlabelled(str(tmp_path))) == 5 and "4 images in" in caplog.text
    assert len(load_unlabelled(str(tmp_path / "test"))) == 4
    assert len(load_unlabelled(str(tmp_path), test=True)) == 9
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").unlink()
    for number in range(2):
        (tmp_path / "b" / "c" / f"{number}.png").unlink()
    with pytest.raises(UserError, match="no images but those of"):
        load_unlabelled(str(tmp_path))


def test_images_held_out_of_a_data_set_are_left_out_of_its_folder(tmp_path):
    """A folder of two classes without test/: a fifth is held out for testing."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("L", (8, 8), 10 * number + "ab".index(name)).save(tmp_path / name / f"{number}.png")
    source = DataConfig(dataset=f"imagefolder:{tmp_path}")
    test = {image.numpy().tobytes() for image in load_data(source.dataset).test.images[:]}
    found = {image.numpy().tobytes() for image in load_unlabelled(str(tmp_path), source=source)[:]}
    assert len(test) == 4 and len(found) == 16 and not test & found
    assert len(load_unlabelled(str(tmp_path))) == 20  # of no data set that is known
    grouped = replace(source, groups=r"(\d)\.")
    test = {image.numpy().tobytes() for image in load_data(source.dataset, groups=r"(\d)\.").test.images[:]}
    found = {image.numpy().tobytes() for image in load_unlabelled(source.dataset, source=grouped)[:]}
    assert test and not test & found


def test_a_folder_that_has_grown_is_told_of(tmp_path, caplog):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(40):
            Image.new("L", (8, 8), 5 * number + "ab".index(name)).save(tmp_path / name / f"{number}.png")
    source = DataConfig(dataset=f"imagefolder:{tmp_path}")
    info = load_data(source.dataset).info
    load_inputs(source.dataset, info, source=source)
    assert "other images than when" not in caplog.text
    for number in range(40, 46):
        Image.new("L", (8, 8), 5 * number).save(tmp_path / "a" / f"{number}.png")
    load_inputs(source.dataset, info, source=source)
    assert "other images than when the run was trained" in caplog.text


def test_groups_that_have_not_grown_are_no_reason_to_warn(tmp_path, caplog):
    """Whole groups are held out, which are not as many images as were asked for."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(250):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number // 5}_{number}.png")
    source = DataConfig(dataset=f"imagefolder:{tmp_path}", groups=r"/(\d+)_")
    info = load_data(source.dataset, groups=source.groups).info
    load_inputs(source.dataset, info, source=source)
    assert "other images than when" not in caplog.text


def test_deep_images_and_settings_of_older_versions(tmp_path):
    """16 bits as they are; a folder without the newer settings means what it meant."""
    deep = InMemory((torch.rand(40, 1, 4, 4) * 60000).to(torch.uint16))
    training = Pretraining(SETTINGS, deep, None, progress=False)
    training.run()
    assert training.info.kind == "uint16" and np.isfinite(training.history[-1]["loss"])
    kept = json.loads(replace(SETTINGS, resize="crop", pages="channels").to_json())
    (tmp_path / FILE).write_text(json.dumps(kept))
    assert PretrainSettings.read(tmp_path).pages == "channels"
    assert not PretrainSettings.read(tmp_path).test
    for name in ("resize", "pages", "cache", "test"):
        del kept[name]
    (tmp_path / FILE).write_text(json.dumps(kept))
    older = PretrainSettings.read(tmp_path)
    assert older.resize == "stretch" and older.test


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(UserError, match="`margin` must not be negative"):
        made(margin=-1)


def test_a_kill_between_checkpoint_and_history_loses_no_line(tmp_path) -> None:
    made(tmp_path / "p").run()
    history = (tmp_path / "p" / "metrics.jsonl").read_text()
    (tmp_path / "p" / "metrics.jsonl").write_text(history.splitlines(keepends=True)[0])
    again = made(tmp_path / "p")
    again.restore()
    assert (tmp_path / "p" / "metrics.jsonl").read_text() == history


@pytest.mark.parametrize("groups", [None, r"/(\d+)_"])
def test_renamed_files_are_told_of(tmp_path, caplog, groups):
    """The held-out fifth is found by the order of the names: with others it would hold images of the training part."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(40):
            Image.new("L", (8, 8), number).save(tmp_path / name / f"{number // 2}_{number}.png")
    source = DataConfig(dataset=f"imagefolder:{tmp_path}", groups=groups, train_size=20)
    data = load_data(source.dataset, groups=groups, train_size=20)
    load_inputs(source.dataset, data.info, source=source)
    assert "other images than when" not in caplog.text
    for name in "ab":
        for path in list((tmp_path / name).iterdir()):
            path.rename(path.with_name(f"7{path.name}"))
    changed = load_data(source.dataset, groups=groups, train_size=20)
    assert changed.info.counts == data.info.counts and not changed.info.has_images_of(data.info)
    load_inputs(source.dataset, data.info, source=source)
    assert "or they are called otherwise" in caplog.text
    caplog.clear()
    load_inputs(source.dataset, replace(data.info, pool=""), source=source)  # a run of before, which does not know
    assert "other images" not in caplog.text
