"""Compact networks for other runtimes: ONNX, and programs of ``torch.export``. The batch size stays free.

All take normalised images (B, channels, height, width) float32; mean and standard deviation of the pixels are in
compact.json and in the ONNX files' metadata. One network gives logits (B, C), the temperature applied.
"""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.checkpoint import write_atomically
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.pruning.network import CompactViT
from pyro_isingvit.pruning.shapes import CompactConfig
from pyro_isingvit.sharing.names import shared_name

if TYPE_CHECKING:
    from onnxruntime import InferenceSession  # type: ignore[import-untyped]

ONNX, PROGRAM = "compact.onnx", "compact.pt2"
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
BATCHES = (1, 3, 7)  # of the check


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


def _program(model: nn.Module, config: CompactConfig) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *config.image_shape)
    shapes = ({0: torch.export.Dim("batch")},)
    # Older PyTorch cannot prove of some batches what holds for all of them: it is to check instead of refusing.
    return torch.export.export(
        model.eval(), (example,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )


def export_program(model: CompactViT, path: Path) -> None:
    """Writes a ``torch.export`` program (.pt2); ``torch.export.load(path).module()`` runs it.

    Args:
        model: the form ``mean``, or the means of the form ``bayes``.
        path: the file.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()  # PyTorch's writer ends the process where the disk is full
    torch.export.save(_program(model, model.config), buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def export_onnx(model: CompactViT, path: Path) -> float:
    """Writes an ONNX file in the exporter's current opset and checks it with onnxruntime.

    Args:
        model: the form ``mean``, or the means of the form ``bayes``.
        path: the file.

    Returns:
        the largest difference of the logits seen, over batches of 1, 3 and 7 random images.

    Raises:
        UserError: packages are missing, the file cannot be written, or its logits differ by more than 1e-4; nothing
            is written then.
    """
    return write_onnx(model, model.config, Path(path), ["logits"], {}, lambda x: [model(x)], TOLERANCE)


@torch.no_grad()
def write_onnx(
    module: nn.Module,
    config: CompactConfig,
    path: Path,
    outputs: Sequence[str],
    described: dict[str, Any],
    expected: Callable[[Tensor], Sequence[Tensor]],
    tolerance: float,
) -> float:
    """Writes a module as an ONNX file, once onnxruntime has given what is expected of it.

    Args:
        module: of normalised images, (B, channels, height, width) to its outputs.
        config: what the images look like; goes into the metadata.
        path: the file.
        outputs: their names.
        described: further metadata.
        expected: normalised images to what the outputs must be.
        tolerance: largest difference that passes.

    Returns:
        the largest difference seen, over batches of 1, 3 and 7 random images.

    Raises:
        UserError: packages are missing, the file cannot be written, or its outputs differ; nothing is written then.
    """
    need_extras()
    differences: list[float] = []

    def write(temporary: Path) -> None:
        import onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations: nothing that the user could change
            exported = torch.onnx.export(
                _program(module, config), input_names=["images"], output_names=outputs, dynamo=True, verbose=False
            )
        assert exported is not None
        proto = exported.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info, *proto.functions):
            part.ClearField("metadata_props")  # traces of the exporter's own code, a third of the file
        names = ("classes", "mean", "std", "kind", "low", "high", "dataset")
        told = {name: getattr(config, name) for name in names} | {"dataset": shared_name(config.dataset)}
        for key, value in (told | described).items():
            proto.metadata_props.add(key=key, value=json.dumps(value))
        onnx.checker.check_model(proto)
        onnx.save(proto, temporary)
        session = open_onnx(temporary)
        for batch in BATCHES:
            x = torch.randn(batch, *config.image_shape, generator=torch.Generator().manual_seed(batch))
            given = map(torch.from_numpy, session.run(outputs, {"images": x.numpy()}))
            differences.extend(float((a - b).abs().max()) for a, b in zip(given, expected(x), strict=True))
        need(
            all(difference <= tolerance for difference in differences),
            f"{path} would give other {', '.join(outputs)} than the network (by {max(differences):.2g}) and is not "
            "written; please report this.",
        )

    write_atomically(path, write)
    return max(differences)


def open_onnx(path: Path) -> "InferenceSession":
    """The file in onnxruntime, on the CPU, with as many threads as PyTorch has.

    Raises:
        UserError: packages are missing, or the file is missing or no ONNX file that can run.
    """
    need_extras()
    import onnxruntime

    need(path.is_file(), f"{path} is no file; export an ONNX file first.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: its warnings speak of the graph, which the user did not make
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each status of the runtime
        raise UserError(f"{path} cannot be run by onnxruntime; it is damaged or no ONNX file.") from error


def run_onnx(path: Path, x: Tensor) -> Tensor:
    """Logits (B, C) of normalised images (B, channels, height, width) by onnxruntime on the CPU."""
    return torch.from_numpy(open_onnx(path).run(None, {"images": x.numpy()})[0])
