"""The plan of a call: which local pages a device attends over, from the global block table."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .kv_layout import Axis
from .layout import ShardLayout, axis_names
from .vma import vary_together


class LocalPages(NamedTuple):
    """The pages of each sequence that this device holds and needs, compacted to the left.

    Tokens are numbered through the compacted pages: token 0 is the first slot of `ids[s, 0]`.
    Sequence `s` attends over its tokens in `[start, stop)`; `start` lies in its first page, and
    `start == stop == 0` where the device holds none. Entries of `ids` at or past
    `ceil(stop / page_size)` are arbitrary and must not be looked at.
    """

    ids: Int[Array, "num_seqs max_local_pages"]
    start: Int[Array, " num_seqs"]
    stop: Int[Array, " num_seqs"]


class PageRange(NamedTuple):
    """Ranges of global page ids: this device's own, and all that its sequences may use."""

    first: jax.Array | int
    num_pages: int
    seqs_first: jax.Array | int
    seqs_num_pages: int


def local_range(num_local_pages: int, layout: ShardLayout | None) -> PageRange:
    """This device's range; inside the `shard_map` of `layout`, or without one (None)."""
    if layout is None:
        return PageRange(0, num_local_pages, 0, num_local_pages)
    seqs_num_pages = num_local_pages * lax.axis_size(axis_names(layout.context))
    seqs_first = seq_shard_index(layout) * seqs_num_pages
    first = seqs_first + _linear_index(layout.context) * num_local_pages
    return PageRange(first, num_local_pages, seqs_first, seqs_num_pages)


def seq_shard_index(layout: ShardLayout | None) -> jax.Array | int:
    """Which of the `seqs` shards this device belongs to; 0 without a layout."""
    return 0 if layout is None else _linear_index(layout.seqs)


def _linear_index(axis: Axis) -> jax.Array | int:
    names = axis_names(axis)
    return lax.axis_index(names) if names else 0


def plan(
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    page_size: int,
    pages: PageRange,
    *,
    max_context_len: int | None = None,
    sliding_window: int | None = None,
) -> tuple[LocalPages, Bool[Array, " num_seqs"]]:
    """Finds the local pages of each sequence, and the sequences that are invalid.

    A page is needed if it holds a position in `[context_len - sliding_window, context_len)`.
    A sequence is invalid if its context is negative, longer than `max_context_len` or than its
    table, or if a needed entry is not a page that its `seqs` shard holds. All devices that share
    a sequence come to the same verdict, without communication: they see the same table.

    Returns:
      The local pages, none for invalid sequences; and a mask of the invalid ones.
    """
    limit = block_tables.shape[1] * page_size
    if max_context_len is not None:
        limit = min(limit, max_context_len)
        block_tables = block_tables[:, : -(-limit // page_size)]
    invalid = (context_lens < 0) | (context_lens > limit)
    lens = jnp.where(invalid, 0, context_lens)
    first_token = jnp.zeros_like(lens)
    if sliding_window is not None:
        first_token = jnp.maximum(lens - sliding_window, 0)

    block_start = page_size * jnp.arange(block_tables.shape[1], dtype=jnp.int32)
    filled = jnp.clip(lens[:, None] - block_start, 0, page_size)  # tokens in each page
    skipped = jnp.clip(first_token[:, None] - block_start, 0, page_size)  # before the window
    needed = filled > skipped
    usable = _within(block_tables, pages.seqs_first, pages.seqs_num_pages)
    held = needed & _within(block_tables, pages.first, pages.num_pages)
    invalid |= jnp.any(needed & ~usable, axis=1)

    ids = block_tables - pages.first
    if sliding_window is not None or pages.num_pages != pages.seqs_num_pages:
        ids = compact(ids, held)

    def total(tokens: jax.Array) -> jax.Array:
        held_tokens = jnp.sum(jnp.where(held, tokens, 0), axis=1, dtype=jnp.int32)
        return jnp.where(invalid, 0, held_tokens)

    # Of the needed pages only the first has tokens before the window, and only the last has room.
    return LocalPages(ids, start=total(skipped), stop=total(filled)), invalid


def _within(ids: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    return (ids >= first) & (ids < first + count)


def compact(
    values: Int[Array, "rows columns"], keep: Bool[Array, "rows columns"]
) -> Int[Array, "rows columns"]:
    """Moves the kept entries of each row to its left end, in order; the rest is arbitrary."""
    values, keep = vary_together(values, keep)
    return lax.platform_dependent(values, keep, tpu=_compact_by_shifts, default=_compact_by_scatter)


def _compact_by_scatter(values: jax.Array, keep: jax.Array) -> jax.Array:
    rows, columns = values.shape
    place = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    at = (jnp.arange(rows)[:, None], jnp.where(keep, place, columns))
    return jnp.zeros_like(values).at[at].set(values, mode="drop")


def _compact_by_shifts(values: jax.Array, keep: jax.Array) -> jax.Array:
    """For TPUs, where a sort or a scatter would be the slowest part of the plan.

    An entry moves left by the number of dropped entries before it. That distance never falls
    along a row, so moving by one bit of it at a time, lowest first, never makes two kept entries
    meet (Hacker's Delight, 2nd ed., 7-4, "compress"): log2(columns) elementwise passes.
    """
    columns = values.shape[1]
    distance = jnp.cumsum(~keep, axis=1, dtype=jnp.int32)
    distance = jnp.where(keep, distance, 0)

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
