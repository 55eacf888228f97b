"""max_keep "auto": how often even the strongest weights are dropped, fitted to predictions of held-out images.

A network that is too sure of images it has not seen, so that a temperature T > 1 fits their labels best, gets more
noise from its masks, one that is not sure enough gets less:

    logit max_keep  =  logit 0.95 - 4 log T                 in the pilot phase, where no mask drops: where to start
    logit max_keep <-  logit max_keep - 8 share log T       after an epoch that is ``share`` of the Ising phase

between 0.6 and 0.995. Few images, which the network soon memorises, get much noise; many images and few epochs get
little. The rule is that of docs/method.md, Noise of the masks; the validation runs behind its numbers are in
docs/tuning.md, Noise of the masks.
"""

import math

from pyro_isingvit.core.errors import need
from pyro_isingvit.ising.distributions import log_odds

UNFITTED_KEEP = 0.9  # where nothing was seen of the validation part
SURE_KEEP = 0.95  # where the pilot phase needs no temperature
LOWEST_KEEP, HIGHEST_KEEP = 0.6, 0.995
PILOT_GAIN, PHASE_GAIN = 4.0, 8.0  # of log T


def fitted_keep(keep: float | None, temperature: float, share: float) -> float:
    """max_keep after a look at held-out images.

    Args:
        keep: what it was; None in the pilot phase.
        temperature: T that fits their labels best (predictive/calibration.py).
        share: of the Ising phase that has passed since the last look, in [0, 1].

    Raises:
        UserError: T is not positive.

    Examples:
        >>> round(fitted_keep(None, temperature=1.0, share=0.0), 3)  # calibrated without masks
        0.95
        >>> round(fitted_keep(0.9, temperature=1.3, share=0.25), 3)  # too sure: more noise
        0.842
    """
    need(temperature > 0, f"the temperature must be positive, not {temperature}.")
    start, gain = (SURE_KEEP, PILOT_GAIN) if keep is None else (keep, PHASE_GAIN * share)
    logit = log_odds(start) - gain * math.log(temperature)
    return min(max(1.0 / (1.0 + math.exp(-logit)), LOWEST_KEEP), HIGHEST_KEEP)
