"""What is drawn for each step of training besides its images (nets/view.py).

Shapes: B batch, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import draw_share, probabilities
from pyro_isingvit.nets.manifold_mixup import ALPHA, LAST, HiddenMix
from pyro_isingvit.nets.nested_dropout import draw_kept
from pyro_isingvit.nets.tokens import TokenMasking
from pyro_isingvit.nets.view import View
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.run import Run
from pyro_isingvit.runs.teacher import Teacher


class Views:
    """Draws the views of a training; random numbers are torch's global ones, and none where nothing is to be drawn.

    Args:
        settings: of training.
        run: what is trained.
        teachers: of `distillation`.

    Raises:
        UserError: as ``TokenMasking`` and ``Teacher``; or there is no ``ViT`` whose hidden states could be changed.
    """

    def __init__(self, settings: TrainConfig, run: Run, teachers: Sequence[Run] = ()) -> None:
        self.settings, self.classes = settings, run.info.num_classes
        self.depth = run.config.vit.depth
        inside = {"`mix` manifold": settings.mix == "manifold", "`nested_dropout`": settings.nested_dropout > 0}
        has_vit = any(isinstance(module, ViT) for module in run.method.modules())
        for name, asked in inside.items():
            need(has_vit or not asked, f"{name} needs a method whose networks are ViTs.")
        self.teacher = Teacher(teachers, run)
        self.masking = TokenMasking(settings.token_masking, run.method)

    def draw(self, x: Tensor, step: int) -> View:
        """For the batch of a step: images (B, channels, height, width)."""
        view, share = View(self.masking.draw(len(x), x.device), self._mix()), self.settings.nested_dropout
        if share:
            view = replace(view, kept=draw_kept(share, len(x), self.depth, x.device))
        told = self.teacher(x, step)
        return view if told is None else replace(view, told=self.labels(told, view))

    def _mix(self) -> HiddenMix | None:
        if self.settings.mix != "manifold":
            return None
        alpha = ALPHA if self.settings.mix_alpha is None else self.settings.mix_alpha
        return HiddenMix(int(torch.randint(min(LAST, self.depth) + 1, ())), draw_share(alpha))

    def labels(self, y: Tensor, view: View) -> Tensor:
        """The labels of what a view shows: class numbers (B,) or probabilities (B, C), mixed as the states are."""
        return y if view.mix is None else view.mix.labels(probabilities(y, self.classes))
