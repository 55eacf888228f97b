"""Doubtful labels: confident learning by hand and against cleanlab, cross-fitting, the page, the table, the command."""

import csv
import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, EVIL, INFO, here, refused, script, trainer, write_npz

from analysis import crossfit
from analysis.crossfit import cross_fit, digests, read_fold
from inference.spoil import flip_labels
from pyro_isingvit import fit
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.folds import copy_groups, fold_numbers
from pyro_isingvit.data.split import ImageData, Split
from pyro_isingvit.predictive.labels import SLACK, confident_joint, doubt
from pyro_isingvit.report.labels_report import COLUMNS, Checked, thumbnail, to_csv, write_page

QUICK = replace(CONFIG, method="deterministic")


def made(count: int, wrong: float, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities about true classes, given labels, and which of these are wrong."""
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(rng.integers(0, classes, count))
    labels, moved = flip_labels(truth, wrong, classes, seed)
    logits = rng.normal(size=(count, classes)) + 3.0 * np.eye(classes)[truth.numpy()]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs, labels.numpy(), moved.numpy()


# The confident joint --------------------------------------------------------------------------------------------


def test_the_confident_joint_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.95, 0.05], [0.4, 0.6]])
    labels = np.array([0, 0, 1, 1, 1])
    # Thresholds .8 and (.8 + .05 + .6) / 3 = .4833: guesses 0, none, 1, 0, 1; J = [[1, 0], [1, 2]].
    joint, wrong = confident_joint(probs, labels, np.ones(5))
    np.testing.assert_allclose(joint, [[2 / 5, 0], [3 / 5 / 3, 3 / 5 * 2 / 3]])
    assert wrong.tolist() == [False, False, False, True, False]
    weighted, _ = confident_joint(np.repeat(probs, 2, 0), np.repeat(labels, 2), np.ones(10))
    np.testing.assert_allclose(confident_joint(probs, labels, np.full(5, 2.0))[0], weighted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_cleanlab_counts_the_same(seed: int, share: float) -> None:
    """Where it is installed (it is AGPL, and nothing here needs it)."""
    count = pytest.importorskip("cleanlab.count")
    probs, labels, _ = made(600, share, seed=seed)
    found = doubt(probs, probs[None, np.arange(600), labels], labels, resamples=0)
    assert int(found.off_diagonal.sum()) == count.num_label_issues(labels, probs)
    theirs = count.num_label_issues(labels, probs, estimation_method="off_diagonal_calibrated")
    assert found.share * 600 == pytest.approx(theirs, abs=4)  # whose joint is rounded to whole images
    thresholds = count.get_confident_thresholds(labels, probs)
    ours = [probs[labels == k, k].mean() for k in range(4)]
    np.testing.assert_allclose(thresholds, ours, atol=SLACK)


def test_wrong_labels_come_first_and_their_share_is_found() -> None:
    probs, labels, wrong = made(2000, 0.1)
    draws = np.clip(probs[None, np.arange(2000), labels] + np.linspace(-0.02, 0.02, 21)[:, None], 0, 1)
    found = doubt(probs, draws, labels)
    order = found.order()
    assert wrong[order[:200]].mean() > 0.9
    assert found.flagged[order[: found.flagged.sum()]].all()
    assert (found.suspicion[order][: found.flagged.sum()] >= found.suspicion[~found.flagged].max()).all()
    low, high = found.share_interval
    assert low < 0.1 < high + 0.02 and low <= found.share <= high and high - low < 0.05
    np.testing.assert_allclose(found.interval[1] - found.interval[0], 0.036, atol=0.02)
    assert (found.suggested != labels).all()
    assert sum(images for *_, images in found.confused(labels, 12)) == found.flagged.sum()
    assert wrong[found.flagged].mean() > 0.9 and found.flagged[wrong].mean() > 0.9
    wide = doubt(probs, np.stack([draws[0] * 0, draws[0] * 0 + 1]), labels, score="upper", resamples=0)
    assert wide.suspicion.max() < 0.06 and not wide.flagged.any()  # where the draws disagree altogether


def test_probabilities_that_cannot_be_are_refused() -> None:
    probs, labels, _ = made(20, 0.1)
    given = probs[None, np.arange(20), labels]
    for bad in (probs * 2, -probs, np.full_like(probs, np.nan), probs[:5]):
        with pytest.raises(UserError, match="probabilities"):
            doubt(bad, given, labels)
    with pytest.raises(UserError, match="do not fit"):
        doubt(probs, given[:, :3], labels)


# Wrong labels, folds --------------------------------------------------------------------------------------------


def test_labels_are_moved_uniformly_to_other_classes() -> None:
    labels = torch.arange(6000) % 3
    flipped, moved = flip_labels(labels, 0.25, 3, seed=1)
    assert int(moved.sum()) == 1500 and torch.equal(moved, flipped != labels)
    for old, new in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        assert abs(int(((labels == old) & (flipped == new)).sum()) - 250) < 60
    assert torch.equal(flip_labels(labels, 0.25, 3, seed=1)[0], flipped)
    assert not torch.equal(flip_labels(labels, 0.25, 3, seed=2)[0], flipped)
    for share, classes in ((1.1, 3), (-0.1, 3), (0.5, 1)):
        with pytest.raises(UserError):
            flip_labels(labels, share, classes)


def test_folds_keep_proportions_and_groups_together() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 7])
    numbers = fold_numbers(labels, 5, ("a", "b", "c"), seed=3)
    counts = np.array([np.bincount(labels[numbers == number], minlength=3) for number in range(5)])
    assert (counts[:, 0] == 12).all() and (counts[:, 1] == 6).all() and set(counts[:, 2]) == {1, 2}
    groups = np.arange(97) // 3
    numbers = fold_numbers(labels, 5, ("a", "b", "c"), groups=groups)
    assert all(len(set(numbers[groups == group])) == 1 for group in set(groups))
    rare = np.array([0] * 10 + [1])
    with pytest.raises(UserError, match="class 'b' has a single image"):
        fold_numbers(rare, 2, ("a", "b"))
    with pytest.raises(UserError, match="class 'b' has images in one group alone"):
        fold_numbers(np.array([0] * 10 + [1] * 4), 2, ("a", "b"), groups=np.r_[np.arange(10), [10] * 4])
    for count in (1, 11):
        with pytest.raises(UserError, match="`folds` must lie between 2 and 10"):
            fold_numbers(rare, count, ("a", "b"))


def test_copies_are_one_group() -> None:
    assert copy_groups([b"a", b"b", b"c"]) is None
    groups = copy_groups([b"a", b"b", b"a"])
    assert groups is not None and groups[0] == groups[2] != groups[1]


# Cross-fitting --------------------------------------------------------------------------------------------------


def test_every_image_is_predicted_by_a_network_that_has_not_seen_it(data: ImageData, monkeypatch) -> None:
    """With copies of an image in the training part: they are held out together."""
    images = data.train.images[:].clone()
    images[7] = images[4]
    data = replace(data, train=Split(images, data.train.labels))
    seen: list[set[bytes]] = []

    class Watched(crossfit.Trainer):
        def __init__(self, config, parts, *rest, **more) -> None:
            seen.append(set(digests(parts.train.images)))
            assert torch.equal(parts.val.labels, data.val.labels)
            super().__init__(config, parts, *rest, **more)

    predicted: list[set[bytes]] = []
    real = crossfit.draw_predictive

    def watched(run, images, *rest, **more):
        predicted.append(set(digests(Split(images, torch.zeros(len(images))).images)))
        return real(run, images, *rest, **more)

    monkeypatch.setattr(crossfit, "Trainer", Watched)
    monkeypatch.setattr(crossfit, "draw_predictive", watched)
    train = replace(CONFIG.train, epochs=30, lr=1e-2)
    config = replace(CONFIG, method="dropout", train=train)
    fitted = cross_fit(config, lambda: data, folds=3, samples=4, progress=False)
    held_out = predicted[::2]  # each followed by the validation part
    assert len(seen) == 3 and all(not here & there for here, there in zip(seen, held_out, strict=True))
    assert set.union(*held_out) == set(digests(data.train.images)) and all(len(part) > 10 for part in held_out)
    size = len(data.train) + len(data.val)
    assert fitted.probs.shape == (size, 3) and fitted.given.shape == (4, size)
    np.testing.assert_allclose(fitted.probs.sum(1), 1, atol=1e-5)
    rows = np.arange(len(data.train))
    np.testing.assert_allclose(fitted.given[:, rows].mean(0), fitted.probs[rows, fitted.labels[rows]], atol=1e-5)
    assert (fitted.probs.argmax(1) == fitted.labels).mean() > 0.8


def test_intervals_of_a_single_network_hold_the_mean(data: ImageData) -> None:
    """One network of each fold: what is said of a validation image is the mean of all of them, without width."""
    fitted = cross_fit(QUICK, lambda: data, folds=3, samples=2, progress=False)
    rows = np.arange(len(fitted.labels))
    assert fitted.given.shape == (1, len(rows)) and len(data.val) > 0
    np.testing.assert_allclose(fitted.given[0], fitted.probs[rows, fitted.labels], rtol=1e-5)


def test_finished_folds_are_kept_and_damaged_or_other_ones_trained_again(
    data: ImageData, tmp_path: Path, monkeypatch
) -> None:
    trained: list[int] = []
    real = crossfit.fit_fold

    def counted(number, task):
        trained.append(number)
        return real(number, task)

    monkeypatch.setattr(crossfit, "fit_fold", counted)
    run = partial(cross_fit, QUICK, lambda: data, tmp_path, folds=3, samples=2, progress=False)
    first = run()
    assert trained == [0, 1, 2] and sorted(path.name for path in tmp_path.iterdir()) == [
        "fold-1.npz", "fold-2.npz", "fold-3.npz"]  # fmt: skip
    np.testing.assert_array_equal(run().probs, first.probs)
    assert trained == [0, 1, 2]
    (tmp_path / "fold-2.npz").write_bytes((tmp_path / "fold-2.npz").read_bytes()[:200])
    again = run()
    assert trained == [0, 1, 2, 1]
    np.testing.assert_array_equal(again.probs, first.probs)
    flipped = replace(data, train=Split(data.train.images, flip_labels(data.train.labels, 0.2, 3)[0]))
    cross_fit(QUICK, lambda: flipped, tmp_path, folds=3, samples=2, progress=False)
    assert trained[4:] == [0, 1, 2]  # other labels
    (tmp_path / "fold-1.npz").write_bytes(b"")
    assert read_fold(tmp_path / "fold-1.npz", "key") is None


def test_an_interrupted_fit_says_what_is_kept(data: ImageData, tmp_path: Path, monkeypatch) -> None:
    real = crossfit.fit_fold

    def stopped(number, task):
        if number == 1:
            raise KeyboardInterrupt
        return real(number, task)

    monkeypatch.setattr(crossfit, "fit_fold", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 folds are kept in .*re-run the same command"):
        cross_fit(QUICK, lambda: data, tmp_path, folds=3, samples=2, progress=False)


# Page, table, command -------------------------------------------------------------------------------------------


def checked() -> Checked:
    probs, labels, _ = made(40, 0.2)
    found = doubt(probs, probs[None, np.arange(40), labels], labels)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    names = tuple(f"={EVIL}{row}.png" for row in range(30))
    parts = {"train": Split(images[:30], torch.from_numpy(labels[:30]), names),
             "val": Split(images[30:], torch.from_numpy(labels[30:]))}  # fmt: skip
    return Checked(parts, (EVIL, "@b", "c\x1b[31m", "d"), found)


def test_images_of_one_group_are_held_out_together(data: ImageData, monkeypatch) -> None:
    groups = tuple(f"patient {i // 3}" for i in range(len(data.train)))
    grouped = replace(data, train=replace(data.train, groups=groups))
    folds: list[np.ndarray] = []
    real = crossfit.fold_numbers

    def watched(*arguments) -> np.ndarray:
        folds.append(real(*arguments))
        return folds[-1]

    monkeypatch.setattr(crossfit, "fold_numbers", watched)
    config = replace(CONFIG, method="deterministic", train=replace(CONFIG.train, epochs=1))
    cross_fit(config, lambda: grouped, folds=3, samples=1, progress=False)
    held = {(group, int(fold)) for group, fold in zip(groups, folds[0], strict=True)}
    assert len(held) == len(set(groups)) and {fold for _, fold in held} == {0, 1, 2}


def test_copies_join_groups_and_validation_copies_are_left_to_the_network_that_saw_none(
    data: ImageData, monkeypatch
) -> None:
    images = data.train.images[:].clone()
    images[7] = images[4]  # of two patients
    groups = tuple(f"patient {i // 3}" for i in range(len(images)))
    val = data.val.images[:].clone()
    val[2] = images[4]
    joined_up = replace(data, train=Split(images, data.train.labels, groups=groups), val=Split(val, data.val.labels))
    kept: dict[int, crossfit.Arrays] = {}
    folds: list[np.ndarray] = []
    real, cut = crossfit.fit_fold, crossfit.fold_numbers

    def watched(number: int, task) -> crossfit.Arrays:
        kept[number] = real(number, task)
        return kept[number]

    def numbered(*arguments) -> np.ndarray:
        folds.append(cut(*arguments))
        return folds[-1]

    monkeypatch.setattr(crossfit, "fit_fold", watched)
    monkeypatch.setattr(crossfit, "fold_numbers", numbered)
    config = replace(CONFIG, method="dropout", train=replace(CONFIG.train, epochs=2))
    fitted = cross_fit(config, lambda: joined_up, folds=3, samples=3, progress=False)
    [numbers] = folds
    assert len(set(numbers[3:9])) == 1  # patients 1 and 2 share an image
    alone, size = kept[int(numbers[4])], len(images)
    np.testing.assert_array_equal(fitted.probs[size + 2], alone["val_probs"][2])
    np.testing.assert_array_equal(fitted.given[:, size + 2], alone["val_given"][:, 2])
    mean = np.mean([kept[number]["val_probs"][3] for number in range(3)], axis=0)
    np.testing.assert_allclose(fitted.probs[size + 3], mean, rtol=1e-6)


def test_the_table_has_every_image_and_no_formula() -> None:
    found = checked()
    rows = list(csv.reader(io.StringIO(to_csv(found))))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 41
    flags = [row[-1] for row in rows[1:]]
    assert flags == sorted(flags, reverse=True) and 0 < flags.count("yes") < 40
    assert {row[1] for row in rows[1:]} == {"train", "val"} and {"9"} <= {row[0] for row in rows if row[1] == "val"}
    for row in rows[1:]:
        assert not row[0].startswith("=") and not row[2].startswith("@") and "\x1b" not in "".join(row)
        assert row[2] != row[3] and float(row[5]) <= float(row[4]) + 1e-6 <= float(row[6]) + 2e-6


def test_the_page_stands_alone_and_escapes_names(tmp_path: Path) -> None:
    found = checked()
    write_page(tmp_path / "labels.html", found, replace(INFO, dataset=EVIL), {"Images": 40, EVIL: EVIL}, most=3)
    page = (tmp_path / "labels.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert page.count("data:image/png;base64,") == 3 and not re.search(r"(src|href)=\"(?!data:)", page)
    write_page(tmp_path / "none.html", found, INFO, {}, most=0)
    assert "data:image" not in (tmp_path / "none.html").read_text()


@pytest.mark.parametrize(("shape", "size"), [((1, 8, 8), (8, 8)), ((3, 300, 150), (112, 56))])
def test_thumbnails(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    from base64 import b64decode

    from PIL import Image

    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    made = np.asarray(Image.open(io.BytesIO(b64decode(thumbnail(image).partition(",")[2]))))
    assert made.shape == ((*size, 3) if shape[0] == 3 else size)
    if shape[0] == 1:
        np.testing.assert_array_equal(made, image[0])


def test_the_command_finds_labels_that_were_moved(tmp_path: Path, data: ImageData) -> None:
    """Images of an npz file are named by their row in it; a second call trains nothing."""
    source = data.train.images[:].numpy(), data.train.labels.clone()
    labels, moved = flip_labels(source[1], 0.1, 3, seed=2)
    spec = write_npz(tmp_path / "made.npz", train_images=source[0][:, 0], train_labels=labels.numpy(),
                     val_images=None, val_labels=None, test_images=None, test_labels=None)  # fmt: skip
    words = ["--dataset", spec, "--patch-size", 2, "--width", 16, "--depth", 1, "--heads", 2, "--epochs", 30,
             "--samples", 5, "--method", "dropout", "--device", "cpu", "--batch-size", 8, "--out", tmp_path / "run",
             ]  # fmt: skip
    assert script("inference.train", *words).returncode == 0
    first = script("analysis.labels", "--run", tmp_path / "run", "--folds", 4, "--jobs", 2)
    assert first.returncode == 0, first.stderr
    assert "Estimated wrong labels" in first.stdout and (tmp_path / "run" / "labels.html").is_file()
    rows = list(csv.DictReader((tmp_path / "run" / "labels.csv").read_text().splitlines()))
    wrong = set(np.flatnonzero(moved.numpy()).tolist())
    checked = {int(row["image"]) for row in rows}
    assert len(rows) == len(checked) and checked <= set(range(60))
    count = len(wrong & checked)
    assert count >= 3 and len({int(row["image"]) for row in rows[:count]} & wrong) >= count - 1
    out = tmp_path / "elsewhere" / "page.html"
    for path in sorted((tmp_path / "run" / "labels-folds").iterdir()):
        target = out.with_name("page-folds") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    second = script("analysis.labels", "--run", tmp_path / "run", "--folds", 4, "--out", out)
    assert second.returncode == 0 and "4 of 4 folds" in second.stderr
    assert out.with_suffix(".csv").read_text() == (tmp_path / "run" / "labels.csv").read_text()


def test_bad_input_is_refused(tmp_path: Path, data: ImageData) -> None:
    run = tmp_path / "run"
    refused(here("analysis.labels", "--run", run), "run")
    trainer(data, run, replace(QUICK, data=DataConfig("made")), epochs=1).fit()
    refused(here("analysis.labels", "--run", run), "unknown data set 'made'")
    refused(here("analysis.labels", "--run", run, "--out", tmp_path / "x.txt"), "--out names a page")
    refused(here("analysis.labels", "--run", run, "--show", -1), "--show must not be negative")
    for settings in ({"jobs": 0}, {"samples": 0}, {"folds": 1}):
        with pytest.raises(UserError, match=f"`{next(iter(settings))}` must"):
            cross_fit(QUICK, lambda: data, progress=False, **settings)


def test_fewer_groups_than_folds():
    with pytest.raises(UserError, match="`folds` must lie between 2 and 3, the number of groups, not 5"):
        fold_numbers(np.array([0, 1] * 10), 5, ("a", "b"), groups=np.array([0, 1, 2] * 6 + [0, 1]))


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], ["a", "b"]])
def test_doubts_about_what_is_no_class(labels):
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    with pytest.raises(UserError, match="labels must be class numbers, 0 to 1"):
        doubt(probs, np.array([[0.9, 0.8]]), labels, resamples=0)


def test_doubts_take_a_list_and_no_nan():
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert not doubt(probs, np.array([[0.9, 0.8]]), [0, 1], resamples=0).flagged.any()
    with pytest.raises(UserError, match="NaN or infinite"):
        doubt(probs, np.array([[0.9, np.nan]]), [0, 1], resamples=0)


def test_a_run_of_images_in_memory_is_checked_in_python(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    fit("digits", ImageData.from_arrays(images, [0, 1] * 30), epochs=1, progress=False).save(tmp_path / "run")
    refused(here("analysis.labels", "--run", tmp_path / "run"), "given in memory", "docs/labels.md")
