"""The generative model: selection masks, spike-and-slab weights, a Vision Transformer, class labels.

    xi_g        ~ Bernoulli(logits = prior_logit_g)                 docs/method.md, Model
    w_e | xi_g  ~ N(m0_e, tau_1^2) if xi_g = 1 (kept) else N(0, tau_0^2)
    y_n | x_n, W ~ Categorical(softmax f_W(x_n))

m0 is 0 in a fresh network, and the weight that training starts from in a trained one.

Labels that are probabilities y_nc (mixed images, label smoothing), perhaps times the weight of the image, enter as the
factor prod_c softmax(f_W(x_n))_c^y_nc. With logit adjustment (nets/likelihood.py) softmax(f) is softmax(f + log pi).

One mask site and one weight site per kind of matrix, stacked over depth; both lie outside the data plate.
"""

import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.presets import preset
from pyro_isingvit.core.settings import IsingConfig, ViTConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.ising.distributions import SpikeAndSlab
from pyro_isingvit.ising.layout import MaskLayout
from pyro_isingvit.ising.lean import is_large
from pyro_isingvit.nets.likelihood import Likelihood
from pyro_isingvit.nets.penalties import Penalties
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT, Weights

CERTAIN = 20.0  # a logit at which float32 sampling never flips a mask


def with_plate_axis(value: Tensor, event_dim: int) -> Tensor:
    """Gives draws (S, *event) the shape (S, 1, *event), which the data plate broadcasts against.

    ``Predictive(parallel=True)`` hands over guide draws without the data plate's axis; left alone they would be
    read as one weight per image whenever S equals the batch size.
    """
    return value.unsqueeze(1) if value.dim() == event_dim + 1 else value


def announce(module: nn.Module) -> None:
    """Tells Pyro's handlers of a module's trainable parameters, so that ``pyro.infer.SVI`` trains them.

    They stay where they are: nothing enters Pyro's param store, where a second model would meet them again.
    """
    if not am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shown: Any = parameter.view_as(parameter)
            shown.unconstrained = weakref.ref(parameter)  # what SVI hands to the optimiser
            full_name = param_with_module_name(type(module).__name__, name)
            effectful(lambda *_, shown=shown: shown, type="param")(name=full_name)


class IsingViT(nn.Module):
    """Vision transformer with spike-and-slab weights under an Ising prior; a Pyro model.

    Args:
        vit: shape of the network.
        info: what the images look like.
        ising: prior settings.
        centred: training starts from a trained network, around which the slab then lies (``IsingConfig.centre``).
        frozen: how many of the first blocks stay as they start.

    Attributes:
        num_data: N, the size of the training set, by which the data plate scales; set by ``IsingGuide`` and ``fit``.
        temperature: T of the predictions, fitted on the validation part after training
            (predictive/calibration.py).
        kappa_weights: the KL is weighted by 1/kappa_weights in the objective; set by ``IsingGuide`` and ``fit``.
        penalties: further loss terms (nets/penalties.py); none unless training asks for some.
        likelihood: of labels that are given (nets/likelihood.py); the softmax unless training asks for another.
        start: the trained network that ``from_pretrained`` was given, for these images.

    Raises:
        UserError: a shape that does not fit the images, or an unknown granularity.

    Examples:
        >>> from pyro.infer import Predictive
        >>> from pyro_isingvit import IsingGuide, IsingViT, ViTConfig, load_data
        >>> data = load_data("digits", train_size=100)
        >>> model = IsingViT.for_data(data, ViTConfig(patch_size=4, width=8, heads=2, depth=1))
        >>> model.num_masked_weights
        976
        >>> guide = IsingGuide(model, num_data=len(data.train))
        >>> x = data.info.normalise(data.test.images[:3])
        >>> draws = Predictive(model, guide=guide, num_samples=4)(x)
        >>> draws["y"].shape, draws["probs"].shape
        (torch.Size([4, 3]), torch.Size([4, 3, 10]))
    """

    @single_precision()
    def __init__(
        self,
        vit: ViTConfig,
        info: DataInfo,
        ising: IsingConfig | None = None,
        centred: bool = False,
        frozen: int = 0,
    ) -> None:
        super().__init__()
        self.info, self.ising = info, ising or IsingConfig()
        blocks = vit.depth if self.ising.bayesian_blocks is None else self.ising.bayesian_blocks
        need(0 <= blocks <= vit.depth, f"`bayesian_blocks` {blocks} of {vit.depth} blocks cannot be.")
        trunk = vit.depth - blocks
        need(
            frozen <= trunk,
            f"`frozen_blocks` {frozen}: masks and noise are in all but the first {trunk} of {vit.depth} blocks; set "
            f"`bayesian_blocks` to {vit.depth - frozen} or less.",
        )
        self.vit = ViT(vit, info.channels, info.height, info.width, info.num_classes, centred, trunk, frozen)
        self.layout = MaskLayout(self.vit, self.ising.granularity)
        self.start: Start | None = None
        if centred and is_large(self.ising, self.num_masked_weights):
            for name, value in [*self.vit.named_buffers()]:
                if name.startswith("centre_"):
                    self.vit.register_buffer(name, value.bfloat16())
        self.num_data: int | None = None
        self.kappa_weights = 1.0
        self.penalties, self.likelihood = Penalties(), Likelihood()
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))
        for name, site in self.layout.sites.items():
            self.register_buffer(f"prior_logit_{name}", torch.full(site.shape, CERTAIN))
        for kind, shape in self.vit.matrix_shapes.items():
            self.register_buffer(f"tau_1_{kind}", torch.full((shape[0], 1, 1), self.ising.tau_1))

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forgets what an earlier training has found of temperature, prior and slabs; the network stays."""
        self.temperature.fill_(1.0)
        for name in self.layout.sites:
            self.get_buffer(f"prior_logit_{name}").fill_(CERTAIN)
        for kind in self.vit.matrix_shapes:
            self.get_buffer(f"tau_1_{kind}").fill_(self.ising.tau_1)

    @classmethod
    def for_data(cls, data: ImageData, vit: ViTConfig | str = "small", ising: IsingConfig | None = None) -> "IsingViT":
        """The model for a data set.

        Args:
            data: its ``info`` says what the images look like.
            vit: a shape, or the name of a preset.
            ising: prior settings.

        Raises:
            UserError: an unknown preset, or a shape that does not fit the images.
        """
        return cls(preset(vit) if isinstance(vit, str) else vit, data.info, ising)

    @classmethod
    def from_pretrained(
        cls, start: Start, data: ImageData, ising: IsingConfig | None = None, frozen_blocks: int = 0
    ) -> "IsingViT":
        """A model around a trained network; its head is fresh, and ``IsingGuide`` starts from the network's weights.

        Its ``info`` normalises images as the network had them. ``fit`` trains such a model in place.

        Args:
            start: what ``load_start`` gives, or ``start_of`` for a network of timm or torchvision.
            data: the images to train on.
            ising: prior settings.
            frozen_blocks: how many of the first blocks stay as they start; ``ising.bayesian_blocks`` leaves them out.

        Raises:
            UserError: channels that do not fit, or blocks that are frozen and Bayesian.

        Examples:
            >>> from torchvision.models import VisionTransformer
            >>> from pyro_isingvit import IsingViT, fit, load_data, start_of
            >>> net = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
            >>> data = load_data("digits", train_size=100)
            >>> model = IsingViT.from_pretrained(start_of(net), data)
            >>> model.vit.config.width, model.info.channels, model.centred
            (16, 1, True)
            >>> run = fit(model, data, epochs=2, progress=False)
            >>> run.predict(data.test.images[:2], 3).mean.shape
            torch.Size([2, 10])
        """
        start = start.fitted(data.info.image_shape)
        info = data.info.scaled_as(start.scale)
        model = cls(start.vit, info, ising, centred=True, frozen=frozen_blocks)
        start.copy_to(model.vit)
        model.start = start
        return model

    @property
    def num_masked_weights(self) -> int:
        """P, the number of weights under a mask."""
        return sum(layers * rows * columns for layers, rows, columns in self.vit.matrix_shapes.values())

    def prior_logits(self, site: str) -> Tensor:
        """J c - logit(delta) of a mask site, as last set by the guide; CERTAIN in the pilot phase."""
        return self.get_buffer(f"prior_logit_{site}")

    def tau_1(self, kind: str) -> Tensor:
        """Slab standard deviations of a kind, (layers, 1, 1)."""
        return self.get_buffer(f"tau_1_{kind}")

    @property
    def centred(self) -> bool:
        """Whether the slabs lie around the weights that training started from."""
        return self.vit.centred and self.ising.centre == "start"

    def centre(self, kind: str) -> Tensor | None:
        """m0, the means of the slabs of a kind, (layers, out, in); None: 0."""
        return self.vit.centre(kind) if self.centred else None

    def initial_weights(self) -> Weights:
        """Where slab means start, kind -> (layers, out, in); of a large network, the centre is rounded."""
        weights = self.vit.initial_weights()
        for kind, value in self.start.weights.items() if self.start else ():
            if kind in weights:
                weights[kind] = value[-len(weights[kind]) :]
        return weights

    def sample_weights(self) -> Weights:
        """Samples every mask and weight site; returns kind -> ([S,] layers, out, in)."""
        masks, weights = {}, {}
        with poutine.scale(scale=1.0 / self.kappa_weights):
            for name, site in self.layout.sites.items():
                prior = dist.Bernoulli(logits=self.prior_logits(name), validate_args=False)
                masks[name] = with_plate_axis(
                    pyro.sample(f"xi_{name}", prior.to_event(len(site.shape))), len(site.shape)
                )
            for kind, shape in self.vit.matrix_shapes.items():
                mask = self.layout.expand(kind, masks)
                mask = mask.expand(*mask.shape[:-3], *shape)
                slab = SpikeAndSlab(mask, self.ising.tau_0, self.tau_1(kind), self.centre(kind)).to_event(3)
                weight = with_plate_axis(pyro.sample(f"w_{kind}", slab), 3)
                weights[kind] = weight.squeeze(1) if weight.dim() == 5 else weight
        return weights

    def forward(self, x: Tensor, y: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Runs the model.

        Args:
            x: (B, channels, height, width), normalised by ``info.normalise``.
            y: (B,) class numbers or (B, C) probabilities; None samples them (site ``y``) and records ``probs``.
            rows: (B,) numbers of the images within the training part, which some penalties read.

        Returns:
            logits (B, C), or (S, B, C) under a vectorised sample plate; divided by T where y is None, otherwise those
            of the likelihood of training, which knows no T.

        Raises:
            UserError: labels that are not one for each image.
        """
        announce(self)
        fits = y is None or (y.shape == (len(x),) or y.shape == (len(x), self.info.num_classes))
        need(
            fits,
            f"labels of shape {y if y is None else tuple(y.shape)} for {len(x)} images of "
            f"{self.info.num_classes} classes: give (B,) class numbers or (B, C) probabilities.",
        )
        weights = self.sample_weights()
        size = len(x) if y is None or self.num_data is None else self.num_data
        if y is None:
            logits = self.vit(weights, x).float() / self.temperature
        else:
            seen = self.penalties.look(lambda x, watch: self.vit(weights, x, watch), x, y, rows)
            logits = self.likelihood.adjusted(seen.logits)
            for name, term in self.penalties.terms(seen, -size).items():  # loss / N gets weight * penalty
                pyro.factor(name, with_plate_axis(term, 0))
        with pyro.plate("data", size, subsample=torch.arange(len(x), device=x.device)):
            if y is None:
                pyro.deterministic("probs", logits.softmax(-1), event_dim=1)
            if y is None or y.dim() == 1:
                pyro.sample("y", dist.Categorical(logits=logits, validate_args=False), obs=y)
            else:
                pyro.factor("y", (y * logits.log_softmax(-1)).sum(-1))
        return logits
