"""Trained runs as teachers: the mean prediction of a batch that another network is trained towards.

    t(x) = mean over teachers of E_{W ~ q} softmax(f_W(x) / T)

Each step draws a few networks anew from every teacher. Their mean is an unbiased estimate of t.

Shapes: B batch, C classes.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.processes import own_rows
from pyro_isingvit.core.random_state import undisturbed
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.runs.run import Run

IN_MEMORY = "a run in memory"  # stands in the settings for a teacher without a folder


def teacher_name(run: Run) -> str:
    """What the settings call a teacher: its folder."""
    return str(run.folder) if run.folder is not None else IN_MEMORY


def check_teachers(
    teachers: Sequence[Run],
    classes: tuple[str, ...],
    image_shape: tuple[int, int, int],
    scale: Scale,
    balanced: bool | None = None,
) -> None:
    """Refuses teachers that know other classes or images than the network that they should teach.

    Args:
        teachers: the runs.
        classes: of that network.
        image_shape: of its images, (channels, height, width).
        scale: of their pixels; mean and standard deviation may be others than the teacher's.
        balanced: whether the network predicts under equal classes (``Run.balanced``); None: as the first teacher.

    Raises:
        UserError: no teacher, or one that does not fit.
    """
    need(teachers, "`teachers` names no run.")
    balanced = teachers[0].balanced if balanced is None else balanced
    for run in teachers:
        info, own, name = run.info, run.info.scale, f"the teacher {run.folder or run.config.method}"
        need(info.classes == classes, f"{name} has other classes than the network that it should teach.")
        need(
            info.image_shape == image_shape and own.kind == scale.kind,
            f"{name} reads images {info.image_shape} {own.kind}, the network that it should teach {image_shape} "
            f"{scale.kind}.",
        )
        need(
            (own.low, own.high) == (scale.low, scale.high),
            f"{name} scales pixels otherwise (`intensity`) than the network that it should teach.",
        )
        need(
            run.balanced == balanced,
            f"{name} predicts under {'equal shares' if run.balanced else 'the shares'} of the classes, the network "
            "that it should teach, or another teacher, does not: give both a `balance`, or neither.",
        )


@torch.no_grad()
def mean_prediction(run: Run, x: Tensor, info: DataInfo, draws: int, step: int) -> Tensor:
    """Mean probabilities (B, C) of networks drawn from a teacher; a method with a limited number gives all in turn.

    Args:
        run: the teacher.
        x: (B, channels, height, width), normalised by ``info``.
        info: of the images.
        draws: networks, at most.
        step: number of the step.
    """
    scale, own = info.scale, run.info.scale
    if (scale.mean, scale.std) != (own.mean, own.std):
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (scale.mean, scale.std))
        x = own.standardised(x * std + mean)
    parts = [(draws, step * draws)]  # how many, from which on
    if (most := run.max_draws) is not None:
        draws = min(draws, most)
        first = step * draws % most
        parts = [(min(draws, most - first), first), (max(0, first + draws - most), 0)]  # in a cycle
    logits = [run.draw_networks(count, first)(x.to(run.device)) for count, first in parts if count]
    return (torch.cat(logits) / run.temperature).softmax(-1).mean(0).to(x.device)


class Teacher:
    """What trained runs say of the batches of a training.

    Its random numbers are its own, a function of seed and step: the training draws what it draws without a teacher, and
    a resumed training is taught the same. Each process asks for its share of the batch.

    Args:
        runs: the teachers, moved to the device of ``run``; none: nothing is taught.
        run: what is trained, whose settings say how.

    Raises:
        UserError: a teacher of other classes, images, or way of balancing classes; the network that is trained teaches
            itself; `distillation` without a teacher, or a teacher without it.
    """

    def __init__(self, runs: Sequence[Run], run: Run) -> None:
        self.runs, self.info, self.settings = list(runs), run.info, run.config.train
        asked = bool(self.settings.distillation)
        need(self.runs or not asked, "`distillation` needs a trained run to learn from: name one as `teacher`.")
        need(
            asked or not self.runs,
            "`teacher` is for the regulariser distillation: set `distillation` to its weight, such as 1.",
        )
        if not asked:
            return
        check_teachers(self.runs, self.info.classes, self.info.image_shape, self.info.scale, run.balanced)
        own = {id(parameter) for parameter in run.method.parameters()}
        for each in self.runs:
            name = f"the teacher {each.folder or each.config.method}"
            need(own.isdisjoint(map(id, each.method.parameters())), f"{name} is the network that is trained.")
            each.to(run.device)
            each.method.eval()

    def digest(self) -> str:
        """Of the teachers' weights and temperatures; "" without a teacher."""
        if not self.runs:
            return ""
        found = blake2b(digest_size=16)
        for run in self.runs:
            for tensor in (*run.method.parameters(), *run.method.buffers(), run.temperature):
                found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def __call__(self, x: Tensor, step: int) -> Tensor | None:
        """t (B, C) of a batch x (B, channels, height, width), normalised; 0 where another process needs it alone."""
        if not self.runs:
            return None
        mine, draws = own_rows(len(x)), self.settings.teacher_draws
        told = x.new_zeros(len(x), self.info.num_classes)
        with undisturbed(self.settings.seed * 1_000_003 + step, x.device):
            said = [mean_prediction(run, x[mine], self.info, draws, step) for run in self.runs]
        told[mine] = torch.stack(said).mean(0)
        return told
