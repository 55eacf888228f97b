"""Several networks trained side by side, of any one method.

Shapes: B batch, S samples, K members, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Method, Networks, Terms, method_class
from pyro_isingvit.methods.plain import check_baseline
from pyro_isingvit.methods.registry import row
from pyro_isingvit.nets.penalties import Penalties
from pyro_isingvit.nets.vit import ViT, Weights


class Ensemble(Method):
    """K members from different random starts, trained side by side on the same batches.

    Each is what the method ``members_of`` of the row trains: one network (Lakshminarayanan et al. 2017), or a posterior
    of its own. Prediction takes a network of each member in turn, so that S draws are shared out among all; with fewer
    draws than members, the last ones are left out. One temperature serves all.

    Attributes:
        networks: the members.
        max_draws: K, if each member is one network; None, if each can be drawn from without end.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        check_baseline(config.baseline)
        self.penalties = Penalties()  # each member has its own, with what they remember of its predictions
        kind = member_class(config.method)
        self.networks = [kind(config, info, num_data) for _ in range(config.baseline.members)]
        self.members = nn.ModuleList(self.networks)
        each = self.networks[0].max_draws
        self.max_draws = None if each is None else each * len(self.networks)
        self.image_noise = self.networks[0].image_noise
        self.make_temperature()

    # Training ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Terms:
        """The sums of the members' terms, so that each is trained as it would be alone."""
        parts = [member(x, y, rows) for member in self.members]
        return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}

    def logged(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms of the mean member."""
        return self.networks[0].logged({name: value / len(self.networks) for name, value in terms.items()})

    def check(self, settings: TrainConfig) -> None:
        """Refuses what a member refuses."""
        self.networks[0].check(settings)

    @classmethod
    def leaves_unused(cls, config: RunConfig) -> bool:
        """Whether a member does."""
        return member_class(config.method).leaves_unused(config)

    def take_part(self, part: int, parts: int) -> None:
        """Tells every member."""
        for member in self.networks:
            member.take_part(part, parts)

    def settle(self, rows: Tensor) -> None:
        """Tells every member."""
        for member in self.networks:
            member.settle(rows)

    def phases(self, settings: TrainConfig) -> list[tuple[str, int]]:
        """Those of a member."""
        return self.networks[0].phases(settings)

    def begin(self, phase: str) -> None:
        """Tells every member."""
        for member in self.networks:
            member.begin(phase)

    def few_updates(self, settings: TrainConfig, steps: int) -> int | None:
        """That of every member."""
        return self.networks[0].few_updates(settings, steps)

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Tells every member."""
        for member in self.networks:
            member.before_step(x, y, phase, step, progress)

    def validation_draws(self, settings: TrainConfig) -> int:
        """``val_samples`` of each member, where members are drawn from without end: as many as it would have alone."""
        return settings.val_samples * (len(self.networks) if self.max_draws is None else 1)

    @property
    def noise(self) -> float | None:
        """That of a member; all have the same."""
        return self.networks[0].noise

    def set_noise(self, level: float) -> None:
        """Tells every member."""
        for member in self.networks:
            member.set_noise(level)

    def parameter_groups(self, settings: TrainConfig) -> list[dict[str, Any]]:
        """All members' groups."""
        return [group for member in self.networks for group in member.parameter_groups(settings)]

    def trained_networks(self) -> Sequence[tuple[ViT, nn.ParameterDict]]:
        """Those of every member; started from one network, they differ by their heads and their noise."""
        return [network for member in self.networks for network in member.trained_networks()]

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Those of each member."""
        return {
            f"members.{k}.{name}": parameter
            for k, member in enumerate(self.networks)
            for name, parameter in member.averaged_parameters().items()
        }

    def clipped(self) -> list[nn.Module]:
        """What each member clips."""
        return [part for member in self.networks for part in member.clipped()]

    # What was trained -------------------------------------------------------------------------------------------

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """Draw i is one of member i modulo K."""
        size = len(self.networks)
        drawn = [self.networks[i % size].draw_networks(1, i // size) for i in range(first, first + count)]
        return lambda x: torch.cat([network(x) for network in drawn])

    def kept(self) -> Weights:
        """Those of every member, one after another along the layers: (K layers, out, in)."""
        parts = [member.kept() for member in self.networks]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    def deployed(self) -> Sequence[tuple[ViT, Weights]]:
        """All members' networks."""
        return [network for member in self.networks for network in member.deployed()]

    def num_parameters(self) -> int:
        """The sum over the members."""
        return sum(member.num_parameters() for member in self.networks)


def member_class(method: str) -> type[Method]:
    """The class of an ensemble's members.

    Args:
        method: name of the ensemble.
    """
    name = row(method).members_of
    assert name is not None, f"the row of {method} does not say what its members are"
    kind = method_class(name)
    assert kind.finish is Method.finish, f"{name} works after the last epoch, on images that only one member would get"
    return kind
