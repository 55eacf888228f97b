"""Where a network computes, as users name it."""

import torch

from pyro_isingvit.core.errors import UserError, need


def checked_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is the GPU, where there is one.

    Args:
        device: such as "cpu", "cuda", "cuda:1" or "auto".

    Raises:
        UserError: there is none of that name here.

    Examples:
        >>> checked_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"`device` must be auto, cpu or cuda, such as cuda:1, not {device!r:.60}.") from error
    if found.type == "cuda":
        need(torch.cuda.is_available(), "no CUDA device is available here; set `device` to cpu or auto.")
        need(
            (found.index or 0) < torch.cuda.device_count(),
            f"there is no CUDA device {found} here; set another `device`.",
        )
    return found
