"""Online softmax in the registers of one warpgroup: 64 rows of queries, in the layout of wgmma.

Logits are kept in base 2, where an exponential is one instruction.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...options import UNCAPPED, Attention, factor_under_cap
from .mosaic import MMA_ROWS, load

WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)
COLUMNS = WGMMA.reduce(0)
LOG2E = math.log2(math.e)
LOWEST = -3e38  # a peak before any logit; -inf would be NaN in a difference of two


@dataclasses.dataclass(frozen=True)
class Logits:
    """What becomes of the products of queries and keys."""

    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, attention: Attention, key_dim: int) -> "Logits":
        return cls(attention.scale_of(key_dim), attention.soft_cap)

    @property
    def factor(self) -> float:
        """From what `in_base_2` returns to logits; above 0, so it does not change their order."""
        return 1.0 if self.soft_cap is not None or self.scale <= 0 else self.scale * LOG2E

    def in_base_2(self, products: jax.Array) -> jax.Array:
        """Scaled, soft-capped logits in base 2, but for `factor`, which is cheaper with the peak.

        NaN where one is not finite, which could else pass for a masked one.
        """
        if self.soft_cap is None:
            logits = products if self.scale > 0 else products * (self.scale * LOG2E)
            return logits + logits * 0.0
        factor = factor_under_cap(self.scale, self.soft_cap)
        ratio = products * self.scale / self.soft_cap if factor is None else products * factor
        ratio = ratio + ratio * 0.0
        capped = jnp.tanh(ratio) * (self.soft_cap * LOG2E)
        if factor is not None:
            return capped
        return jnp.where(jnp.abs(ratio) < UNCAPPED, products * (self.scale * LOG2E), capped)


class State(NamedTuple):
    """A partial softmax: exp2(logits - peak), summed, and weighted sums of values.

    Of queries as rows; as columns `sums` is transposed (see `tokens_first.py`).
    """

    peak: jax.Array  # [64]
    total: jax.Array  # [64]
    sums: jax.Array  # [64, value_dim]


def nothing(value_dim: int) -> State:
    """The state before any key."""
    full = lambda shape, value, layout: plgpu.layout_cast(
        jnp.full(shape, value, jnp.float32), layout
    )
    zeros = full((MMA_ROWS, value_dim), 0.0, WGMMA)
    return State(full((MMA_ROWS,), LOWEST, ROWS), full((MMA_ROWS,), 0.0, ROWS), zeros)


def products(query_ref: Any, key_ref: Any) -> jax.Array:
    """Queries times keys, `[64, tokens]` in float32."""
    return product(query_ref, key_ref.transpose((1, 0)))


def product(a_ref: Any, b_ref: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Of two matrices in shared memory."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    shape = a_ref.shape[0], b_ref.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, dtype))


def seen(
    logits: jax.Array,
    first_token: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    token_axis: int = 1,
) -> jax.Array:
    """Logits of tokens in `[start, stop)`, scalars or one a query; -inf for the others."""
    token = first_token + plgpu.broadcasted_iota(jnp.int32, logits.shape, token_axis, layout=WGMMA)
    start, stop = (
        lax.broadcast_in_dim(x, logits.shape, [1 - token_axis]) if x.ndim else x
        for x in (start, stop)
    )
    return jnp.where((token >= start) & (token < stop), logits, -jnp.inf)


def weigh(state: State, logits: jax.Array, factor: float) -> tuple[State, jax.Array]:
    """Takes logits in; returns the weights of their values, relative to the new peak."""
    peak = jnp.maximum(state.peak, logits.max(axis=1) * factor)
    weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(peak, logits.shape, [0]))
    shrink = jnp.exp2(state.peak - peak)
    sums = state.sums * lax.broadcast_in_dim(shrink, state.sums.shape, [0])
    return State(peak, state.total * shrink + weights.sum(axis=1), sums), weights


def add_values(state: State, weights: jax.Array, value_ref: Any, stage_ref: Any) -> State:
    """Adds weighted values to the sums.

    `stage_ref` is None but in the interpreter, whose matmuls take shared memory and add to nothing.
    """
    if stage_ref is not None:
        stage_ref[...] = weights
        plgpu.commit_smem()
        return state._replace(sums=state.sums + product(stage_ref, value_ref))
    multiply = lambda sums_ref: plgpu.wgmma(sums_ref, weights, value_ref)
    sums = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(state.sums))
    return state._replace(sums=sums)


def add_values_and_multiply(
    state: State, weights: jax.Array, value_ref: Any, stage_ref: Any, query_ref: Any, key_ref: Any
) -> tuple[State, jax.Array]:
    """`add_values`, and `products` of other keys, as one piece of work for the matrix unit."""
    if stage_ref is not None:
        return add_values(state, weights, value_ref, stage_ref), products(query_ref, key_ref)

    def multiply(refs):
        products_ref, sums_ref = refs
        plgpu.wgmma(products_ref, query_ref, key_ref.transpose((1, 0)))
        plgpu.wgmma(sums_ref, weights, value_ref)

    zeros = plgpu.layout_cast(jnp.zeros((MMA_ROWS, key_ref.shape[0]), jnp.float32), WGMMA)
    init: Any = plgpu.WGMMAAccumulatorRef.init
    multiplied, sums = pl.run_state(multiply)((init(zeros), init(state.sums)))
    return state._replace(sums=sums), multiplied


def zero_unread(value_ref: Any, first_token: jax.Array, start: jax.Array, stop: jax.Array) -> None:
    """Zeroes the values of tokens outside `[start, stop)`: a weight of 0 does not silence a NaN."""
    token = first_token + plgpu.broadcasted_iota(jnp.int32, value_ref.shape, 0, layout=WGMMA)
    value = load(value_ref, WGMMA)
    read = (token >= start) & (token < stop)
    value_ref[...] = jnp.where(read, value, jnp.zeros_like(value))
    plgpu.commit_smem()


def mean(state: State, *, query_axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """The weighted mean of values, and lse in base 2: zeros and -inf where no key was seen.

    A total of 0 means that none was. NaN is not 0: it stays. A row in which anything is not finite
    is NaN as a whole.
    """
    none = state.total == 0.0
    inverse = 1.0 / jnp.where(none, 1.0, state.total)
    lse = state.peak + jnp.log(state.total) * LOG2E
    by_query = lambda x: lax.broadcast_in_dim(x, state.sums.shape, [query_axis])
    means = state.sums * by_query(inverse)
    nan_if_broken = jnp.where(none, 0.0, lse * 0.0) + (means * 0.0).sum(axis=1 - query_axis)
    return means + by_query(nan_if_broken), jnp.where(none, -jnp.inf, lse) + nan_if_broken
