"""Compact networks for other runtimes: ONNX, and programs of ``torch.export``. The batch size stays free.

Both take normalised images (B, channels, height, width) float32 and give logits (B, C), the temperature applied; mean
and standard deviation of the pixels are in compact.json and in the ONNX file's metadata.
"""

import importlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pyro_isingvit.core.checkpoint import write_atomically
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.pruning.network import CompactViT

ONNX, PROGRAM = "compact.onnx", "compact.pt2"
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4


def need_extras() -> None:
    """Complains of missing packages before any work.

    Raises:
        UserError: one of the ONNX packages is not installed.
    """
    for name in EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"ONNX export needs the package {name}: pip install 'pyro-isingvit[export]'.") from error


def _program(model: CompactViT) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *model.config.image_shape)
    return torch.export.export(model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def export_program(model: CompactViT, path: Path) -> None:
    """Writes a ``torch.export`` program (.pt2); ``torch.export.load(path).module()`` runs it.

    Args:
        model: the form ``mean``, or the means of the form ``bayes``.
        path: the file.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, lambda temporary: torch.export.save(_program(model), temporary))


def export_onnx(model: CompactViT, path: Path) -> float:
    """Writes an ONNX file in the exporter's current opset and checks it with onnxruntime.

    Args:
        model: the form ``mean``, or the means of the form ``bayes``.
        path: the file.

    Returns:
        the largest difference of the logits seen, over batches of 1, 3 and 7 random images.

    Raises:
        UserError: packages are missing, the file cannot be written, or its logits differ by more than 1e-4.
    """
    need_extras()

    def write(temporary: Path) -> None:
        import onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations: nothing that the user could change
            exported = torch.onnx.export(
                _program(model), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
        assert exported is not None
        proto = exported.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info, *proto.functions):
            part.ClearField("metadata_props")  # traces of the exporter's own code, a third of the file
        config = model.config
        names = ("classes", "mean", "std", "kind", "low", "high", "dataset")
        described = {name: getattr(config, name) for name in names}
        for key, value in described.items():
            proto.metadata_props.add(key=key, value=json.dumps(value))
        onnx.checker.check_model(proto)
        onnx.save(proto, temporary)

    write_atomically(path, write)
    difference = max(_difference(model, path, batch) for batch in (1, 3, 7))
    if not difference <= TOLERANCE:
        raise UserError(f"{path} gives other logits than the network (by {difference:.2g}); please report this.")
    return difference


@torch.no_grad()
def _difference(model: CompactViT, path: Path, batch: int) -> float:
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(batch))
    return float((model(x) - run_onnx(path, x)).abs().max())


def run_onnx(path: Path, x: Tensor) -> Tensor:
    """Logits (B, C) of normalised images (B, channels, height, width) by onnxruntime on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
