"""Averaged weights: what a training predicts with, while the raw weights train on.

    avg_t = avg_{t-1} + (gamma + 1) / (t + gamma) (w_t - avg_{t-1}),   gamma = 2 / share - 2,   t = 1, 2, ...

This is polynomial-decay averaging (Shamir & Zhang 2013), the power-function average of Karras et al. (2024). The
weights that enter are on average share (t - 1) / 2 steps old, as in a uniform window over the last ``share`` of the
steps so far. It therefore needs no number of steps in advance, and forgets the start by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Averaging:
    """The average of a training's parameters, and which of the two the network holds.

    Between epochs the network holds the average: for validation, for the checkpoint, for what follows the last epoch.
    During the steps it holds the raw weights.

    Args:
        parameters: what is averaged, by name.
        share: of the steps so far that the average is about; 0: nothing is averaged, and nothing here does anything.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], share: float) -> None:
        self.parameters = parameters if share > 0 else {}
        self.gamma = 2 / share - 2 if share > 0 else 0.0
        self._followed = nn.ParameterList(self.parameters.values())
        self._average = AveragedModel(self._followed, multi_avg_fn=self._move)
        self._raw: list[Tensor] = []  # set aside while the network holds the average

    @property
    def steps(self) -> int:
        """t, optimiser steps that the average has seen."""
        return int(self._average.n_averaged)  # on the CPU: nothing waits for the device

    def _move(self, average: Any, current: Any, _: Tensor | int) -> None:
        torch._foreach_lerp_(average, current, (self.gamma + 1) / (self.steps + 1 + self.gamma))

    def follow(self) -> None:
        """Takes the weights after a step into the average."""
        if self.parameters:
            self._average.update_parameters(self._followed)

    def restart(self) -> None:
        """Forgets all steps so far; the network holds the raw weights."""
        self._average.n_averaged.zero_()

    @torch.no_grad()
    def show(self) -> None:
        """Puts the average into the network and sets the raw weights aside."""
        if self.parameters and self.steps and not self._raw:
            self._raw = [parameter.detach().clone() for parameter in self.parameters.values()]
            self._fill(self._average.parameters())

    @torch.no_grad()
    def hide(self) -> None:
        """Puts the raw weights back, so that training goes on from them."""
        if self._raw:
            self._fill(self._raw)
            self._raw = []

    def _fill(self, values: Any) -> None:
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        """For a checkpoint whose network holds the average: what training goes on from, as ``raw``."""
        if not self.parameters:
            return {}
        raw = {name: value.detach() for name, value in self.parameters.items()}
        if self._raw:
            raw = dict(zip(self.parameters, self._raw, strict=True))
        return {"raw": {"weights": raw, "steps": self.steps}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` gave; the network holds the average of the same checkpoint already.

        Raises:
            KeyError, ValueError: it does not fit.
        """
        if not self.parameters:
            return
        raw = []
        for name, parameter in self.parameters.items():
            value = state["raw"]["weights"][name]
            if value.shape != parameter.shape:
                raise ValueError(f"raw.{name} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            raw.append(value.to(parameter.device, copy=True))
        self._raw = raw
        self._average.n_averaged.fill_(int(state["raw"]["steps"]))
        for average, parameter in zip(self._average.parameters(), self.parameters.values(), strict=True):
            average.copy_(parameter)
