"""ONNX files with weights and activations of 8 bits, by onnxruntime's static quantisation.

    w ~ s_c q, q int8, s_c for each output channel c;    x ~ s (q - z), q uint8, s and z from calibration images

Static: the range of each activation is that of training images. Dynamic quantisation takes it from the batch, so that
an image's prediction depends on its neighbours. Integer products (format QOperator): with pairs of quantise and
dequantise nodes instead these small networks were slower than in float32. Only products with weights are quantised;
attention, norms and softmax stay float32.

onnxruntime's integer products take a scale for each output channel of a matrix, but one for a whole stack (K, in, out).
The columns of stacks are therefore divided by their largest absolute values first, and the products multiplied by
these: a scale for each output channel of each member. Matrices that the members share have one scale each there.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_isingvit.core.checkpoint import write_atomically
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.pixels import TOP, Scale
from pyro_isingvit.data.images import Images, as_images
from pyro_isingvit.pruning.export import need_extras, open_onnx
from pyro_isingvit.pruning.onnx_predict import scale_of

if TYPE_CHECKING:
    from onnx import GraphProto

CALIBRATION = 256  # images
BATCH = 32
MARGIN = 0.1  # that normalised images may go further


def int8_of(path: Path) -> Path:
    """Where the quantised file stands: compact.onnx -> compact.int8.onnx."""
    return path.with_suffix(f".int8{path.suffix}")


def quantise(path: str | Path, out: str | Path, calibration: Images | Tensor | np.ndarray) -> None:
    """Writes an exported ONNX file again with 8-bit weights and activations; ``predict_onnx`` runs both.

    Args:
        path: a file of ``export_onnx`` or ``export_members``.
        out: the quantised file.
        calibration: (B, channels, height, width) training images, a few hundred: ``Images``, such as
            ``data.train.images``, and whole numbers as they are; float tensors and arrays normalised.

    Raises:
        UserError: packages are missing, ``path`` is no ONNX file, no images or some that do not fit, or ``out`` cannot
            be written.
    """
    need_extras()
    need(len(calibration), "`calibration` has no images.")
    path = Path(path)
    ready = _normalised(calibration, open_onnx(path), path)

    def write(temporary: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]

        proto = onnx.load(path)
        stacked = with_unit_columns(proto.graph)
        with tempfile.TemporaryDirectory() as place, _quiet():
            made = Path(place) / "int8.onnx"
            quantize_static(
                proto, made, _Reader(ready), op_types_to_quantize=["MatMul", "Gemm"], per_channel=not stacked,
                quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
            open_onnx(made)
            temporary.write_bytes(made.read_bytes())

    write_atomically(Path(out), write)


def with_unit_columns(graph: "GraphProto") -> bool:
    """Divides every column of the stacked matrices by its largest absolute value and multiplies the products by it.

    Args:
        graph: of an ONNX file; changed in place, to one that computes the same.

    Returns:
        whether it has stacked matrices.
    """
    from onnx import helper, numpy_helper

    stacks = {value.name: value for value in graph.initializer if len(value.dims) == 3}
    nodes = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in stacks]
    for node in nodes:
        stack, result = stacks[node.input[1]], node.output[0]
        weights = numpy_helper.to_array(stack)
        largest = np.abs(weights).max(1, keepdims=True)  # (K, 1, out)
        largest[largest == 0] = 1.0
        product, scale = f"{result}_of_unit_columns", f"{stack.name}_columns"
        stack.CopyFrom(numpy_helper.from_array(weights / largest, stack.name))
        graph.initializer.append(numpy_helper.from_array(largest, scale))
        node.output[0] = product
        after = list(graph.node).index(node) + 1
        graph.node.insert(after, helper.make_node("Mul", [product, scale], [result], name=f"{product}_restored"))
    return bool(nodes)


def _normalised(calibration: Images | Tensor | np.ndarray, session: Any, path: Path) -> Tensor:
    """Calibration images as the network reads them."""
    tensor = isinstance(calibration, Tensor) and calibration.is_floating_point()
    known = None if tensor else as_images(calibration)
    images = calibration if known is None else known[:]
    assert isinstance(images, Tensor)
    [reads] = session.get_inputs()
    shape, given = tuple(reads.shape[1:]), tuple(images.shape[1:])
    fits = len(shape) == len(given) and all(
        not isinstance(wanted, int) or wanted == size for wanted, size in zip(shape, given, strict=True)
    )
    told = f"`calibration` has images of shape {tuple(images.shape)}, {path} reads (B, {', '.join(map(str, shape))})."
    need(fits, told)
    try:
        scale: Scale | None = scale_of(session.get_modelmeta().custom_metadata_map)
    except (ValueError, KeyError, TypeError):  # a file of another exporter
        scale = None
    if known is not None and (known.kind != "float32" or calibration is known):
        if scale is None or scale.kind != known.kind:
            raise UserError(f"`calibration` is {known.kind}, and {path} reads other images; give them normalised.")
        scale.check(images, f"`calibration` is not what {path} reads")
        return scale.standardised(scale.scaled(images))
    need(bool(images.isfinite().all()), "`calibration` has pixels that are not finite.")
    if scale is not None and max(scale.mean) > 0:
        told = "`calibration` lies between 0 and 1, so it is not normalised: give uint8 as it is, or use `normalise`."
        need(float(images.min()) < 0 or float(images.max()) > 1, told)
    if scale is not None and (scale.low or scale.kind in TOP):  # normalised from numbers between 0 and 1
        zeros = torch.zeros(1, len(scale.mean), 1, 1)
        low, high = float(scale.standardised(zeros).min()), float(scale.standardised(zeros + 1).max())
        here = float(images.min()), float(images.max())
        told = f"`calibration` goes from {here[0]:.4g} to {here[1]:.4g}, normalised images from {low:.4g} to {high:.4g}"
        need(here[0] >= low - MARGIN and here[1] <= high + MARGIN, f"{told}: use `normalise`.")
    return images


class _Reader:
    """Calibration batches, as onnxruntime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(BATCH))

    def get_next(self) -> dict[str, object] | None:
        x = next(self.batches, None)
        return None if x is None else {"images": x.numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises, on the root logger, a preparation that the exporter has already done."""
    root = logging.getLogger()
    root.addFilter(_not_advice)
    try:
        yield
    finally:
        root.removeFilter(_not_advice)


def _not_advice(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
