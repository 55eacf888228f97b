"""Each peer, trained and used for prediction as its own documentation says (docs/peers.md).

A method is a function and a line in METHODS. Each function imports its own peer, so no other code needs it.

Shapes: S samples, B batch, C classes.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.peer_network import Clock, Job, decayed, train
from pyro_isingvit.methods.registry import METHODS as OWN
from pyro_isingvit.methods.registry import WITHOUT
from pyro_isingvit.runs.predict import draw_predictive
from pyro_isingvit.runs.trainer import Trainer

Predict = Callable[[Tensor], Tensor]  # images (B, ...) uint8 -> class probabilities (S, B, C)


def own(job: Job, clock: Clock, method: str) -> Predict:
    """A method of this library, with its own defaults, but the peers' one rate and loss and the last step's weights."""
    asked = job.config.train
    settings = replace(
        OWN[method].train, epochs=asked.epochs, batch_size=asked.batch_size, lr=asked.lr, seed=asked.seed,
        samples=asked.samples, device=asked.device, average=asked.average,
        rate_rule=asked.rate_rule, **WITHOUT,
    )  # fmt: skip
    config = replace(job.config, method=method, ising=OWN[method].ising, train=settings)
    # The peers have no validation, so the epochs' times leave it out.
    run = Trainer(config, job.data, None, False, on_epoch=lambda at: clock.note(at.epoch_seconds[-1])).fit()
    return lambda images: draw_predictive(run, images, asked.samples, seed=asked.seed).probs


@contextmanager
def deep_getattr() -> Iterator[None]:
    """Puts back the function that TyXe 0.0.2 calls and Pyro 1.9 no longer has."""
    from pyro import util

    missing = not hasattr(util, "deep_getattr")
    if missing:
        setattr(util, "deep_getattr", lambda obj, name: operator.attrgetter(name)(obj))  # noqa: B010
    try:
        yield
    finally:
        if missing:
            delattr(util, "deep_getattr")


def tyxe(job: Job, clock: Clock, local: bool = True) -> Predict:
    """TyXe: mean-field Gaussians over the linear layers; ``local``: by local reparameterisation in training.

    Prior, initial means and the guide's scales are those of its examples/resnet.py. It is trained through Pyro's
    differentiable loss instead of ``bnn.fit``, which keeps an optimiser for each tensor and clips each one alone.
    """
    with deep_getattr():
        import pyro
        import tyxe as library
        from pyro import distributions as dist
        from pyro.infer import TraceMeanField_ELBO

        network, n = job.network(), len(job.data.train)
        prior = library.priors.IIDPrior(
            dist.Normal(torch.zeros(1, device=job.device), torch.ones(1, device=job.device)),
            expose_all=False, hide_module_types=(nn.LayerNorm,), hide=[".position"],
        )  # fmt: skip
        guide = partial(
            library.guides.AutoNormal, init_scale=1e-4,
            init_loc_fn=library.guides.PretrainedInitializer.from_net(network, prefix="net"),
        )  # fmt: skip
        bnn = library.VariationalBNN(network, prior, library.likelihoods.Categorical(dataset_size=n), guide)
        first = job.data.info.normalise(job.data.train.images[:2])
        bnn.net_guide(first)  # the first call creates its parameters
        elbo = TraceMeanField_ELBO()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return elbo.differentiable_loss(bnn.model, bnn.guide, x, y) / n

        with library.poutine.local_reparameterization() if local else nullcontext():
            train(job, bnn, [{"params": list(bnn.parameters()), "weight_decay": 0.0}], loss, clock)

    def predict(images: Tensor) -> Tensor:
        with deep_getattr(), torch.no_grad():
            # The same S networks for all chunks.
            traces = [pyro.poutine.trace(bnn.net_guide).get_trace(first) for _ in range(job.config.train.samples)]
            return job.in_chunks(
                images, lambda x: bnn.predict(x, guide_traces=traces, aggregate=False).softmax(-1)
            )  # fmt: skip

    return predict


def bayesian_torch(job: Job, clock: Clock) -> Predict:
    """bayesian-torch: every linear layer becomes a flipout layer; prior, scales and loss of its README."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    network = job.network()
    means = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    dnn_to_bnn(network, {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0, "type": "Flipout",
        "moped_enable": False, "moped_delta": 0.5,
    })  # fmt: skip
    layers: dict[str, Any] = {name: layer for name, layer in network.named_modules() if hasattr(layer, "mu_weight")}
    with torch.no_grad():  # the same initial weights for all, instead of N(0, 0.1)
        for name, layer in layers.items():
            layer.mu_weight.copy_(means[f"{name}.weight"])
            layer.mu_bias.copy_(means[f"{name}.bias"])
    network.to(job.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y) + get_kl_loss(network) / job.config.train.batch_size

    train(job, network, [{"params": list(network.parameters()), "weight_decay": 0.0}], loss, clock)

    def draws(x: Tensor) -> Tensor:
        return torch.stack([network(x).softmax(-1) for _ in range(job.config.train.samples)])

    return lambda images: job.in_chunks(images, draws)


def laplace(job: Job, clock: Clock) -> Predict:
    """laplace-torch: ordinary training, then its default, a Kronecker-factored posterior of the last layer."""
    from laplace import Laplace

    network = job.network()
    _train_plainly(job, network, network, clock)
    data = torch.utils.data.TensorDataset(job.data.info.normalise(job.data.train.images[:]), job.data.train.labels)
    loader = torch.utils.data.DataLoader(data, batch_size=job.config.train.batch_size)
    posterior: Any = Laplace(network, "classification", subset_of_weights="last_layer", hessian_structure="kron")
    posterior.fit(loader)
    posterior.optimize_prior_precision(method="marglik")

    def draws(x: Tensor) -> Tensor:
        return posterior.predictive_samples(x, pred_type="glm", n_samples=job.config.train.samples).detach()

    return lambda images: job.in_chunks(images, draws)


DROP_RATE = 0.1  # nn.TransformerEncoderLayer's; the library's tutorial has 0.4, for a LeNet


def torch_uncertainty(job: Job, clock: Clock) -> Predict:
    """torch-uncertainty: training with dropout modules, which its wrapper keeps on at prediction."""
    from torch_uncertainty.methods import mc_dropout

    network = job.network(DROP_RATE)
    wrapped = mc_dropout(network, num_estimators=job.config.train.samples, on_batch=False)
    _train_plainly(job, network, wrapped, clock)

    def draws(x: Tensor) -> Tensor:
        return wrapped(x).unflatten(0, (job.config.train.samples, len(x))).softmax(-1)

    return lambda images: job.in_chunks(images, draws)


def _train_plainly(job: Job, network: Any, module: nn.Module, clock: Clock) -> None:
    """Cross entropy, with the weight decay of our own deterministic method."""
    groups = decayed(network, job.train)
    train(job, module, groups, lambda x, y: F.cross_entropy(module(x), y), clock)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        what: description in a few words.
        fit: trains on a job and returns what predicts.
        module: name under which the peer is imported; None for our own methods.
        package: its name for pip.
        calibrated: the method itself fits a temperature on the validation part.
    """

    what: str
    fit: Callable[[Job, Clock], Predict]
    module: str | None = None
    package: str = "pyro-isingvit"
    calibrated: bool = False


METHODS = {
    "ising": Method("likelihood-guided masks", partial(own, method="ising"), calibrated=True),
    "deterministic": Method("one network", partial(own, method="deterministic")),
    "tyxe": Method("mean-field VI, local reparameterisation", tyxe, "tyxe", "tyxe"),
    "tyxe-plain": Method("mean-field VI, weights drawn", partial(tyxe, local=False), "tyxe", "tyxe"),
    "bayesian-torch": Method("mean-field VI, flipout", bayesian_torch, "bayesian_torch", "bayesian-torch"),
    "laplace": Method("last-layer Laplace", laplace, "laplace", "laplace-torch"),
    "torch-uncertainty": Method("MC dropout", torch_uncertainty, "torch_uncertainty", "torch-uncertainty"),
}
PEERS = [name for name, method in METHODS.items() if method.module is not None]
