"""Token-major pages, of which a TPU keeps `n = 4 / itemsize` rows in words of 32 bits.

    [page, rows, width]  ->  int32 [page * words, 128]

All heads of a token lie together, so what is read of one head is rows far from each other. Loads
with a stride are of 32 bits and of rows of 128: pages are taken as rows of words, as they lie, and
a row of elements is shifted out of its words.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...page_format import PageFormat
from .geometry import LANES, SUBLANES


def refusal(page_format: PageFormat) -> str | None:
    """Why pages are not such that the kernels can read them; None if they are."""
    name, per_word = page_format.layout.label, _per_word(page_format)
    *rows, width = page_format.token_shape
    if width % LANES or (page_format.word is None and width != LANES):
        multiple = f"{LANES}" if page_format.word is None else f"a multiple of {LANES}"
        return (
            f"rows of {width} elements of kv_layout={name!r}: a TPU keeps rows of {multiple} as "
            "they are read; use such rows, kv_layout='interleaved_words'"
        )
    if page_format.word is not None and page_format.word[0] != per_word:
        return (
            f"words of {page_format.word[0]} rows of {page_format.dtype.name} are not of 32 bits; "
            f"use words of {per_word} rows, kv_layout='fused'"
        )
    if page_format.word is None and (
        rows[0] % per_word or not (rows[0] in (1, 2, 4) or rows[0] % SUBLANES == 0)
    ):
        return (
            f"{rows[0]} rows a token of kv_layout={name!r} in {page_format.dtype.name} do not fill "
            f"tiles: use a multiple of {SUBLANES} of them, or a power of two that fills words of "
            f"{per_word}, or kv_layout='interleaved_words'"
        )
    return None


def words_shape(page_format: PageFormat) -> tuple[int, int]:
    """A page of one array, as rows of words."""
    return (math.prod(page_format.page_shape) // (_per_word(page_format) * LANES), LANES)


def words_of_array(page_format: PageFormat, array: jax.Array) -> jax.Array:
    """Pages `[pages, *page_shape]` as rows of words: for the interpreter, which has not
    `words_of_ref`."""
    shape, per_word = words_shape(page_format), _per_word(page_format)
    by_row = array.reshape(len(array), -1, per_word, page_format.row_dim)
    by_row = by_row[..., 0, :] if per_word == 1 else by_row.mT
    return lax.bitcast_convert_type(by_row, jnp.int32).reshape(-1, *shape)


def words_of_ref(page_format: PageFormat, pages: Any) -> Any:
    """The same of a reference, without a copy."""
    if pages.dtype == jnp.int32:  # already
        return pages
    return pages.bitcast(jnp.int32).reshape(pages.shape[0], *words_shape(page_format))


def array_of(page_format: PageFormat, which: int) -> int:
    """The array that holds keys (0) or values (1)."""
    return which if page_format.num_arrays == 2 else 0


def elements(page_format: PageFormat, words: Any, which: int, head: Any) -> jax.Array:
    """Keys (0) or values (1) of a head, `[tokens, row_dim]`.

    Args:
      page_format: its number of KV heads does not matter.
      words: reference to pages of `array_of` them, `[pages, *words_shape]`.
    """
    page_size, columns = page_format.page_size, page_format.row_dim // LANES
    stride = words.shape[1] // page_size
    word, place = _word_and_place(page_format, which, head)
    parts = [
        words[:, pl.ds(word * columns + i, page_size, stride), :].reshape(-1, LANES)
        for i in range(columns)
    ]
    found = parts[0] if columns == 1 else jnp.concatenate(parts, axis=1)
    if page_format.padding:  # nothing, but not a number perhaps
        lane = lax.broadcasted_iota(jnp.int32, found.shape, 1)
        found = jnp.where(lane < page_format.key_dim, found, 0)
    bits = 8 * page_format.dtype.itemsize
    if bits < 32:
        found = (found >> (place * bits)).astype(jnp.dtype(f"int{bits}"))
    return pltpu.bitcast(found, page_format.dtype)


def silence(page_format: PageFormat, words: Any, span: Any) -> None:
    """Zeros the tokens of a page that are not in a span; `words`: reference, `words_shape`."""
    per_token = words.shape[0] // page_format.page_size
    row = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    seen = (row >= span.start * per_token) & (row < span.stop * per_token)
    words[...] = jnp.where(seen, words[...], 0)


def _per_word(page_format: PageFormat) -> int:
    return 4 // page_format.dtype.itemsize


def _word_and_place(page_format: PageFormat, which: int, head: Any) -> tuple[Any, Any]:
    """Which word of a token holds a head's row, and at which place in it."""
    apart = page_format.num_arrays == 2 or page_format.shares_rows
    row = head if apart else 2 * head + which
    per_word = _per_word(page_format)  # a power of two
    return row >> (per_word.bit_length() - 1), row & (per_word - 1)
