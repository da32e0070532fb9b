"""Decode attention over pages: one persistent kernel per core.

    ids    |w0|w1|w2|...            (tables too large for scalar memory: ids run ahead of pages)
    pages     |b0|b1|b2|b3|...      a ring of blocks, each refilled as soon as it was used
    math            |b0|b1|b2|...   the next blocks' pages arrive meanwhile, of whichever query
    out                    |q0| ... a finished query leaves while the next one is worked on

The walk over blocks is flat (see `walk`). Most blocks are *plain*: all their tokens are seen, and
the block that is fetched in their place is full. They run in an inner loop without a branch, in
which the compiler overlaps issuing the copies of one block with the arithmetic of another. The
rest, a few per query, takes the general path: counted copies and masks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import softmax
from .config import Config
from .fetch import PagedTable, PageRing, ResidentTable
from .geometry import LANES
from .walk import Cursor, Walk


class Scratch(NamedTuple):
    """References to what a core keeps in fast memory."""

    buffers: Sequence[Any]  # [ring_blocks, block_pages, *page_shape] for each cache array
    queries: Any  # [ring_blocks, rows, row_dim]: of the segment that starts at this place
    query: Any  # [rows, row_dim] of the segment at work
    state: softmax.State
    results: Any  # [2, rows, out_lanes]
    ids: Any  # [table_entries * 128] in scalar memory
    page_semaphores: Any  # [ring_blocks]
    query_semaphores: Any  # [ring_blocks]
    result_semaphores: Any  # [2]
    id_semaphores: Any  # [table_entries]


class Position(NamedTuple):
    """Where the pipeline stands; all int32 scalars."""

    at: Cursor  # the block to work on
    fetch: Cursor  # `ring_blocks` on: the next to fetch
    ids: Cursor  # `table_entries` blocks further on: the next whose page ids to fetch
    place: jax.Array  # of `at` in the ring of blocks, and to be refilled by `fetch`
    entry: jax.Array  # of `fetch` in the ring of ids
    finished: jax.Array  # segments so far


class Kernel:
    """One core's run. Its methods are the phases of the pipeline."""

    def __init__(self, config: Config, logits, schedule, table, query, caches, out, scratch):
        core = pl.program_id(0)
        by_heads = config.cores.by_heads
        self.config, self.format, self.sizes = config, config.geometry.format, config.sizes
        self.scratch, self.logits = scratch, logits
        self.query, self.out = query.at[core if by_heads else 0], out.at[core]
        walk_core = 0 if by_heads else core
        self.walk = Walk(schedule, walk_core, config.num_segments, config.num_splits)
        pages = self.sizes.block_pages
        if self.sizes.table_entries:
            self.table = PagedTable(table, scratch.ids, scratch.id_semaphores, pages, self.walk)
        else:
            width = table.shape[0] // config.num_queries
            self.table = ResidentTable(table, width, pages, self.walk)
        first_head = core * self.format.num_kv_heads if by_heads else 0
        ring = (scratch.buffers, scratch.page_semaphores)
        self.pages = PageRing(self.format, pages, caches, *ring, first_head)

    def run(self) -> None:
        position = self.fill()
        position = lax.while_loop(lambda p: ~self.walk.done(p.at), self.step, position)
        self.drain(position)

    def fill(self) -> Position:
        """Starts the first copies: one block for each place of the ring."""
        zero, begin = jnp.int32(0), self.walk.begin()
        position = Position(begin, begin, begin, zero, zero, zero)
        start_ids = lambda _, position: self.start_ids(position)
        start_block = lambda _, position: self.start_block(position)
        if self.sizes.table_entries:
            position = lax.fori_loop(0, self.sizes.table_entries, start_ids, position)
        position = lax.fori_loop(0, self.sizes.ring_blocks, start_block, position)
        return position._replace(at=begin, place=zero)

    def step(self, position: Position) -> Position:
        """All plain blocks from here on, then one block that is not."""
        pl.when(self.walk.starts_segment(position.at))(lambda: self.begin(position))
        count = self.count_plain(position)
        position = lax.fori_loop(0, count, lambda _, p: self.plain_block(p), position)
        position = position._replace(fetch=self.walk.settle(position.fetch))
        position = lax.cond(self.ended(position), lambda p: p, self.any_block, position)
        pl.when(self.ended(position))(lambda: self.finish(position))
        finished = position.finished + self.ended(position).astype(jnp.int32)
        return position._replace(at=self.walk.settle(position.at), finished=finished)

    def ended(self, position: Position) -> jax.Array:
        return position.at.block >= self.walk.end(position.at.segment)

    def begin(self, position: Position) -> None:
        """Takes over the query of a segment, and forgets the last one's."""
        self.copy_query(position.at, position.place).wait()
        self.scratch.query[...] = self.scratch.queries[position.place]
        softmax.reset(self.scratch.state)

    def count_plain(self, position: Position) -> jax.Array:
        """How many blocks need no mask and fetch a full block that starts no segment."""
        at, fetch = position.at, position.fetch
        start, _ = self.walk.bounds(at)
        masked = (at.block == 0) & (start > 0)
        ahead = self.walk.full_blocks(fetch)
        none = masked | self.walk.starts_segment(fetch)
        return jnp.where(none, 0, jnp.minimum(self.walk.full_blocks(at), ahead))

    def plain_block(self, position: Position) -> Position:
        self.pages.wait_full(position.place)
        self.attend(position.place, 0, self.sizes.block_pages, None)
        self.table.wait(position.entry)
        page_ids = self.table.page_ids(position.fetch, position.entry)
        self.pages.start_full(page_ids, position.place)
        position = self.start_ids(position)
        return position._replace(
            at=position.at._replace(block=position.at.block + 1),
            fetch=position.fetch._replace(block=position.fetch.block + 1),
            place=_next(position.place, self.sizes.ring_blocks),
        )

    def any_block(self, position: Position) -> Position:
        """Works on a block of which only some tokens may be seen."""
        first_token = position.at.block * self.config.block_tokens
        start, stop = self.walk.bounds(position.at)
        num_pages, chunk_pages = self.num_pages(position.at), self.sizes.chunk_pages
        self.pages.wait(num_pages, position.place)

        @pl.loop(0, _cdiv(num_pages, chunk_pages))
        def _(chunk):
            page = chunk * chunk_pages
            token = first_token + page * self.format.page_size
            self.attend(position.place, page, chunk_pages, softmax.Span(start, stop, token))

        at = position.at._replace(block=position.at.block + 1)
        return self.start_block(position)._replace(at=at)

    def attend(self, place, first_page, num_pages: int, span: softmax.Span | None) -> None:
        pages = (place, first_page, num_pages)
        chunk = softmax.Chunk(self.config.geometry, self.scratch.buffers, *pages)
        softmax.attend(chunk, self.scratch.query, self.scratch.state, self.logits, span)

    def start_block(self, position: Position) -> Position:
        """Fetches the next block, if there is one, to the current place."""
        fetch, place, entry = position.fetch, position.place, position.entry
        self.table.wait(entry)

        @pl.when(~self.walk.done(fetch))
        def _():
            page_ids = self.table.page_ids(fetch, entry)
            self.pages.start(page_ids, self.num_pages(fetch), place)
            starts = self.walk.starts_segment(fetch)
            pl.when(starts)(lambda: self.copy_query(fetch, place).start())

        position = self.start_ids(position)
        fetch = self.walk.advance(fetch)
        return position._replace(fetch=fetch, place=_next(place, self.sizes.ring_blocks))

    def start_ids(self, position: Position) -> Position:
        """Fetches the page ids of a block yet to be fetched, into the current entry."""
        if not self.sizes.table_entries:
            return position
        self.table.start(position.ids, position.entry)
        entry = _next(position.entry, self.sizes.table_entries)
        return position._replace(ids=self.walk.advance(position.ids), entry=entry)

    def finish(self, position: Position) -> None:
        """Sends a segment's result off, through one of two buffers."""
        which, segment = position.finished & 1, position.at.segment
        pl.when(position.finished >= 2)(lambda: self.copy_result(segment, which).wait())
        softmax.write_result(self.scratch.state, self.scratch.results.at[which])
        self.copy_result(segment, which).start()

    def drain(self, position: Position) -> None:
        """Waits for the results that are still on their way, and for ids that nobody needed."""
        for which in range(2):
            wait = lambda which=which: self.copy_result(0, which).wait()
            pl.when(position.finished > which)(wait)
        if self.sizes.table_entries:
            pl.loop(0, self.sizes.table_entries)(self.table.wait)

    def num_pages(self, cursor: Cursor) -> jax.Array:
        """How many pages of a block hold tokens."""
        _, stop = self.walk.bounds(cursor)
        left = _cdiv(stop, self.format.page_size) - cursor.block * self.sizes.block_pages
        return jnp.minimum(left, self.sizes.block_pages)

    def copy_query(self, cursor: Cursor, place: jax.Array):
        query, target = self.walk.query(cursor.segment), self.scratch.queries.at[place]
        semaphore = self.scratch.query_semaphores.at[place]
        return pltpu.make_async_copy(self.query.at[query], target, semaphore)

    def copy_result(self, segment: jax.Array | int, which: jax.Array | int):
        result, target = self.scratch.results.at[which], self.out.at[segment]
        return pltpu.make_async_copy(result, target, self.scratch.result_semaphores.at[which])


def _next(index: jax.Array, count: int) -> jax.Array:
    return jnp.where(index + 1 == count, 0, index + 1)


def _cdiv(value: jax.Array, divisor: int) -> jax.Array:
    return lax.div(value + (divisor - 1), divisor)


def kernel(schedule, table, query, caches, out, *scratch, config: Config, logits) -> None:
    """The body of the `pallas_call`."""
    Kernel(config, logits, schedule, table, query, caches, out, Scratch(*scratch)).run()


def scratch_shapes(config: Config) -> Scratch:
    geometry, page_format, sizes = config.geometry, config.geometry.format, config.sizes
    rows, row_dim, dtype = geometry.rows, page_format.row_dim, page_format.dtype
    ring, entries = sizes.ring_blocks, max(sizes.table_entries, 1)
    buffer = pltpu.VMEM((ring, sizes.block_pages, *page_format.page_shape), dtype)
    return Scratch(
        buffers=(buffer,) * page_format.num_arrays,
        queries=pltpu.VMEM((ring, rows, row_dim), dtype),
        query=pltpu.VMEM((rows, row_dim), dtype),
        state=softmax.State(
            maximum=pltpu.VMEM((rows, LANES), jnp.float32),
            total=pltpu.VMEM((rows, LANES), jnp.float32),
            out=pltpu.VMEM((rows, row_dim), jnp.float32),
        ),
        results=pltpu.VMEM((2, rows, geometry.out_lanes), jnp.float32),
        ids=pltpu.SMEM((entries * LANES,), jnp.int32),
        page_semaphores=pltpu.SemaphoreType.DMA((ring,)),
        query_semaphores=pltpu.SemaphoreType.DMA((ring,)),
        result_semaphores=pltpu.SemaphoreType.DMA((2,)),
        id_semaphores=pltpu.SemaphoreType.DMA((entries,)),
    )
