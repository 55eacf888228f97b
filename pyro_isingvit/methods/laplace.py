"""A Laplace posterior of the last layer, by laplace-torch.

Shapes: B batch, S samples, C classes.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Networks
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.nets.vit import Watch


class LastLayerLaplace(Plain):
    """Deterministic training, then a Laplace posterior of the last layer (Daxberger et al. 2021), by laplace-torch.

    Kronecker-factored curvature, prior precision by marginal likelihood; the posterior is kept as a set of draws.
    """

    max_draws = 200

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        _import_laplace()
        _, classes, width = self.vit.matrix_shapes["head"]
        self.heads: Tensor
        self.register_buffer("heads", torch.zeros(self.max_draws, classes * width + classes))

    weighs_images = False

    def check(self, settings: TrainConfig) -> None:
        """Refuses ways to balance classes that the curvature of the training images would not know of."""
        super().check(settings)
        need(
            settings.balance in ("none", "logit"),
            f"method laplace measures its posterior on the training images as they are, unlike `balance` "
            f"{settings.balance}; set `balance` to logit.",
        )

    def _features(self, x: Tensor) -> Tensor:
        """What the last layer reads, (B, width)."""
        watch: Watch = {"features": []}
        self.vit(dict(self.loc.items()), x, watch)
        return watch["features"][0]

    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fits the posterior on the training images and keeps draws of it."""
        laplace = _import_laplace()
        with torch.no_grad():
            pairs = [(self._features(x).float(), y) for x, y in batches]
        features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        head = nn.Linear(features.shape[1], self.loc["head"].shape[1], device=features.device)
        with torch.no_grad():
            head.weight.copy_(self.loc["head"][0])
            head.bias.copy_(self.likelihood.adjusted(self.vit.bias["head"][0]))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=512)
        posterior = laplace(head, "classification", subset_of_weights="all", hessian_structure="kron")
        posterior.fit(loader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a link function that sampling does not use
            posterior.optimize_prior_precision(method="marglik")
        self.heads.copy_(posterior.sample(len(self.heads)))
        if self.likelihood.shift is not None:  # predictions are those without the shares of the classes
            self.heads[:, -len(self.likelihood.shift) :] -= self.likelihood.shift

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """``count`` of the kept last layers, in a cycle, before there are some the trained one; all read the same."""
        if not self.heads.any():
            return super().draw_networks(count, first)
        chosen = self.heads[torch.arange(first, first + count, device=self.heads.device) % len(self.heads)]
        classes, width = self.loc["head"].shape[1:]
        weight, bias = chosen[:, : classes * width].view(-1, classes, width), chosen[:, classes * width :]
        return lambda x: torch.einsum("bd,scd->sbc", self._features(x).float(), weight) + bias.unsqueeze(1)


def _import_laplace() -> Any:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise UserError("method laplace needs laplace-torch: pip install 'pyro-isingvit[peers]'.") from error
    return Laplace
