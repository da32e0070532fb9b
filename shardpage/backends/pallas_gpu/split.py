"""Queries as sums of pieces of 8 bits, to be multiplied with keys as a quantised cache has them.

    query = unit * (piece 0 + piece 1 / 2**bits + ...)        unit: a power of two per row

The pieces are more rows of the same matmul. Two of float8_e4m3fn, or three of float8_e5m2, are
bfloat16's 8 bits exactly, but for elements below 2**-14 of their row's largest; two of int8 are
within 2**-14 of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ...page_format import PageFormat
from ...quantise import INT8_NAN


class _Pieces(NamedTuple):
    number: int
    bits: int  # of one, and from one to the next
    top: int  # elements of a row are below 2**top units


_PIECES = {
    "int8": _Pieces(2, 7, 7),
    "float8_e4m3fn": _Pieces(2, 4, 8),
    "float8_e5m2": _Pieces(3, 3, 15),
}


def pieces(page_format: PageFormat) -> int:
    """How many there are, the marks among them."""
    return _PIECES[page_format.dtype.name].number + _marked(page_format)


def _marked(page_format: PageFormat) -> bool:
    """Whether a key says by its first element that its token is NaN."""
    return page_format.dtype == np.int8 and page_format.scale != "token"


def queries(
    query: Float[Array, "copies rows dim"], page_format: PageFormat
) -> tuple[Array, Float[Array, "copies rows"]]:
    """The pieces of all rows, one piece behind the other, `[copies, pieces * rows, dim]`, and the
    rows' units. What is not finite makes the unit NaN."""
    dtype = page_format.dtype
    number, bits, top = _PIECES[dtype.name]
    query = query.astype(jnp.float32)
    largest = jnp.max(jnp.abs(query), axis=-1)
    exponent = jnp.frexp(largest)[1] - top
    rest = jnp.ldexp(query, -exponent[..., None])
    made = []
    for _ in range(number):
        if dtype == np.int8:
            piece = jnp.clip(jnp.round(rest), -127, 127)
        else:  # XLA takes the conversion to 8 bits and back for the number itself
            piece = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=bits - 1)
        made.append(piece.astype(dtype))
        rest = (rest - piece) * 2.0**bits
    if _marked(page_format):
        made.append(jnp.zeros_like(made[0]).at[..., 0].set(1))
    unit = jnp.where(jnp.isfinite(largest), jnp.ldexp(1.0, exponent), jnp.nan)
    return jnp.concatenate(made, axis=1), unit


def products(multiplied: jax.Array, rows: int, page_format: PageFormat) -> jax.Array:
    """Keys times queries, `[tokens, rows]` in the queries' units, of keys times pieces."""
    number, bits, _ = _PIECES[page_format.dtype.name]
    part = lambda i: multiplied[:, i * rows : (i + 1) * rows]
    total = part(0).astype(jnp.float32)
    for i in range(1, number):
        total += part(i).astype(jnp.float32) * 2.0 ** (-bits * i)
    if _marked(page_format):
        total = jnp.where(part(number) == INT8_NAN, jnp.nan, total)
    return total
