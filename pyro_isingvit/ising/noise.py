"""max_keep "auto": how often even the strongest weights are dropped, chosen by held-out images.

Training tries some levels for a while (runs/noise_search.py) and sees what each makes of the validation part, after
the temperature that fits it. The usual level stays unless another beats it by more than the uncertainty of the
comparison:

    d_i  = NLL_i(usual) - NLL_i(level),   i = 1 .. n validation images
    gain = mean d - sd(d) / sqrt(n)  >  0

This is the one-standard-error rule of Breiman et al. (1984): a few hundred images cannot tell levels apart that differ
by 1%, and then the usual level is as good as any. Where all levels are alike it still leaves the usual one in about
three of ten trainings, as two alternatives are tried. docs/tuning.md, Noise of the masks, has the runs behind the
numbers.
"""

from torch import Tensor

from pyro_isingvit.core.errors import need

USUAL_KEEP = 0.98  # best or nearly so on most data
LEVELS = (0.9, 0.98, 0.995)  # of max_keep, as tried


def chosen_keep(nll: dict[float, Tensor], usual: float = USUAL_KEEP) -> float:
    """The level of the largest gain over the usual one, or the usual one where none is certain.

    Args:
        nll: level -> (n,), nats of the same held-out images.
        usual: the level that stays unless another is certainly better; it must be in ``nll``.

    Raises:
        UserError: fewer than 2 images, or a loss that is not finite.

    Examples:
        >>> import torch
        >>> usual = torch.tensor([0.5, 0.4, 0.6, 0.5])
        >>> chosen_keep({0.98: usual, 0.9: usual - torch.tensor([0.1, 0.2, 0.1, 0.2])})  # better on each image
        0.9
        >>> chosen_keep({0.98: usual, 0.9: usual - torch.tensor([0.9, -0.8, 0.1, -0.1])})  # not certain
        0.98
    """
    need(len(nll[usual]) > 1, "the noise of the masks cannot be chosen by fewer than 2 validation images.")
    gains = {usual: 0.0}
    for level, losses in nll.items():
        need(bool(losses.isfinite().all()), f"the predictions at `max_keep` {level} are not finite.")
        if level != usual:
            better = (nll[usual] - losses).double()
            gains[level] = float(better.mean() - better.std() / len(better) ** 0.5)
    return max(gains, key=lambda level: gains[level])
