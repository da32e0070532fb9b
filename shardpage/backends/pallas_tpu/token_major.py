"""Token-major pages, of which a TPU keeps `n = 4 / itemsize` rows in words of 32 bits.

    [page, rows, width]  ->  int32 [page, words, 128]

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
            f"rows={rows[0]} per token of kv_layout={name!r} in {page_format.dtype.name} do not "
            f"fill tiles: use a multiple of {SUBLANES} of them, or a power of two that fills words "
            f"of {per_word}, or kv_layout='interleaved_words'"
        )
    return None


def words_of_array(page_format: PageFormat, array: jax.Array, *, interpreted: bool) -> jax.Array:
    """What a kernel is given of an array of pages: the same bytes, in which words can be told; for
    the interpreter, which has no other view of a reference's bytes, the words, `[pages, page_size,
    words_per_token, 128]`."""
    per_word = _per_word(page_format)
    lead, width = array.shape[:2], page_format.row_dim
    by_word = array.reshape(*lead, -1, per_word, width)
    if not interpreted:
        return by_word
    by_word = by_word[..., 0, :] if per_word == 1 else by_word.mT
    return lax.bitcast_convert_type(by_word, jnp.int32).reshape(*lead, -1, LANES)


def words_of_ref(page_format: PageFormat, pages: Any) -> Any:
    """Reference to the words of what a kernel is given, [pages, page_size, words_per_token, 128];
    compiled, with an axis of 1 before the last."""
    if pages.dtype == jnp.int32:  # already: interpreted
        return pages
    shape = (*pages.shape[:2], _words_per_token(page_format), 1, LANES)
    return pages.bitcast(jnp.int32).reshape(shape)


def buffer_shape(page_format: PageFormat, *, interpreted: bool) -> tuple[int, ...]:
    """A page of one array in fast memory: words of a token, and what keeps those of the next from
    the same bank."""
    return (page_format.page_size, pitch(page_format), *(() if interpreted else (1,)), LANES)


def pitch(page_format: PageFormat) -> int:
    """Rows of 128 words in fast memory from a token to the next: no multiple of 8, of which a load
    takes half of its rows at a time, of 16 a quarter."""
    words = _words_per_token(page_format)
    return words + (words % SUBLANES == 0)


def filled(page_format: PageFormat, pages: Any, axes: int) -> Any:
    """Of a reference to pages in fast memory, with as many axes before a page's, what is copied."""
    each = (slice(None),) * (axes + 1)
    return pages.at[(*each, pl.ds(0, _words_per_token(page_format)))]


def _words_per_token(page_format: PageFormat) -> int:
    return math.prod(page_format.token_shape) // (_per_word(page_format) * LANES)


def array_of(page_format: PageFormat, which: int) -> int:
    """The array that holds keys (0) or values (1)."""
    return which if page_format.num_arrays == 2 else 0


def elements(page_format: PageFormat, words: Any, which: int, head: Any) -> jax.Array:
    """Keys (0) or values (1) of a head, `[tokens, row_dim]`.

    Args:
      page_format: its number of KV heads does not matter.
      words: reference to pages in fast memory of `array_of` them.
    """
    columns = page_format.row_dim // LANES
    word, place = _word_and_place(page_format, which, head)
    parts = [_rows(words, word * columns + i) for i in range(columns)]
    found = parts[0] if columns == 1 else jnp.concatenate(parts, axis=1)
    if page_format.padding:  # nothing, but not a number perhaps
        lane = lax.broadcasted_iota(jnp.int32, found.shape, 1)
        found = jnp.where(lane < page_format.key_dim, found, 0)
    bits = 8 * page_format.dtype.itemsize
    if bits < 32:
        found = (found >> (place * bits)).astype(jnp.dtype(f"int{bits}"))
    return pltpu.bitcast(found, page_format.dtype)


def _rows(words: Any, word: Any) -> jax.Array:
    """A word of each token, [tokens, 128]."""
    num_pages, page_size, stride = words.shape[:3]
    if len(words.shape) == 4:  # interpreted
        return words[:, :, word, :].reshape(-1, LANES)
    count = num_pages * page_size
    return words.reshape(count * stride, LANES)[pl.ds(word, count, stride), :]


def keep_from(words: Any, start: jax.Array) -> None:
    """Zeros the tokens of a page in fast memory before one."""
    rows, row, per_token = _numbered(words)
    rows[...] = jnp.where(row >= start * per_token, rows[...], 0)


def keep_until(words: Any, stop: jax.Array) -> None:
    """Zeros the tokens of a page in fast memory from one on."""
    rows, row, per_token = _numbered(words)
    rows[...] = jnp.where(row < stop * per_token, rows[...], 0)


def _numbered(words: Any) -> tuple[Any, jax.Array, int]:
    """A page's rows of words, the number of each, and how many a token has."""
    page_size, stride = words.shape[:2]
    rows = words if len(words.shape) == 3 else words.reshape(page_size * stride, LANES)
    number = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return rows, number, rows.shape[0] // page_size


def _per_word(page_format: PageFormat) -> int:
    return 4 // page_format.dtype.itemsize


def _word_and_place(page_format: PageFormat, which: int, head: Any) -> tuple[Any, Any]:
    """Which word of a token holds a head's row, and at which place in it."""
    apart = page_format.num_arrays == 2 or page_format.shares_rows
    row = head if apart else 2 * head + which
    per_word = _per_word(page_format)  # a power of two
    return row >> (per_word.bit_length() - 1), row & (per_word - 1)
