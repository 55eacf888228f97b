"""Several networks trained side by side.

Shapes: B batch, S samples, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.settings import RunConfig, TrainConfig
from pyro_isingvit.data.split import DataInfo
from pyro_isingvit.methods.base import Objective
from pyro_isingvit.methods.plain import Baseline, Networks, check_baseline
from pyro_isingvit.nets.vit import Weights


class Ensemble(Objective):
    """K networks from different random starts (Lakshminarayanan et al. 2017), trained side by side on the same batches.

    Attributes:
        max_draws: K.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__()
        self.info, self.max_draws = info, config.baseline.members
        check_baseline(config.baseline)
        self.networks = [Baseline(config, info, num_data) for _ in range(self.max_draws)]
        self.members = nn.ModuleList(self.networks)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the members' losses, so that each is trained as it would be alone."""
        return torch.stack([member(x, y) for member in self.members]).sum()

    def terms(self, loss: float) -> dict[str, float]:
        """Nll of the mean member."""
        return {"nll": loss / len(self.members)}

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """All members' groups."""
        return [group for member in self.networks for group in member.parameter_groups(settings)]

    def clipped(self) -> list[nn.Module]:
        """Each member alone."""
        return list(self.members)

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """The members, in order, over and over."""
        chosen = [self.networks[i % len(self.networks)] for i in range(first, first + count)]
        return lambda x: torch.cat([member.draw_networks(1)(x) for member in chosen])

    def kept(self) -> Weights:
        """Nothing is selected: 1, of all members."""
        parts = [member.kept() for member in self.networks]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
