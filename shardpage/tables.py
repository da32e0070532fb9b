"""Block tables on one device: which of their pages it holds, moved to the left of their row.

The same on every device that shares a sequence, but for which pages are its own: they see the same
tables, and come to the same verdict about them without communication.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .page_format import Axis
from .shard_layout import Split, axis_names
from .varying import vary_over, vary_together, varying_axes


class PageRange(NamedTuple):
    """Ranges of global page ids: this device's own, and all that its sequences may use."""

    first: jax.Array | int
    num_pages: int
    seqs_first: jax.Array | int
    seqs_num_pages: int

    @classmethod
    def here(cls, num_local_pages: int, split: Split | None) -> "PageRange":
        """This device's range; inside the `shard_map` of `split`, or without one (None)."""
        if split is None:
            return cls(0, num_local_pages, 0, num_local_pages)
        context = split.layout.context
        seqs_num_pages = num_local_pages * lax.axis_size(axis_names(context))
        seqs_first = linear_index(split.layout.seqs) * seqs_num_pages
        first = seqs_first + linear_index(context) * num_local_pages
        return cls(first, num_local_pages, seqs_first, seqs_num_pages)

    @property
    def scattered(self) -> bool:
        """Whether a sequence has pages on other devices too."""
        return self.num_pages != self.seqs_num_pages


def linear_index(axis: Axis) -> jax.Array | int:
    """This device's place along one mesh axis, several or none."""
    names = axis_names(axis)
    return lax.axis_index(names) if names else 0


class Tokens(NamedTuple):
    """Intervals `[start, stop)` of the tokens of a row."""

    start: Int[Array, " intervals"]
    stop: Int[Array, " intervals"]


class Found(NamedTuple):
    """What the columns of the tables that were looked up say."""

    bad: Bool[Array, " rows"]  # a needed page is not of this `seqs` shard
    ids: Int[Array, "rows columns"]  # pages of this device, in order; the rest is arbitrary
    held: Int[Array, " rows"]  # how many they are, where a sequence has others elsewhere
    tokens: Tokens  # of each query, counted in pages of this device


def look_up(
    needed: Tokens,
    row: Int[Array, " queries"] | None,
    tokens: Tokens,
    tables: Int[Array, "rows columns"],
    page_size: int,
    pages: PageRange,
    piece: int,
) -> Found:
    """Looks up the pages of the tokens that each row needs, and counts queries' tokens in them.

    Tables of more than `piece` columns are looked up that many at a time, as far as needed.

    Args:
      needed: of each row, what its queries read together.
      row: each query's; None where query `i` reads row `i`.
      tokens: what each query reads.
    """
    rows, columns = tables.shape

    def look_up_piece(first: jax.Array | int, some: jax.Array, found: Found) -> Found:
        before = page_size * (first + jnp.arange(some.shape[1], dtype=jnp.int32))
        taken = lambda tokens: jnp.clip(tokens[:, None] - before, 0, page_size)  # of each page
        is_needed = taken(needed.stop) > taken(needed.start)
        bad = found.bad | jnp.any(
            is_needed & ~within(some, pages.seqs_first, pages.seqs_num_pages), axis=1
        )
        if not pages.scattered:
            return found._replace(bad=bad)
        held = is_needed & within(some, pages.first, pages.num_pages)
        if row is None:
            total = lambda x: jnp.sum(jnp.where(held, taken(x), 0), axis=1, dtype=jnp.int32)
            start, stop = map(total, tokens)
        else:
            one = held.astype(jnp.int32)
            ahead = found.held[:, None] + jnp.cumsum(one, axis=1, dtype=jnp.int32) - one
            start = _slots(tokens.start, 0, row, held, ahead, page_size, first)
            stop = _slots(tokens.stop - 1, 1, row, held, ahead, page_size, first)
        if some.shape[1] == columns:
            ids = compact(some - pages.first, held)
        else:
            ids = _append(found.ids, found.held, some - pages.first, held)
        counted = Tokens(found.tokens.start + start, found.tokens.stop + stop)
        return Found(bad, ids, found.held + jnp.sum(held, axis=1, dtype=jnp.int32), counted)

    zeros = jnp.zeros(rows, jnp.int32)
    counted = jax.tree.map(jnp.zeros_like, tokens) if pages.scattered else tokens
    found = Found(zeros > 0, tables - pages.first, zeros, counted)
    if columns <= piece:
        return look_up_piece(0, tables, found)
    # All devices that share a sequence come to the same verdict; the rest is each device's own.
    axes = varying_axes(tables, needed)
    own = axes | varying_axes(found)
    bad, *others = found
    found = Found(vary_over(bad, axes), *jax.tree.map(lambda x: vary_over(x, own), others))
    padded = jnp.pad(tables, ((0, 0), (0, -columns % piece)))

    def body(number: jax.Array, found: Found) -> Found:
        some = lax.dynamic_slice_in_dim(padded, number * piece, piece, axis=1)
        return look_up_piece(number * piece, some, found)

    return lax.fori_loop(0, -(-jnp.max(needed.stop) // (page_size * piece)), body, found)


def _slots(
    token: Int[Array, " queries"],
    more: int,
    row: Int[Array, " queries"],
    held: Bool[Array, "rows columns"],
    ahead: Int[Array, "rows columns"],
    page_size: int,
    first_column: jax.Array | int,
) -> Int[Array, " queries"]:
    """The slots before each token, and `more`, in held pages up to its own; 0 if that lies
    in no column."""
    column = token // page_size - first_column
    inside = (column >= 0) & (column < held.shape[1])
    at = lambda array: array.at[row, column].get(mode="clip")
    slots = page_size * at(ahead) + jnp.where(at(held), token % page_size + more, 0)
    return jnp.where(inside, slots, 0)


def within(ids: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    """Which ids lie in `[first, first + count)`."""
    return (ids >= first) & (ids < first + count)


def from_column(tables: jax.Array, first: jax.Array, most: int) -> jax.Array:
    """Each row from a column of its own on, `most` columns; the last ones may repeat."""
    columns = tables.shape[1]
    kept = min(most, columns)
    tables, first = vary_together(tables, first)

    def by_gather(tables: jax.Array, first: jax.Array) -> jax.Array:
        column = jnp.minimum(first[:, None] + jnp.arange(kept, dtype=jnp.int32), columns - 1)
        return jnp.take_along_axis(tables, column, axis=1)

    def by_shifts(tables: jax.Array, first: jax.Array) -> jax.Array:
        keep = jnp.arange(columns, dtype=jnp.int32) >= first[:, None]
        return _compact_by_shifts(tables, keep)[:, :kept]

    return lax.platform_dependent(tables, first, tpu=by_shifts, default=by_gather)


def compact(
    values: Int[Array, "rows columns"], keep: Bool[Array, "rows columns"]
) -> Int[Array, "rows columns"]:
    """Moves the kept entries of each row to its left end, in order; the rest is arbitrary."""
    values, keep = vary_together(values, keep)
    return lax.platform_dependent(values, keep, tpu=_compact_by_shifts, default=_compact_by_scatter)


def _append(ids: jax.Array, count: jax.Array, values: jax.Array, keep: jax.Array) -> jax.Array:
    """Puts the kept values of each row behind the first `count` ids."""
    rows, columns = ids.shape
    column = count[:, None] + jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    at = (jnp.arange(rows)[:, None], jnp.where(keep, column, columns))
    return ids.at[at].set(values, mode="drop")


def _compact_by_scatter(values: jax.Array, keep: jax.Array) -> jax.Array:
    return _append(jnp.zeros_like(values), jnp.zeros(len(values), jnp.int32), values, keep)


def _compact_by_shifts(values: jax.Array, keep: jax.Array) -> jax.Array:
    """For TPUs, where a sort or a scatter would be the slowest part of the plan.

    An entry moves left by the number of dropped entries before it. That distance never falls
    along a row, so moving by one bit of it at a time, lowest first, never makes two kept entries
    meet (Hacker's Delight, 2nd ed., 7-4, "compress"): log2(columns) elementwise passes.
    """
    columns = values.shape[1]
    distance = jnp.where(keep, jnp.cumsum(~keep, axis=1, dtype=jnp.int32), 0)

    def move(bit: jax.Array, state: tuple[jax.Array, jax.Array]):
        values, distance = state
        step = jnp.int32(1) << bit
        arriving_values, arriving = (_shift_left(x, step) for x in (values, distance))
        arrives = (arriving >> bit) & 1 == 1
        leaves = (distance >> bit) & 1 == 1
        # An entry that left must not be seen again: what stays behind it has distance 0.
        values = jnp.where(arrives, arriving_values, values)
        distance = jnp.where(arrives, arriving, jnp.where(leaves, 0, distance))
        return values, distance

    num_bits = max(columns - 1, 0).bit_length()
    return lax.fori_loop(0, num_bits, move, (values, distance))[0]


def _shift_left(x: jax.Array, step: jax.Array) -> jax.Array:
    """`x[:, step:]`, zero-filled on the right."""
    columns = x.shape[1]
    return lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (0, columns))), step, columns, axis=1)
