"""Predictions part by part: the numbers of draw_predictive, kills, full disks, unreadable images, bounded memory."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from forks import ROOT, exit_code
from helpers import INFO, around, make_pair
from kills import die_at_call, forked
from PIL import Image

from pyro_isingvit import ImageData, fit
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.streamed import ImageStream, open_stream
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.stopping import Stopping
from pyro_isingvit.predictive.table import summary_columns
from pyro_isingvit.runs.parts import Parts
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.sequential import SequentialDraws
from pyro_isingvit.runs.stream import Streamed, stream_predictions

COUNT = 23
AUTO = Stopping(0.05, most=120)


def write_images(folder: Path, count: int = COUNT) -> Path:
    """Grey images of 4x4 pixels, some darker than others: the network is surer of some."""
    folder.mkdir()
    made = np.random.default_rng(0)
    for i in range(count):
        pixels = made.integers(0, 256, (4, 4)) * (0.1 + 0.9 * (i % 4) / 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def make_run() -> Run:
    torch.manual_seed(0)
    model, guide = make_pair(granularity="unit")
    with torch.no_grad():
        for loc in guide.loc.values():
            loc.mul_(0.4)
    return around(model, guide)


def stream_of(images: Path) -> ImageStream:
    return open_stream(str(images), INFO)


def predict(images: Path, out: Path, samples: int | Stopping = 7, run: Run | None = None, **more) -> Streamed:
    return stream_predictions(run or make_run(), stream_of(images), out, samples, **{"part": 5, "seed": 3, **more})


def table(path: Path) -> dict[str, list]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: [row[name] for row in rows] for name in rows[0]}


def pixels(images: Path) -> torch.Tensor:
    (part,) = stream_of(images).parts(10_000, [0])
    return part.images


# The numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 5, 23, 100])
def test_all_draws_are_those_of_draw_predictive(images: Path, tmp_path: Path, part: int) -> None:
    run, out = make_run(), tmp_path / "p.parquet"
    done = predict(images, out, run=run, part=part, all_classes=True)
    draws, found = draw_predictive(run, pixels(images), 7, seed=3), table(out)
    names = sorted(path.name for path in images.iterdir())
    for name, wanted in summary_columns(draws, names, INFO.classes).items():
        if isinstance(wanted, np.ndarray):
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-6)
        else:
            assert found[name] == wanted
    for c, name in enumerate(INFO.classes):
        np.testing.assert_allclose(found[f"prob_{name}"], draws.mean[:, c], rtol=1e-4, atol=1e-6)
    assert found["draws"] == [7] * COUNT and (done.images, done.new, done.totals["draws"]) == (COUNT, COUNT, 7 * COUNT)
    assert done.totals["confidence"] == pytest.approx(float(draws.mean.amax(-1).sum()), rel=1e-5)
    assert done.classes == torch.bincount(draws.mean.argmax(-1), minlength=3).tolist()
    assert not (tmp_path / "p.parquet.parts").exists() and not (tmp_path / "p.parquet.unreadable.csv").exists()


def test_csv_and_parquet_say_the_same(images: Path, tmp_path: Path) -> None:
    for name in ("p.csv", "p.parquet"):
        predict(images, tmp_path / name, AUTO)
    text, binary = table(tmp_path / "p.csv"), table(tmp_path / "p.parquet")
    assert list(text) == list(binary) and text["class"] == binary["class"] and text["file"] == binary["file"]
    for name in ("probability", "p05", "p95", "entropy", "mutual_information", "draws", "mc_error"):
        np.testing.assert_allclose(np.array(text[name], float), binary[name], atol=1e-6)
    about = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"pyro_isingvit"])
    assert about["samples"] == "auto" and about["bound"] == "0.05" and about["seed"] == "3"


def small_run(data, **more) -> Run:
    return fit(ViTConfig(patch_size=2, width=8, heads=2, depth=2), data, epochs=2, batch_size=20, device="cpu",
               progress=False, max_keep=0.9, **more)  # fmt: skip


@pytest.mark.parametrize("trunk", [False, True])
def test_images_that_stop_early_have_the_first_draws_and_cost_no_more(images: Path, data, trunk: bool) -> None:
    run = small_run(data, bayesian_blocks=1) if trunk else make_run()
    x, seen, below = pixels(images), [], []
    vit = run.model.vit
    forward, patchify = type(vit).forward, vit.patchify

    def spy(self, weights, batch, *rest, **options):
        seen.append(len(batch))
        return forward(self, weights, batch, *rest, **options)

    vit.patchify = lambda batch: below.append(len(batch)) or patchify(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(vit), "forward", spy)
        groups = SequentialDraws(run, Stopping(0.03, most=150), seed=3).predict(x)
    assert sorted(torch.cat([group.rows for group in groups]).tolist()) == list(range(COUNT))
    taken = [len(group.draws.probs) for group in groups]
    assert sum(seen) == sum(n * len(group.rows) for n, group in zip(taken, groups, strict=True))
    assert trunk is (sum(below) == COUNT)  # the trunk: once for each image
    if not trunk:
        assert len(set(taken)) > 2 and min(taken) < 150
    whole = draw_predictive(run, x, 150, seed=3).probs
    for n, group in zip(taken, groups, strict=True):
        torch.testing.assert_close(group.draws.probs, whole[:n, group.rows], rtol=1e-4, atol=1e-5)
        assert (group.mc_error <= 0.03).all() or n == 150


def test_the_bound_holds_for_a_network(images: Path) -> None:
    run, x = make_run(), pixels(images)
    truth = draw_predictive(run, x, 4000, seed=999).mean
    held = []
    for seed in range(25):
        for group in SequentialDraws(run, AUTO, seed).predict(x):
            within = (group.draws.mean - truth[group.rows]).abs().amax(-1) <= AUTO.bound
            held += within[group.mc_error <= AUTO.bound].tolist()
    assert len(held) > 200 and np.mean(held) >= 0.95


def test_few_networks_are_all_asked_and_then_known(images: Path, tmp_path: Path, data) -> None:
    for method, networks in (("deterministic", 1), ("ensemble", 5)):
        run = fit(ViTConfig(patch_size=2, width=8, heads=2, depth=1), data, method=method, epochs=1, device="cpu",
                  progress=False)  # fmt: skip
        for samples in (AUTO, 100):
            done = predict(images, tmp_path / "p.csv", samples, run, overwrite=True)
            found = table(tmp_path / "p.csv")
            assert set(found["draws"]) == {str(networks)} and done.mc_error == 0 == done.totals["unsettled"]


def test_noise_of_every_image_is_the_same_again_and_differs_between_parts(images: Path, data) -> None:
    run = fit(ViTConfig(patch_size=2, width=8, heads=2, depth=1), data, method="dropout", epochs=1, device="cpu",
              progress=False)  # fmt: skip
    x = pixels(images)[:4]
    draws = SequentialDraws(run, 6, seed=3)
    first, second = (draws.predict(x, number)[0].draws.probs for number in (0, 1))
    again = SequentialDraws(run, 6, seed=3).predict(x, 1)[0].draws.probs  # as a process does that goes on
    assert torch.equal(second, again) and not torch.equal(first, second)
    assert len({tuple(draw.flatten().tolist()) for draw in first}) == 6
    state = torch.get_rng_state()
    draws.predict(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_give_scores(images: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(images.iterdir())):
        (images / INFO.classes[i % 3]).mkdir(exist_ok=True)
        path.rename(images / INFO.classes[i % 3] / path.name)
    run, stream = make_run(), stream_of(images)
    done = stream_predictions(run, stream, tmp_path / "p.csv", 6, part=5)
    (part,) = stream.parts(COUNT, [0])
    draws = draw_predictive(run, part.images, 6)
    assert stream.labels is not None and done.scores is not None
    right = int((draws.mean.argmax(-1) == stream.labels).sum())
    assert done.scores["accuracy"] * COUNT == pytest.approx(right)
    nll = torch.nn.functional.nll_loss(draws.mean.log(), stream.labels, reduction="sum")
    assert done.scores["nll"] * COUNT == pytest.approx(float(nll), rel=1e-4)
    assert sum(row["images"] for row in done.scores["by_class"]) == COUNT
    calls = stream_predictions(run, stream_of(images / INFO.classes[0]), tmp_path / "n.csv", 6)
    assert calls.scores is None  # no labels


# Kills ----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dying(images: Path, out: Path, aim: int, hits: Path) -> None:
    if aim:
        die_at_call(aim, hits)
    predict(images, out, AUTO)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_killed_at_every_write_and_resumed_is_the_uninterrupted_table(images: Path, tmp_path: Path, suffix) -> None:
    (images / "00007.png").write_bytes(b"nothing")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    predict(images, tmp_path / "whole" / f"p{suffix}", AUTO)
    wanted, out, hits = files(tmp_path / "whole"), tmp_path / "killed" / f"p{suffix}", tmp_path / "hits"
    assert list(wanted) == [f"p{suffix}", f"p{suffix}.unreadable.csv"]
    lives, log = 0, tmp_path / "log"
    for aim in range(1, 200):  # each life dies at a later write than the one before: some parts are left by each
        code = exit_code(forked(partial(dying, images, out, aim, hits), log))
        if code != -signal.SIGKILL:
            break
        lives += 1
    assert code == 0 or f"p{suffix} exists" in log.read_text(), log.read_text()  # died with nothing left to do
    assert files(out.parent) == wanted
    assert lives >= 5 and {"fsync", "replace"} <= set(hits.read_text().split())


def test_finished_parts_are_not_predicted_again(images: Path, tmp_path: Path, monkeypatch) -> None:
    out, parts = tmp_path / "p.csv", tmp_path / "p.csv.parts"
    asked, real = [], SequentialDraws.predict

    def stop_at(number: int) -> None:
        def call(self, x, number_: int = 0):
            asked.append(number_)
            if number_ == number:
                raise KeyboardInterrupt
            return real(self, x, number_)

        monkeypatch.setattr(SequentialDraws, "predict", call)

    stop_at(3)
    with pytest.raises(KeyboardInterrupt, match=r"run the same command again .*p\.csv\.parts"):
        predict(images, out)
    assert not out.exists() and len(list(parts.glob("*.json"))) == 4  # the plan and three parts
    content = (parts / "part-000001.csv").read_bytes()
    (parts / "part-000001.csv").write_bytes(content.replace(b"0", b"1", 1))  # damaged
    (parts / "part-000000.json").write_text("{")
    asked.clear()
    stop_at(-1)
    done = predict(images, out)
    assert asked == [0, 1, 3, 4] and done.new == COUNT - 5 and done.images == COUNT
    predict(images, tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not parts.exists()


@pytest.mark.parametrize("change", ["seed", "samples", "part", "images", "run", "all_classes", "labels and names"])
def test_parts_of_another_table_are_refused_or_replaced(images: Path, tmp_path: Path, monkeypatch, change) -> None:
    out = tmp_path / "p.csv"
    with monkeypatch.context() as patch:
        patch.setattr(SequentialDraws, "predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(images, out)
    other: dict = {"seed": {"seed": 4}, "samples": {"samples": 8}, "part": {"part": 6}, "all_classes":
                   {"all_classes": True}}.get(change, {})  # fmt: skip
    if change == "images":
        os.utime(images / "00000.png", (1, 1))
    if change == "labels and names":  # of a table that is read by another column
        stream = stream_of(images)
        stream.labels = torch.zeros(len(stream), dtype=torch.long)
        monkeypatch.setitem(globals(), "stream_of", lambda _: stream)
    if change == "run":
        other["run"] = make_run()
        with torch.no_grad():
            other["run"].guide.loc["head"].add_(1e-6)
    with pytest.raises(UserError, match=rf"p\.csv\.parts holds parts of a table with other {change}; .*`overwrite`"):
        predict(images, out, **other)
    done = predict(images, out, overwrite=True, **other)
    assert done.new == COUNT and out.exists()
    with pytest.raises(UserError, match="exists"):
        predict(images, out, **other)


def test_another_process_that_writes_the_table_is_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv.parts").mkdir()
    with (
        filelock.FileLock(tmp_path / "p.csv.parts" / "lock"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        predict(images, tmp_path / "p.csv")
    predict(images, tmp_path / "p.csv")


# What cannot be read or written ---------------------------------------------------------------------------------


def test_predictions_that_are_not_numbers_are_listed_and_not_counted(tmp_path: Path) -> None:
    """Numbers that stand for missing data overflow in the network: no class, and not right by accident."""
    made = np.random.default_rng(0).normal(size=(30, 4, 4)).astype(np.float32)
    data = ImageData.from_arrays(made, made.mean((1, 2)) > 0, train_size=20, intensity="none")
    run = fit(ViTConfig(2, 8, 2, 1), data, epochs=2, progress=False, device="cpu")
    given = made[:6].copy()
    given[1, 0, 0], given[4] = 3e38, 1e30
    np.savez(tmp_path / "given.npz", images=given[..., None], labels=np.zeros(6, int))
    stream = open_stream(str(tmp_path / "given.npz"), run.info)
    for samples in (3, Stopping(0.5, most=16)):
        done = stream_predictions(run, stream, tmp_path / "p.csv", samples, part=4, overwrite=True)
        assert done.images == 4 and [name for name, _ in done.unreadable] == ["1", "4"]
        assert "predictions are not numbers: its pixels go from" in done.unreadable[0][1]
        assert done.scores is not None and np.isfinite(done.scores["nll"]) and sum(done.classes) == 4
        assert table(tmp_path / "p.csv")["file"] == ["0", "2", "3", "5"]
        whole = draw_predictive(run, made[[0, 2, 3, 5]][:, None], 3 if samples == 3 else 16)
        found = np.array(table(tmp_path / "p.csv")["probability"], float)
        np.testing.assert_allclose(found, whole.mean.amax(-1), atol=1e-5)
    with pytest.raises(UserError, match=r"2 of 6 images are not numbers, such as those of image 1 .* to 3e\+38"):
        run.predict(given[..., None], 2)
    with pytest.raises(UserError, match="Replace such values"):
        run.evaluate((given[..., None], np.zeros(6, int)))


def test_unreadable_images_are_skipped_counted_and_listed(images: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.csv"
    predict(images, whole)
    for i in (0, 7, *range(10, 15)):  # a part without any image among them
        (images / f"{i:05d}.png").write_bytes(b"nothing")
    (images / "00001.png").rename(images / "=1+1,'\n.png")
    (images / "=1+1,'\n.png").write_bytes(b"")
    done = predict(images, tmp_path / "p.csv")
    assert done.images == COUNT - 8 and len(done.unreadable) == 8
    listed = table(tmp_path / "p.csv.unreadable.csv")
    assert listed["file"][-1] == "'=1+1,'\\n.png" and listed["file"][0] == "00000.png" and len(listed["file"]) == 8
    assert "identify" in listed["reason"][0]
    kept, before = table(tmp_path / "p.csv"), table(whole)
    rows = [before["file"].index(name) for name in kept["file"]]
    np.testing.assert_allclose(
        np.array(kept["probability"], float), np.array(before["probability"], float)[rows], atol=2e-6
    )
    for path in images.iterdir():  # all are well again: no old list stays
        if not path.name.startswith("="):
            Image.new("L", (4, 4)).save(path)
    (images / "=1+1,'\n.png").unlink()
    predict(images, tmp_path / "p.csv", overwrite=True)
    assert not (tmp_path / "p.csv.unreadable.csv").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_too_many_unreadable_images_are_an_error(images: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"p{suffix}"
    for i in range(12):
        (images / f"{i:05d}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"12 of 23 images cannot be read, such as 00000\.png .*max_unreadable"):
        predict(images, out)
    assert not out.exists() and len(table(tmp_path / f"p{suffix}.unreadable.csv")["file"]) == 12
    done = predict(images, out, max_unreadable=0.6)  # nothing is predicted again
    assert done.new == 0 and len(table(out)["file"]) == 11
    for path in images.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="23 of 23 images cannot be read"):
        predict(images, out, max_unreadable=0.99, overwrite=True)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("call", [1, 2, 3, 8, 11, 12, 13])
def test_a_disk_that_fills_at_any_write_keeps_the_parts(
    images: Path, tmp_path: Path, monkeypatch, call, suffix
) -> None:
    (images / "00007.png").write_bytes(b"nothing")
    out, real, left = tmp_path / "o" / f"p{suffix}", os.fsync, call
    out.parent.mkdir()

    def fail(handle: int) -> None:
        nonlocal left
        if not os.path.isdir(f"/proc/self/fd/{handle}"):
            left -= 1
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(
            UserError, match=r"cannot write .*No space left on device.*Finished parts stay in .*\.parts"
        ):
            predict(images, out)
    assert not out.exists() and not [path for path in out.parent.rglob(".*")]
    predict(images, out)
    predict(images, tmp_path / f"w{suffix}")
    assert out.read_bytes() == (tmp_path / f"w{suffix}").read_bytes()


def test_a_disk_that_is_really_full_and_really_read_only_keeps_the_parts(small_disk: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "many", 600)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 190_000)
    for suffix in (".csv", ".parquet"):
        out = small_disk / f"p{suffix}"
        with pytest.raises(UserError, match=r"cannot write .*No space left on device.*run the same command again"):
            predict(images, out, 2, part=50, all_classes=True)
        filler.unlink()
        assert predict(images, out, 2, part=50, all_classes=True).new < 600
        predict(images, tmp_path / out.name, 2, part=50, all_classes=True)
        assert out.read_bytes() == (tmp_path / out.name).read_bytes()
        out.unlink()
        filler.write_bytes(b"x" * 190_000)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"cannot write .*Read-only file system"):
        predict(images, small_disk / "p.csv", 2)


def test_what_cannot_be_is_refused(images: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ({"samples": 0}, "samples"), ({"chunk": 0}, "chunk"), ({"part": 0}, "part"),
        ({"max_unreadable": 1.0}, "max_unreadable"), ({"max_unreadable": -0.1}, "max_unreadable"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            predict(images, tmp_path / "p.csv", **wrong)
    with pytest.raises(UserError, match=r"\.parquet or \.csv"):
        predict(images, tmp_path / "p.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_table_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(UserError, match="exists; name another"):
        Parts(tmp_path / "p.csv", {"seed": "0"}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"] and (tmp_path / "p.csv").read_text() == "mine"


def test_without_pyarrow_the_extra_is_named(images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pyro-isingvit\[parquet\]"):
        predict(images, tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet.parts").exists()


# Memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
sys.path[:0] = ["tests"]
from pathlib import Path
from large_data import peak_kib
from runs.test_stream import make_run, stream_of
from pyro_isingvit.runs.stream import stream_predictions
stream_predictions(make_run(), stream_of(Path(sys.argv[1])), Path(sys.argv[2]), 100, part=500)
print(peak_kib())
"""


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """20,000 more images, whose 100 draws alone would be 24 MB: names, of which there are 4 MB, are all that grows."""
    peaks = []
    for count in (1000, 21_000):
        folder = write_images(tmp_path / str(count), count)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", MEASURE, folder, tmp_path / f"{count}.parquet"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
        assert pq.read_metadata(tmp_path / f"{count}.parquet").num_rows == count
    assert peaks[1] - peaks[0] < 14_000, peaks  # kB


def test_draws_of_one_part_are_bounded_whatever_is_asked(images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pyro_isingvit.runs.stream.NUMBERS", 4 * 3 * 10)  # ten images of three classes and four draws
    sizes, real = [], SequentialDraws.predict
    monkeypatch.setattr(
        SequentialDraws, "predict", lambda self, x, number: sizes.append(len(x)) or real(self, x, number)
    )
    predict(images, tmp_path / "p.csv", 4, part=5000)
    assert sizes == [10, 10, 3]


def test_the_error_of_a_prevalence_is_not_shown(images: Path, tmp_path: Path) -> None:
    def decide(draws: PredictiveDraws, labels):
        weights = torch.full(draws.probs.shape[:2], 1 / len(draws.probs))
        return PredictiveDraws(draws.probs, weights), {"more": ["x"] * draws.probs.shape[1]}, {"seen": 1.0}

    done = predict(images, tmp_path / "p.csv", decide=decide)
    found = table(tmp_path / "p.csv")
    assert "mc_error" not in found and set(found["more"]) == {"x"} and done.totals["seen"] == 5
