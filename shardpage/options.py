"""The options of a call: `Attention` is what is computed, `Tuning` is how. Each checks itself."""

import dataclasses
import math
import typing
from typing import Any, Literal

import numpy as np
from jax.core import Tracer

BackendName = Literal["xla", "pallas_tpu"]
CoresMode = Literal["auto", "off", "kv_head", "batch"]

INT32_MAX = 2**31 - 1
# What float32 holds without being flushed to 0, with room for a factor log2(e).
_FLOAT32_RANGE = (2.0**-126, 2.0**127)
# `cap * tanh(logit / cap)` is the logit, to float32's last digit, where the quotient is below
# `UNCAPPED`. Only beyond this cap could such a quotient be flushed to 0, and be told by it.
HUGE_SOFT_CAP = 2.0**64
UNCAPPED = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Attention:
    """What is computed. Hashable: static under `jax.jit`.

    Attributes:
      scale: factor on the logits; None for `key_dim ** -0.5`.
      window: attend to the last this many positions only; None for all.
      soft_cap: `cap * tanh(logits / cap)` on scaled logits, before masking; None for no cap.
      max_context_len: a longer context is invalid; None for the capacity of its table.

    Raises:
      ValueError: if a value makes no sense, or a float32 or int32 cannot hold it.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    max_context_len: int | None = None

    def __post_init__(self):
        self._set("scale", _finite("scale", self.scale, "or None for head_dim ** -0.5"))
        self._set("soft_cap", _finite("soft_cap", self.soft_cap, "above 0, or None for no cap"))
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be above 0, or None for no cap")
        self._set("window", _positive("window", self.window, "tokens, or None for all"))
        width = "tokens, or None for the table's width"
        self._set("max_context_len", _positive("max_context_len", self.max_context_len, width))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as Python's own number, which hashes and is exact

    def scale_of(self, key_dim: int) -> float:
        """The factor on the logits."""
        return key_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How it is computed: no result depends on it, up to rounding. Hashable.

    Attributes:
      backend: "xla" or "pallas_tpu"; None for the one made for the platform.
      platform: "cpu", "gpu" or "tpu"; None for that of the mesh or the arrays.
      num_splits, pages_per_block, cores: as `page_attention` has them, the last as megacore_mode.
      interpret: run Pallas kernels in interpret mode; None where there is no TPU. Pallas' own
        `InterpretParams` say how.
      chip: the backend's description of the device; None asks JAX.

    Raises:
      ValueError: if a value makes no sense.
    """

    backend: BackendName | None = None
    platform: str | None = None
    num_splits: int = 0
    pages_per_block: int | None = None
    cores: CoresMode | None = None
    interpret: Any = None
    chip: Any = None

    def __post_init__(self):
        names = typing.get_args(BackendName)
        if self.backend is not None and self.backend not in names:
            raise ValueError(f"backend={self.backend!r} is none of {names}; None follows the mesh")
        if not _is_int(self.num_splits) or self.num_splits < 0:
            raise ValueError(
                f"num_splits={self.num_splits!r} must be an integer >= 0: 0 chooses, 1 never "
                "splits a sequence, n splits each into at most n parts"
            )
        object.__setattr__(self, "num_splits", _int32("num_splits", self.num_splits))
        pages = _positive("pages_per_block", self.pages_per_block, "pages, or None to choose")
        object.__setattr__(self, "pages_per_block", pages)
        if self.cores not in (modes := (None, *typing.get_args(CoresMode))):
            raise ValueError(f"cores={self.cores!r} must be one of {modes}")
        if isinstance(self.interpret, str | int) and not isinstance(self.interpret, bool):
            raise ValueError(
                f"interpret={self.interpret!r} must be True, False or None (only where there is "
                "no TPU)"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _positive(name: str, value: Any, meaning: str) -> int | None:
    if value is None:
        return None
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer: {meaning}")
    return _int32(name, value)


def _int32(name: str, value: Any) -> int:
    if value > INT32_MAX:
        raise ValueError(
            f"{name}={value!r} must be at most {INT32_MAX}: lengths and positions are int32"
        )
    return int(value)


def _finite(name: str, value: Any, meaning: str) -> float | None:
    if isinstance(value, Tracer):
        raise ValueError(f"{name} is traced; it is a static option: pass a Python number")
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number {meaning}")
    low, high = _FLOAT32_RANGE
    if value and not low <= abs(value) <= high:
        raise ValueError(
            f"{name}={value!r} must be 0 or between 2**-126 and 2**127 in size: logits are float32"
        )
    return float(value)
