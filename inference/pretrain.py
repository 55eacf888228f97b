"""Learn from images without labels, by masked-image modelling; training then starts from the result.

python -m inference.pretrain --images fashion-mnist --preset small --out runs/pretrained
python -m inference.pretrain --images photos/ --image-size 32 --preset cifar-linear --out runs/pretrained
python -m inference.pretrain --resume runs/pretrained
python -m inference.train --init runs/pretrained/start.safetensors --dataset fashion-mnist --train-size 300 --out runs/a

--images takes a data set (its training files), an .npz file with `images` or `train_images`, or a folder of images. A
folder test in that folder is left out.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from inference.cli import print_table, resumes, run_script, with_clear_errors
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.presets import PRESETS, default_preset, preset, without_stem
from pyro_isingvit.core.pretraining import PretrainConfig
from pyro_isingvit.core.settings import DataConfig, ViTConfig


@dataclass(frozen=True)
class PretrainArguments:
    """What to learn from, and where to keep the network."""

    images: str
    """digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, csv:FILE, npz:FILE, npy:FOLDER, FILE.npz or a
    folder of images."""
    out: Path
    """Folder of the pretraining."""
    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))]
    """Network shape to start from; by default the preset for the data set."""
    overwrite: bool = False
    """Replace the pretraining that the folder holds."""
    data_root: str = "data"
    """Folder of the torchvision data sets."""
    image_size: int | None = None
    """Resize the images to squares with this many pixels a side."""
    vit: ViTConfig = field(default_factory=ViTConfig)
    train: PretrainConfig = field(default_factory=PretrainConfig)
    resize: Literal["fit", "crop", "stretch"] = "fit"
    """With image_size, images that are no squares are shown whole with dark margins, cut to their middle, or lose their
    shape."""
    pages: Literal["first", "channels"] = "first"
    """Which pages of a TIFF file are read: the first, or all of them as channels."""
    cache: str | None = None
    """Folder where decoded images are kept and read from row by row, for data that do not fit into memory."""
    intensity: str = "full"
    """Which pixel values become 0 and 1: full, none, or "percentile LOW HIGH" of the training pixels. The training that
    starts here takes it over."""
    groups: str | None = None
    """As in the training that starts here: of images that belong together, none is held out alone."""
    columns: str = ""
    """csv: names of columns other than path, label, split, group and weight, as 'path=file,label=finding'."""


@dataclass(frozen=True)
class ResumeArguments:
    """Continue an interrupted pretraining with its own settings."""

    resume: Path
    """Folder of the pretraining."""


def pretrain(arguments: PretrainArguments) -> None:
    """Learn from images without labels. To continue: --resume DIR alone."""
    from pyro_isingvit.core.checkpoint import previous_of
    from pyro_isingvit.runs.folder import holds_run
    from pyro_isingvit.runs.pretrain import CHECKPOINT, HISTORY, SETTINGS, START, PretrainSettings

    out = arguments.out
    need(not out.exists() or out.is_dir(), f"{out} is a file; --out takes a folder.")
    need(not holds_run(out) or (out / SETTINGS).exists(), f"{out} holds a run of inference.train; name another --out.")
    kept = (CHECKPOINT, previous_of(Path(CHECKPOINT)).name, START)  # of which an interrupted first epoch leaves none
    if any((out / name).exists() for name in kept) and not arguments.overwrite:
        raise UserError(
            f"{out} already holds a pretraining; continue it with --resume {out} alone, or replace it with --overwrite."
        )
    settings = PretrainSettings(
        arguments.images, arguments.data_root, arguments.image_size, arguments.vit, arguments.train,
        resize=arguments.resize, pages=arguments.pages, cache=arguments.cache, intensity=arguments.intensity,
        groups=arguments.groups, columns=arguments.columns,
    )  # fmt: skip
    settings.check()
    training = _made(settings, out)
    for name in (SETTINGS, HISTORY, *kept):
        (out / name).unlink(missing_ok=True)
    _run(training)


def resume(arguments: ResumeArguments) -> None:
    """Continue an interrupted pretraining; its folder holds the settings."""
    from pyro_isingvit.runs.pretrain import PretrainSettings

    need(arguments.resume.is_dir(), f"there is no folder {arguments.resume}.")
    training = _made(PretrainSettings.read(arguments.resume), arguments.resume)
    training.restore()
    _run(training)


def _made(settings, out):  # type: ignore[no-untyped-def]
    from pyro_isingvit.data.load import load_unlabelled
    from pyro_isingvit.runs.pretrain import Pretraining

    how = DataConfig(
        resize=settings.resize, pages=settings.pages, cache=settings.cache, groups=settings.groups,
        columns=settings.columns,
    )  # fmt: skip
    images = load_unlabelled(
        settings.source, data_root=settings.data_root, image_size=settings.image_size, source=how, test=settings.test
    )
    return Pretraining(settings, images, out)


def _run(training) -> None:  # type: ignore[no-untyped-def]
    from pyro_isingvit.report.pretrain_figure import draw_guesses
    from pyro_isingvit.runs.pretrain import START

    try:
        training.run()
    except KeyboardInterrupt as stop:
        again = f"go on with: python -m inference.pretrain --resume {training.folder}"
        stop.args = (f"{stop}; {again if training.epoch else 'run the same command again'}",)
        raise
    last, folder = training.history[-1], training.folder
    print_table(
        f"{training.settings.source}, {len(training.split):,} images without labels",
        {"epochs": training.epoch, "loss": last["loss"], "loss on held-out images": last["held_out_loss"],
         "seconds": training.seconds},
    )  # fmt: skip
    if training.settings.vit.stride == training.settings.vit.patch_size:
        print(f"figure: {draw_guesses(training, folder / 'guesses.png')}")
    print(f"start: {folder / START}\ntrain: python -m inference.train --init {folder / START} --dataset ... --out ...")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line. The preset sets the defaults of the shape."""
    argv = sys.argv[1:] if argv is None else argv
    if resumes(argv):
        run_script(resume, ResumeArguments, argv)
        return
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--images", default="digits")
    peek.add_argument("--preset", default=None)
    known, _ = peek.parse_known_args(argv)
    name = known.preset or without_stem(default_preset(known.images))
    with_clear_errors(lambda: preset(name), PretrainArguments)
    default = PretrainArguments(images=tyro.MISSING, out=tyro.MISSING, preset=name, vit=preset(name))
    run_script(pretrain, PretrainArguments, argv, default)


if __name__ == "__main__":
    main()
