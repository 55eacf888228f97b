"""Files for other runtimes give the same logits at every batch size."""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INFO, TINY, cut, network

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.pruning.assembly import assemble
from pyro_isingvit.pruning.export import export_onnx, export_program, run_onnx
from pyro_isingvit.pruning.network import CompactViT

# Uniform heads, a lost branch, padded heads and dropped features among them.
SHAPES = {"mean": TINY, "cls": replace(TINY, pool="cls", head="mlp", patch_size=3)}


def pruned(config: ViTConfig, granularity: str = "unit") -> CompactViT:
    vit, weights = network(config, INFO, 4)
    weights = cut(vit, weights, granularity, 0.6, 4)
    weights["qkv"][0, 8:12] = 0.0
    weights["fc1"][1] = 0.0
    if config.head == "linear":
        weights["head"][0, :, :2] = 0.0
    model = assemble(vit, INFO, weights)
    model.temperature.fill_(0.8)
    return model


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnx

    model, path = pruned(SHAPES[name]), tmp_path / "model.onnx"
    model.config = replace(model.config, dataset="imagefolder:/home/of/somebody/wards")
    assert export_onnx(model, path) <= 1e-4
    x = torch.randn(9, 1, 4, 4)
    torch.testing.assert_close(run_onnx(path, x), model(x).detach(), atol=1e-4, rtol=0)
    proto = onnx.load(path)
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["classes"] == ["a", "b", "c"] and metadata["mean"] == [0.5]
    assert "wards" in metadata["dataset"] and b"somebody" not in path.read_bytes()  # no path of this machine
    assert list(tmp_path.iterdir()) == [path]  # one file, no weights beside it


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_torch_program(name: str, tmp_path: Path) -> None:
    model, path = pruned(SHAPES[name]), tmp_path / "model.pt2"
    export_program(model, path)
    program = torch.export.load(path).module()
    for batch in (1, 5):
        x = torch.randn(batch, 1, 4, 4)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'pyro-isingvit\[export\]'"):
        export_onnx(pruned(TINY), tmp_path / "model.onnx")


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_disk_that_fills_while_a_file_is_written(export, tmp_path: Path) -> None:
    """A real limit to what may be written, which PyTorch's own writer of files does not survive."""
    model, kept = pruned(TINY), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            export(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert not [*tmp_path.iterdir()]
