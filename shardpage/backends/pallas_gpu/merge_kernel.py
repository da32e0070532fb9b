"""The second kernel: merges the parts of the units that are cut between shares, in place.

A CTA for each share and some columns: share `c` ends inside a unit, whose parts are the last of
share `c` and the first of the next ones. Elements of all rows lie side by side, one a thread.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config
from .mosaic import WARPGROUP, load
from .softmax import LOG2E

_AT_ONCE = 8  # parts that are on their way together
_FLAT = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)
_LOWEST = -3e38


def grid(config: Config) -> tuple[int, int]:
    """Shares, and vectors of a unit's elements with one more for its lse."""
    return config.num_ctas, config.out_rows * config.format.value_dim // WARPGROUP + 1


def kernel(
    part_out_ref: Any, part_lse_ref: Any, cut_ref: Any, out_ref: Any, lse_ref: Any, *, config: Config
) -> None:
    """`out` and `part_out` as `[units or parts, vectors, 128]`; `lse` as `[.., 128]`."""
    share, vector = lax.axis_index("share"), lax.axis_index("vector")
    num_vectors = grid(config)[1] - 1
    unit, last = cut_ref[share, 0], cut_ref[share, 1]

    @pl.when(unit >= 0)
    def _():
        count = last - share + 1
        lse_of = lambda part: load(part_lse_ref.at[part], _FLAT)

        @pl.when(vector == num_vectors)
        def _():
            _, peak, total = _merge(share, count, lse_of, lambda part: None)
            lse_ref[unit] = _lse(peak, total)

        @pl.when(vector < num_vectors)
        def _():
            at = jnp.minimum(vector, num_vectors - 1)
            first = lax.rem(unit, jnp.int32(config.fold)) * config.rows
            lse_of_row = functools.partial(_lse_by_element, config, part_lse_ref, at, first)
            value_of = lambda part: load(part_out_ref.at[part, at], _FLAT)
            sums, _, total = _merge(share, count, lse_of_row, value_of)
            out_ref[unit, at] = jnp.where(total == 0.0, 0.0, sums / jnp.where(total == 0.0, 1.0, total))


def _merge(share: jax.Array, count: jax.Array, lse_of: Any, value_of: Any) -> tuple[Any, Any, Any]:
    """Sums of values and of weights, relative to the peak, element by element."""

    def some(number, carry):
        sums, peak, total = carry
        loaded = []
        for i in range(_AT_ONCE):
            which = number * _AT_ONCE + i
            part = 2 * (share + jnp.minimum(which, count - 1)) + (which == 0).astype(jnp.int32)
            beyond = jnp.where(which < count, 0.0, -jnp.inf)  # the last part again: to be ignored
            loaded.append((lse_of(part) + beyond, value_of(part)))
        next_peak = functools.reduce(jnp.maximum, [lse for lse, _ in loaded], peak)
        shrink = jnp.exp2(peak - next_peak)
        sums, total = sums * shrink, total * shrink
        for lse, value in loaded:
            weight = jnp.exp2(lse - next_peak)
            total += weight
            if value is not None:  # of no part, or of rows without keys, it is any
                sums += jnp.where(lse == -jnp.inf, 0.0, weight * value)
        return sums, next_peak, total

    full = lambda value: plgpu.layout_cast(jnp.full((WARPGROUP,), value, jnp.float32), _FLAT)
    rounds = lax.div(count + (_AT_ONCE - 1), jnp.int32(_AT_ONCE))
    return lax.fori_loop(0, rounds, some, (full(0.0), full(_LOWEST), full(0.0)))


def _lse(peak: jax.Array, total: jax.Array) -> jax.Array:
    none = total == 0.0
    log = jnp.log(jnp.where(none, 1.0, total)) * LOG2E
    return jnp.where(none, -jnp.inf, peak + log)


def _lse_by_element(
    config: Config, lse_ref: Any, vector: jax.Array, first_row: jax.Array, part: jax.Array
) -> jax.Array:
    """The lse of the row that each element of a vector is of."""
    dim = config.format.value_dim
    element = vector * WARPGROUP
    row = lax.div(element, jnp.int32(dim))
    most = -(-(WARPGROUP - 1) // dim) + 1 if WARPGROUP % dim and dim % WARPGROUP else -(-WARPGROUP // dim)
    at = lambda i: lse_ref[part, jnp.minimum(first_row + row + i, WARPGROUP - 1)]
    lse = plgpu.layout_cast(jnp.full((WARPGROUP,), at(0), jnp.float32), _FLAT)
    of_row = element - row * dim + plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=_FLAT)
    for i in range(1, most):
        lse = jnp.where(of_row >= i * dim, at(i), lse)
    return lse
