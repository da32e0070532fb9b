"""The second kernel: merges the parts of the units that are cut between shares, in place.

A CTA for each share and some columns: share `c` ends inside a unit, whose parts are the last of
share `c` and the first of the next ones. Elements of all rows lie side by side.
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
from .softmax import LOG2E, LOWEST

# Parts that are on their way together, by elements a thread. Large units have few parts.
_AT_ONCE = {1: 8, 4: 2}


def grid(config: Config) -> tuple[int, int]:
    """Shares, and vectors of a unit's elements with one more for its lse."""
    return config.num_ctas, config.out_rows * config.out_dim // config.merge_width + 1


def kernel(
    part_out_ref: Any,
    part_lse_ref: Any,
    cut_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    config: Config,
) -> None:
    """`out` and `part_out` as `[units or parts, vectors, merge_width]`; `lse` as `[.., 128]`."""
    share, vector = lax.axis_index("share"), lax.axis_index("vector")
    num_vectors = grid(config)[1] - 1
    unit, last = cut_ref[share, 0], cut_ref[share, 1]

    @pl.when((unit >= 0) & (vector == num_vectors))
    def _():
        lse_of = lambda part: load(part_lse_ref.at[part], _flat(WARPGROUP))
        _, peak, total = _merge(WARPGROUP, share, last - share + 1, lse_of, lambda part: None)
        none = total == 0.0
        log = jnp.log(jnp.where(none, 1.0, total)) * LOG2E
        lse_ref[unit] = jnp.where(none, -jnp.inf, peak + log)

    @pl.when((unit >= 0) & (vector < num_vectors))
    def _():
        at, first = (
            jnp.minimum(vector, num_vectors - 1),
            lax.rem(unit, jnp.int32(config.fold)) * config.rows,
        )
        width = config.merge_width
        lse_of = functools.partial(_lse_by_element, config, part_lse_ref, at, first)
        value_of = lambda part: load(part_out_ref.at[part, at], _flat(width))
        sums, _, total = _merge(width, share, last - share + 1, lse_of, value_of)
        none = total == 0.0
        mean = jnp.where(none, 0.0, sums / jnp.where(none, 1.0, total))
        out_ref[unit, at] = mean.astype(out_ref.dtype)


def _flat(width: int) -> Any:
    return plgpu.Layout.WG_STRIDED((width,), vec_size=width // WARPGROUP)


def _full(width: int, value: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full((width,), value, jnp.float32), _flat(width))


def _merge(
    width: int, share: jax.Array, count: jax.Array, lse_of: Any, value_of: Any
) -> tuple[Any, Any, Any]:
    """Sums of values and of weights, relative to the peak, element by element."""

    at_once = _AT_ONCE[width // WARPGROUP]

    def some(number, carry):
        sums, peak, total = carry
        loaded = []
        for i in range(at_once):
            which = number * at_once + i
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

    rounds = lax.div(count + (at_once - 1), jnp.int32(at_once))
    init = (_full(width, 0.0), _full(width, LOWEST), _full(width, 0.0))
    return lax.fori_loop(0, rounds, some, init)


def _lse_by_element(
    config: Config, lse_ref: Any, vector: jax.Array, first_row: jax.Array, part: jax.Array
) -> jax.Array:
    """The lse of the row that each element of a vector is of."""
    dim, width = config.out_dim, config.merge_width
    row = lax.div(vector * width, jnp.int32(dim))
    behind = vector * width - row * dim  # of the row's elements, those before this vector
    element = behind + plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=_flat(width))
    lse_of = lambda i: lse_ref[part, jnp.minimum(first_row + row + i, WARPGROUP - 1)]
    lse = _full(width, lse_of(0))
    for i in range(1, (dim - 1 + width - 1) // dim + 1):
        lse = jnp.where(element >= i * dim, lse_of(i), lse)
    return lse
