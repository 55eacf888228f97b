"""A Laplace posterior of the last layer, by laplace-torch.

Shapes: B batch, S samples, C classes.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.base import Batches, Networks
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.nets.vit import Watch
from pyro_isingvit.predictive.calibration import CALIBRATION_SAMPLES, TINY, fit_temperature, temper, with_shares_of

PRECISIONS = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 9))  # of the prior: .01 to 10,000


class LastLayerLaplace(Plain):
    """Deterministic training, then a Laplace posterior of the last layer (Daxberger et al. 2021), by laplace-torch.

    Kronecker-factored curvature; the posterior is kept as a set of draws. The precision of the prior is that with the
    lowest NLL of the validation part, after the temperature that fits it: the marginal likelihood, taken where there is
    no such part, knows the training images alone, and makes a network that has learned them by heart far too unsure.
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

    def finish(self, batches: Batches, held_out: Batches) -> None:
        """Fits the posterior on the training images and keeps draws of it."""
        laplace = _import_laplace()
        features, labels = self._read(batches)
        head = nn.Linear(features.shape[1], self.loc["head"].shape[1], device=features.device)
        with torch.no_grad():
            head.weight.copy_(self.loc["head"][0])
            head.bias.copy_(self.likelihood.adjusted(self.vit.bias["head"][0]))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, labels), batch_size=512)
        posterior = laplace(head, "classification", subset_of_weights="all", hessian_structure="kron")
        posterior.fit(loader)
        precision = self._precision(posterior, held_out)
        if precision is not None:
            posterior.prior_precision = precision
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about a link function that sampling does not use
                posterior.optimize_prior_precision(method="marglik")
        self.heads.copy_(self._unshifted(posterior.sample(len(self.heads))))

    @torch.no_grad()
    def _read(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Features and labels of all images; no rows where there are none."""
        pairs = [(self._features(x).float(), y) for x, y in batches]
        if not pairs:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
        return features, labels

    @torch.no_grad()
    def _precision(self, posterior: Any, held_out: Batches) -> float | None:
        """The precision of ``PRECISIONS`` of lowest NLL on held-out images; None where there are none."""
        features, labels = self._read(held_out)
        if not len(labels):
            return None
        classes, costs = self.info.num_classes, dict[float, float]()
        prior = None if self.likelihood.shift is None else (1 / classes,) * classes
        for precision in PRECISIONS:
            posterior.prior_precision = precision
            noise = torch.Generator(features.device).manual_seed(0)  # the same for all
            heads = self._unshifted(posterior.sample(CALIBRATION_SAMPLES, noise))
            probs = self._logits(features, heads).softmax(-1).cpu()
            mean = temper(probs, fit_temperature(probs, labels, prior)).mean(0)
            mean = mean if prior is None else with_shares_of(labels.cpu(), mean, prior)
            costs[precision] = float(F.nll_loss(mean.clamp(min=TINY).log(), labels.cpu()))
        return min(costs, key=lambda precision: costs[precision])

    def _unshifted(self, heads: Tensor) -> Tensor:
        """Last layers (S, weights and biases) whose predictions are those without the shares of the classes."""
        shift = self.likelihood.shift
        return heads if shift is None else heads - F.pad(shift, (heads.shape[1] - len(shift), 0))

    def _logits(self, features: Tensor, heads: Tensor) -> Tensor:
        """Logits (S, B, C) of last layers (S, weights and biases)."""
        classes, width = self.loc["head"].shape[1:]
        weight, bias = heads[:, : classes * width].view(-1, classes, width), heads[:, classes * width :]
        return torch.einsum("bd,scd->sbc", features, weight) + bias.unsqueeze(1)

    def draw_networks(self, count: int, first: int = 0) -> Networks:
        """``count`` of the kept last layers, in a cycle, before there are some the trained one; all read the same."""
        if not self.heads.any():
            return super().draw_networks(count, first)
        chosen = self.heads[torch.arange(first, first + count, device=self.heads.device) % len(self.heads)]
        return lambda x: self._logits(self._features(x).float(), chosen)


def _import_laplace() -> Any:
    try:
        from laplace import Laplace
    except ImportError as error:
        raise UserError("method laplace needs laplace-torch: pip install 'pyro-isingvit[peers]'.") from error
    return Laplace
