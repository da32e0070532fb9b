"""Errors about single arguments: each names the argument, its value, the rule and the way out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

INT32_MAX = 2**31 - 1
# What float32 holds without being flushed to 0, with room for a factor log2(e).
_FLOAT32_RANGE = (2.0**-126, 2.0**127)


def shown(value: Any) -> str:
    """A value in an error: its type alone, where it is long."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def integer(
    name: str, value: Any, meaning: str = "", *, least: int = 1, most: int = INT32_MAX
) -> int:
    """A Python integer from `least` to `most`, from any integer but a bool."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_integer and least <= value <= most:
        return int(value)
    rule = "a positive integer" if least == 1 else f"an integer >= {least}"
    if is_integer and value > most:
        rule, meaning = f"at most {most}", meaning if most != INT32_MAX else "lengths are int32"
    raise ValueError(f"{name}={shown(value)} must be {rule}{meaning and ': '}{meaning}")


def number(name: str, value: Any, meaning: str) -> float:
    """A Python float that a float32 holds."""
    if isinstance(value, Tracer):
        raise ValueError(f"{name} is traced; it is a static option: pass a Python number")
    if np.ndim(value) == 0 and hasattr(value, "item"):
        value = value.item()
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise ValueError(f"{name}={shown(value)} must be a finite number {meaning}")
    low, high = _FLOAT32_RANGE
    if value and not low <= abs(value) <= high:
        raise ValueError(
            f"{name}={value!r} must be 0 or between 2**-126 and 2**127 in size: logits are float32"
        )
    return float(value)


def instance(name: str, value: Any, types: Any, what: str) -> None:
    """Checks that an argument is of a type; `what` says which, and how to come by it."""
    if not isinstance(value, types):
        raise ValueError(f"{name} must be {what}; got {shown(value)}")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks that an argument is one of some texts."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(choices)}")


def hashable(name: str, value: Any) -> None:
    """Checks that an argument can be a key, all through: not so a tuple that holds a list."""
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{name} must be hashable: a string, a number or a tuple of such; got {shown(value)}"
        ) from None


def array(name: str, value: Any) -> None:
    """Checks that an argument is an array, NumPy's or JAX's."""
    if not all(hasattr(value, each) for each in ("shape", "dtype", "ndim")):
        raise ValueError(
            f"{name} must be an array; got {type(value).__name__}: pass jax.numpy.asarray of it"
        )
