"""Decode attention over pages: one persistent kernel per core.

    ids    |w0|w1|w2|...            (tables too large for scalar memory: ids run ahead of pages)
    pages     |b0|b1|b2|b3|...      a ring of slots, refilled as soon as a block was used
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

    buffers: Sequence[Any]  # [slots, block_pages, *page_shape] for each cache array
    queries: Any  # [slots, rows, row_dim]: those of the segment that starts in the slot
    query: Any  # [rows, row_dim] of the segment at work
    state: softmax.State
    results: Any  # [2, rows, out_lanes]
    ids: Any  # [table_entries * 128] in scalar memory
    page_semaphores: Any  # [slots]
    query_semaphores: Any  # [slots]
    result_semaphores: Any  # [2]
    id_semaphores: Any  # [table_entries]


class Position(NamedTuple):
    """Where the pipeline stands; all int32 scalars."""

    at: Cursor  # the block to work on
    fetch: Cursor  # `slots` blocks on: the next to fetch
    ids: Cursor  # `table_entries` blocks further on: the next whose page ids to fetch
    slot: jax.Array  # of `at`, and to be refilled by `fetch`
    entry: jax.Array  # of `fetch` in the ring of ids
    finished: jax.Array  # segments so far


class Kernel:
    """One core's run. Its methods are the phases of the pipeline."""

    def __init__(self, config: Config, logits, schedule, table, query, caches, out, scratch):
        core = pl.program_id(0)
        by_heads = config.cores.by_heads
        self.config, self.format, self.sizes = config, config.geometry.format, config.sizes
        self.scratch, self.logits = scratch, logits
        self.query = query.at[core if by_heads else 0]
        self.out = out.at[core]
        walk_core = 0 if by_heads else core
        self.walk = Walk(schedule, walk_core, config.num_segments, config.num_splits)
        block_pages = self.sizes.block_pages
        if self.sizes.table_entries:
            self.table = PagedTable(
                table, scratch.ids, scratch.id_semaphores, block_pages, self.walk
            )
        else:
            self.table = ResidentTable(
                table, table.shape[0] // config.num_queries, block_pages, self.walk
            )
        self.pages = PageRing(
            self.format,
            block_pages,
            caches,
            scratch.buffers,
            scratch.page_semaphores,
            core * self.format.num_kv_heads if by_heads else 0,
        )

    def run(self) -> None:
        position = self.fill()
        position = lax.while_loop(lambda p: ~self.walk.done(p.at), self.step, position)
        self.drain(position)

    def fill(self) -> Position:
        """Starts the first copies: one block a slot."""
        zero = jnp.int32(0)
        begin = self.walk.begin()
        position = Position(begin, begin, begin, zero, zero, zero)

        def start_ids(_, position: Position) -> Position:
            return self.start_ids(position)

        def start_block(_, position: Position) -> Position:
            return self.start_block(position)

        if self.sizes.table_entries:
            position = lax.fori_loop(0, self.sizes.table_entries, start_ids, position)
        position = lax.fori_loop(0, self.sizes.slots, start_block, position)
        return position._replace(at=begin, slot=zero)

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
        self.copy_query(position.at, position.slot).wait()
        self.scratch.query[...] = self.scratch.queries[position.slot]
        softmax.reset(self.scratch.state)

    def count_plain(self, position: Position) -> jax.Array:
        """How many blocks need no mask and fetch a full block that starts no segment."""
        at, fetch = position.at, position.fetch
        start, _ = self.walk.bounds(at)
        masked = (at.block == 0) & (start > 0)
        ahead = self.walk.full_blocks(fetch)
        return jnp.where(
            masked | self.walk.starts_segment(fetch),
            0,
            jnp.minimum(self.walk.full_blocks(at), ahead),
        )

    def plain_block(self, position: Position) -> Position:
        self.pages.wait_full(position.slot)
        self.attend(position.slot, 0, self.sizes.block_pages, None)
        self.table.wait(position.entry)
        page_ids = self.table.page_ids(position.fetch, position.entry)
        self.pages.start_full(page_ids, position.slot)
        position = self.start_ids(position)
        return position._replace(
            at=position.at._replace(block=position.at.block + 1),
            fetch=position.fetch._replace(block=position.fetch.block + 1),
            slot=self.next_slot(position.slot),
        )

    def any_block(self, position: Position) -> Position:
        """Works on a block of which only some tokens may be seen."""
        first_token = position.at.block * self.config.block_tokens
        start, stop = self.walk.bounds(position.at)
        num_pages = self.num_pages(position.at)
        self.pages.wait(num_pages, position.slot)
        chunk_pages = self.sizes.chunk_pages

        @pl.loop(0, _cdiv(num_pages, chunk_pages))
        def _(chunk):
            page = chunk * chunk_pages
            token = first_token + page * self.format.page_size
            self.attend(position.slot, page, chunk_pages, softmax.Span(start, stop, token))

        at = position.at._replace(block=position.at.block + 1)
        return self.start_block(position)._replace(at=at)

    def attend(self, slot, first_page, num_pages: int, span: softmax.Span | None) -> None:
        chunk = softmax.Chunk(
            self.config.geometry, self.scratch.buffers, slot, first_page, num_pages
        )
        softmax.attend(chunk, self.scratch.query, self.scratch.state, self.logits, span)

    def start_block(self, position: Position) -> Position:
        """Fetches the next block, if there is one, into the current slot."""
        fetch, slot, entry = position.fetch, position.slot, position.entry
        self.table.wait(entry)

        @pl.when(~self.walk.done(fetch))
        def _():
            page_ids = self.table.page_ids(fetch, entry)
            self.pages.start(page_ids, self.num_pages(fetch), slot)

            @pl.when(self.walk.starts_segment(fetch))
            def _():
                self.copy_query(fetch, slot).start()

        position = self.start_ids(position)
        return position._replace(fetch=self.walk.advance(fetch), slot=self.next_slot(slot))

    def start_ids(self, position: Position) -> Position:
        """Fetches the page ids of a block yet to be fetched, into the current entry."""
        if not self.sizes.table_entries:
            return position
        self.table.start(position.ids, position.entry)
        entry = _next(position.entry, self.sizes.table_entries)
        return position._replace(ids=self.walk.advance(position.ids), entry=entry)

    def finish(self, position: Position) -> None:
        """Sends a segment's result off, through one of two buffers."""
        which = position.finished & 1
        segment = position.at.segment
        pl.when(position.finished >= 2)(lambda: self.copy_result(segment, which).wait())
        softmax.write_result(self.scratch.state, self.scratch.results.at[which])
        self.copy_result(segment, which).start()

    def drain(self, position: Position) -> None:
        """Waits for the results that are still on their way, and for ids that nobody needed."""
        for which in range(2):
            pl.when(position.finished > which)(
                lambda which=which: self.copy_result(0, which).wait()
            )
        if self.sizes.table_entries:
            pl.loop(0, self.sizes.table_entries)(lambda entry: self.table.wait(entry))

    def num_pages(self, cursor: Cursor) -> jax.Array:
        """How many pages of a block hold tokens."""
        _, stop = self.walk.bounds(cursor)
        left = _cdiv(stop, self.format.page_size) - cursor.block * self.sizes.block_pages
        return jnp.minimum(left, self.sizes.block_pages)

    def next_slot(self, slot: jax.Array) -> jax.Array:
        return _next(slot, self.sizes.slots)

    def copy_query(self, cursor: Cursor, slot: jax.Array):
        return pltpu.make_async_copy(
            self.query.at[self.walk.query(cursor.segment)],
            self.scratch.queries.at[slot],
            self.scratch.query_semaphores.at[slot],
        )

    def copy_result(self, segment: jax.Array | int, which: jax.Array | int):
        return pltpu.make_async_copy(
            self.scratch.results.at[which],
            self.out.at[segment],
            self.scratch.result_semaphores.at[which],
        )


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
    buffer = pltpu.VMEM((sizes.slots, sizes.block_pages, *page_format.page_shape), dtype)
    entries = max(sizes.table_entries, 1)
    return Scratch(
        buffers=(buffer,) * page_format.num_arrays,
        queries=pltpu.VMEM((sizes.slots, rows, row_dim), dtype),
        query=pltpu.VMEM((rows, row_dim), dtype),
        state=softmax.State(
            maximum=pltpu.VMEM((rows, LANES), jnp.float32),
            total=pltpu.VMEM((rows, LANES), jnp.float32),
            out=pltpu.VMEM((rows, row_dim), jnp.float32),
        ),
        results=pltpu.VMEM((2, rows, geometry.out_lanes), jnp.float32),
        ids=pltpu.SMEM((entries * LANES,), jnp.int32),
        page_semaphores=pltpu.SemaphoreType.DMA((sizes.slots,)),
        query_semaphores=pltpu.SemaphoreType.DMA((sizes.slots,)),
        result_semaphores=pltpu.SemaphoreType.DMA((2,)),
        id_semaphores=pltpu.SemaphoreType.DMA((entries,)),
    )
