"""Files from strangers: no code of theirs runs, none fills the memory, no name of theirs leaves its place."""

import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EVIL, INFO, TINY, around, make_pair, refuses
from netCDF4 import Dataset
from PIL import Image
from safetensors.torch import load, save_file

from analysis import report
from analysis.strange import strange_images
from inference import predict
from pyro_isingvit.core import untrusted as data_checks
from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.inputs import load_image_files
from pyro_isingvit.data.load import load_data
from pyro_isingvit.predictive.datatree import load_datatree, make_tree, save_datatree
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.network import WEIGHTS, CompactViT
from pyro_isingvit.pruning.shapes import CONFIG
from pyro_isingvit.runs.load import open_run


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.proof,))


# ---- code


@pytest.mark.parametrize("wrap", ["pickle", "torch", "nested"])
def test_a_checkpoint_runs_no_code(wrap: str, folder: Path, tmp_path: Path, capsys) -> None:
    proof, target = tmp_path / "proof", folder / "checkpoint.pt"
    if wrap == "pickle":
        target.write_bytes(pickle.dumps(Evil(proof)))
    else:
        torch.save(Evil(proof) if wrap == "torch" else {"model": {"x": [Evil(proof)]}}, target)
    arguments = ["--run", str(folder), "--input", "digits", "--out", str(tmp_path / "p.nc"), "--device", "cpu"]
    refuses(capsys, lambda: predict.main(arguments), "checkpoint.pt")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))  # the trap does work
    assert proof.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pickles_are_unpickled_only_if_they_are_the_published_ones(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    base = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    base.mkdir()
    for file in ("batches.meta", "meta", "train", "test", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (base / file).write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(UserError, match=r"not found or corrupted.*published"):
        load_data(name, data_root=tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("key", ["train_images", "train_labels"])
def test_object_arrays_are_not_unpickled(key: str, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    arrays = {"train_images": np.zeros((9, 4, 4), np.uint8), "train_labels": np.arange(9) % 3}
    np.savez(tmp_path / "a.npz", **(arrays | {key: np.array([Evil(proof)], dtype=object)}), allow_pickle=True)
    with pytest.raises(UserError, match="object arrays"):
        load_data(f"npz:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "b.npz", images=np.array([Evil(proof)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="object arrays"):
        strange_images(f"npz:{tmp_path / 'b.npz'}", INFO, torch.zeros(1), "data", 5, 0)
    assert not proof.exists()


# ---- memory


def png(width: int, height: int) -> bytes:
    """A valid black PNG of one bit a pixel, as small as deflate makes it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("limit", ["Pillow's", None])
def test_an_image_that_is_a_bomb(limit, tmp_path: Path, monkeypatch) -> None:
    if limit is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # what some libraries do
    (tmp_path / "bomb.png").write_bytes(png(20_000, 10_000))
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"cannot read the image .*bomb"):
        load_image_files([tmp_path / "bomb.png"], INFO)
    (tmp_path / "fine.png").write_bytes(png(64, 32))
    assert load_image_files([tmp_path / "fine.png"], INFO).images.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("content", [
    b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', b"<!DOCTYPE html><script></script>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n(x) print", b"%PDF-1.7", b"GIF89a", b"BM", b"P5 99999999 99999999 255\n",
], ids=["svg", "html", "ps", "pdf", "gif", "bmp", "ppm"])  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "ppm"])
def test_what_only_poses_as_an_image(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image"):
        load_image_files([tmp_path / f"a.{suffix}"], INFO)


def test_an_archive_that_is_a_bomb(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_checks, "FREE", 2**20)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, train_images=np.zeros((3000, 32, 32), np.uint8), train_labels=np.arange(3000) % 3)
    with pytest.raises(UserError, match="decompression bomb"):
        load_data(f"npz:{path}")
    with pytest.raises(UserError, match="decompression bomb"):
        strange_images(f"npz:{path}", INFO, torch.zeros(1), "data", 5, 0)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 32, 32), dtype=np.uint8)
    np.savez_compressed(path, train_images=noise, train_labels=np.arange(2000) % 3)
    assert len(load_data(f"npz:{path}").train) > 1000


def test_an_array_that_says_it_is_huge(tmp_path: Path) -> None:
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 28, 28), }"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train_images.npy", head + bytes(100))
        archive.writestr("train_labels.npy", head + bytes(100))
    with pytest.raises(UserError, match="is cut short"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_a_posterior_that_is_a_bomb(tmp_path: Path) -> None:
    with Dataset(tmp_path / "posterior.nc", "w") as file:
        file.library = "pyro-isingvit"
        group = file.createGroup("posterior")
        group.createDimension("huge", 10**12)
        group.createVariable("huge", "f8", ("huge",), zlib=True, chunksizes=(1000,))  # never written: a few bytes
    assert (tmp_path / "posterior.nc").stat().st_size < 100_000
    with pytest.raises(UserError, match="decompression bomb"):
        load_datatree(tmp_path / "posterior.nc")


@pytest.mark.parametrize("setting", ["width", "depth", "mlp_ratio", "patch_size", "members", "info"])
def test_a_run_that_says_it_is_huge(setting: str, folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    if setting == "members":
        raw["method"], raw["baseline"]["members"] = "ensemble", 10**9
    elif setting == "info":
        state = load_checkpoint(folder / "checkpoint.pt")
        state["info"] |= {"height": 2**16, "width": 2**16}
        save_checkpoint(folder / "checkpoint.pt", state)
    else:
        raw["vit"][setting] = 10**9
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="larger than what the file holds"):
        open_run(folder)


def test_a_tensor_repeated_by_its_strides_counts_once(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["vit"]["width"] = 40_000
    (folder / "config.json").write_text(json.dumps(raw))
    state = load_checkpoint(folder / "checkpoint.pt")
    state["guide"]["loc.qkv"] = torch.zeros(1).expand(2, 120_000, 40_000)
    save_checkpoint(folder / "checkpoint.pt", state)
    with pytest.raises(UserError, match="larger than what the file holds"):
        open_run(folder)


@pytest.mark.parametrize("change", [
    {"info": 3}, {"info": {}}, {"model": 3}, {"model": {}}, {"guide": None}, {"num_data": "x"}, {"num_data": 0},
    {"history": 3}, {"info": INFO.to_dict() | {"classes": [1, 2]}}, {"info": INFO.to_dict() | {"std": [0.0]}},
    {"info": INFO.to_dict() | {"mean": [float("nan")]}}, {"info": INFO.to_dict() | {"channels": "1"}},
], ids=str)  # fmt: skip
def test_checkpoints_of_the_wrong_content(change: dict, folder: Path) -> None:
    state = load_checkpoint(folder / "checkpoint.pt")
    save_checkpoint(folder / "checkpoint.pt", state | change)
    with pytest.raises(UserError):
        open_run(folder)


@pytest.mark.parametrize(("part", "name", "value"), [
    ("vit", "width", "8"), ("vit", "width", 8.0), ("vit", "depth", True), ("vit", "width", 2**40), ("vit", "width", 0),
    ("vit", "patch_size", 0), ("vit", "pool", "../x"), ("train", "lr", float("nan")), ("train", "lr", "1"),
    ("train", "device", 3), ("ising", "granularity", ["weight"]), ("ising", "kappa_mask", "nope"),
    ("data", "dataset", 7), ("data", "image_size", "8"), ("baseline", "members", None), (None, "method", EVIL),
    (None, "version", 3), (None, "vit", []),
])  # fmt: skip
def test_settings_of_the_wrong_kind(part: str | None, name: str, value: object, folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw if part is None else raw[part])[name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError):
        open_run(folder)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deeply_nested_json(depth: int, folder: Path) -> None:
    for name in ("config.json", CONFIG):
        (folder / name).write_text("[" * depth + "]" * depth)
    (folder / WEIGHTS).write_bytes(b"")
    for read in (open_run, CompactViT.from_pretrained):
        with pytest.raises(UserError):
            read(folder)


# ---- compact networks


@pytest.fixture(params=["mean", "bayes"])
def compact(request, tmp_path: Path) -> Path:
    model, guide = make_pair(granularity="unit")
    if request.param == "mean":
        assemble(model.vit, INFO, model.vit.initial_weights()).save_pretrained(tmp_path)
        return tmp_path
    from pyro_isingvit.pruning.choose import choose_masks, from_masks

    run = around(model, guide, RunConfig(vit=TINY, ising=model.ising))
    from_masks(run, choose_masks(run, 0.3), "bayes").save_pretrained(tmp_path)
    return tmp_path


SHAPES = {
    "width": (2**23, 2**40, -1, 0, "8", 7), "patch_size": (0, 2**20, None), "head_dim": (0, -4), "features": (10**6,),
    "image_shape": ([1, 4], [1, 10**6, 10**6], [], [0, 4, 4]), "mean": ([float("nan")], ["a"], []), "std": ([0.0],),
    "classes": ([1, 2, 3], ["a"] * 1000), "pool": ("x",), "form": ("x",), "head_hidden": (10**9, -1, "x"),
    "layers": ([], [{}], [{"heads": 10**6, "query": 10**6, "value": 1, "uniform": 0, "hidden": 1}] * 2),
    "sites": ({"x": [10**12]}, {"a.b": [1]}, 3), "posteriors": ({"x": {}}, {"nope": None}),
}  # fmt: skip


@pytest.mark.parametrize("field", SHAPES)
def test_compact_networks_of_absurd_shapes(field: str, compact: Path, monkeypatch) -> None:
    CompactViT.from_pretrained(compact)
    whole = (compact / CONFIG).read_text()
    for value in SHAPES[field]:
        (compact / CONFIG).write_text(json.dumps(json.loads(whole) | {field: value}))
        with pytest.raises(UserError):
            CompactViT.from_pretrained(compact)


def test_compact_networks_of_damaged_weights(compact: Path) -> None:
    state = load((compact / WEIGHTS).read_bytes())
    whole = (compact / WEIGHTS).read_bytes()
    name = "patch.weight"
    nan = state[name].clone()
    nan[0, 0] = float("nan")
    changes = [{name: state[name].half()}, {name: state[name].T.contiguous()}, {name: nan}, {"extra": nan}]
    for key, value in state.items():
        if key.endswith("index"):
            changes += [{key: torch.full_like(value, 10**6)}, {key: torch.full_like(value, -1)}]
    assert len(changes) > 4 or not any(key.startswith("retention_") for key in state)  # the form bayes has indices
    for change in changes:
        save_file(state | change, compact / WEIGHTS)
        with pytest.raises(UserError):
            CompactViT.from_pretrained(compact)
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 2**60) + b"{}", whole[:-4], whole[8:], pickle.dumps(state)):
        (compact / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError):
            CompactViT.from_pretrained(compact)


# ---- posterior.nc


def test_damaged_posteriors(tmp_path: Path) -> None:
    import xarray as xr

    path = tmp_path / "posterior.nc"
    tree = make_tree({"posterior": xr.Dataset({"x": (("sample", "y"), np.arange(600.0).reshape(20, 30))})}, {})
    save_datatree(tree, path)
    whole = path.read_bytes()
    for content in (b"", b"x" * 2000, whole[: len(whole) // 2], whole[:100], whole[50:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"posterior\.nc"):
            load_datatree(path)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 20)] = rng.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        try:
            load_datatree(path)
        except UserError as error:
            assert "posterior.nc" in str(error)


def test_marks_that_are_no_text(tmp_path: Path) -> None:
    with Dataset(tmp_path / "a.nc", "w") as file:
        file.library = np.arange(3)
    with pytest.raises(UserError, match="not written by"):
        load_datatree(tmp_path / "a.nc")


@pytest.mark.parametrize("text", ["[", "3", "[]", "{}"])
def test_reports_of_a_posterior_of_the_wrong_content(text: str, tmp_path: Path, capsys) -> None:
    from made import make_run, make_tree

    tree = make_tree(("a", "b", "c"), stored=4)
    tree.attrs["classes"] = text
    folder = make_run(tmp_path / "run", tree=tree)
    refuses(capsys, lambda: report.main(["--run", str(folder)]), "posterior.nc")


# ---- the source


def test_nothing_in_the_library_unpickles_or_evaluates() -> None:
    """Every way to load that can run code is either absent or told not to."""
    root = Path(__file__).parents[2]
    for path in [*root.glob("pyro_isingvit/*.py"), *root.glob("inference/*.py"), *root.glob("analysis/*.py")]:
        text = path.read_text()
        for word in ("pickle.load", "import pickle", "eval(text", "exec(", "yaml", "shell=True", "os.system"):
            assert word not in text, f"{path.name}: {word}"
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
        assert text.count("np.load(") == text.count("allow_pickle=False"), path.name
        assert "| safe" not in text and "autoescape=False" not in text, path.name
