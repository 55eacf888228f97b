"""Images in memory and on demand answer alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import INFO, make_split
from hypothesis import given
from hypothesis import strategies as st

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.batches import batches
from pyro_isingvit.data.images import CHUNK, Images, InMemory, Subset, as_images, copies
from pyro_isingvit.data.intensity import fit_scale
from pyro_isingvit.data.split import Split

COUNT = 7
ARRAY = torch.randint(0, 256, (COUNT, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class OnDemand(Images):
    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.hidden = tuple(tensor.shape), tensor

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        assert len(index) and int(index.min()) >= 0
        return torch.stack([self.hidden[i] for i in index.tolist()])


KINDS = {
    "memory": InMemory(ARRAY),
    "demand": OnDemand(ARRAY),
    "subset": Subset(OnDemand(torch.cat([ARRAY.flip(0), ARRAY])), torch.arange(COUNT) + COUNT),
    "subset of a subset": Subset(OnDemand(ARRAY.flip(0)), torch.arange(COUNT)).take(slice(None, None, -1)),
}  # fmt: skip
WHERE = [
    slice(None), slice(2, 5), slice(5, 2), slice(None, None, 2), slice(-3, None), 0, 6, -1, np.int64(3), [1, 1, 0],
    torch.tensor([4, 2]), torch.tensor([-1, 0]), np.array([5, 1]), torch.zeros(0, dtype=torch.int64),
    torch.arange(COUNT) > 4, np.arange(COUNT) % 2 == 0, torch.zeros(COUNT, dtype=torch.bool),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_indexing_is_the_tensor_s(kind: str, where) -> None:
    images, wanted = KINDS[kind], ARRAY[torch.from_numpy(where) if isinstance(where, np.ndarray) else where]
    assert torch.equal(images[where], wanted)
    if wanted.ndim == 4:
        part = images.take(where)
        assert isinstance(part, Images) and torch.equal(part[:], wanted)
        assert part.shape == tuple(wanted.shape) and len(part) == len(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_exist(kind: str) -> None:
    for where in (COUNT, -COUNT - 1, torch.tensor([0, COUNT]), torch.ones(COUNT + 1, dtype=torch.bool)):
        with pytest.raises(IndexError):
            KINDS[kind][where]
    assert len(list(KINDS[kind])) == COUNT  # iteration ends
    np.testing.assert_array_equal(np.asarray(KINDS[kind]), ARRAY.numpy())
    assert np.asarray(KINDS[kind], dtype=np.float32).dtype == np.float32


@given(size=st.integers(1, 9), count=st.integers(0, COUNT))
def test_batches_are_the_whole_in_parts(size: int, count: int) -> None:
    whole = INFO.normalise(ARRAY[:count])
    for images in KINDS.values():
        split = Split(images.take(slice(count)), torch.arange(count))
        parts = list(split.batches(size, INFO.normalise))
        assert [len(x) for x, _ in parts] == [min(size, count - i) for i in range(0, count, size)]
        if count:
            assert torch.equal(torch.cat([x for x, _ in parts]), whole)
            assert torch.cat([y for _, y in parts]).tolist() == list(range(count))


def test_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"`size` .* at least 1, got 0"):
        next(KINDS["demand"].batches(0, INFO.normalise))
    with pytest.raises(UserError, match=r"expected images \(N, 1, 4, 4\).* got \(N, 1, 4, 3\)"):
        next(InMemory(ARRAY[..., :3]).batches(2, INFO.normalise))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "parts"), [(3, 1), (3, 3), (10, 1)])
def test_training_batches_name_their_rows(kind: str, size: int, parts: int) -> None:
    split = Split(KINDS[kind], torch.arange(COUNT) * 10)
    seen = []
    for images, labels, rows in batches(split, size, seed=1, epoch=2, parts=parts):
        assert rows.dtype == torch.int64 and torch.equal(images, ARRAY[rows]) and torch.equal(labels, rows * 10)
        seen += rows.tolist()
    assert len(set(seen)) == len(seen) == COUNT - COUNT % size % parts
    again = [rows for *_, rows in batches(Split(ARRAY, split.labels), size, seed=1, epoch=2, parts=parts)]
    assert torch.cat(again).tolist() == seen


def test_memory_is_shared_where_it_can_be() -> None:
    images, array = as_images(ARRAY), ARRAY.numpy()
    assert images[2:4].data_ptr() == ARRAY[2:4].data_ptr() == images.take(slice(2, 4))[:].data_ptr()
    assert images.to("cpu")[:].data_ptr() == ARRAY.data_ptr()
    frozen = array.copy()
    frozen.flags.writeable = False
    assert as_images(frozen)[:].data_ptr() == frozen.ctypes.data  # and no warning: warnings are errors here
    assert as_images(images) is images
    assert torch.equal(as_images(array[::-1])[:], ARRAY.flip(0))


@pytest.mark.parametrize(
    "bad", [ARRAY.double(), ARRAY[0], ARRAY.numpy().astype(np.int64), ARRAY.numpy()[:, 0], [1], None]
)
def test_what_is_no_images(bad) -> None:
    with pytest.raises(UserError, match="expected images"):
        as_images(bad)


def test_a_split_accepts_arrays_and_checks_counts() -> None:
    labels = torch.arange(COUNT)
    for images in (ARRAY, ARRAY.numpy(), KINDS["demand"]):
        split = Split(images, labels)
        assert isinstance(split.images, Images) and torch.equal(split.images[3:], ARRAY[3:])
        assert replace(split, labels=labels + 1).labels[0] == 1
        assert torch.equal(split.take(np.array([2, 0])).images[:], ARRAY[[2, 0]])
    with pytest.raises(UserError, match="label count mismatch: 7 images, 6 labels"):
        Split(ARRAY, labels[1:])


def test_statistics_and_copies_in_chunks(monkeypatch) -> None:
    tensor = torch.randint(0, 256, (CHUNK + 10, 3, 2, 2), dtype=torch.uint8)
    tensor[CHUNK + 1] = tensor[3]
    scale = fit_scale(OnDemand(tensor))
    assert scale == fit_scale(as_images(tensor))
    mean, std = scale.mean, scale.std
    plain = tensor.double() / 255
    np.testing.assert_allclose(mean, plain.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, plain.std((0, 2, 3), correction=0), rtol=1e-12)
    assert copies([OnDemand(tensor[:5]), OnDemand(tensor[5:])]) == copies([tensor[:5], tensor[5:]]) == [0, 1]


def test_normalise_takes_images_too() -> None:
    split = make_split(6, torch.Generator().manual_seed(0))
    assert torch.equal(INFO.normalise(split.images), INFO.normalise(split.images[:]))
