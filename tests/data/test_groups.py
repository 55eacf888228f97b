"""Images of one patient, slide or plate never fall into two parts."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyro_isingvit import ImageData, load_data
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import development_data, load_unlabelled
from pyro_isingvit.data.named import groups_of
from pyro_isingvit.data.split import UNLABELLED
from pyro_isingvit.data.stratify import hold_out_groups, shared_group

RNG = np.random.default_rng(0)


def made(count, groups, seed=0):
    rng = np.random.default_rng(seed)
    return pixels(count, 6, 6), np.arange(count) % 2, rng.integers(0, groups, count)


def check(data):
    parts = [set(part.groups) for part in (data.train, data.val, data.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for part in (data.train, data.val):
        assert set(part.labels.tolist()) == set(range(data.info.num_classes))


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 300), st.integers(12, 40), st.integers(0, 10**6), st.sampled_from([None, 20]))
def test_no_group_in_two_parts(count, groups, seed, train_size):
    images, labels, named = made(count, groups, seed)
    data = ImageData.from_arrays(images, labels, groups=named, seed=seed, train_size=train_size)
    check(data)
    assert train_size is None or len(data.train) == train_size
    assert 0.05 * count <= len(data.test) <= 0.4 * count
    again = ImageData.from_arrays(images, labels, groups=named, seed=seed, train_size=train_size)
    assert again.train.groups == data.train.groups
    other = ImageData.from_arrays(images, labels, groups=named, seed=seed + 1, train_size=train_size)
    assert other.test.groups == data.test.groups  # whatever the seed


def test_groups_in_the_files_names(tmp_path):
    for name, label in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i in range(30):
            Image.fromarray(pixels(6, 6, seed=30 * label + i)).save(tmp_path / name / f"patient{i // 3:02d}-{i}.png")
    spec = f"imagefolder:{tmp_path}"
    for pattern in (r"patient(\d+)", r"patient\d+"):
        data = load_data(spec, groups=pattern)
        check(data)
        assert len(set(data.train.groups) | set(data.val.groups) | set(data.test.groups)) == 10
    assert data.train.groups[0] in data.train.names[0]
    check(development_data(DataConfig(dataset=spec, groups=r"patient(\d+)"), 12))
    for pattern, message in (
        ("[", "is no regular expression"),
        ("plate", "finds no group in the file name 'a/patient"),
    ):
        with pytest.raises(UserError, match=message):
            load_data(spec, groups=pattern)
    with pytest.raises(UserError, match="is for names of files"):
        np.savez(tmp_path / "a.npz", train_images=pixels(4, 6, 6), train_labels=[0, 1, 0, 1])
        load_data(f"npz:{tmp_path / 'a.npz'}", groups="x")


def test_what_a_pattern_finds():
    assert groups_of(["a/p1_x.png", "b/p22_y.png"], r"p\d+") == ("p1", "p22")
    assert groups_of(["a/p1_x.png"], r"p(\d+)_(.)") == ("1",) and groups_of(["a"], None) == ()


def test_groups_in_an_npz_and_a_leak(tmp_path):
    images, labels, named = made(80, 16)
    arrays = {"train_images": images, "train_labels": labels, "train_groups": named}
    np.savez(tmp_path / "a.npz", **arrays)
    check(load_data(f"npz:{tmp_path / 'a.npz'}"))
    test = {"test_images": images[:8], "test_labels": labels[:8], "test_groups": named[:8]}
    np.savez(tmp_path / "a.npz", **arrays, **test)
    with pytest.raises(UserError, match=r"group '\d+' has images in two parts"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_too_few_groups():
    images, labels, _ = made(40, 4)
    alone = np.where(labels == 1, 0, np.arange(40))
    with pytest.raises(UserError, match=r"class '1' has images of one group.*for testing; add groups"):
        ImageData.from_arrays(images, labels, groups=alone)
    two = np.where(labels == 1, np.arange(40) % 4 // 2, np.arange(40))
    with pytest.raises(UserError, match=r"class '1' has images of one group.*for validation"):
        ImageData.from_arrays(images, labels, groups=two)
    with pytest.raises(UserError, match="40 images, 40 labels, 3 groups"):
        ImageData.from_arrays(images, labels, groups=[1, 2, 3])


def test_the_fold_keeps_the_classes_shares():
    labels = RNG.choice(3, 600, p=[0.7, 0.2, 0.1])
    groups = [str(i) for i in RNG.integers(0, 100, 600)]
    rest, held_out = hold_out_groups(labels, groups, 120, RNG, ("a", "b", "c"), "testing")
    assert len(rest) + len(held_out) == 600 and 90 <= len(held_out) <= 150
    shares = np.bincount(labels[held_out]) / len(held_out)
    np.testing.assert_allclose(shares, np.bincount(labels) / 600, atol=0.05)
    assert shared_group([[groups[i] for i in part] for part in (rest, held_out)]) is None


@pytest.mark.parametrize("pattern", [r"patient(\d+)|case(\d+)", r"(p\d+_)?c"])
def test_first_parentheses_that_hold_nothing(pattern):
    with pytest.raises(UserError, match=r"finds no group in the file name 'c/case1.png'"):
        groups_of(["c/patient1.png", "c/case1.png"][pattern[0] == "(" :], pattern)


def test_missing_groups_are_refused():
    with pytest.raises(UserError, match="`groups` have 2 NaN or missing values"):
        ImageData.from_arrays(np.zeros((9, 4, 4)), np.arange(9) % 3, groups=[None, float("nan"), *"abcdefg"])


def test_groups_of_any_kind_stay_together():
    """An iterator is read once, and rows of an array are groups too."""
    ids = np.arange(60) // 3
    for groups in (map(str, ids), np.stack([ids, ids], 1), list(torch.from_numpy(np.stack([ids, ids], 1)))):
        data = ImageData.from_arrays(np.zeros((60, 4, 4)), np.arange(60) // 30, groups=groups)
        assert len(set(data.train.groups)) > 5
        check(data)


def test_another_data_set_needs_no_groups(tmp_path):
    """Its names are not those of the training images, and all of its test images are predicted in any case."""
    for name in "ab":
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        for part in ("train", "test"):
            for i in range(3):
                Image.fromarray(pixels(6, 6, seed=i)).save(tmp_path / part / name / f"{i}.png")
    info, source = DataInfo("x", ("a", "b"), 1, 6, 6, (0.5,), (0.25,)), DataConfig(groups=r"patient(\d+)")
    split = load_inputs(f"imagefolder:{tmp_path}", info, source=source)
    assert len(split) == 6 and split.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_count_by_their_names(tmp_path, caplog):
    """A folder in which one of the run's classes is missing has labels all the same."""
    for part, name in itertools.product(("train", "test"), "bd"):
        (tmp_path / part / name).mkdir(parents=True)
        Image.fromarray(pixels(6, 6, seed=ord(name))).save(tmp_path / part / name / "1.png")
    info = DataInfo("x", ("a", "b", "c", "d"), 1, 6, 6, (0.5,), (0.25,))
    assert load_inputs(f"imagefolder:{tmp_path}", info).labels.tolist() == [1, 3]
    assert "other classes" not in caplog.text
    other = replace(info, classes=("a", "b", "c"))
    assert load_inputs(f"imagefolder:{tmp_path}", other).labels.tolist() == [UNLABELLED] * 2
    assert "other classes" in caplog.text


def test_settings_that_nothing_reads_are_told_of(caplog):
    load_data("digits", train_size=100)
    assert "changes nothing" not in caplog.text
    load_data("digits", train_size=100, groups="p[0-9]+", columns="path=file", pages="channels")
    for name in ("groups", "columns", "pages"):
        assert f"`{name}` changes nothing here" in caplog.text


def test_groups_hold_where_the_folder_was_moved(tmp_path):
    """Images of a patient who was trained on are not in the test part of a copy."""
    for name in "ab":
        (tmp_path / "here" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(pixels(6, 6, seed=i)).save(tmp_path / "here" / name / f"{i % 10}_{i}.png")
    source = DataConfig(f"imagefolder:{tmp_path / 'here'}", groups=r"(\d+)_")
    data = load_data(source.dataset, groups=source.groups)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = load_inputs(f"imagefolder:{tmp_path / 'there'}", data.info, source=source)
    assert moved.names == data.test.names and not {*moved.groups} & {*data.train.groups}
    kept = load_unlabelled(f"imagefolder:{tmp_path / 'there'}", source=source)
    assert len(kept) == 60 - len(moved)
    np.savez(tmp_path / "x.npz", train_images=pixels(20, 6, 6), train_labels=np.arange(20) % 2)
    assert len(load_unlabelled(f"npz:{tmp_path / 'x.npz'}", source=source)) == 16
    assert len(load_inputs(f"npz:{tmp_path / 'x.npz'}", data.info, source=source)) == 4


@pytest.mark.parametrize("official", [True, False])
def test_files_that_cannot_move_into_the_test_part_are_no_reason_to_warn(tmp_path, caplog, official):
    tops = [tmp_path / "train", tmp_path / "test"] if official else [tmp_path]
    parts = [top / name for top in tops for name in "ab"]
    for place in parts:
        place.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(pixels(6, 6, seed=i)).save(place / f"{i}.png")
    source = DataConfig(f"imagefolder:{tmp_path}")
    info = load_data(source.dataset).info
    (parts[0] / "3.png").rename(parts[0] / "x.png")
    load_inputs(source.dataset, info, source=source)
    assert ("other images than when" in caplog.text) != official
