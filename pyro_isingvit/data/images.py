"""Images wherever they lie: an array in memory, files on disk, or rows made on demand.

Shapes: N images, C channels (1 or 3), H height, W width; images are (N, C, H, W) uint8.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need

CHUNK = 4096  # images at a time in passes over all of them
CPU = torch.device("cpu")

Shape = tuple[int, int, int, int]
Where = int | slice | Tensor | np.ndarray | list[int]
Normalise = Callable[[Tensor], Tensor]  # (B, C, H, W) uint8 -> float32


@runtime_checkable
class Images(Protocol):
    """Images that are asked for by row number.

    A new source is a subclass with ``shape`` and ``rows``; length, indexing, parts and batches come with it. Nothing
    here holds more rows than are asked for at once.

    Attributes:
        shape: (N, C, H, W).
        device: where ``rows`` gives images.

    Examples:
        >>> import torch
        >>> from pyro_isingvit.data.images import Images
        >>> class Grey(Images):
        ...     shape = (256, 1, 8, 8)
        ...     def rows(self, index):
        ...         return index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        >>> images = Grey()
        >>> len(images), images[250:].shape, int(images[7].max())
        (256, torch.Size([6, 1, 8, 8]), 7)
    """

    shape: Shape
    device: torch.device = CPU

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index``.

        Args:
            index: (n,) int64 in [0, N) on ``device``, n >= 1, in any order, repeated or not.

        Returns:
            (n, C, H, W) uint8 on ``device``.
        """

    def __len__(self) -> int:
        """N, the number of images."""
        return self.shape[0]

    def __getitem__(self, where: Where) -> Tensor:
        """One image (C, H, W) for an integer; otherwise (n, C, H, W), for a slice, row numbers or a mask (N,).

        Raises:
            IndexError: there is no such row.
        """
        index = positions(where, len(self)).to(self.device)
        if len(index) == 0:
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8, device=self.device)
        rows = self.rows(index)
        return rows[0] if isinstance(where, int | np.integer) else rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All images as a NumPy array."""
        array = self[:].cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def take(self, where: Where) -> "Images":
        """The images at ``where``, as ``Images`` again; nothing is read yet."""
        return Subset(self, positions(where, len(self)))

    def to(self, device: torch.device | str) -> "Images":
        """The same images on a device, if they can stay there; a source that makes rows on demand stays on the CPU."""
        return self

    def batches(self, size: int, normalise: Normalise, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """All images in order, normalised, at most ``size`` at a time.

        Args:
            size: B, images of a batch; the last one may have fewer.
            normalise: ``DataInfo.normalise`` of the training data.
            device: where to; None: where the images are.

        Yields:
            (B, C, H, W) float32.

        Raises:
            UserError: ``size`` below 1, or images that do not fit the training data.
        """
        need(size >= 1, f"`size` of a batch must be at least 1, got {size}.")
        for start in range(0, len(self), size):
            yield normalise(self[start : start + size].to(device or self.device))


class InMemory(Images):
    """Images as one tensor, on any device. A slice is a view of it.

    Args:
        tensor: (N, C, H, W) uint8.

    Raises:
        UserError: another shape or type.
    """

    def __init__(self, tensor: Tensor) -> None:
        fits = tensor.ndim == 4 and tensor.dtype == torch.uint8
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        need(fits, f"expected images (N, C, H, W) torch.uint8, got {got}; `ImageData.from_arrays` converts others.")
        count, channels, height, width = tensor.shape
        self.tensor, self.shape, self.device = tensor, (count, channels, height, width), tensor.device

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,), a copy."""
        return self.tensor[index]

    def __getitem__(self, where: Where) -> Tensor:
        """As the tensor's own."""
        return self.tensor[torch.from_numpy(where) if isinstance(where, np.ndarray) else where]

    def take(self, where: Where) -> Images:
        """The images at ``where``: a view for a slice, otherwise a copy."""
        return InMemory(self[where])

    def to(self, device: torch.device | str) -> Images:
        """The tensor on a device; the same where it is there already."""
        return InMemory(self.tensor.to(device))


class Subset(Images):
    """Some rows of other images, read when they are asked for.

    Args:
        source: the images.
        index: (n,) int64, rows of the source.
    """

    def __init__(self, source: Images, index: Tensor) -> None:
        self.source, self.index = source, index.to(source.device)
        self.shape, self.device = (len(index), *source.shape[1:]), source.device

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,) of this part."""
        return self.source.rows(self.index[index])

    def take(self, where: Where) -> Images:
        """A part of this part, one step from the source."""
        return Subset(self.source, self.index[positions(where, len(self)).to(self.index.device)])


class Resized(Images):
    """Other images at another size, resized when they are asked for (bicubic, with antialiasing).

    Args:
        source: the images.
        size: height and width, in pixels; another shape of the source is lost.
    """

    def __init__(self, source: Images, size: int) -> None:
        self.source, self.size = source, size
        self.shape, self.device = (*source.shape[:2], size, size), source.device

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,)."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        return resize(self.source[index], [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)

    def take(self, where: Where) -> Images:
        """Some of them, resized in turn."""
        return Resized(self.source.take(where), self.size)

    def to(self, device: torch.device | str) -> Images:
        """The source moves where it can."""
        return Resized(self.source.to(device), self.size)


def positions(where: Where, count: int) -> Tensor:
    """Row numbers (n,) int64 that an index of ``count`` rows means; a mask (N,) means its true rows.

    Raises:
        IndexError: there is no such row.
    """
    if isinstance(where, slice):
        return torch.from_numpy(np.arange(*where.indices(count)))
    index = torch.as_tensor(where)
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise IndexError(f"a mask of shape {tuple(index.shape)} for {count} images")
        return index.nonzero()[:, 0]
    index = index.reshape(-1).long()
    if len(index) and not -count <= int(index.min()) <= int(index.max()) < count:
        raise IndexError(f"rows {int(index.min())} to {int(index.max())} of {count} images")
    return torch.where(index < 0, index + count, index)


def as_images(images: object) -> Images:
    """Anything that is accepted as images: ``Images`` as they are, a tensor or array (N, C, H, W) uint8 in memory.

    Raises:
        UserError: another kind, shape or type.
    """
    if isinstance(images, Tensor):  # asked first: a protocol takes long to answer
        return InMemory(images)
    if isinstance(images, Images):
        return images
    if isinstance(images, np.ndarray):
        kind = f"expected images (N, C, H, W) uint8, got {images.shape} {images.dtype}"
        need(images.dtype == np.uint8, f"{kind}; `ImageData.from_arrays` converts others.")
        return InMemory(from_numpy(images))
    kind = type(images).__name__
    raise UserError(f"expected images as a tensor, an array or a subclass of `Images`, got {kind}.")


def from_numpy(array: np.ndarray) -> Tensor:
    """The array as a tensor on the same memory, which nobody here writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def statistics(images: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel, pixels in [0, 1]; at least 1e-3.

    The pixels' histogram is counted chunk by chunk: there is no float copy of the images.

    Args:
        images: as ``as_images`` takes them.
    """
    images = as_images(images)
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64, device=images.device)
    for start in range(0, len(images), CHUNK):
        for row, channel in zip(counts, images[start : start + CHUNK].unbind(1), strict=True):
            row += torch.bincount(channel.reshape(-1), minlength=256)
    level = torch.arange(256, dtype=torch.float64) / 255
    share = (counts.double() / counts[0].sum()).cpu()  # (C, 256)
    mean = (share * level).sum(1)
    std = (share * (level - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def copies(parts: Iterable[object]) -> list[int]:
    """How many images of each part are, byte for byte, in a part before it.

    Args:
        parts: as ``as_images`` takes them, of one shape.
    """
    seen: set[int] = set()  # 64 bits: among 100,000 images a chance of 3e-10 that two share one
    found = []
    for part in map(as_images, parts):
        prints: list[int] = []
        for start in range(0, len(part), CHUNK):
            prints += [hash(image.tobytes()) for image in part[start : start + CHUNK].cpu().numpy()]
        found.append(sum(each in seen for each in prints))
        seen.update(prints)
    return found
