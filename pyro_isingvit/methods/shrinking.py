"""Methods that shrink the weights that matter least while they train, then cut the smallest and fine-tune the rest."""

import math

import torch
from torch import Tensor

from pyro_isingvit.core.settings import RunConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.sparse import Magnitude
from pyro_isingvit.nets.reparametrise import trained
from pyro_isingvit.nets.vit import Weights


def hypersparse(weights: Weights, share: float) -> Tensor:
    """Sum abs(w) * sum t / stopgrad(sum t) - sum abs(w),   t = tanh(s abs(w)),   s = 0.6585 / abs(w) at a quantile.

    HyperSparse (Glandorf, Kaiser & Rosenhahn 2023, arXiv 2308.07163). The value is 0; the gradient,

        sum abs(w) / sum t * s / cosh(s abs(w))^2 * sign(w),

    falls off around the quantile: weights below it are pulled to 0, those well above are left alone. 0.6585 is where
    the third derivative of tanh is 0. The gradients of the two sums of abs(w) cancel; neither is formed.

    Args:
        weights: the matrices, of any shape.
        share: of the weights that are below the quantile, in [0, 1).

    Returns:
        a scalar.
    """
    sizes = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    with torch.no_grad():
        s = 0.6585 / sizes.kthvalue(math.floor(share * len(sizes)) + 1).values.clamp(min=1e-12)
    t = (s * sizes).tanh().sum()
    return sizes.detach().sum() * (t / t.detach() - 1)


class HyperSparse(Magnitude):
    """Adaptive regularized training: a plain warm-up, then the loss ``hypersparse``, then the cut and fine-tuning.

        loss = cross entropy + weight_e hypersparse(W, sparsity),   weight_e = weight_0 growth^e

    e counts epochs from the end of the warm-up, the first ``WARMUP`` of the epochs before the cut. The source goes on
    until the cut network is as accurate on the training images as the whole one; here the number of epochs is given, so
    that all methods train equally long.
    """

    WARMUP = 0.4

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        self.weight = 0.0

    def weight_at(self, progress: float) -> float:
        """weight_e, when ``progress`` of the epochs before the cut is over; 0 in the warm-up."""
        epochs = self.config.train.epochs
        e = math.floor(progress * epochs + 1e-6) - round(self.WARMUP * epochs)
        return self.settings.hypersparse_weight * self.settings.hypersparse_growth**e if e >= 0 else 0.0

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """Sets the weight of the loss."""
        self.weight = self.weight_at(progress) if phase == "train" else 0.0

    def penalty(self) -> Tensor:
        """The loss on top, nats over all images; its value is 0."""
        if not self.weight:
            return torch.zeros((), device=self.temperature.device)
        return self.num_data * self.weight * hypersparse(self.moving(self.weights()), self.settings.sparsity)


class Lobster(Magnitude):
    """Decay of the weights to which the loss is insensitive, then a cut and fine-tuning.

        w <- w - (step of the optimiser) - weight * w max(0, 1 - abs(dL/dw))

    LOBSTER (Tartaglione et al. 2022, arXiv 2011.09905). At dL/dw = 0 it is a decay of the weights by ``lobster_weight``
    a step. The source takes the step of SGD, and finds the threshold of the cut by the validation loss, again and
    again; here the step is AdamW's, without decay unless it is asked for, and the threshold is the size below which
    the wanted share of the weights lies, once. The decay is towards 0 also where training starts from a trained
    network.
    """

    def __init__(self, config: RunConfig, info: DataInfo, num_data: int) -> None:
        super().__init__(config, info, num_data)
        self.shrinks = True

    def before_step(self, x: Tensor, y: Tensor, phase: str, step: int, progress: float) -> None:
        """What is left after the cut is fine-tuned without it."""
        self.shrinks = phase == "train"

    @torch.no_grad()
    def settle(self, rows: Tensor) -> None:
        """Takes the decay, with the gradients of the whole step, before the optimiser takes its own step."""
        super().settle(rows)
        for kind, weight in trained(self.loc).items() if self.shrinks else ():
            if weight.grad is not None:
                layers = slice(self.vit.frozen_layers(kind), None)
                insensitive = (1 - weight.grad[layers].abs()).clamp(min=0.0)
                weight[layers] -= self.settings.lobster_weight * weight[layers] * insensitive
