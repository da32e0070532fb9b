"""8-bit elements as the matrix units take them: as they are, or as bfloat16 where they must be.

The compiler widens 8 bits so slowly for a v4, whose units take none, that it was 86 % of a call's
853 us. Here words are taken apart in arithmetic: the same call issues for 182 us. A word holds the
elements of four rows one below the other, so rows of a matrix come out in another order
(`row_at`), which is nothing to a softmax: masks and scales follow it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from .geometry import LANES, SUBLANES

_ROWS = 4 * SUBLANES  # of a tile of words


def _wide(where: Any) -> bool:
    return where.widens and where.format.quantised


def as_matrix(where: Any, elements: jax.Array) -> jax.Array:
    """Elements `[rows, row_dim]` for matmuls; `where` has a `format`, and says if it `widens`."""
    if not _wide(where):
        return elements
    words = pltpu.bitcast(elements, jnp.int32).reshape(-1, 1, SUBLANES, elements.shape[1])
    number = _integer if elements.dtype == np.int8 else _float8(elements.dtype)
    rows = jnp.concatenate([number(words << (24 - 8 * byte)) for byte in range(4)], axis=1)
    return rows.reshape(elements.shape).astype(where.format.compute_dtype)


def row_at(where: Any, place: jax.Array) -> jax.Array:
    """Which row of a page's or a block's stands at a place of a matrix."""
    if not _wide(where):
        return place
    return (place & -_ROWS) + 4 * (place & (SUBLANES - 1)) + ((place >> 3) & 3)


def lanes(where: Any, row: jax.Array) -> jax.Array:
    """What is said of each row, `[1, rows]`, in the order of a matrix."""
    if not _wide(where):
        return row
    parts = [row[:, i : i + LANES] for i in range(0, row.shape[1], LANES)]
    return jnp.concatenate([_in_order(where, part) for part in parts], axis=1)


def _in_order(where: Any, part: jax.Array) -> jax.Array:
    """Of at most 128 rows."""
    count = part.shape[1]
    if count < LANES:
        part = jnp.concatenate([part, jnp.zeros((1, LANES - count), part.dtype)], axis=1)
    shape = (SUBLANES, LANES)
    order = row_at(where, lax.broadcasted_iota(jnp.int32, shape, 1))
    return jnp.take_along_axis(jnp.broadcast_to(part, shape), order, axis=1)[:1, :count]


def _integer(words: jax.Array) -> jax.Array:
    """The int8 in the first byte of each word."""
    return (words >> 24).astype(jnp.float32)


def _float8(dtype: np.dtype) -> Any:
    """The same of a float8, whose bits are the first of a float32's, but for the exponent's base.

    A float32 that small would be zero to the hardware: so those without an exponent are integers.
    What is not finite comes out as a number above the largest.
    """
    info = jnp.finfo(dtype)
    base = 1 - info.minexp  # of the exponent

    def number(words: jax.Array) -> jax.Array:
        bits = lax.shift_right_logical(words & 0x7F000000, jnp.int32(8 - info.nexp))
        large = lax.bitcast_convert_type(bits + ((127 - base) << 23), jnp.float32)
        small = (bits >> (23 - info.nmant)).astype(jnp.float32) * float(info.smallest_subnormal)
        size = jnp.where(bits < 1 << 23, small, large)
        return jnp.where(words < 0, -size, size)

    return number
