"""What the benchmark times: a training step, a mask update and posterior draws, ours and those of a plain ViT.

Both steps are loss, backward pass, clipping of the gradient norm, and the optimiser and schedule of training. Training
also looks at the loss and its terms every tenth step.
Shapes: S samples, B batch, C classes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.peer_network import decayed
from pyro_isingvit.core.settings import IsingConfig, RunConfig, ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.batches import count_steps
from pyro_isingvit.data.images import network_chunk
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.nets.shape import widest_activation
from pyro_isingvit.runs.averaging import Averaging
from pyro_isingvit.runs.optimiser import make_optimizer, make_schedule, with_decay
from pyro_isingvit.runs.predict import CHUNK, draw_predictive
from pyro_isingvit.runs.run import Run, build_run
from pyro_isingvit.runs.steps import total

Case = Callable[[], object]
LR = 1e-4  # low: thousands of steps on one batch of noise must stay finite


@dataclass(frozen=True)
class Shape:
    """What a case is built for.

    Attributes:
        vit: the network.
        batch: B, images of a step.
        side: of the images, pixels; channels: of the images.
        classes: C.
        num_data: N, which sets the tempering.
        device: cpu or cuda.
        compiled: the forward and backward pass by torch.compile.
        bf16: forward passes in bfloat16 by autocast.
    """

    vit: ViTConfig
    batch: int = 64
    side: int = 28
    channels: int = 1
    classes: int = 10
    num_data: int = 6000
    device: str = "cpu"
    compiled: bool = False
    bf16: bool = False

    @property
    def info(self) -> DataInfo:
        """Images of that shape."""
        names = tuple(map(str, range(self.classes)))
        grey = (0.5,) * self.channels
        return DataInfo("synthetic", names, self.channels, self.side, self.side, grey, grey)

    def images(self, count: int) -> Tensor:
        """(count, channels, side, side) uint8, at random."""
        shape = (count, self.channels, self.side, self.side)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 if the case asks for it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


def plain_network(shape: Shape) -> PlainViT:
    """The ViT of ordinary layers."""
    return PlainViT.fresh(shape.vit, shape.channels, shape.side, shape.side, shape.classes).to(shape.device)


def ising_run(shape: Shape, ising: IsingConfig | None = None) -> Run:
    """A fresh run of the library in the Ising phase."""
    config = RunConfig(vit=shape.vit, ising=ising or IsingConfig())
    run = build_run(config, shape.info, shape.num_data).to(shape.device)
    run.guide.start_masks()
    return run


def _batch(shape: Shape) -> tuple[Tensor, Tensor]:
    labels = torch.arange(shape.batch, device=shape.device) % shape.classes
    return shape.info.normalise(shape.images(shape.batch)), labels


def _stepper(
    shape: Shape, network: nn.Module, groups: list, settings: TrainConfig, loss: Callable[[], Tensor],
    after: Case = lambda: None,
) -> Case:  # fmt: skip
    optimizer = make_optimizer(groups, settings)
    schedule = make_schedule(optimizer, settings, count_steps(shape.num_data, shape.batch))

    def step() -> None:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        after()

    return step


def plain_step(shape: Shape) -> Case:
    """A step of the plain ViT: cross entropy and AdamW as in the deterministic method, without averaging."""
    network, (x, y) = plain_network(shape), _batch(shape)
    settings = with_decay(replace(METHODS["deterministic"].train, lr=LR), count_steps(shape.num_data, shape.batch))
    forward = torch.compile(network) if shape.compiled else network

    def loss() -> Tensor:
        with shape.autocast():
            return F.cross_entropy(forward(x).float(), y)

    return _stepper(shape, network, decayed(network, settings), settings, loss)


@dataclass(frozen=True)
class IsingStep:
    """A training step of this library.

    Attributes:
        step: without mask update.
        update: curvature estimate and mask sweep.
        amortised: a step; every ``update_every`` steps an update comes first, as in training.
        run: what is trained.
    """

    step: Case
    update: Case
    amortised: Case
    run: Run


def ising_step(shape: Shape, ising: IsingConfig | None = None, settings: TrainConfig | None = None) -> IsingStep:
    """A step of SVI, with the fused ELBO unless the settings say otherwise."""
    settings = replace(settings or METHODS["ising"].train, compile=shape.compiled, lr=LR)
    run = ising_run(shape, ising)
    config = replace(run.config, train=settings)
    method = IsingMethod(config, shape.info, shape.num_data, run.model, run.guide).to(shape.device)
    x, y = _batch(shape)

    def loss() -> Tensor:
        with shape.autocast():
            return total(method(x, y))

    averaging = Averaging(method.averaged_parameters(), settings.average)
    step = _stepper(shape, method, method.parameter_groups(settings), settings, loss, averaging.follow)

    def update() -> None:
        run.guide.observe(run.model, x, y)
        run.guide.update(run.model, 0.6)

    number = itertools.count()

    def amortised() -> None:
        if next(number) % run.guide.config.update_every == 0:
            update()
        step()

    update()
    return IsingStep(step, update, amortised, run)


def plain_draws(shape: Shape, draws: int, images: int) -> Case:
    """S forward passes of a plain ViT over the same images, normalised beforehand, as many at a time as ours."""
    network, x = plain_network(shape).eval(), shape.info.normalise(shape.images(images))
    forward = torch.compile(network) if shape.compiled else network
    most = widest_activation(shape.vit, *x.shape[-2:])
    pieces = x.split(network_chunk(CHUNK, x.device, most))

    @torch.inference_mode()
    def passes() -> None:
        for _ in range(draws):
            for piece in pieces:
                with shape.autocast():
                    forward(piece).float()

    return passes


def ising_draws(shape: Shape, draws: int, images: int, chunk: int = CHUNK) -> Case:
    """S posterior predictive draws from uint8 images to probabilities on the CPU."""
    run, pixels = ising_run(shape), shape.images(images)

    def predict() -> None:
        with shape.autocast():  # the library itself predicts in single precision
            draw_predictive(run, pixels, draws, chunk)

    return predict


def times(function: Case, number: int) -> Case:
    """``number`` calls as one."""

    def repeated() -> None:
        for _ in range(number):
            function()

    return repeated
