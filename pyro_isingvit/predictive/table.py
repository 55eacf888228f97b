"""Predictions as the columns of a table, and tables as CSV or Parquet.

Shapes: S draws, B images, C classes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.untrusted import csv_text
from pyro_isingvit.predictive.draws import PredictiveDraws

if TYPE_CHECKING:
    import pyarrow as pa

Column = Sequence[str] | np.ndarray  # texts, or (B,) whole numbers or float32
Columns = Mapping[str, Column]


def summary_columns(draws: PredictiveDraws, names: Sequence[str], classes: Sequence[str]) -> dict[str, Column]:
    """What is said about every image.

    Args:
        draws: (S, B, C).
        names: (B,).
        classes: (C,).

    Returns:
        file, class, probability, its 5% and 95% quantiles, entropy and mutual information (nats), each (B,).
    """
    mean = draws.mean
    top = mean.argmax(-1)
    at = top[None, :, None].expand(len(draws.probs), -1, 1)
    low, high = PredictiveDraws(draws.probs.gather(2, at), draws.weights).interval(0.9)[..., 0]
    return {
        "file": names, "class": [classes[c] for c in top.tolist()],
        "probability": _numbers(mean.gather(1, top[:, None])[:, 0]), "p05": _numbers(low), "p95": _numbers(high),
        "entropy": _numbers(draws.entropy), "mutual_information": _numbers(draws.mutual_information),
    }  # fmt: skip


def _numbers(values: Tensor) -> np.ndarray:
    return values.float().numpy()


def csv_of(columns: Columns, header: bool = True) -> str:
    """A table as CSV: floats with six decimals, no text that a spreadsheet takes for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(map(csv_text, columns))
    writer.writerows(zip(*map(_texts, columns.values()), strict=True))
    return text.getvalue()


def _texts(column: Column) -> list[str]:
    if isinstance(column, np.ndarray):
        form = "{:.6f}" if column.dtype.kind == "f" else "{}"
        return [form.format(value) for value in column.tolist()]
    return [csv_text(text) for text in column]


def parquet() -> Any:
    """pyarrow's reader and writer of Parquet files.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet as found
    except ImportError as error:
        raise UserError("Parquet needs the package pyarrow: pip install 'pyro-isingvit[parquet]'.") from error
    return found


def arrow_of(columns: Columns) -> "pa.Table":
    """A table for Parquet; texts as they are, floats with 32 bits."""
    import pyarrow as pa

    arrays = [pa.array(column if isinstance(column, np.ndarray) else list(column)) for column in columns.values()]
    return pa.table(arrays, names=list(columns))


def parquet_bytes(columns: Columns) -> bytes:
    """A table as the content of a Parquet file."""
    content = io.BytesIO()
    parquet().write_table(arrow_of(columns), content)
    return content.getvalue()


def join_parquet(parts: Sequence[Path], out: Path, about: Mapping[str, str]) -> None:
    """Writes the tables of files as one, one after another, each a group of rows.

    Args:
        parts: at least one.
        out: the file.
        about: metadata of the file.
    """
    pq = parquet()
    schema = pq.read_schema(parts[0]).with_metadata(dict(about))
    with out.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).replace_schema_metadata(dict(about)))
