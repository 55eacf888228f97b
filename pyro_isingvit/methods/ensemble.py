"""Several networks trained side by side.

Shapes: B batch, S samples, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.settings import RunConfig, TrainConfig
from pyro_isingvit.data.split import DataInfo
from pyro_isingvit.methods.base import Method, Networks, Terms
from pyro_isingvit.methods.plain import Plain, check_baseline
from pyro_isingvit.nets.vit import Weights


class Ensemble(Method):
    """K networks from different random starts (Lakshminarayanan et al. 2017), trained side by side on the same batches.

    Attributes:
        max_draws: K.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        check_baseline(config.baseline)
        self.max_draws = config.baseline.members
        self.networks = [Plain(config, info, num_data) for _ in range(self.max_draws)]
        self.members = nn.ModuleList(self.networks)
        self.make_temperature()

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        """The sums of the members' terms, so that each is trained as it would be alone."""
        parts = [member(x, y, rows) for member in self.members]
        return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}

    def logged(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms of the mean member."""
        return {name: value / len(self.members) for name, value in terms.items()}

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """All members' groups."""
        return [group for member in self.networks for group in member.parameter_groups(settings)]

    def clipped(self) -> list[nn.Module]:
        """Each member alone."""
        return list(self.members)

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """The members, in a cycle."""
        chosen = [self.networks[i % len(self.networks)] for i in range(first, first + count)]
        return lambda x: torch.cat([member.draw_networks(1)(x) for member in chosen])

    def kept(self) -> Weights:
        """1 for every weight of every member: nothing is selected."""
        parts = [member.kept() for member in self.networks]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
