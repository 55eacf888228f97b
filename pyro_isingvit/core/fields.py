"""Checks that the fields of a dataclass of settings hold what they declare."""

import dataclasses
import math
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pyro_isingvit.core.errors import UserError


def check_fields(settings: Any) -> None:
    """Checks that every field of a dataclass, including nested ones, has its declared kind.

    Raises:
        UserError: a field has another kind, a number is not finite, or a whole number is 2^31 or more.
    """
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(each.type):
            if not isinstance(value, each.type):  # type: ignore[arg-type]
                raise UserError(f"`{each.name}` holds no settings.")
            check_fields(value)
        elif not _fits(value, each.type):
            raise UserError(f"`{each.name}` cannot be {value!r:.60}; it takes {_takes(each.type)}.")


def _fits(value: object, kind: Any) -> bool:
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, choices[0])
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is Literal:
        return isinstance(value, str) and value in choices
    if origin is tuple:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(_fits(item, choices[0]) for item in value)
    if kind in (int, float):
        whole = type(value) is int and abs(value) < 2**31
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    return value is None if kind is type(None) else isinstance(value, kind)


WORDS = {int: "a whole number below 2^31", float: "a finite number", bool: "True or False", str: "a text"}


def _takes(kind: Any) -> str:
    """What ``_fits`` accepts, in words."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _takes(choices[0])
    if origin in (Union, UnionType):
        return " or ".join(_takes(choice) for choice in choices)
    if origin is Literal:
        return ", ".join(map(str, choices))
    if origin is tuple:
        return f"a tuple, each {_takes(choices[0])}"
    return WORDS.get(kind, "None" if kind is type(None) else f"a {kind.__name__}")
