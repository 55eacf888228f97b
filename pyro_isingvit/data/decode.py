"""One image file as an array: PNG, JPEG, TIFF and the like by Pillow, what it cannot read by tifffile, NPY by NumPy.

Files may come from anyone: few readers, no decompression bombs, nothing unpickled.
Shapes: C channels (1 to 16), H height, W width.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.pixels import KINDS, Kind
from pyro_isingvit.data.images import MOST_CHANNELS, Resize, resized_to
from pyro_isingvit.data.on_disk import layout_of

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 89_478_485  # of one image: Pillow's limit, which any other library can switch off
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow tries these readers and no other
TIFF, NPY = (".tif", ".tiff"), (".npy",)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", *TIFF, ".gif", ".ppm", ".pgm", *NPY)
PNG_START = b"\x89PNG\r\n\x1a\n"

ALPHA = (1, 2)  # a TIFF's extra channel, associated or not
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> Pillow's Image.Transpose that undoes it

Pages = Literal["first", "channels"]


@dataclass(frozen=True)
class Look:
    """What a file's header says, or what the files of a data set become.

    Attributes:
        channels: C, without alpha.
        height: pixels.
        width: pixels.
        kind: type of the pixels.
    """

    channels: int
    height: int
    width: int
    kind: Kind


@dataclass(frozen=True)
class Reading:
    """How files become images.

    Attributes:
        size: (height, width) of the images; None: that of the files.
        how: what happens to another shape: fit, crop or stretch.
        pages: of a TIFF: the first, or all of them as channels.
    """

    size: tuple[int, int] | None = None
    how: Resize = "fit"
    pages: Pages = "first"


def look(path: Path, reading: Reading) -> Look:
    """What an image file holds, by its header alone where it has one.

    Raises:
        UserError: the file cannot be read, or its image cannot be used.
    """
    return _guarded(path, lambda: _look(path, reading.pages))


def read(path: Path, reading: Reading, wanted: Look) -> np.ndarray:
    """One file as (C, H, W), of the type and size that ``wanted`` says.

    Args:
        path: the file.
        reading: how.
        wanted: as ``common`` gives it.

    Raises:
        UserError: the file cannot be read, or has another number of channels.
    """
    return read_told(path, reading, wanted)[0]


def read_told(path: Path, reading: Reading, wanted: Look) -> tuple[np.ndarray, Look]:
    """As ``read``, and what the file held, without a second look at it.

    Raises:
        UserError: as ``read``.
    """

    def work() -> tuple[np.ndarray, Look]:
        found, channels = _pixels(path, reading.pages, wanted.channels)
        pixels = converted(found, wanted)  # (H, W, C)
        size, (height, width) = (wanted.height, wanted.width), pixels.shape[:2]
        done = pixels if (height, width) == size else resized(pixels, size, reading.how)
        return done.transpose(2, 0, 1), Look(channels, height, width, _kind(found.dtype))

    return _guarded(path, work)


def common(looks: Sequence[Look], paths: Sequence[Path], reading: Reading) -> Look:
    """What all files become: colour where one has colours, 16 bits where one has.

    Args:
        looks: of every file.
        paths: the files, for messages.
        reading: whose ``size`` decides where files differ in size.

    Raises:
        UserError: files that differ in size where no size is given, in channels other than grey and colour, or of which
            some have floats.
    """
    first = looks[0]

    def name(wrong: Iterable[bool]) -> int:
        return next((i for i, each in enumerate(wrong) if each), -1)

    odd = name((one.channels != first.channels and {one.channels, first.channels} != {1, 3}) for one in looks)
    need(odd < 0, f"{paths[0]} has {first.channels} channel(s), {paths[odd]} has {looks[odd].channels}; sort them out.")
    odd = name((one.kind == "float32") != (first.kind == "float32") for one in looks)
    need(
        odd < 0, f"{paths[0]} has pixels of type {first.kind}, {paths[odd]} of {looks[odd].kind}; convert one of them."
    )
    size = reading.size
    if size is None:
        odd = name((one.height, one.width) != (first.height, first.width) for one in looks)
        sizes = f"{paths[0]} is {first.width}x{first.height}, {paths[odd]} is {looks[odd].width}x{looks[odd].height}"
        need(odd < 0, f"images differ in size: {sizes}; give one `image_size`.")
        size = first.height, first.width
    channels, kind = max(one.channels for one in looks), max((one.kind for one in looks), key=KINDS.index)
    return Look(channels, *size, kind)


def converted(pixels: np.ndarray, wanted: Look) -> np.ndarray:
    """Pixels (H, W, c) of any kind as (H, W, C) of the wanted one: 8 bits times 257 are 16, grey is repeated.

    Raises:
        UserError: channels or types that cannot be converted.
    """
    channels, kind, given = wanted.channels, wanted.kind, pixels.dtype.name
    need(
        pixels.shape[2] == channels or (pixels.shape[2], channels) == (1, 3),
        f"it has {pixels.shape[2]} channel(s), {channels} are expected",
    )
    need((given == "float32") == (kind == "float32"), f"its pixels are {given}, {kind} is expected")
    if (given, kind) == ("uint8", "uint16"):
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    elif (given, kind) == ("uint16", "uint8"):
        pixels = (pixels >> 8).astype(np.uint8)
    return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)


def resized(pixels: np.ndarray, size: tuple[int, int], how: Resize) -> np.ndarray:
    """(H, W, C) at another size (height, width), bilinear with antialiasing.

    Margins are as dark as the darkest pixel, by channel: percentiles of all pixels then hardly feel them.

    Args:
        pixels: uint8, uint16 or float32.
        size: wanted.
        how: fit, crop or stretch (``Resized`` says what they are).
    """
    from PIL import Image

    height, width = inner = resized_to(pixels.shape[:2], size, how)
    whole = pixels.dtype == np.uint8
    planes = [
        Image.fromarray(plane if whole else plane.astype(np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR  # Pillow's is anti-aliased
        )
        for plane in np.moveaxis(pixels, 2, 0)
    ]  # fmt: skip
    done = np.stack([np.asarray(plane) for plane in planes], axis=2)
    done = np.rint(done) if pixels.dtype == np.uint16 else done
    done = done.astype(pixels.dtype)
    if inner == size:
        return done
    canvas = np.broadcast_to(done.min((0, 1)), (*size, done.shape[2])).copy()
    inside: list[slice] = []
    outside: list[slice] = []
    for side, wanted in zip(inner, size, strict=True):
        start = abs(side - wanted) // 2
        cut, kept = slice(start, start + wanted), slice(start, start + side)
        inside.append(cut if side > wanted else slice(None))
        outside.append(slice(None) if side >= wanted else kept)
    canvas[tuple(outside)] = done[tuple(inside)]
    return canvas


# Readers --------------------------------------------------------------------------------------------------------


def _guarded[Result](path: Path, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise UserError(f"cannot read the image {path} ({why(error)}); repair or remove it.") from error


def _look(path: Path, pages: Pages) -> Look:
    if path.suffix.lower() in NPY:
        array = _npy(path)
        return Look(array.shape[2], array.shape[0], array.shape[1], _kind(array.dtype))
    if path.suffix.lower() in TIFF and _odd_tiff(path, pages):
        shape, dtype = _tiff_shape(path, pages)
        return Look(shape[2], shape[0], shape[1], _kind(dtype))
    from PIL import Image

    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        height, width = (image.width, image.height) if _orientation(image) > 4 else (image.height, image.width)
        _small(height, width)
        _whole_ppm(image)
        if deep := _deep_png(path):
            return Look({0: 1, 4: 1}.get(deep, 3), image.height, image.width, "uint16")
        if image.mode == "P":
            return Look(3, height, width, "uint8")
        kind: Kind = "float32" if image.mode == "F" else "uint8"
        if image.mode.startswith("I"):
            kind = "float32" if _signed(image) else "uint16"
        grey = image.mode in {"1", "L", "LA", "F"} or image.mode.startswith("I")
        return Look(1 if grey else 3, height, width, kind)


def _pixels(path: Path, pages: Pages, channels: int) -> tuple[np.ndarray, int]:
    """(H, W, C) uint8, uint16 or float32; grey where ``channels`` is 1, an alpha channel dropped; the file's own C."""
    if path.suffix.lower() in NPY:
        array = _plain(np.array(_npy(path)))
        return array, array.shape[2]
    if path.suffix.lower() in TIFF and _odd_tiff(path, pages):
        bands = _plain(_tiff(path, pages))
        # Before version 0.15 what is beside red, green and blue was left out.
        bands = bands[..., :3] if channels == 3 and pages == "first" else bands
        return bands, bands.shape[2]
    from PIL import Image

    # Given a path, Pillow maps a plain TIFF into memory, and takes the sides of a turned one for each other.
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        _small(image.height, image.width)
        _whole_ppm(image)
        if _deep_png(path):
            array = _png16(path)
            return array, array.shape[2]
        picture: Image.Image = upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            array = np.asarray(picture)[..., None]
            return (_plain(array) if image.mode == "F" or _signed(image) else _unsigned(array)), 1
        if picture.mode == "P":
            picture = picture.convert("RGBA")  # Pillow warns about transparency otherwise
        own = 1 if picture.mode in {"1", "L", "LA"} else 3
        array = np.asarray(picture.convert("L" if 1 in (channels, own) else "RGB"))
        return (array[..., None] if array.ndim == 2 else array), own


def _orientation(image: "Image.Image") -> int:
    """How a camera held the picture, 1 to 8, by EXIF in front of the pixels; from 5 on height and width change places.

    1, upright, where EXIF does not say so plainly; Pillow turns a TIFF by itself.
    """
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        told = image.getexif().get(274)
    except Exception:  # what is no EXIF makes Pillow raise almost anything
        return 1
    return told if isinstance(told, int) and told in UPRIGHT else 1


def upright(image: "Image.Image") -> "Image.Image":
    """A picture turned as its camera was held."""
    from PIL import Image

    told = _orientation(image)
    return image.transpose(Image.Transpose(UPRIGHT[told])) if told > 1 else image


def _whole_ppm(image: "Image.Image") -> None:
    args = image.tile[0][3] if image.format == "PPM" and image.tile else ()  # type: ignore[attr-defined]
    cut = image.mode == "RGB" and isinstance(args, tuple) and any(isinstance(most, int) and most > 255 for most in args)
    need(not cut, "16-bit colours of a PPM would be cut to 8; write it as PNG or TIFF")


def _small(height: int, width: int, channels: int = 1) -> None:
    size = f"{width}x{height} pixels" + (f" in {channels} channels" if channels > 3 else "")
    need(height * width * max(channels, 3) <= 3 * MOST_PIXELS, f"{size} are too many")


def _signed(image: "Image.Image") -> bool:
    """Whether whole numbers of a TIFF are signed; those of other formats are not."""
    tags = getattr(image, "tag_v2", {})
    return 2 in np.atleast_1d(tags.get(339, 1))


def _plain(array: np.ndarray) -> np.ndarray:
    """Any numbers as uint8, uint16 or float32; other whole numbers than the first two become floats."""
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    need(array.dtype.kind in "iuf", f"pixels of type {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    need(bool(np.isfinite(array).all()), "NaN or infinite pixels")
    return array


def _unsigned(array: np.ndarray) -> np.ndarray:
    """Grey values that Pillow gives as 32 bits, as 16 bits."""
    need(0 <= array.min() <= array.max() <= 65535, "grey values beyond 16 bits")
    return array.astype(np.uint16)


def _kind(dtype: np.dtype) -> Kind:
    """The type that ``_plain`` makes of an array of this type."""
    return KINDS[KINDS.index(_plain(np.zeros(1, dtype)).dtype.name)]


def _npy(path: Path) -> np.ndarray:
    """A NumPy file as (H, W, C), not read yet: (H, W), (H, W, C) or (C, H, W)."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    need(array.ndim in (2, 3) and array.size > 0, f"its shape is {array.shape}, not (H, W), (H, W, C) or (C, H, W)")
    layout = layout_of((1, *array.shape))
    need(layout, f"its shape is {array.shape}, and no axis of it is surely that of at most {MOST_CHANNELS} channels")
    array = array[..., None] if layout == "grey" else np.moveaxis(array, 0, 2) if layout == "first" else array
    _small(*array.shape)
    return array


def _deep_png(path: Path) -> int:
    """Colour type of a PNG with 16 bits that Pillow would cut to 8; 0: none."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[25] if head.startswith(PNG_START) and len(head) == 26 and head[24] == 16 else 0


def _png16(path: Path) -> np.ndarray:
    """A 16-bit PNG with colours or alpha, (H, W, 1 or 3) uint16."""
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError("16-bit colour needs the package imagecodecs: pip install 'pyro-isingvit[deep]'") from error
    array = imagecodecs.png_decode(path.read_bytes())
    return array[..., : 1 if array.shape[2] < 3 else 3]


def _odd_tiff(path: Path, pages: Pages) -> bool:
    """Whether a TIFF holds what Pillow cannot give.

    Several channels of more than 8 bits, or grey ones besides alpha; signed numbers of 8 bits; pages as channels.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("TIFF",)) as image:
            tags = getattr(image, "tag_v2", {})
            bits, samples, space = max(np.atleast_1d(tags.get(258, 1))), tags.get(277, 1), tags.get(262, 1)
            deep = bits > 8 and samples > 1
            own = {0: 1, 1: 1, 2: 3}.get(space, samples)  # grey, grey, RGB
            more = samples > own + sum(np.isin(np.atleast_1d(tags.get(338, 1)), ALPHA))  # channels that are no alpha
            signed = bits == 8 and _signed(image)
            return deep or more or signed or (pages == "channels" and getattr(image, "n_frames", 1) > 1)
    except (Image.UnidentifiedImageError, SyntaxError):
        return True


def _tifffile() -> Any:
    """The package, without its own reports of every damaged tag: what cannot be read is told once, by name."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


def _tiff_shape(path: Path, pages: Pages) -> tuple[tuple[int, int, int], np.dtype]:
    """(H, W, C) of a TIFF, and its type, by its tags."""
    with _tifffile().TiffFile(path) as file:
        return _tiff_plan(file, pages)


def _tiff_plan(file: Any, pages: Pages) -> tuple[tuple[int, int, int], np.dtype]:
    page = file.pages[0]
    count = len(file.pages) if pages == "channels" else 1
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    _small(height, width)
    need(page.imagedepth == 1 and page.dtype is not None, "a TIFF of this layout cannot be read")
    if pages == "channels" and count > 1:
        need(samples == 1, f"its {count} pages have {samples} channels each; only grey pages can be channels")
        same = all((one.imagelength, one.imagewidth, one.dtype) == (height, width, page.dtype) for one in file.pages)
        need(same, "its pages differ in size or type and cannot be channels")
        samples = count
    else:
        samples = len(_bands(page))
    need(samples <= MOST_CHANNELS, f"it has {samples} channels; at most {MOST_CHANNELS} can be read")
    _small(height, width, samples)
    return (height, width, samples), page.dtype


def _tiff(path: Path, pages: Pages) -> np.ndarray:
    """(H, W, C) of a TIFF."""
    with _tifffile().TiffFile(path) as file:
        shape, _ = _tiff_plan(file, pages)
        if pages == "channels" and len(file.pages) > 1:
            return np.stack([page.asarray() for page in file.pages], axis=2)
        array = file.pages[0].asarray()
        if array.ndim == 3 and file.pages.first.planarconfig == 2:  # one plane after the other
            array = np.moveaxis(array, 0, 2)
        return np.reshape(array, (*shape[:2], -1))[..., _bands(file.pages.first)]


def _bands(page: Any) -> list[int]:
    """Numbers of a TIFF's channels that are no alpha; the fourth of RGB is one where nothing is said."""
    extra = page.extrasamples or ((1,) if page.photometric == 2 and page.samplesperpixel == 4 else ())
    own = page.samplesperpixel - len(extra)
    return [*range(own), *(own + i for i, what in enumerate(extra) if what not in ALPHA)]
