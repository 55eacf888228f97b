"""8-bit ONNX files: smaller, close to what they were made from, and independent of the batch."""

import errno
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import INFO, around, make_pair
from torch import Tensor

from pyro_isingvit import UserError, compact, predict_onnx
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.pruning.export import export_onnx
from pyro_isingvit.pruning.onnx_members import export_members
from pyro_isingvit.pruning.quantise import int8_of, quantise

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
