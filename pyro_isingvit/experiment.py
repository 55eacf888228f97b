"""The door: settings and images in, a trained and evaluated run out."""

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyro_isingvit.core.checkpoint import remove_leftovers
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.presets import preset
from pyro_isingvit.core.processes import is_first, launched, on_first
from pyro_isingvit.core.settings import BaselineConfig, DataConfig, IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.load import is_named, load_data
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.evaluation import write_evaluation
from pyro_isingvit.ising.model import IsingViT
from pyro_isingvit.methods.registry import epochs_in_all, row, started, unread
from pyro_isingvit.nets.start import Start
from pyro_isingvit.runs.checks import check_asked, idle
from pyro_isingvit.runs.folder import FILES, alone_in, clear_run, need_folder, need_room
from pyro_isingvit.runs.load import open_run, read_info
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import IN_MEMORY, teacher_name
from pyro_isingvit.runs.trainer import Trainer
from pyro_isingvit.starts import load_start
from pyro_isingvit.trained import TrainedRun
from pyro_isingvit.version import __version__

log = logging.getLogger(__name__)


def train_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    full_posterior: bool = False,
    progress: bool = True,
    trained: Path | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one run, and keeps it in a folder.

    Args:
        config: all settings; when resuming, those of the folder.
        folder: where the run is kept; an earlier run in it is replaced unless ``resume``.
        resume: continue from the folder's checkpoint.
        full_posterior: keep every mask and weight draw in posterior.nc.
        progress: show progress bars.
        trained: a finished run of the same network, data and seed whose weights are taken instead of training
            (methods that add something after ordinary training: temperature, laplace).

    Returns:
        what metrics.json holds.

    Raises:
        UserError: data, settings or folder that cannot be used, or another process trains in it; an earlier run is
            then untouched.
        TrainingDiverged: the loss was not finite.
        KeyboardInterrupt: Ctrl-C; its message says what is kept.
    """
    need_folder(folder)
    if not resume:
        need_room(folder)
        check_asked(config.train)
        _tell_unread(config)
    trainer, data = _prepared(config, folder, resume, progress)
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(alone_in(folder)))
        if trained is not None:
            trainer.adopt(trained)
        elif resume:
            trainer.restore()
            on_first(lambda: remove_leftovers(folder, FILES))
        if not resume:
            on_first(lambda: clear_run(folder))
        run = _trained(trainer, data)
        try:
            metrics = run.evaluate(data, progress=progress and is_first())
            evaluation = run.evaluation
            assert evaluation is not None
            on_first(lambda: write_evaluation(run, evaluation, folder, full_posterior))
            return metrics
        except KeyboardInterrupt as stop:
            stop.args = (f"interrupted in the evaluation; the trained network is kept in {folder}",)
            raise


def _prepared(config: RunConfig, folder: Path, resume: bool, progress: bool) -> tuple[Trainer, ImageData]:
    """What trains, at its start, and its data; nothing is written."""
    source = config.data
    if source.download and launched() != (1, 1):
        need(
            resume,
            "several processes would download the same at once; download it first, in one process without torchrun, "
            "and leave out `download` here.",
        )
        source = replace(source, download=False)  # the training that is resumed has done it
    here = is_named(config.data.dataset)
    need(here or not resume, f"{folder} was trained on images given in memory; it can be loaded, but not resumed.")
    data, start = load_data(**dataclasses.asdict(source), seed=config.train.seed), None
    if resume:
        data = replace(data, info=_as_before(data, config, folder))
    else:
        _check_weights(data, config.train)
        if config.init is not None:
            config, data, start = begun(config, data, load_start(config.init, download=source.download))
    need(
        IN_MEMORY not in config.teacher,
        f"{folder} has a teacher that was never saved: it can be loaded, but not resumed.",
    )
    teachers = [open_run(teacher) for teacher in config.teacher]
    return Trainer(config, data, folder, progress, start=start, teachers=teachers), data


def _as_before(data: ImageData, config: RunConfig, folder: Path) -> DataInfo:
    """What a resumed run knows of its data: normalised as its start had them, and weighed as its version did."""
    if config.init is None and data.train.weights is None:
        return data.info
    before, info = read_info(folder), data.info
    info = info if config.init is None else info.with_scale_of(before)
    return info if before.weighted else replace(info, weighted=())  # before version 0.14 all images counted alike


def _tell_unread(config: RunConfig) -> None:
    if names := unread(config):
        log.warning("method %s does not read %s: no effect", config.method, _named(names))
    for name, needed in idle(config.train, row(config.method).train):
        log.warning("`%s` changes nothing without `%s`", name, needed)


def _check_weights(data: ImageData, train: TrainConfig) -> None:
    """Raises UserError where a new training would make the classes alike and weigh them otherwise."""
    need(
        train.balance != "sampler" or data.train.weights is None,
        "`balance` sampler makes the classes alike, and weights of images make them differ; set `balance` to loss.",
    )


def begun(config: RunConfig, data: ImageData, start: Start) -> tuple[RunConfig, ImageData, Start]:
    """Settings, data and start of a training that begins from a trained network.

    Args:
        config: the settings; of the shape, the head counts alone.
        data: whose images are normalised as the network had them from now on.
        start: for any images.

    Raises:
        UserError: images that the network cannot read.
    """
    if max(data.info.height, data.info.width) < min(4 * start.vit.patch_size, *start.image_shape[1:]):
        log.warning(
            "%s was trained on images of %dx%d, these have %dx%d: resize them with `image_size`",
            start.source, *start.image_shape[1:], data.info.height, data.info.width,
        )  # fmt: skip
    start = start.fitted(data.info.image_shape)
    config = replace(config, vit=replace(start.vit, head=config.vit.head), init=config.init or start.source)
    info = data.info.scaled_as(start.scale)
    return config, replace(data, info=info), start


def fit(
    model: IsingViT | ViTConfig | Start | str,
    data: ImageData,
    *,
    method: str = "ising",
    train: TrainConfig | None = None,
    ising: IsingConfig | None = None,
    baseline: BaselineConfig | None = None,
    teacher: Run | Sequence[Run] = (),
    progress: bool = True,
    **settings: Any,
) -> TrainedRun:
    """Trains a network on images in memory, by the likelihood-guided Ising posterior or any other method.

    Args:
        model: the name of a preset ("digits", "small", "cifar", ...), the shape of a network, a trained network to
            start from (``load_start``, ``start_of``), or an ``IsingViT``, whose own parameters are then trained in
            place.
        data: what ``load_data`` or ``ImageData.from_arrays`` returns.
        method: a name in ``pyro_isingvit.methods.registry.METHODS``: "ising", "dropout", "ensemble", "laplace", ...
        train: how to train; None: the method's own defaults.
        ising: prior and posterior of the masks; None: the method's own defaults. An ``IsingViT`` has its own.
        baseline: settings of the methods without Ising masks; None: the method's own defaults.
        teacher: a trained run, or several, whose mean prediction is learned with the weight ``distillation``; moved to
            the device of the training.
        progress: show a progress bar.
        **settings: single fields of ``TrainConfig``, ``IsingConfig`` and ``BaselineConfig``, such as ``epochs=60``,
            ``target_retention=0.3`` or ``drop_rate=0.2``. ``epochs`` without ``finetune_epochs`` are all epochs.

    Returns:
        the trained run, in memory; ``TrainedRun.save`` writes it to a folder.

    Raises:
        UserError: an unknown method, preset or setting, one out of its range, or data that do not fit the model.
        TrainingDiverged: the loss was not finite.

    Examples:
        >>> from pyro_isingvit import ViTConfig, fit, load_data
        >>> data = load_data("digits", train_size=400)
        >>> vit = ViTConfig(patch_size=4, width=32, heads=4, depth=1)
        >>> run = fit(vit, data, epochs=20, target_retention=0.6, progress=False)
        >>> accuracy = (run.predict(data.test.images, 10).mean.argmax(-1) == data.test.labels).float().mean()
        >>> bool(accuracy > 0.8), run.history[-1]["phase"]
        (True, 'ising')

        A baseline is trained in the same way, with its own defaults:

        >>> run = fit(vit, data, method="dropout", drop_rate=0.2, epochs=2, progress=False)
        >>> run.config.baseline.drop_rate, run.config.train.lr
        (0.2, 0.006)
    """
    need(
        isinstance(data, ImageData),
        f"`data` must be an ImageData, not {type(data).__name__}: use `load_data` or `ImageData.from_arrays`.",
    )
    usual = started(row(method), "given" if _starts(model) else None)
    given = model if isinstance(model, IsingViT) else None
    settings |= epochs_in_all(usual.train, settings) if train is None else {}
    clash = "`model` is an IsingViT with mask settings of its own"
    need(given is None or ising is None, f"{clash}; leave out `ising`.")
    teachers: list[Any] = [*teacher] if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    need(all(isinstance(each, Run) for each in teachers), "`teacher` takes a trained run, or a list of several.")
    parts: dict[str, Any] = {
        "train": train or usual.train,
        "ising": given.ising if given else ising or usual.ising,
        "baseline": baseline or usual.baseline,
    }
    kinds = {"train": TrainConfig, "ising": IsingConfig, "baseline": BaselineConfig}
    for name, part in parts.items():
        need(isinstance(part, kinds[name]), f"`{name}` must be a {kinds[name].__name__}, not {part!r:.60}.")
        own = {each.name: settings.pop(each.name) for each in dataclasses.fields(part) if each.name in settings}
        fixed = given is not None and name == "ising" and own
        need(not fixed, f"{clash}; set {_named(own)} there.")
        parts[name] = replace(part, **own)
        check_fields(parts[name])
    if given is not None:
        asked, frozen = parts["train"].frozen_blocks, given.vit.frozen
        need(
            asked in (0, frozen),
            f"`frozen_blocks` {asked}: `model` is an IsingViT whose first {frozen} blocks are frozen; give it to "
            "`IsingViT.from_pretrained`.",
        )
        parts["train"] = replace(parts["train"], frozen_blocks=frozen)
    check_asked(parts["train"])
    _check_weights(data, parts["train"])
    need(not settings, f"unknown setting {_named(settings)}; {_hint(settings, parts)}")
    config = RunConfig(
        data=_source(data, parts["train"]), vit=_shape(model), **parts, version=__version__, method=method,
        preset=model if isinstance(model, str) else "custom", teacher=tuple(map(teacher_name, teachers)),
    )  # fmt: skip
    _tell_unread(config)
    if given is not None:
        made, there = given.info, data.info
        fits = (made.classes, made.image_shape, made.kind) == (there.classes, there.image_shape, there.kind)
        told = f"images {made.image_shape} {made.kind} of {made.num_classes} classes"
        need(fits, f"`model` was made for {told}; `data` has others: make the model for these data.")
    start = None
    if isinstance(model, Start):
        config, data, start = begun(config, data, model)
    elif given is not None and given.vit.centred:  # IsingViT.from_pretrained
        info = data.info.with_scale_of(given.info)
        config, data = replace(config, init="IsingViT.from_pretrained"), replace(data, info=info)
    cuda = config.train.device != "cpu" and torch.cuda.is_available()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        return _trained(Trainer(config, data, None, progress, given, start=start, teachers=teachers), data)


def _source(data: ImageData, train: TrainConfig) -> DataConfig:
    """Where a script finds the same parts; a name that none can load where it would divide the images otherwise."""
    if data.source is None:
        return DataConfig(dataset=data.info.dataset)
    source, seed = data.source
    same = seed == train.seed  # the seed of a run divides its images too
    return source if same else DataConfig(dataset=f"{data.info.dataset} (divided with seed {seed})")


def _starts(model: Any) -> bool:
    """Whether a model has been trained before."""
    return isinstance(model, Start) or (isinstance(model, IsingViT) and model.vit.centred)


def _shape(model: IsingViT | ViTConfig | Start | str) -> ViTConfig:
    if isinstance(model, IsingViT):
        return model.vit.config
    if isinstance(model, Start):
        return model.vit
    if isinstance(model, ViTConfig):
        return model
    need(
        isinstance(model, str),
        f"`model` must be a preset's name, a ViTConfig, a Start or an IsingViT, not {model!r:.60}.",
    )
    return preset(model)


def _hint(unknown: Iterable[str], parts: dict[str, Any]) -> str:
    """What may have been meant by settings that there are not."""
    if shapes := [name for name in unknown if name in {each.name for each in dataclasses.fields(ViTConfig)}]:
        return f"the shape is that of `model`: pass a ViTConfig with {_named(shapes)}."
    names = [each.name for part in parts.values() for each in dataclasses.fields(part)]
    close = [found for name in unknown for found in difflib.get_close_matches(name, names, 1)]
    known = "settings are the fields of TrainConfig, IsingConfig and BaselineConfig."
    return f"did you mean {_named(close)}?" if close else known


def _named(settings: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in settings)


def _trained(trainer: Trainer, data: ImageData) -> TrainedRun:
    run = trainer.fit()
    training = {name: value for name, value in trainer.session.state().items() if name not in run.state()}
    return TrainedRun.of(run, training, data.val)
