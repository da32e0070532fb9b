"""The static options of one attention call, packed once and passed whole."""

import dataclasses
from typing import Literal

from .kv_layout import KVLayout

# The seed's default: far below any logit, and finite with room for a subtraction.
DEFAULT_MASK_VALUE = -2.381976426469702e38

MegacoreMode = Literal["kv_head", "batch", "auto"]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a backend needs to know besides arrays. Hashable: a static argument of `jax.jit`.

    Sliding window, sinks, casts and invalid sequences are handled around the backend.
    """

    kv: KVLayout
    scale: float
    mask_value: float = DEFAULT_MASK_VALUE
    soft_cap: float | None = None
    num_splits: int = 0
    pages_per_compute_block: int | None = None
    megacore_mode: MegacoreMode | None = None
    inline_seq_dim: bool = True
    interpret: bool | None = None
