"""Images wherever they lie: an array in memory, files on disk, or rows made on demand.

Shapes: N images, C channels, H height, W width; images are (N, C, H, W) uint8, or float32 if their pixels have more
than 8 bits.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.pixels import TOP, Kind

CHUNK = 4096  # images at a time in passes over all of them, and fewer where they are large
VALUES = 2**26  # pixels that such a pass holds
CPU_CHUNK = 256  # images that a network is given at a time on a CPU: the activations of more leave its caches
CPU_VALUES = 2**22  # numbers of their widest activation: Linux gives arrays above 32 MB back, and clears them anew
MOST_CHANNELS = 16
CPU = torch.device("cpu")

Shape = tuple[int, int, int, int]
Where = int | slice | Tensor | np.ndarray | list[int]
Normalise = Callable[[Tensor], Tensor]  # (B, C, H, W) as read -> float32
TYPES: dict[torch.dtype, Kind] = {torch.uint8: "uint8", torch.uint16: "uint16", torch.float32: "float32"}
Resize = Literal["fit", "crop", "stretch"]


def network_chunk(chunk: int, device: torch.device, widest: int) -> int:
    """How many images a network is given at a time for its predictions, at most ``chunk``.

    Args:
        chunk: at most so many.
        device: of the network; a CPU is faster with few, whose activations its caches hold.
        widest: numbers of the widest activation of one image.
    """
    return min(chunk, CPU_CHUNK, max(1, CPU_VALUES // widest)) if device.type == "cpu" else chunk


@runtime_checkable
class Images(Protocol):
    """Images that are asked for by row number.

    A new source is a subclass with ``shape`` and ``rows``; length, indexing, parts and batches come with it. Nothing
    here holds more rows than are asked for at once.

    Attributes:
        shape: (N, C, H, W).
        device: where ``rows`` gives images.
        kind: type of the pixels: uint8, uint16 or float32.

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
    kind: Kind = "uint8"

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index``.

        Args:
            index: (n,) int64 in [0, N) on ``device``, n >= 1, in any order, repeated or not.

        Returns:
            (n, C, H, W) on ``device``: uint8, or float32 for the other kinds.
        """

    @property
    def chunk(self) -> int:
        """Images at a time in a pass over all of them."""
        return max(1, min(CHUNK, VALUES // math.prod(self.shape[1:])))

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
            dtype = torch.uint8 if self.kind == "uint8" else torch.float32
            return torch.empty(0, *self.shape[1:], dtype=dtype, device=self.device)
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
        tensor: (N, C, H, W) uint8, uint16 or float32.

    Raises:
        UserError: another shape or type.
    """

    def __init__(self, tensor: Tensor) -> None:
        fits = tensor.ndim == 4 and tensor.dtype in TYPES
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        need(
            fits,
            f"expected images (N, C, H, W) torch.uint8, uint16 or float32, got {got}; `ImageData.from_arrays` converts "
            "others.",
        )
        count, channels, height, width = tensor.shape
        self.tensor, self.shape, self.device = tensor, (count, channels, height, width), tensor.device
        self.kind = TYPES[tensor.dtype]

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,), a copy."""
        return self[index]

    def __getitem__(self, where: Where) -> Tensor:
        """As the tensor's own; uint16 becomes float32."""
        rows = self.tensor[torch.from_numpy(where) if isinstance(where, np.ndarray) else where]
        return rows.float() if rows.dtype == torch.uint16 else rows

    def take(self, where: Where) -> Images:
        """The images at ``where``: a view for a slice, otherwise a copy."""
        return InMemory(self.tensor[torch.from_numpy(where) if isinstance(where, np.ndarray) else where])

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
        self.shape, self.device, self.kind = (len(index), *source.shape[1:]), source.device, source.kind

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
        size: height and width, in pixels.
        how: fit: the whole image, with margins as dark as its darkest pixel; crop: the middle, without them; stretch:
            the whole image, whose shape is lost. The same for square images.
    """

    def __init__(self, source: Images, size: int, how: Resize = "stretch") -> None:
        self.source, self.size, self.how = source, size, how
        self.shape, self.device, self.kind = (*source.shape[:2], size, size), source.device, source.kind

    def rows(self, index: Tensor) -> Tensor:
        """The images at ``index`` (n,)."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, resize

        inner = resized_to(self.source.shape[2:], (self.size, self.size), self.how)
        x = resize(self.source[index], list(inner), InterpolationMode.BICUBIC, antialias=True)
        if self.kind == "uint16":  # held as floats, which overshoot at edges; torchvision rounds and cuts 8 bits itself
            x = x.round().clamp(0, TOP["uint16"])
        if self.how == "fit":
            top, left = ((self.size - side) // 2 for side in inner)
            whole = x.amin((2, 3), keepdim=True).repeat(1, 1, self.size, self.size)
            whole[:, :, top : top + inner[0], left : left + inner[1]] = x
            return whole
        return center_crop(x, [self.size, self.size]) if self.how == "crop" else x

    def take(self, where: Where) -> Images:
        """Some of them, resized in turn."""
        return Resized(self.source.take(where), self.size, self.how)

    def to(self, device: torch.device | str) -> Images:
        """The source moves where it can."""
        return Resized(self.source.to(device), self.size, self.how)


def resized_to(given: tuple[int, ...], size: tuple[int, int], how: Resize) -> tuple[int, int]:
    """Height and width of an image before margins are added or cut, so that it becomes ``size`` (height, width)."""
    if how == "stretch":
        return size
    ratios = [wanted / side for wanted, side in zip(size, given, strict=True)]
    scale = min(ratios) if how == "fit" else max(ratios)
    height, width = (max(1, round(scale * side)) for side in given)
    return height, width


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
    """Anything that is accepted as images: ``Images`` as they are, a tensor or array (N, C, H, W) in memory.

    Pixels are uint8, uint16 or float32.

    Raises:
        UserError: another kind, shape or type.
    """
    if isinstance(images, Tensor):  # asked first: a protocol takes long to answer
        return InMemory(images)
    if isinstance(images, Images):
        return images
    if isinstance(images, np.ndarray):
        kind = f"expected images (N, C, H, W) uint8, uint16 or float32, got {images.shape} {images.dtype}"
        need(images.dtype.name in TYPES.values(), f"{kind}; `ImageData.from_arrays` converts others.")
        return InMemory(from_numpy(images))
    kind = type(images).__name__
    raise UserError(f"expected images as a tensor, an array or a subclass of `Images`, got {kind}.")


def from_numpy(array: np.ndarray) -> Tensor:
    """The array as a tensor on the same memory, which nobody here writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def copies(parts: Iterable[object]) -> list[int]:
    """How many images of each part are, byte for byte, in a part before it.

    Args:
        parts: as ``as_images`` takes them, of one shape.
    """
    seen: set[int] = set()  # 64 bits: among 100,000 images a chance of 3e-10 that two share one
    found = []
    for part in map(as_images, parts):
        prints: list[int] = []
        for start in range(0, len(part), part.chunk):
            prints += [hash(image.tobytes()) for image in part[start : start + part.chunk].cpu().numpy()]
        found.append(sum(each in seen for each in prints))
        seen.update(prints)
    return found
