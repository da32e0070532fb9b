"""The plan of a step: what each query token reads and each new token's slot, on this device.

Windows, bad tables and the split of pages over devices end here: a backend knows intervals
of pages, and nothing of where they come from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .options import Attention
from .page_format import Axis
from .shard_layout import Split, axis_names
from .varying import vary_over, vary_together, varying_axes


class Reads(NamedTuple):
    """The tokens that each query reads: an interval of one row's pages that this device holds.

    Tokens are numbered through a row's pages: token 0 is the first slot of `ids[row, 0]`. A query
    reads the tokens `[start, stop)`; `start` lies in the row's first page, and `start == stop == 0`
    where it reads none. Entries of `ids` at or past `ceil(stop / page_size)` are arbitrary and are
    never looked up.
    """

    ids: Int[Array, "rows pages"]  # local, those that this device holds moved to the left
    row: Int[Array, " queries"] | None  # None where query `i` reads row `i`, as in decoding
    start: Int[Array, " queries"]
    stop: Int[Array, " queries"]

    def ids_by_query(self) -> Int[Array, "queries pages"]:
        """The page ids of each query."""
        return self.ids if self.row is None else self.ids[self.row]


class Writes(NamedTuple):
    """Where each new token goes; `page == num_pages` drops it."""

    page: Int[Array, " tokens"]
    slot: Int[Array, " tokens"]


class Plan(NamedTuple):
    """What follows from lengths and tables alone, once per step."""

    reads: Reads  # of this device
    invalid: Bool[Array, " queries"]  # whose sequence has a bad table or length
    work: Any  # the backend's own, made from `reads`


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
        seqs_first = _linear_index(split.layout.seqs) * seqs_num_pages
        first = seqs_first + _linear_index(context) * num_local_pages
        return cls(first, num_local_pages, seqs_first, seqs_num_pages)


def _linear_index(axis: Axis) -> jax.Array | int:
    names = axis_names(axis)
    return lax.axis_index(names) if names else 0


def make_plan(
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    page_size: int,
    pages: PageRange,
    attention: Attention,
    prepare: Callable[[Reads], Any],
    *,
    piece: int | None = None,
) -> Plan:
    """Plans a decode step: one query per sequence, its last token.

    A page is needed if it holds a position in `[context_len - window, context_len)`. A sequence is
    invalid, and reads nothing, if its context is negative, longer than `max_context_len` or than
    its table, or if a needed entry is not a page that its `seqs` shard holds. All devices that
    share a sequence come to the same verdict, without communication: they see the same table.

    `prepare` is the backend's, which makes its work of the reads. Tables of more than `piece`
    columns are looked up that many at a time, as far as the longest context goes.
    """
    limit = block_tables.shape[1] * page_size
    if attention.max_context_len is not None:
        limit = min(limit, attention.max_context_len)
        block_tables = block_tables[:, : -(-limit // page_size)]
    invalid = (context_lens < 0) | (context_lens > limit)
    stop = jnp.where(invalid, 0, context_lens)
    start = jnp.zeros_like(stop)
    if attention.window is not None:  # from here on, tables and tokens begin with its first page
        start = jnp.maximum(stop - attention.window, 0)
        first_page, start = start // page_size, start % page_size
        stop -= first_page * page_size
        most = -(-(attention.window - 1) // page_size) + 1
        block_tables = _from_column(block_tables, first_page, most)
    piece = piece or block_tables.shape[1]
    found = _look_up(start, stop, block_tables, page_size, pages, piece)
    invalid |= found.bad
    # Of the needed pages only the first has tokens before the window, and only the last has room.
    start, stop = (jnp.where(invalid, 0, tokens) for tokens in (found.start, found.stop))
    reads = Reads(found.ids, row=None, start=start, stop=stop)
    return Plan(reads, invalid, prepare(reads))


class _Found(NamedTuple):
    """What the columns of the tables that were looked up say; a row per sequence."""

    bad: jax.Array  # whether a needed page is not of this `seqs` shard
    start: jax.Array  # tokens before the window, in pages of this device
    stop: jax.Array  # tokens up to the end, likewise
    held: jax.Array  # pages of this device
    ids: jax.Array  # which they are, moved to the left where others lie between them


def _look_up(
    start: jax.Array,
    stop: jax.Array,
    tables: jax.Array,
    page_size: int,
    pages: PageRange,
    piece: int,
) -> _Found:
    """Looks up the pages with tokens in `[start, stop)`; in a wide table, no columns past those."""
    rows, columns = tables.shape
    scattered = pages.num_pages != pages.seqs_num_pages

    def look_up(first_column: jax.Array | int, some: jax.Array, found: _Found) -> _Found:
        column = first_column + jnp.arange(some.shape[1], dtype=jnp.int32)
        filled = jnp.clip(stop[:, None] - page_size * column, 0, page_size)  # tokens in each page
        skipped = jnp.clip(start[:, None] - page_size * column, 0, page_size)
        needed = filled > skipped
        usable = _within(some, pages.seqs_first, pages.seqs_num_pages)
        held = needed & _within(some, pages.first, pages.num_pages)
        total = lambda x: jnp.sum(jnp.where(held, x, 0), axis=1, dtype=jnp.int32)
        ids = found.ids
        if scattered and some.shape[1] == columns:
            ids = compact(some - pages.first, held)
        elif scattered:
            ids = _append(ids, found.held, some - pages.first, held)
        return _Found(
            found.bad | jnp.any(needed & ~usable, axis=1),
            found.start + total(skipped),
            found.stop + total(filled),
            found.held + total(1),
            ids,
        )

    zeros = jnp.zeros(rows, jnp.int32)
    nothing = _Found(zeros > 0, zeros, zeros, zeros, tables - pages.first)
    if columns <= piece:
        return look_up(0, tables, nothing)
    # All devices that share a sequence come to the same verdict; the rest is each device's own.
    axes = varying_axes(tables, stop)
    own = axes | varying_axes(nothing.ids)
    bad, *others = nothing
    nothing = _Found(vary_over(bad, axes), *(vary_over(x, own) for x in others))
    tables = jnp.pad(tables, ((0, 0), (0, -columns % piece)))

    def body(chunk: jax.Array, found: _Found) -> _Found:
        some = lax.dynamic_slice_in_dim(tables, chunk * piece, piece, axis=1)
        return look_up(chunk * piece, some, found)

    return lax.fori_loop(0, -(-jnp.max(stop) // (page_size * piece)), body, nothing)


def _from_column(tables: jax.Array, first: jax.Array, most: int) -> jax.Array:
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


def _append(ids: jax.Array, count: jax.Array, values: jax.Array, keep: jax.Array) -> jax.Array:
    """Puts the kept values of each row behind the first `count` ids."""
    rows, columns = ids.shape
    column = count[:, None] + jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    at = (jnp.arange(rows)[:, None], jnp.where(keep, column, columns))
    return ids.at[at].set(values, mode="drop")


def plan_writes(
    seq_ids: Int[Array, " tokens"],
    positions: Int[Array, " tokens"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    page_size: int,
    pages: PageRange,
    split: Split | None,
) -> Writes:
    """Finds each new token's slot among the pages of this device; the others are dropped."""
    num_rows, max_blocks = block_tables.shape
    seq_shard = 0 if split is None else _linear_index(split.layout.seqs)
    row = seq_ids - seq_shard * num_rows
    block, slot = positions // page_size, positions % page_size
    inside = (row >= 0) & (row < num_rows) & (block >= 0) & (block < max_blocks)
    page = block_tables.at[row, block].get(mode="clip") - pages.first
    held = inside & _within(page, 0, pages.num_pages)
    return Writes(jnp.where(held, page, pages.num_pages), slot)


def _within(ids: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    return (ids >= first) & (ids < first + count)


def compact(
    values: Int[Array, "rows columns"], keep: Bool[Array, "rows columns"]
) -> Int[Array, "rows columns"]:
    """Moves the kept entries of each row to its left end, in order; the rest is arbitrary."""
    values, keep = vary_together(values, keep)
    return lax.platform_dependent(values, keep, tpu=_compact_by_shifts, default=_compact_by_scatter)


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
