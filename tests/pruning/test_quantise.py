"""8-bit ONNX files: smaller, close to what they were made from, and independent of the batch."""

import errno
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import INFO, around, make_pair
from torch import Tensor

from pyro_isingvit import ImageData, UserError, compact, fit, predict_onnx
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.images import InMemory, as_images
from pyro_isingvit.pruning.export import export_onnx, open_onnx
from pyro_isingvit.pruning.onnx_members import export_members
from pyro_isingvit.pruning.quantise import int8_of, quantise, with_unit_columns

WIDE = ViTConfig(patch_size=2, width=64, heads=4, depth=1, mlp_ratio=4)  # weights outweigh the graph


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.manual_seed(0)
    model, guide = make_pair(vit=WIDE, granularity="unit")
    for site in guide.layout.sites:
        guide.field(site).data.abs_().add_(0.3)
    run, folder = around(model, guide), tmp_path_factory.mktemp("files")
    made = [folder / "compact.onnx", folder / "members.onnx"]
    export_onnx(compact(run), made[0])
    export_members(compact(run, "bayes"), made[1], 3)
    calibration = INFO.normalise(images(64, 1))
    for path in made:
        quantise(path, int8_of(path), calibration)
    assert len([*folder.iterdir()]) == 4  # nothing else is left
    return made


@pytest.mark.parametrize("number", [0, 1])
def test_smaller_and_close(number: int, files: list[Path]) -> None:
    path = files[number]
    small = int8_of(path)
    assert small.name == f"{path.stem}.int8.onnx" and small.stat().st_size < 0.6 * path.stat().st_size
    x = images(50, 2)
    before, after = predict_onnx(path, x), predict_onnx(small, x)
    difference = (before.probs - after.probs).abs()
    assert 0 < difference.max() < 0.15 and difference.mean() < 0.02 and after.classes == INFO.classes
    alone = torch.cat([predict_onnx(small, x[i : i + 1]).probs for i in range(5)])
    torch.testing.assert_close(alone, after.probs[:5], atol=1e-6, rtol=0)  # neighbours in the batch do not matter


def test_the_products_are_of_integers(files: list[Path]) -> None:
    import onnx

    for path in files:
        graph = onnx.load(int8_of(path)).graph
        weights = {value.name for value in graph.initializer}
        left = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and set(n.input) & weights]
        assert not left  # attention alone stays float32
        assert sum(node.op_type == "QLinearMatMul" for node in graph.node) >= 4


def test_each_channel_of_each_member_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """Columns of tiny weights beside columns of large ones: all keep their relative accuracy, in every member."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = np.random.default_rng(0)
    sizes = np.float32([[1e-4, 1, 100, 0], [10, 1e-3, 1, 0.1], [1, 1, 1e-5, 1000]])
    weights = made.normal(size=(3, 16, 4)).astype(np.float32) * sizes[:, None]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["K", "n", None]) for name in ("images", "y")]
    node = helper.make_node("MatMul", ["images", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "stack", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, tmp_path / "stack.onnx")
    x = made.normal(size=(3, 40, 16)).astype(np.float32)
    wanted = x @ weights
    assert with_unit_columns(proto.graph) and np.abs(numpy_helper.to_array(proto.graph.initializer[0])).max() == 1
    onnx.save(proto, tmp_path / "same.onnx")
    (same,) = open_onnx(tmp_path / "same.onnx").run(None, {"images": x})
    np.testing.assert_allclose(same, wanted, rtol=1e-5, atol=1e-4 * sizes.max(1).min())
    with patch("pyro_isingvit.pruning.quantise.BATCH", 3):
        quantise(tmp_path / "stack.onnx", tmp_path / "int8.onnx", torch.from_numpy(x))
    (found,) = open_onnx(tmp_path / "int8.onnx").run(None, {"images": x})
    assert (np.abs(found - wanted).max(1) <= 0.05 * np.abs(wanted).max(1) + 1e-30).all()


def test_refused(files: list[Path], tmp_path: Path) -> None:
    out, calibration = tmp_path / "o.onnx", INFO.normalise(images(4))
    with pytest.raises(UserError, match="no images"):
        quantise(files[0], out, calibration[:0])
    with pytest.raises(UserError, match="is no file"):
        quantise(tmp_path / "none.onnx", out, calibration)
    full = patch("onnxruntime.quantization.quantize_static", side_effect=OSError(errno.ENOSPC, "no room"))
    with full, pytest.raises(UserError, match="no room"):
        quantise(files[0], out, calibration)
    assert not [*tmp_path.iterdir()]


def test_images_as_they_are_or_normalised(files: list[Path], tmp_path: Path) -> None:
    raw = images(64, 1)
    for number, given in enumerate((raw, raw.numpy(), INFO.normalise(raw))):
        quantise(files[0], tmp_path / f"{number}.onnx", given)
    made = {(tmp_path / f"{number}.onnx").read_bytes() for number in range(3)}
    assert len(made) == 1


def test_images_of_16_bits(tmp_path: Path) -> None:
    """As they are: arrays, and the parts of a data set, which hold them as floats."""
    rng, path = np.random.default_rng(0), tmp_path / "compact.onnx"
    deep = rng.integers(0, 2**16, (60, 4, 4)).astype(np.uint16)
    data = ImageData.from_arrays(deep, deep.mean((1, 2)) > 2**15, train_size=40, intensity="full")
    run = fit(ViTConfig(2, 8, 2, 1), data, epochs=1, device="cpu", progress=False)
    export_onnx(compact(run), path)
    given = (deep[:16, None], torch.from_numpy(deep[:16, None]), InMemory(torch.from_numpy(deep[:16, None])),
             data.info.normalise(as_images(deep[:16, None])[:]))  # fmt: skip
    for number, each in enumerate(given):
        quantise(path, tmp_path / f"{number}.onnx", each)
    assert len({(tmp_path / f"{number}.onnx").read_bytes() for number in range(len(given))}) == 1
    with pytest.raises(UserError, match="is uint8"):
        quantise(path, tmp_path / "o.onnx", deep[:16, None].astype(np.uint8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x / 255, "lies between 0 and 1"),
        (lambda x: x.float(), "use `normalise`"),
        (lambda x: x.to(torch.uint16) * 257, "is uint16"),
        (lambda x: InMemory(x / 255), "is float32"),
        (lambda x: INFO.normalise(x) * float("nan"), "not finite"),
        (lambda x: x[:, :, 1:], "has images of shape"),
        (lambda x: x[:, [0, 0]].numpy(), "has images of shape"),
    ],
)  # fmt: skip
def test_calibration_that_does_not_fit(files: list[Path], tmp_path: Path, change, told: str) -> None:
    with pytest.raises(UserError, match=told):
        quantise(files[0], tmp_path / "o.onnx", change(images(4)))
    assert not [*tmp_path.iterdir()]
