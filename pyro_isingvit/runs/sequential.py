"""Draws of some images at a time, each image as many as it needs, and the same networks for all.

Shapes: n draws, B images, C classes.
"""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.random_state import seed_devices, undisturbed
from pyro_isingvit.methods.base import Networks
from pyro_isingvit.nets.trunk import keep_images, one_trunk, with_trunk
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.predictive.stopping import Stopping, monte_carlo_error
from pyro_isingvit.runs.predict import CHUNK, TRUNK_CHUNK, SameDraws, images_at_once
from pyro_isingvit.runs.run import Run


@dataclass(frozen=True)
class Drawn:
    """Images with the same number of draws.

    Attributes:
        rows: (b,) their numbers among the images.
        draws: (n, b, C).
        mc_error: (b,) Monte Carlo error of their class probabilities (predictive/stopping.py).
    """

    rows: Tensor
    draws: PredictiveDraws
    mc_error: Tensor


class SequentialDraws:
    """Predictions for one part of many images after another, with the networks that ``draw_predictive`` draws.

    Draw s is the same network for every part. Methods whose noise is drawn for every image (dropout) have
    noise of their own in every part, which depends on ``seed`` and on the part's number alone.

    Args:
        run: a trained run.
        samples: S draws of every image, or when to stop; at most as many as the method has networks.
        seed: of the draws.
        chunk: at most this many images pass through the network at a time, and at most 256 on a CPU,
            fewer where the network is wide.

    Raises:
        UserError: S or chunk below 1.
    """

    def __init__(self, run: Run, samples: int | Stopping, seed: int = 0, chunk: int = CHUNK) -> None:
        most = samples.most if isinstance(samples, Stopping) else samples
        need(most >= 1 and chunk >= 1, f"`samples` ({most}) and `chunk` ({chunk}) must be at least 1.")
        self.run, self.seed, self.same = run, seed, SameDraws(run)
        self.chunk = images_at_once(run, chunk)
        self.most = min(most, run.max_draws or most)
        self.stopping = samples if isinstance(samples, Stopping) else None
        self.certainty = self.stopping.certainty if self.stopping else Stopping.certainty
        self.looks = self.stopping.looks(self.most) if self.stopping else [self.most]

    @torch.no_grad()
    def predict(self, images: Tensor, number: int = 0) -> list[Drawn]:
        """Predicts all images of a part.

        Args:
            images: (B, channels, height, width) as read, B >= 1.
            number: of the part.

        Returns:
            groups of images, by their number of draws; each image is in one. The global random state is as it was.

        Raises:
            UserError: images that do not fit the run.
        """
        size = min(self.chunk, TRUNK_CHUNK) if with_trunk(self.run.method) else len(images)
        found: list[Drawn] = []
        with undisturbed(self.seed, self.run.device):
            for start in range(0, len(images), size):
                x = self.run.info.normalise(images[start : start + size].to(self.run.device))
                with one_trunk(self.run.method):
                    found += self._block(x, start, number)
        return found

    def _block(self, x: Tensor, start: int, number: int) -> list[Drawn]:
        """``x`` (B, ...) normalised, image ``start`` and those after it."""
        probs = torch.empty(self.most, len(x), self.run.info.num_classes)
        left, drawn, found = torch.arange(len(x)), 0, list[Drawn]()  # numbers of the images that are not settled
        for look in self.looks:
            for s in range(drawn, look):
                network = self._network(s, start, number)
                pieces = [network(piece)[0] / self.run.temperature for piece in x.split(self.chunk)]
                probs[s, left] = torch.cat(pieces).softmax(-1).cpu()
            drawn, so_far = look, probs[:look, left]
            error = monte_carlo_error(so_far, self.certainty, self.run.max_draws)
            ends = torch.ones(len(left), dtype=torch.bool)
            if self.stopping and look < self.most:
                ends = ~(error > self.stopping.bound)  # more draws do not help what is not a number
            if ends.any():
                found.append(Drawn(start + left[ends], PredictiveDraws(so_far[:, ends]), error[ends]))
            if ends.all():
                break
            if ends.any():
                stay = (~ends).nonzero()[:, 0]
                left, there = left[stay], stay.to(x.device)
                x = x[there]
                keep_images(self.run.method, there)
        return found

    def _network(self, s: int, start: int, number: int) -> Networks:
        """Draw s; where nothing was drawn for it, its noise is drawn for every image, from a seed of its own."""
        network = self.same.network(s)
        if self.same.is_unchanged(s):
            key = blake2b(repr((self.seed, number, start, s)).encode(), digest_size=7).digest()
            seed_devices(int.from_bytes(key), self.run.device)
        return network
