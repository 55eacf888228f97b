"""What a pretrained network makes of images of which it sees a quarter."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_isingvit.report.style import save_png, styled
from pyro_isingvit.runs.pretrain import Pretraining

COUNT = 10


@styled
def draw_guesses(training: Pretraining, path: Path) -> Path:
    """Draws held-out images, what the network sees of them, and what it guesses; returns ``path``.

    Args:
        training: whose patches do not overlap.
        path: of the PNG file.
    """
    shown = training.info.scale.on_screen
    rows = {
        name: shown(images) for name, images in zip(("image", "seen", "guessed"), training.guesses(COUNT), strict=True)
    }
    figure = Figure(figsize=(COUNT * 0.9, len(rows) * 0.95), layout="constrained")
    axes = figure.subplots(len(rows), COUNT, squeeze=False)
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            _show(axis, picture)
        line[0].set_ylabel(label)
    save_png(figure, path)
    return path


def _show(axis: Axes, picture: Tensor) -> None:
    grey = picture.shape[0] == 1
    pixels = (picture[0] if grey else picture.permute(1, 2, 0)).numpy()
    axis.imshow(pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
