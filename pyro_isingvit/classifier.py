"""The library as a scikit-learn classifier.

Shapes: N images, C channels (1 or 3), H height, W width, F features.
"""

import logging
import math
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.data.split import ImageData, Split, check_division, divide
from pyro_isingvit.experiment import fit
from pyro_isingvit.ising.noise import USUAL_KEEP
from pyro_isingvit.methods.base import method_class
from pyro_isingvit.methods.ising import IsingMethod
from pyro_isingvit.methods.registry import row
from pyro_isingvit.predictive.draws import PredictiveDraws

log = logging.getLogger(__name__)
FEW = 5  # images of a class, below which none is spared for validation
LONG = 1024  # features in a row, each a token of its own
DEPTHS = (1, 3)
DARK = 8.0  # brightest pixel of the training images, from which on 1 is hardly any light
TAKEN = {"epochs": "epochs", "samples": "samples", "seed": "random_state"}  # setting -> argument


class IsingViTClassifier(ClassifierMixin, BaseEstimator):
    """A Bayesian vision transformer with scikit-learn's interface.

    Images may have one channel or three. ``X`` is (N, H, W), (N, H, W, C), (N, C, H, W), or flat, (N, F). Labels are
    whatever scikit-learn's classifiers take. Pixels of type uint8 are taken as they are; any others are scaled by the
    least and the largest value of the training images to 256 levels, and later images are clipped to that range.

    It passes all but one check of scikit-learn's ``check_estimator``: probabilities are computed in single precision,
    so that they change by about 1e-7 with an image's place in the batch, and ``check_methods_sample_order_invariance``
    allows less. The checks skip ``sample_weight``, since ``fit`` does not take it (the likelihood counts every image
    once). Sparse ``X`` and missing values are refused. scikit-learn checks flat ``X`` alone; tests/test_classifier.py
    checks images.

    A fitted classifier can be pickled; ``run_.save(folder)`` keeps the network without pickle.

    Args:
        vit: the name of a preset, a ``ViTConfig``, or None: a network like the preset "small" whose patches are a
            quarter of the image's shorter side, at most 16 pixels.
        method: "ising", or any other name in ``pyro_isingvit.methods.registry.METHODS``.
        epochs: passes over the images, in all; None: the method's own default.
        samples: S, networks drawn for each prediction.
        image_shape: (H, W) or (H, W, C) of flat ``X``; None: a square if F is one, otherwise one row of F pixels.
        val_fraction: share of the images that is held out to fit mask noise and temperature, 0 to 0.5; none where a
            class has fewer than 5 images.
        settings: further settings by name, as ``fit`` takes them: ``{"lr": 2e-3, "target_retention": 0.3}``.
        random_state: seed of the training and of the draws; None: a new one at each ``fit``.
        progress: show a progress bar.

    Attributes:
        classes_: (C,) labels, sorted.
        n_features_in_: F, numbers of an image.
        image_shape_: (H, W, C).
        pixel_range_: the values that become 0 and 255; None for uint8.
        run_: the ``TrainedRun``, with ``evaluate``, ``prune``, ``report`` and ``save``.

    Examples:
        >>> from sklearn.datasets import load_digits
        >>> from pyro_isingvit import IsingViTClassifier, ViTConfig
        >>> X, y = load_digits(return_X_y=True)
        >>> vit = ViTConfig(patch_size=4, width=32, heads=4, depth=1)
        >>> classifier = IsingViTClassifier(vit, epochs=20, samples=10, random_state=0).fit(X[:500], y[:500])
        >>> classifier.predict_proba(X[500:503]).shape
        (3, 10)
        >>> classifier.score(X[500:], y[500:]) > 0.8
        True
    """

    def __init__(
        self,
        vit: ViTConfig | str | None = None,
        *,
        method: str = "ising",
        epochs: int | None = None,
        samples: int = 50,
        image_shape: tuple[int, ...] | None = None,
        val_fraction: float = 0.1,
        settings: dict[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool = False,
    ) -> None:
        self.vit = vit
        self.method = method
        self.epochs = epochs
        self.samples = samples
        self.image_shape = image_shape
        self.val_fraction = val_fraction
        self.settings = settings
        self.random_state = random_state
        self.progress = progress

    def __sklearn_tags__(self) -> Any:
        """Says that images are taken as well as flat rows."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Trains on images.

        Args:
            X: images, as above.
            y: (N,) labels.

        Returns:
            the classifier.

        Raises:
            UserError, ValueError: images, labels or settings that cannot be used.
        """
        self.__dict__.pop("run_", None)  # should this training fail, no network is left that knows other classes
        X, y = self._training_set(X, y)
        seed = self._seed()
        self.classes_, numbers = np.unique(y, return_inverse=True)
        need(len(self.classes_) > 1, f"`y` has only one class, '{self.classes_[0]}'; at least two are needed.")
        self.image_shape_ = self._shape(X)
        low_high = None if X.dtype == np.uint8 else (float(X.min()), float(X.max()))
        told = "`X` has values so large that their range overflows; scale the images, or clip what is no pixel."
        need(low_high is None or math.isfinite(low_high[1] - low_high[0]), told)
        self.pixel_range_, self._floats = low_high, X.dtype.kind == "f"
        data = self._data(self._pixels(X), torch.from_numpy(numbers.astype(np.int64)), seed)
        chosen = {"seed": seed, "samples": plain(self.samples)} | self._settings()
        if self.epochs is not None:
            chosen["epochs"] = plain(self.epochs)
        if len(data.val) < 2 and asks_for_noise(self.method, chosen):
            chosen["max_keep"] = USUAL_KEEP  # there are no images to choose it by
        self.run_ = fit(self._network(), data, method=self.method, progress=self.progress, **chosen)
        return self

    def predict_draws(self, X: Any) -> PredictiveDraws:
        """Class probabilities of every drawn network: mean, credible intervals, entropy, mutual information.

        Args:
            X: images of the training images' size.

        Raises:
            UserError, ValueError: images that do not fit.
        """
        images = self._pixels(self._images(X))
        return self.run_.predict(images, self.samples, seed=self.run_.config.train.seed)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Posterior predictive probabilities, (N, C), columns in the order of ``classes_``."""
        mean = self.predict_draws(X).mean.double()
        return (mean / mean.sum(1, keepdim=True)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each image, (N,)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    # What is given -----------------------------------------------------------------------------------------------

    def _training_set(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels by scikit-learn's rules; notes how many numbers an image has."""
        if _axes(X) < 3:
            X, y = validate_data(self, X, y)
        else:
            need(y is not None, f"{type(self).__name__} requires `y`, a label for each image.")
            X, y = check_array(X, allow_nd=True, estimator=self, input_name="X"), column_or_1d(y, warn=True)
            check_consistent_length(X, y)
            self.n_features_in_ = math.prod(X.shape[1:])
        check_classification_targets(y)
        return X, y

    def _images(self, X: Any) -> np.ndarray:
        """Images to predict, by scikit-learn's rules."""
        check_is_fitted(self, "run_")
        if _axes(X) < 3:
            return validate_data(self, X, reset=False)
        return check_array(X, allow_nd=True, estimator=self, input_name="X")

    def _settings(self) -> dict[str, Any]:
        """``settings``, which are those of ``fit`` that the classifier has no arguments for."""
        settings = {} if self.settings is None else self.settings
        need(isinstance(settings, dict), f"`settings` must be a dict of settings of `fit`, not {settings!r}.")
        taken = [name for name in ("method", "progress", "vit", *TAKEN) if name in settings]
        told = ", ".join(f"{name} (as `{TAKEN[name]}`)" if TAKEN.get(name, name) != name else name for name in taken)
        need(not taken, f"`settings` has {told}; give it to {type(self).__name__} itself.")
        made = [name for name in ("model", "data") if name in settings]
        need(not made, f"`settings` has {', '.join(made)}, which {type(self).__name__} makes of `vit`, X and y.")
        return {name: plain(value) for name, value in settings.items()}

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral):
            return int(self.random_state) % 2**31 if self.random_state >= 0 else int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _shape(self, X: np.ndarray) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        wanted = self._wanted_shape()
        found = self._own_shape(X, wanted)
        told = f"`image_shape` {wanted} is not that of `X`, whose images are {found}: (H, W, C)."
        need(wanted is None or wanted in (found, found[: len(wanted)]), told)
        return found

    def _wanted_shape(self) -> tuple[int, ...] | None:
        """``image_shape`` as whole numbers."""
        if self.image_shape is None:
            return None
        wanted = tuple(np.atleast_1d(np.asarray(self.image_shape, dtype=object)).tolist())
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in wanted)
        told = f"`image_shape` must be (H, W) or (H, W, C), whole numbers of 1 or more, not {self.image_shape!r:.60}."
        need(len(wanted) in (2, 3) and whole, told)
        return tuple(int(n) for n in wanted)

    def _own_shape(self, X: np.ndarray, wanted: tuple[int, ...] | None) -> tuple[int, int, int]:
        if X.ndim == 3:
            return X.shape[1], X.shape[2], 1
        if X.ndim == 4:
            last, first = X.shape[3] in DEPTHS, X.shape[1] in DEPTHS
            if last and first and wanted is not None:
                last, first = (shape[: len(wanted)] == wanted for shape in (X.shape[1:], (*X.shape[2:], X.shape[1])))
                need(last or first, f"`image_shape` {wanted} is not that of `X`, whose shape is {X.shape}.")
                first = first and not last
            need(last or first, f"`X` has shape {X.shape}; one axis must be the channels, 1 or 3 of them.")
            need(
                last != first, f"`X` has shape {X.shape}: both axes can be the channels; give `image_shape` (H, W, C)."
            )
            _, *shape = X.shape if last else np.moveaxis(X, 1, 3).shape
            return tuple(shape)
        layouts = "(N, H, W), (N, H, W, C), (N, C, H, W) or (N, F)"
        need(X.ndim == 2, f"`X` has shape {X.shape}; expected {layouts}.")
        features = X.shape[1]
        if wanted is not None:
            height, width, channels = (*wanted, 1)[:3]
            fits = height * width * channels == features and channels in DEPTHS
            need(fits, f"`image_shape` {wanted} is not that of {features} features: (H, W) or (H, W, C).")
            return height, width, channels
        side = math.isqrt(features)
        if side * side == features:
            return side, side, 1
        shapes = "give `image_shape`, (H, W) or (H, W, C)"
        need(features <= LONG, f"`X` has {features} features, which are no square; {shapes}.")
        return 1, features, 1

    def _pixels(self, X: np.ndarray) -> torch.Tensor:
        """(N, C, H, W) uint8.

        Raises:
            UserError: images of another size than those of the training, of another type where those were uint8, or on
                another scale.
        """
        shape, (height, width, channels) = X.shape, self.image_shape_
        if X.ndim == 2 and shape[1] == height * width * channels:
            X = X.reshape(-1, height, width, channels)
        elif X.ndim == 3 and channels == 1:
            X = X[..., None]
        elif X.ndim == 4 and shape[1:] != self.image_shape_:
            X = np.moveaxis(X, 1, 3)
        fits = X.shape[1:] == self.image_shape_
        need(fits, f"`X` has shape {shape}; the training images were of height, width, channels {self.image_shape_}.")
        if self.pixel_range_ is None:
            need(X.dtype == np.uint8, f"`X` is {X.dtype}; the training images were uint8.")
        else:
            low, high = self.pixel_range_
            floats = getattr(self, "_floats", None)  # None: it was saved by an earlier version
            need(
                not self._scaled_otherwise(X, low, high, floats),
                f"`X` is {X.dtype} up to {X.max(initial=0):.5g}; the training images were "
                f"{'floats' if floats else 'whole numbers'} from {low:.3g} to {high:.5g}. Scale both alike.",
            )
            dark = floats and high > DARK and _from_0_to_1(X)
            bright = floats is False and high <= 1 < X.max(initial=0)
            if low >= 0 and (dark or bright):  # it may be right: of a dark image, or of 0 and 255 for 0 and 1
                told = "`X` goes up to %.5g, the training images went up to %.5g: are both scaled alike?"
                log.warning(told, X.max(), high)
            share = (np.clip(X.astype(np.float64), low, high) - low) / ((high - low) or 1.0)
            X = np.rint(255 * share).astype(np.uint8)
        return torch.from_numpy(np.moveaxis(X, 3, 1).copy())  # a view may be read-only

    def _scaled_otherwise(self, X: np.ndarray, low: float, high: float, floats: bool | None) -> bool:
        """Whether images are on another scale, 0 to 1, 8 or 16 bits, than the training images from low to high."""
        top = X.max(initial=0)
        if floats:  # what overshoots a little is clipped
            return 0 <= low <= high <= 1 and top > (2 if X.dtype.kind == "f" else 1)
        if floats is not False or high <= 1:
            return False
        return (X.dtype == np.uint8 and high > 255) or _from_0_to_1(X)

    def _network(self) -> ViTConfig | str:
        if self.vit is not None:
            return self.vit
        patch = round(min(self.image_shape_[:2]) / 4)
        return ViTConfig(patch_size=min(16, max(1, patch)), mlp_ratio=2)

    def _data(self, images: torch.Tensor, numbers: torch.Tensor, seed: int) -> ImageData:
        check_division(self.val_fraction, 0.0, seed)
        fraction = self.val_fraction if int(numbers.bincount().min()) >= FEW else 0.0
        pool, names = Split(images, numbers), tuple(str(name) for name in self.classes_)
        none = pool.take(np.arange(0))
        return divide(pool, None, none, names, name="arrays", train_size=None, val_fraction=fraction, seed=seed)


def asks_for_noise(method: str, chosen: dict[str, Any]) -> bool:
    """Whether a training would choose the level of its masks' noise, though nobody asked for it."""
    masks = issubclass(method_class(row(method).members_of or method), IsingMethod)
    ising = chosen.get("ising") or row(method).ising
    searched = getattr(ising, "max_keep", None) == "auto" and row(method).train.pilot_fraction < 1
    return masks and searched and "max_keep" not in chosen


def plain(value: Any) -> Any:
    """One of NumPy's numbers, such as a grid search gives, as Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _from_0_to_1(X: np.ndarray) -> bool:
    """Whether no pixel is above 1, and some lie between 0 and 1."""
    return bool(X.max(initial=0) <= 1 and ((X > 0) & (X < 1)).any())


def _axes(X: Any) -> int:
    return X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim
