"""The static options of one attention call, packed once and passed whole."""

import dataclasses
from typing import Literal

from .kv_layout import KVLayout

# The seed's default: far below any logit, and finite with room for a subtraction.
DEFAULT_MASK_VALUE = -2.381976426469702e38

# `cap * tanh(logit / cap)` is the logit, to float32's last digit, where the quotient is below
# `UNCAPPED`. Only beyond this cap could such a quotient be flushed to 0, and be told by it.
HUGE_SOFT_CAP = 2.0**64
UNCAPPED = 2.0**-12

MegacoreMode = Literal["kv_head", "batch", "auto"]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """All that is known of a call besides arrays and mesh. Hashable: static under `jax.jit`.

    `max_context_len` and `sliding_window` are the plan's; the others are the backend's.
    """

    kv: KVLayout
    scale: float
    platform: str = "cpu"
    max_context_len: int | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    num_splits: int = 0
    pages_per_compute_block: int | None = None
    megacore_mode: MegacoreMode | None = None
    inline_seq_dim: bool = True
    interpret: bool | None = None
