"""Images to predict in parts, one after another: files are decoded when their turn comes, ahead of who takes them.

Shapes: N images of the stream, n images of a part; images are (n, C, H, W).
"""

import os
import stat
from abc import abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import batched
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.errors import UserError, why
from pyro_isingvit.core.paths import is_dir, with_home
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.core.untrusted import printable
from pyro_isingvit.data.decode import Look, Reading, read_told
from pyro_isingvit.data.files import Changes, image_names
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.inputs import folder_labels, load_inputs, look_of, tell_changes, tell_seen
from pyro_isingvit.data.load import is_named
from pyro_isingvit.data.named import is_own
from pyro_isingvit.data.parallel import in_parallel
from pyro_isingvit.data.split import Split
from pyro_isingvit.data.table import table_inputs

DIGEST = 16  # bytes


@dataclass(frozen=True)
class Part:
    """Some images of a stream that lie next to each other.

    Attributes:
        number: of the part.
        rows: (n,) numbers of the images that could be read.
        images: (n, C, H, W) as read.
        unreadable: name and reason of the others.
    """

    number: int
    rows: Tensor
    images: Tensor
    unreadable: list[tuple[str, str]]


class ImageStream:
    """N images that are taken in parts.

    Attributes:
        labels: (N,) class numbers, or None.
        digest: of what the images are.
    """

    labels: Tensor | None
    digest: bytes

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def name(self, row: int) -> str:
        """What an image is called, printable."""

    @abstractmethod
    def parts(self, size: int, wanted: Sequence[int]) -> Generator[Part]:
        """The parts with these numbers, in this order.

        Args:
            size: images of a part; the last one may have fewer.
            wanted: numbers of parts; part k has the images from k * size on.
        """


class FileStream(ImageStream):
    """Files, decoded in parallel; at most one part is decoded ahead of the one that was taken last.

    Args:
        root: folder that the names start at.
        names: of the files.
        info: of the run; files are converted to its channels and type and resized to its size.
        source: how the run read its images: shape and pages.
        labels: (N,) class numbers, or None.
        shown: what the images are called; None: as the files are.
    """

    def __init__(
        self, root: Path, names: Sequence[str], info: DataInfo, source: DataConfig, labels: Tensor | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.root, self.names, self.labels, self.shown = root, names, labels, shown
        self.reading = Reading((info.height, info.width), source.resize, source.pages)
        self.wanted = look_of(info)
        found = blake2b(digest_size=DIGEST)
        for block in in_parallel(self._touched, [*batched(names, 256)], "looking at files"):
            found.update(block)
        self.digest = found.digest()

    def __len__(self) -> int:
        """The number of files."""
        return len(self.names)

    def name(self, row: int) -> str:
        """The file, relative to the folder."""
        return printable((self.names if self.shown is None else self.shown)[row])

    def parts(self, size: int, wanted: Sequence[int]) -> Generator[Part]:
        """Part by part; unreadable files are left out and told of."""
        rows = [range(k * size, min((k + 1) * size, len(self))) for k in wanted]
        numbers = np.concatenate([np.arange(each.start, each.stop) for each in rows]) if rows else np.empty(0, int)
        pixels = in_parallel(self._read, numbers, None, ahead=size)  # type: ignore[arg-type]
        looks = Counter[Look]()
        for number, each in zip(wanted, rows, strict=True):
            good, unreadable = list[int](), list[tuple[str, str]]()
            images = np.empty((len(each), *self._shape), self.wanted.kind)
            for row in each:
                found = next(pixels)
                if isinstance(found, str):
                    unreadable.append((self.name(row), found))
                else:
                    images[len(good)], seen = found
                    looks[seen] += 1
                    good.append(row)
            kept = torch.from_numpy(images[: len(good)])
            kept = kept.float() if self.wanted.kind == "uint16" else kept
            yield Part(number, torch.tensor(good, dtype=torch.long), kept, unreadable)
        tell_changes(Changes.of(looks.elements(), self.wanted), looks.total(), self.wanted)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.wanted.channels, self.wanted.height, self.wanted.width

    def _read(self, row: int) -> tuple[np.ndarray, Look] | str:
        path = self.root / self.names[row]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
                return "not a file"
            return read_told(path, self.reading, self.wanted)
        except OSError as error:
            return printable(error.strerror or why(error))
        except UserError as error:
            return printable(why(error.__cause__ or error))

    def _touched(self, names: Sequence[str]) -> bytes:
        """Digest of names, sizes and times."""
        found = blake2b(digest_size=DIGEST)
        for name in names:
            found.update(os.fsencode(name) + b"\0")
            try:
                about = os.stat(self.root / name)
                found.update(f"{about.st_size} {about.st_mtime_ns}\0".encode())
            except OSError:
                found.update(b"-\0")
        return found.digest()


class SplitStream(ImageStream):
    """Images that are there already, in memory or in an array on disk.

    Args:
        split: the images.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.labels = split.labels if int(split.labels.min()) >= 0 else None
        found = blake2b(repr(split.images.shape).encode(), digest_size=DIGEST)
        for start in range(0, len(split), split.images.chunk):
            found.update(np.ascontiguousarray(split.images[start : start + split.images.chunk].numpy()).data)
        self.digest = found.digest()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.split)

    def name(self, row: int) -> str:
        """The file's, or the number."""
        return self.split.names[row] if self.split.names else str(row)

    def parts(self, size: int, wanted: Sequence[int]) -> Generator[Part]:
        """Part by part."""
        for k in wanted:
            rows = torch.arange(k * size, min((k + 1) * size, len(self)))
            yield Part(k, rows, self.split.images[k * size : (k + 1) * size], [])


def open_stream(
    spec: str, info: DataInfo, *, data_root: str | Path = "data", source: DataConfig | None = None
) -> ImageStream:
    """Images to predict as ``load_inputs`` takes them; a folder and a table of files are not read yet.

    With a cache, and in every other form, the images are opened as ``load_inputs`` does.

    Args:
        spec: as for ``load_inputs``.
        info: of the run.
        data_root: folder of the torchvision data sets.
        source: how the run read its images: size, shape, pages, columns and cache.

    Raises:
        UserError: as ``load_inputs``; unreadable images of a folder or table are found later.
    """
    source, folder = source or DataConfig(), with_home(spec)
    if source.cache is None and spec.startswith("csv:") and not is_own(spec, source):
        paths, lines, numbers = table_inputs(replace(source, dataset=spec), info.classes)
        labels = numbers if int(numbers.min()) >= 0 else None
        tell_seen(paths, source)
        return FileStream(Path(), [str(path) for path in paths], info, source, labels, lines)
    if source.cache is None and not is_named(spec) and is_dir(folder):
        names = image_names(folder)
        tell_seen([folder / name for name in names], source)
        return FileStream(folder, names, info, source, folder_labels(names, info.classes))
    return SplitStream(load_inputs(spec, info, data_root=data_root, source=source))
