"""The order of work: a flat walk over (segment, block), laid out in XLA and read by the kernel.

A *segment* is the part of one query's tokens that one output row is for: all of them, or one of
`num_splits` parts. A *block* is what one buffer holds: a fixed number of pages. A core walks
all blocks of its segments one after the other, so that what is fetched next never depends on
where a query's tokens end. Empty segments are linked past, and several cores share one walk by
cutting it into pieces of equally many blocks, wherever in a query's tokens that falls.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_FEW_SEGMENTS = 1024


class Schedule(NamedTuple):
    """The walk of every core, as flat int32 arrays for scalar memory.

    Entry `core * (num_segments + 1) + segment`; the last segment of a core is a sentinel without
    blocks, which links to itself.

    Attributes:
      first: the segment's first block on this core.
      end: one past its last block on this core.
      full_end: blocks before this one hold only tokens below `stop`.
      link: the core's next segment that is not empty, or the sentinel.
      entry: [num_cores] the core's first segment that is not empty, or the sentinel.
      start: [queries] first token to attend to.
      stop: [queries] one past the last.
    """

    first: Int[Array, " entries"]
    end: Int[Array, " entries"]
    full_end: Int[Array, " entries"]
    link: Int[Array, " entries"]
    entry: Int[Array, " num_cores"]
    start: Int[Array, " queries"]
    stop: Int[Array, " queries"]


def schedule(
    start: Int[Array, " queries"],
    stop: Int[Array, " queries"],
    *,
    block_tokens: int,
    num_splits: int = 1,
    num_cores: int = 1,
) -> tuple[Schedule, Bool[Array, "num_cores queries num_splits"]]:
    """Lays out the walk.

    Args:
      start: first token of each query, within its first page.
      stop: one past its last token; `start >= stop` reads nothing.
      block_tokens: tokens per block.
      num_splits: segments per query; they get equally many blocks, but for the last.
      num_cores: cores that share the blocks evenly, each a contiguous piece of the walk.

    Returns:
      The schedule, and which segments have blocks on which core: the others' output is not written.
    """
    num_queries = start.shape[0]
    num_blocks = jnp.where(start < stop, -(-stop // block_tokens), 0)
    per_split = -(-num_blocks // num_splits)
    split = jnp.arange(num_splits, dtype=jnp.int32)
    first = jnp.minimum(split * per_split[:, None], num_blocks[:, None]).reshape(-1)
    end = jnp.minimum((split + 1) * per_split[:, None], num_blocks[:, None]).reshape(-1)
    first, end = (first[None], end[None]) if num_cores == 1 else _cut(first, end, num_cores)
    held = first < end
    full_end = jnp.minimum(end, jnp.repeat(stop // block_tokens, num_splits))
    next_held = _next_index(held)
    sentinel = jnp.full((num_cores, 1), num_queries * num_splits, jnp.int32)
    flat = lambda values, last: jnp.concatenate([values, last], axis=1).reshape(-1)
    zero = jnp.zeros_like(sentinel)
    first, end, full_end = (flat(x, zero) for x in (first, end, full_end))
    link = flat(next_held[:, 1:], jnp.concatenate([sentinel, sentinel], axis=1))
    arrays = Schedule(first, end, full_end, link, next_held[:, 0], start, stop)
    return arrays, held.reshape(num_cores, num_queries, num_splits)


def _cut(first: jax.Array, end: jax.Array, num_cores: int) -> tuple[jax.Array, jax.Array]:
    """Each core's part of the segments, [num_cores, num_segments]: as many blocks for each core."""
    after = jnp.cumsum(end - first, dtype=jnp.int32)
    before = after - (end - first)
    share = -(-after[-1] // num_cores)
    low = share * jnp.arange(num_cores, dtype=jnp.int32)[:, None]
    high = low + share
    cut = lambda bound: first + jnp.clip(bound - before, 0, end - first)
    return cut(low), cut(high)


def _next_index(held: Bool[Array, "rows columns"]) -> Int[Array, "rows columns"]:
    """The first column at or after each that is held, or the number of columns."""
    columns = held.shape[1]
    index = jnp.arange(columns, dtype=jnp.int32)
    if columns > _FEW_SEGMENTS:
        return lax.cummin(jnp.where(held, index, jnp.int32(columns)), axis=1, reverse=True)
    # One fused reduction, where a scan is many small steps.
    here = held[:, None, :] & (index >= index[:, None])
    return jnp.min(jnp.where(here, index, jnp.int32(columns)), axis=2)


class Cursor(NamedTuple):
    """Where one is on the walk."""

    segment: jax.Array
    block: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """One core's walk, read inside a kernel; `schedule` holds references to scalar memory."""

    schedule: Any
    core: jax.Array | int
    num_segments: int
    num_splits: int

    def _index(self, segment: jax.Array) -> jax.Array:
        return self.core * (self.num_segments + 1) + segment

    def begin(self) -> Cursor:
        segment = self.schedule.entry[self.core]
        return Cursor(segment, self.first(segment))

    def done(self, cursor: Cursor) -> jax.Array:
        return cursor.segment >= self.num_segments

    def first(self, segment: jax.Array) -> jax.Array:
        return self.schedule.first[self._index(segment)]

    def end(self, segment: jax.Array) -> jax.Array:
        return self.schedule.end[self._index(segment)]

    def query(self, segment: jax.Array) -> jax.Array:
        return segment if self.num_splits == 1 else lax.div(segment, self.num_splits)

    def starts_segment(self, cursor: Cursor) -> jax.Array:
        return cursor.block == self.first(cursor.segment)

    def settle(self, cursor: Cursor) -> Cursor:
        """Moves a cursor that ran off its segment's end to the next segment."""
        ended = cursor.block >= self.end(cursor.segment)
        segment = jnp.where(ended, self.schedule.link[self._index(cursor.segment)], cursor.segment)
        return Cursor(segment, jnp.where(ended, self.first(segment), cursor.block))

    def advance(self, cursor: Cursor) -> Cursor:
        """Moves on by one block."""
        return self.settle(Cursor(cursor.segment, cursor.block + 1))

    def full_blocks(self, cursor: Cursor) -> jax.Array:
        """How many blocks from here on, in this segment, are fetched whole."""
        full_end = self.schedule.full_end[self._index(cursor.segment)]
        return jnp.maximum(full_end - cursor.block, 0)

    def bounds(self, cursor: Cursor) -> tuple[jax.Array, jax.Array]:
        """`[start, stop)` of the query; only where the walk is not done."""
        query = self.query(cursor.segment)
        return self.schedule.start[query], self.schedule.stop[query]
