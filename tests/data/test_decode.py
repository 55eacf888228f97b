"""Images of 8, 16 and 32 bits, with 1 to 16 channels, in the files that labs have."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.decode import Look, Reading, common, converted, look, read, resized, upright
from pyro_isingvit.data.files import read_files

RNG = np.random.default_rng(0)
SIZE = (9, 7)
DEEP = RNG.integers(0, 65536, SIZE, np.uint16)
SIGNED = RNG.integers(-1000, 3000, SIZE, np.int16)
FLOATS = RNG.normal(size=SIZE).astype(np.float32)
COLOURS = RNG.integers(0, 65536, (*SIZE, 3), np.uint16)
FIVE = RNG.integers(0, 65536, (*SIZE, 5), np.uint16)
PAGES = RNG.normal(size=(4, *SIZE)).astype(np.float32)


def tiff(array, **settings):
    return lambda path: tifffile.imwrite(path, array, **settings)


def write_deep_colour_png(path, array):
    """A 16-bit RGB or grey-alpha PNG, by hand: signature, header, one zlib stream of unfiltered rows."""
    height, width, samples = array.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[samples], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


ALPHA = np.concatenate([COLOURS, DEEP[..., None]], axis=2)
CASES = {
    "16-bit PNG": ("a.png", lambda p: Image.fromarray(DEEP).save(p), "first", DEEP[..., None]),
    "16-bit colour PNG": ("a.png", lambda p: write_deep_colour_png(p, COLOURS), "first", COLOURS),
    "16-bit colour and alpha PNG": ("a.png", lambda p: write_deep_colour_png(p, ALPHA), "first", COLOURS),
    "16-bit grey and alpha PNG": (
        "a.png", lambda p: write_deep_colour_png(p, ALPHA[..., 2:]), "first", COLOURS[..., 2:],
    ),
    "16-bit TIFF": ("a.tif", tiff(DEEP), "first", DEEP[..., None]),
    "LZW TIFF": ("a.tif", tiff(DEEP, compression="lzw"), "first", DEEP[..., None]),
    "signed TIFF": ("a.tif", tiff(SIGNED), "first", SIGNED[..., None].astype(np.float32)),
    "float TIFF": ("a.tiff", tiff(FLOATS), "first", FLOATS[..., None]),
    "16-bit colour TIFF": ("a.tif", tiff(COLOURS, photometric="rgb"), "first", COLOURS),
    "16-bit colour LZW TIFF": ("a.tif", tiff(COLOURS, photometric="rgb", compression="lzw"), "first", COLOURS),
    "five channels": ("a.tif", tiff(FIVE, photometric="minisblack", planarconfig="contig"), "first", FIVE),
    "five planes": (
        "a.tif", tiff(np.moveaxis(FIVE, 2, 0), photometric="minisblack", planarconfig="separate"), "first", FIVE,
    ),
    "two channels of 8 bits": (
        "a.tif", tiff((FIVE[..., :2] >> 8).astype(np.uint8), photometric="minisblack", planarconfig="contig",
                      extrasamples=["unspecified"]), "first", (FIVE[..., :2] >> 8).astype(np.uint8),
    ),
    "signed 8-bit TIFF": ("a.tif", tiff((SIGNED // 30).astype(np.int8)), "first",
                          (SIGNED // 30).astype(np.int8)[..., None].astype(np.float32)),
    "first page": ("a.tif", tiff(PAGES, photometric="minisblack"), "first", PAGES[0][..., None]),
    "pages": ("a.tif", tiff(PAGES, photometric="minisblack"), "channels", np.moveaxis(PAGES, 0, 2)),
    "grey NPY": ("a.npy", lambda p: np.save(p, DEEP), "first", DEEP[..., None]),
    "NPY, channels last": ("a.npy", lambda p: np.save(p, FIVE[:, :, :3]), "first", FIVE[:, :, :3]),
    "NPY, channels first": ("a.npy", lambda p: np.save(p, np.zeros((4, 20, 30))), "first", np.zeros((20, 30, 4), "f4")),
    "bool NPY": ("a.npy", lambda p: np.save(p, DEEP > 9), "first", ((DEEP > 9) * 255).astype(np.uint8)[..., None]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_kept(name, tmp_path):
    file, write, pages, wanted = CASES[name]
    write(tmp_path / file)
    reading = Reading(pages=pages)
    seen = look(tmp_path / file, reading)
    assert seen == Look(wanted.shape[2], *wanted.shape[:2], wanted.dtype.name)
    got = read(tmp_path / file, reading, seen)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", *([".webp"] if features.check("webp") else [])])
def test_photographs_stand_upright(orientation, suffix, tmp_path):
    """Each of the eight ways to hold a camera; the upper left corner is white afterwards, or where EXIF puts it."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[8:, 16:] = 255, (200, 0, 0)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    held = Image.fromarray(upright)
    held = held.transpose(undo[orientation]) if orientation > 1 else held
    exif = Image.Exif()
    exif[274] = orientation
    more = {"quality": 95} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    held.save(tmp_path / f"a{suffix}", exif=exif, **more)
    seen = look(tmp_path / f"a{suffix}", Reading())
    assert seen == Look(3, 16, 24, "uint8")
    got = read(tmp_path / f"a{suffix}", Reading(), seen).transpose(1, 2, 0).astype(int)
    assert got.shape == upright.shape and np.abs(got - upright).mean() < 6


@pytest.mark.parametrize("said", [b"nonsense", 9, 0])
def test_photographs_whose_exif_says_nothing_plain_stay_as_they_are(said, tmp_path):
    picture = Image.fromarray(COLOURS.astype(np.uint8)[:8, :6])
    exif: object = said
    if said != b"nonsense":
        exif = Image.Exif()
        exif[274] = said
    for suffix in (".jpg", ".png"):
        picture.save(tmp_path / f"a{suffix}", exif=exif)
        seen = look(tmp_path / f"a{suffix}", Reading())
        assert (seen.height, seen.width) == (8, 6)
        assert read(tmp_path / f"a{suffix}", Reading(), seen).shape == (3, 8, 6)
        with Image.open(tmp_path / f"a{suffix}") as opened:
            assert upright(opened) is opened


def test_sixteen_bit_colours_of_a_ppm_are_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n2 2\n65535\n" + bytes(24))
    with pytest.raises(UserError, match="would be cut to 8"):
        read_files([tmp_path / "a.ppm"], Reading())
    (tmp_path / "b.ppm").write_bytes(b"P6\n2 2\n255\n" + bytes(12))
    assert read_files([tmp_path / "b.ppm"], Reading())[0].shape == (1, 3, 2, 2)


def test_eight_bits_beside_sixteen_and_grey_beside_colour(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    Image.new("RGB", SIZE[::-1], (255, 128, 0)).save(tmp_path / "colour.png")
    paths = [tmp_path / "deep.png", tmp_path / "colour.png"]
    images, changes = read_files(paths, Reading())
    assert (images.kind, images.shape, changes) == ("uint16", (2, 3, *SIZE), (0, 0, 0))
    assert torch.equal(images[0][2], torch.from_numpy(DEEP.astype(np.float32)))
    assert images[1][:, 0, 0].tolist() == [65535, 128 * 257, 0]  # both ends of 8 bits are ends of 16
    eight = converted(DEEP[..., None], Look(1, *SIZE, "uint8"))  # a run of 8 bits takes the upper ones
    assert np.array_equal(eight[..., 0], DEEP >> 8)


def test_files_that_do_not_go_together(tmp_path):
    np.save(tmp_path / "a.npy", FLOATS)
    Image.fromarray(DEEP).save(tmp_path / "b.png")
    tifffile.imwrite(tmp_path / "c.tif", FIVE, photometric="minisblack", planarconfig="contig")
    Image.new("L", (5, 5)).save(tmp_path / "d.png")
    for pair, message in (
        ("ab", r"a.npy has pixels of type float32, .*b.png of uint16"),
        ("bc", r"b.png has 1 channel\(s\), .*c.tif has 5"),
        ("bd", r"differ in size: .*b.png is 7x9, .*d.png is 5x5; give one `image_size`"),
    ):
        paths = [next(tmp_path.glob(f"{letter}.*")) for letter in pair]
        with pytest.raises(UserError, match=message):
            read_files(paths, Reading())
    seen = [look(path, Reading()) for path in (tmp_path / "b.png", tmp_path / "d.png")]
    assert common(seen, [tmp_path] * 2, Reading((4, 4))) == Look(1, 4, 4, "uint16")


BROKEN = {
    "a.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3, 3), }",
    "b.npy": b"not an array",
    "c.tif": b"II*\x00\x08\x00\x00\x00",
    "d.png": b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10\x02",
    "e.tif": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=rf"cannot read the image .*{name}"):
        read_files([tmp_path / name], Reading())


def test_arrays_and_pages_that_cannot_be_images(tmp_path):
    cases = {
        "cube": (lambda p: np.save(p, np.zeros((20, 20, 20))), "no axis of it is surely"),
        "line": (lambda p: np.save(p, np.zeros(20)), r"its shape is \(20,\)"),
        "nan": (lambda p: np.save(p, np.full((4, 4), np.nan)), "NaN or infinite"),
        "text": (lambda p: np.save(p, np.full((4, 4), "a")), "pixels of type <U1"),
    }
    for name, (write, message) in cases.items():
        write(tmp_path / f"{name}.npy")
        with pytest.raises(UserError, match=message):
            read_files([tmp_path / f"{name}.npy"], Reading())
    tifffile.imwrite(tmp_path / "many.tif", np.zeros((17, 4, 4), np.uint8), photometric="minisblack")
    with pytest.raises(UserError, match="17 channels; at most 16"):
        read_files([tmp_path / "many.tif"], Reading(pages="channels"))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_shapes_are_kept(kind):
    wide = np.full((10, 20, 2), 30, kind)
    wide[:, 2:, 0] = 200
    fitted = resized(wide, (20, 20), "fit")
    assert fitted.shape == (20, 20, 2) and fitted.dtype == kind
    assert (fitted[[*range(5), *range(15, 20)]] == 30).all() and (fitted[5:15, 2:, 0] == 200).all()
    assert (fitted[..., 1] == 30).all()
    wide[:, :2, 0] = 200
    half = wide.copy()
    half[:, 5:15] = 100
    assert (resized(half, (10, 10), "crop") == 100).all()
    assert (resized(half, (10, 10), "stretch")[:, 0, 0] == 200).all()
    assert resized(wide, (5, 7), "fit").shape == resized(wide, (5, 7), "crop").shape == (5, 7, 2)


def test_resizing_agrees_with_images_in_memory():
    """Files and arrays are framed alike; only the filter differs."""
    from pyro_isingvit.data.images import InMemory, Resized

    array = np.zeros((1, 12, 24, 1), np.uint8)
    array[:, 3:9, 6:18] = 255
    for how in ("fit", "crop", "stretch"):
        there = Resized(InMemory(torch.from_numpy(array.transpose(0, 3, 1, 2).copy())), 12, how)[:][0, 0].int()
        here = torch.from_numpy(resized(array[0], (12, 12), how)[..., 0]).int()
        assert (there - here).abs().float().mean() < 12, how


def test_images_of_16_bits_keep_to_their_range_when_they_are_resized():
    """Bicubic weights overshoot at edges; what does is no pixel of 16 bits."""
    from pyro_isingvit.data.images import InMemory, Resized

    array = np.zeros((2, 1, 8, 8), np.uint16)
    array[:, :, 2:6, 3:5] = 65535
    for how in ("fit", "crop", "stretch"):
        there = Resized(InMemory(torch.from_numpy(array)), 12, how)[:]
        assert there.min() == 0 and there.max() == 65535 and torch.equal(there, there.round()), how


def whole_files(folder):
    """One file of each kind that can be read."""
    Image.fromarray(DEEP).save(folder / "a.png")
    write_deep_colour_png(folder / "b.png", COLOURS)
    tifffile.imwrite(folder / "c.tif", COLOURS, photometric="rgb")
    tifffile.imwrite(folder / "d.tif", PAGES, photometric="minisblack", compression="zlib")
    np.save(folder / "e.npy", FIVE)
    Image.new("RGB", (9, 7), "red").save(folder / "f.jpg")
    return sorted(folder.iterdir())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 5), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.integers(0, 2000),
    st.sampled_from(["first", "channels"]),
)  # fmt: skip
def test_damaged_files_are_images_or_one_clear_line(tmp_path_factory, number, changes, cut, pages):
    """``make fuzz`` goes on where this ends."""
    folder = tmp_path_factory.mktemp("files")
    path = whole_files(folder)[number]
    raw = bytearray(path.read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path.write_bytes(raw[: len(raw) - cut % (len(raw) + 1) * (cut > 1500)])
    try:
        images, _ = read_files([path], Reading((4, 4), pages=pages))
        assert images[:].shape[2:] == (4, 4)
    except UserError as error:
        assert path.name in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_turned_tiff_without_compression(orientation, dtype, tmp_path):
    """Pillow's memory map takes the sides of a turned picture for each other."""
    array = RNG.integers(0, 255, (8, 10), dtype)
    tags, path = Image.Exif(), tmp_path / "turned.tif"
    tags[274] = orientation
    Image.fromarray(array).save(path, exif=tags)
    turned = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.T, 6: array[::-1].T}
    turned |= {7: array[::-1, ::-1].T, 8: array.T[::-1]}
    found = look(path, Reading())
    assert np.array_equal(read(path, Reading(), found)[0], turned[orientation])


BANDS = {  # photometric, extra samples, channels of the file -> which of them are the image
    "near infrared": ("rgb", ["unspecified"], 4, [0, 1, 2, 3]),
    "two more": ("rgb", ["unspecified", "unspecified"], 5, [0, 1, 2, 3, 4]),
    "colour, alpha": ("rgb", ["unassalpha"], 4, [0, 1, 2]),
    "colour, alpha, another": ("rgb", ["assocalpha", "unspecified"], 5, [0, 1, 2, 4]),
    "grey, alpha": ("minisblack", ["unassalpha"], 2, [0]),
    "grey, another": ("minisblack", ["unspecified"], 2, [0, 1]),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_tiffs_alpha_is_dropped_and_nothing_else(name, dtype, tmp_path):
    photometric, extra, channels, kept = BANDS[name]
    array = (RNG.random((*SIZE, channels)) * 200).astype(dtype)
    path = tmp_path / "bands.tif"
    tifffile.imwrite(path, array, photometric=photometric, extrasamples=extra, planarconfig="contig")
    found = look(path, Reading())
    assert found.channels == len(kept)
    assert np.array_equal(read(path, Reading(), found), array[..., kept].transpose(2, 0, 1))


def test_a_run_of_three_channels_reads_the_first_three(tmp_path):
    """As runs before version 0.15 did, which left out what stands beside red, green and blue."""
    array, path = RNG.integers(0, 255, (*SIZE, 4), np.uint8), tmp_path / "bands.tif"
    tifffile.imwrite(path, array, photometric="rgb", extrasamples=["unspecified"])
    found = read(path, Reading(), Look(3, *SIZE, "uint8"))
    assert np.array_equal(found, array[..., :3].transpose(2, 0, 1))
