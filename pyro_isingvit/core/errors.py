"""The one error that the user can fix, and one that nobody here has made."""

from numbers import Integral, Real


class UserError(ValueError):
    """Something the user gave is wrong; the message names the cause and the fix.

    Settings and arguments stand in backticks, such as `patch_size`; a script shows them as its flags.

    Scripts print the message alone and leave with exit code 2.

    Examples:
        >>> from pyro_isingvit import UserError, load_data
        >>> try:
        ...     load_data("digits", val_fraction=2)
        ... except UserError as error:
        ...     print(error)
        `val_fraction` must be between 0 and 0.5, got 2.
    """


class ProcessLost(RuntimeError):
    """Another of several processes that train together is gone, killed or out of memory.

    Scripts print the message alone and leave with exit code 1.
    """


def need(condition: object, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def need_whole(least: int, **numbers: object) -> None:
    """Raises UserError unless every number, given by its name, is whole and at least ``least``.

    Examples:
        >>> need_whole(1, samples=20, chunk=256)
    """
    for name, value in numbers.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        need(whole, f"`{name}` must be a whole number and at least {least}, not {value!r:.60}.")


def need_share(**shares: object) -> None:
    """Raises UserError unless every share, given by its name, is a number above 0 and below 1."""
    for name, value in shares.items():
        need(isinstance(value, Real) and 0 < float(value) < 1, f"`{name}` must lie in (0, 1), not {value!r:.60}.")


def why(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
