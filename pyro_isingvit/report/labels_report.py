"""The page and the table of doubtful labels.

Shapes: N images; an image is (C, H, W) uint8.
"""

import base64
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from torch import Tensor

from pyro_isingvit.core.checkpoint import write_text
from pyro_isingvit.core.untrusted import csv_text, printable
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import Split
from pyro_isingvit.predictive.labels import Doubts

THUMBNAIL = 112  # pixels of the longer side, at most
COLUMNS = (
    "image", "part", "given", "suggested", "p_given", "p_given_p05", "p_given_p95", "suspicion", "flagged",
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """Labelled images and what is thought of their labels.

    Attributes:
        parts: of the data set by name, in the order of ``doubts``.
        classes: their names.
        doubts: of all parts together.
    """

    parts: dict[str, Split]
    classes: tuple[str, ...]
    doubts: Doubts

    @property
    def labels(self) -> np.ndarray:
        """(N,) given class numbers."""
        return np.concatenate([part.labels.cpu().numpy() for part in self.parts.values()])

    def where(self, row: int) -> tuple[str, int]:
        """Part of an image, and its row there."""
        for name, part in self.parts.items():
            if row < len(part):
                return name, row
            row -= len(part)
        raise IndexError("there is no such image")

    def name(self, row: int) -> str:
        """File name of an image, or its number within its part."""
        part, number = self.where(row)
        names = self.parts[part].names
        return printable(names[number]) if names else str(number)


def to_csv(checked: Checked) -> str:
    """A line for each image, the most doubtful first."""
    text, labels, doubts = io.StringIO(), checked.labels, checked.doubts
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in doubts.order().tolist():
        numbers = (doubts.given[row], *doubts.interval[:, row], doubts.suspicion[row])
        classes = (checked.classes[labels[row]], checked.classes[doubts.suggested[row]])
        writer.writerow([
            csv_text(checked.name(row)), checked.where(row)[0], *map(csv_text, map(printable, classes)),
            *(f"{float(number):.6f}" for number in numbers), "yes" if doubts.flagged[row] else "no",
        ])  # fmt: skip
    return text.getvalue()


def write_page(path: Path, checked: Checked, info: DataInfo, summary: dict[str, object], most: int = 200) -> None:
    """Writes one HTML file that needs nothing else.

    Args:
        path: the file.
        checked: what it shows.
        info: of the data.
        summary: names and values for the head of the page.
        most: images shown, the most doubtful flagged ones.
    """
    doubts, labels = checked.doubts, checked.labels
    shown = doubts.order()[: min(most, int(doubts.flagged.sum()))].tolist()
    sides = [side for part in checked.parts.values() for side in part.images.shape[2:]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    images = []
    for row in shown:
        part, number = checked.where(row)
        low, high = doubts.interval[:, row].tolist()
        seen = info.scale.shown(checked.parts[part].images[number : number + 1])[0]
        images.append({
            "address": thumbnail(seen), "name": checked.name(row), "part": part,
            "given": printable(checked.classes[labels[row]]), "p": float(doubts.given[row]), "low": low, "high": high,
            "suggested": printable(checked.classes[doubts.suggested[row]]),
        })  # fmt: skip
    pairs = [
        (printable(checked.classes[given]), printable(checked.classes[other]), count)
        for given, other, count in doubts.confused(labels)
    ]
    page = environment.get_template("labels.html.j2").render(
        dataset=printable(info.dataset), summary=[*summary.items()], pairs=pairs, images=images,
        flagged=int(doubts.flagged.sum()), small=max(sides) <= THUMBNAIL,
    )  # fmt: skip
    write_text(path, page)


def thumbnail(image: Tensor) -> str:
    """An image (1 or 3, H, W) uint8 as the address of a PNG."""
    from PIL import Image
    from torchvision.transforms.v2.functional import resize

    image = image.cpu()
    height, width = image.shape[1:]
    if (longer := max(height, width)) > THUMBNAIL:
        sides = [max(1, round(side * THUMBNAIL / longer)) for side in (height, width)]
        image = resize(image, sides, antialias=True)
    pixels, file = image.movedim(0, -1).squeeze(-1).numpy(), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
