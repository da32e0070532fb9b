"""The options of a call: what a token sees (`Mask`), what is computed (`Attention`), and how
(`Tuning`). Each checks itself."""

import dataclasses
import typing
from typing import Any, Literal

from .arguments import instance, integer, number, shown

BackendName = Literal["xla", "pallas_tpu", "pallas_gpu"]
CoresMode = Literal["auto", "off", "kv_head", "batch"]

# `cap * tanh(logit / cap)` is the logit, to float32's last digit, where the quotient is below
# `UNCAPPED`. Only beyond this cap could such a quotient be flushed to 0, and be told by it.
HUGE_SOFT_CAP = 2.0**64
UNCAPPED = 2.0**-12
_SMALLEST_NORMAL = 2.0**-126


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which positions of its sequence a token sees. Hashable: static under `jax.jit`.

    Attributes:
      window: the last this many positions only, its own included; None for all.
      chunk: positions of its own multiple of `chunk` only (Llama 4's chunked attention, which a
        sliding window is not); None for all.
      causal: none behind its own; False shows each new token the whole context.
      max_context_len: a longer context is invalid; None for the capacity of its table.

    Raises:
      ValueError: if a value makes no sense, or an int32 cannot hold it.
    """

    window: int | None = None
    chunk: int | None = None
    causal: bool = True
    max_context_len: int | None = None

    def __post_init__(self):
        for name in ("window", "chunk"):
            _set(self, name, integer, "tokens, or None for all")
        instance("causal", self.causal, bool, "True or False")
        _set(self, "max_context_len", integer, "tokens, or None for the table's width")

    @property
    def span(self) -> int | None:
        """The most positions up to its own that a token sees; None for no bound."""
        return min(filter(None, (self.window, self.chunk)), default=None)


@dataclasses.dataclass(frozen=True)
class Attention:
    """What is computed of the tokens that are read. Hashable: static under `jax.jit`.

    Attributes:
      scale: factor on the logits; None for `key_dim ** -0.5`.
      soft_cap: `cap * tanh(logits / cap)` on scaled logits, before masking; None for no cap.

    Raises:
      ValueError: if a value makes no sense, or a float32 cannot hold it.
    """

    scale: float | None = None
    soft_cap: float | None = None

    def __post_init__(self):
        _set(self, "scale", number, "or None for head_dim ** -0.5")
        _set(self, "soft_cap", number, "above 0, or None for no cap")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be above 0, or None for no cap")

    def scale_of(self, key_dim: int) -> float:
        """The factor on the logits."""
        return key_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How it is computed: no result depends on it, up to rounding. Hashable.

    Attributes:
      backend: "xla", "pallas_tpu" or "pallas_gpu"; None for the one made for the platform.
      platform: "cpu", "gpu" or "tpu"; None for that of the mesh or the arrays.
      num_splits, pages_per_block, cores: as `page_attention` has them, the last as megacore_mode.
      invariant: give a sequence the same bits whatever else is in the batch: its tokens' order
        in it, the other sequences, where pages lie, how a prompt is cut, and over how many shards
        sequences and heads are split.
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
    invariant: bool = False
    interpret: Any = None
    chip: Any = None

    def __post_init__(self):
        names = typing.get_args(BackendName)
        if self.backend is not None and self.backend not in names:
            raise ValueError(
                f"backend={shown(self.backend)} is none of {names}; None follows the mesh"
            )
        meaning = "0 chooses, 1 never splits a sequence, n splits each into at most n parts"
        num_splits = integer("num_splits", self.num_splits, meaning, least=0)
        object.__setattr__(self, "num_splits", num_splits)
        _set(self, "pages_per_block", integer, "pages, or None to choose")
        if self.cores not in (modes := (None, *typing.get_args(CoresMode))):
            raise ValueError(f"cores={shown(self.cores)} must be one of {modes}")
        instance("invariant", self.invariant, bool, "True or False")
        of_pallas = ("InterpretParams", "InterpretGPUParams")  # importing it takes a second
        if type(self.interpret).__name__ not in of_pallas:
            what = "True, False or None (only where there is no TPU)"
            instance("interpret", self.interpret, bool | None, what)


def factor_under_cap(scale: float, soft_cap: float) -> float | None:
    """`scale / soft_cap`, with which a kernel makes quotients in one product per logit.

    None if float32 could flush the factor, or a quotient that matters.
    """
    factor = scale / soft_cap
    is_normal = _SMALLEST_NORMAL <= abs(factor) < 1 / _SMALLEST_NORMAL
    return factor if is_normal and soft_cap <= HUGE_SOFT_CAP else None


def _set(options: Any, name: str, check: Any, meaning: str) -> None:
    """Checks an option that is not None, and keeps it as Python's own number: exact, hashable."""
    value = getattr(options, name)
    if value is not None:
        object.__setattr__(options, name, check(name, value, meaning))
