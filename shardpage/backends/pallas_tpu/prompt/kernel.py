"""Attention of many queries over pages: one persistent kernel per core.

    ids    |b0|b1|b2|b3|...         windows of page ids, for blocks of all tiles
    pages     |b0|b1|b2|...         a ring of blocks
    math            |b0|b1|...      of a block, one KV head after the other

A *tile* is a run of query tokens of one row: it reads keys once for all its queries. The walk is
flat, over the blocks of one tile after the other (see `walk`), so that what is fetched next never
depends on where a tile ends. A tile's queries come while the one before it is worked on, and its
results leave while the next is.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..fetch import filled, in_kernel, page_buffers, parts_of_page
from ..geometry import LANES, SUBLANES
from ..softmax import Logits
from . import softmax
from .config import Config
from .walk import NUM_FIELDS, Schedule, Tile

_UNROLL = 8  # page copies issued between two branches


class Inputs(NamedTuple):
    """References to what the kernel is given."""

    schedule: Schedule  # in scalar memory, but for the spans, in HBM
    ids: Any  # [rows * windows, 1, 128] in HBM
    first_page: Any  # [1] in scalar memory: added to all ids; -1 of no layer, read as any
    query: Any  # [shards, queries, head_rows, row_dim] float32, in HBM
    caches: Sequence[Any]  # in HBM: the arrays, and the scales of tokens
    before: Sequence[Any]  # nothing, or what `out` is to keep of other queries: the same memory


class Outputs(NamedTuple):
    """References to the results, in HBM."""

    out: Any  # [shards, queries, head_rows, row_dim]
    lse: Any  # [shards, tiles, head_rows, tile_tokens]


class Scratch(NamedTuple):
    """References to what a core keeps in fast memory."""

    pages: Any  # of each of `caches` [places, block_pages, *page_shape]; see `page_buffers`
    ids: Any  # [id_places * 128] in scalar memory
    arriving: Any  # queries, [tile_tokens, head_rows, row_dim]
    spans: Any  # [2, tile_tokens, 128]: of two, one is on its way
    queries: Any  # [kv_heads, pack, rows, row_dim] in the dtype of matmuls
    sums: softmax.Sums
    before: softmax.Before
    out: Any  # leaving, [tile_tokens, head_rows, row_dim]
    lse: Any  # leaving, [head_rows, tile_tokens]
    page_semaphores: Any  # [places]
    id_semaphores: Any  # [id_places]
    query_semaphore: Any
    out_semaphore: Any


class Cursor(NamedTuple):
    """A place in the walk."""

    number: jax.Array  # of the block, over all tiles
    tile: jax.Array
    block: jax.Array  # of the tile


class Kernel:
    """One core's run. Its methods are the phases of the pipeline."""

    def __init__(self, config: Config, logits: Logits, inputs: Inputs, outputs, scratch: Scratch):
        core = pl.program_id(0)
        by_heads = config.cores.by_heads
        walk_core, self.shard = (0, core) if by_heads else (core, 0)
        self.config, self.logits = config, logits
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        schedule = inputs.schedule
        self.first_tile, self.end_tile = schedule.bounds[walk_core], schedule.bounds[walk_core + 1]
        self.num_blocks = schedule.num_blocks[walk_core]
        heads = config.format.num_kv_heads
        self.caches = in_kernel(config.format, inputs.caches)
        self.heads = pl.ds(core * heads if by_heads else 0, heads)
        self.first_page = jnp.maximum(inputs.first_page[0], 0)

    def run(self) -> None:
        zero = jnp.int32(0)
        start = Cursor(zero, self.first_tile, zero)
        self.start_tile(self.first_tile)
        ids = pages = start
        for _ in range(self.config.places):
            ids = self.fetch_ids(ids)
        for _ in range(self.config.places - 1):
            pages = self.fetch_pages(pages)
        lax.fori_loop(0, self.num_blocks, self.step, (start, pages, ids))
        pl.when(self.end_tile > self.first_tile)(lambda: self.wait_results(self.end_tile - 1))

    def step(self, _: jax.Array, cursors: tuple[Cursor, Cursor, Cursor]):
        """Works on a block, while later ones are on their way."""
        here, pages, ids = cursors
        ids = self.fetch_ids(ids)
        pages = self.fetch_pages(pages)
        pl.when(here.block == 0)(lambda: self.begin(here.tile))
        self.work(here)
        last = here.block + 1 == self.tile(here.tile).num_blocks
        pl.when(last)(lambda: self.finish(here.tile))
        return self.after(here), pages, ids

    # -- the walk

    def tile(self, number: jax.Array) -> Tile:
        fields = (self.inputs.schedule.tiles[number * NUM_FIELDS + i] for i in range(NUM_FIELDS))
        return Tile(*fields)

    def after(self, cursor: Cursor) -> Cursor:
        last = cursor.block + 1 == self.tile(cursor.tile).num_blocks
        return Cursor(
            cursor.number + 1,
            jnp.where(last, cursor.tile + 1, cursor.tile),
            jnp.where(last, 0, cursor.block + 1),
        )

    def columns(self, cursor: Cursor) -> tuple[Tile, jax.Array, jax.Array, jax.Array]:
        """A block's tile and first column, and its pages that are read, counted from there."""
        tile, pages = self.tile(cursor.tile), self.config.block_pages
        first = (lax.div(tile.begin, pages) + cursor.block) * pages
        low = jnp.maximum(tile.begin - first, 0)
        return tile, first, low, jnp.clip(tile.end - first, low, pages)

    # -- page ids and pages

    def fetch_ids(self, cursor: Cursor) -> Cursor:
        pl.when(cursor.number < self.num_blocks)(lambda: self.ids_of(cursor).start())
        return self.after(cursor)

    def ids_of(self, cursor: Cursor):
        """A block's window of page ids: a block lies in one, since both are powers of two."""
        tile, first, _, _ = self.columns(cursor)
        window = lax.div(tile.first_id + first, LANES)
        window = jnp.minimum(window, self.inputs.ids.shape[0] - 1)
        place = cursor.number & (2 * self.config.places - 1)
        target = self.scratch.ids.at[pl.ds(pl.multiple_of(place * LANES, LANES), LANES)]
        source = self.inputs.ids.at[window, 0]
        return pltpu.make_async_copy(source, target, self.scratch.id_semaphores.at[place])

    def fetch_pages(self, cursor: Cursor) -> Cursor:
        @pl.when(cursor.number < self.num_blocks)
        def _():
            self.ids_of(cursor).wait()
            first, low, high = self.columns(cursor)[1:]
            place = cursor.number & (self.config.places - 1)
            window = cursor.number & (2 * self.config.places - 1)
            first_id = window * LANES + lax.rem(first, LANES)

            unroll = min(_UNROLL, self.config.block_pages)

            @pl.loop(lax.div(low, unroll), lax.div(high + (unroll - 1), unroll))
            def _(some):
                for index in range(unroll):
                    page = some * unroll + index
                    # Read whether it is needed or not: a predicate costs more.
                    page_id = self.first_page + self.scratch.ids[first_id + page]
                    self.copy_page(page_id, page, place, (page >= low) & (page < high))

        return self.after(cursor)

    def copy_page(
        self, page_id: jax.Array, page: jax.Array, place: jax.Array, needed: jax.Array
    ) -> None:
        sources = parts_of_page(self.config.format, self.caches, page_id, self.heads)
        semaphore = self.scratch.page_semaphores.at[place]

        @pl.when(needed)
        def _():
            there = [pages.at[place, page] for pages in self.scratch.pages]
            targets = filled(self.config.format, there, 0)
            for source, target in zip(sources, targets, strict=True):
                pltpu.make_async_copy(source, target, semaphore).start()

    def wait_pages(self, count: jax.Array, place: jax.Array) -> None:
        """One wait for each binary digit of their number."""
        for size, _ in _digits(count, self.config.block_pages):
            there = [x.at[place, pl.ds(0, size)] for x in self.scratch.pages]
            for some in filled(self.config.format, there, 1):
                semaphore = self.scratch.page_semaphores.at[place]
                pl.when(count & size != 0)(pltpu.make_async_copy(some, some, semaphore).wait)

    # -- a tile

    def start_tile(self, number: jax.Array) -> None:
        """Fetches a tile's queries."""

        @pl.when(number < self.end_tile)
        def _():
            for there, copy in self.queries_of(number):
                pl.when(there)(copy.start)

    def queries_of(self, number: jax.Array) -> Iterator[tuple[Any, Any]]:
        tile, semaphore = self.tile(number), self.scratch.query_semaphore
        for size, offset in _digits(tile.num_queries, self.config.tile_tokens):
            source = self.inputs.query.at[self.shard, pl.ds(tile.first_query + offset, size)]
            target = self.scratch.arriving.at[pl.ds(offset, size)]
            copy = pltpu.make_async_copy(source, target, semaphore)
            yield tile.num_queries & size != 0, copy
        spans = self.inputs.schedule.spans.at[number], self.scratch.spans.at[number & 1]
        yield number >= 0, pltpu.make_async_copy(*spans, semaphore)

    def begin(self, number: jax.Array) -> None:
        """Takes a tile's queries, and fetches the next one's."""
        for there, copy in self.queries_of(number):
            pl.when(there)(copy.wait)
        config, arriving = self.config, self.scratch.arriving
        token = lax.broadcasted_iota(jnp.int32, (config.tile_tokens, 1), 0)
        own = token < self.tile(number).num_queries  # what others left could be anything

        @pl.loop(0, config.head_rows // SUBLANES)
        def _(group):
            heads = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
            by_head = jnp.swapaxes(arriving[:, heads, :], 0, 1)
            for index in range(SUBLANES):

                @pl.when(group * SUBLANES + index < config.num_heads)
                def _(index=index):
                    kv_head, of_head = config.rows_of(group * SUBLANES + index)
                    queries = jnp.where(own, by_head[index], 0.0)
                    for copy in range(config.format.pack):
                        rows = softmax.query_rows(config, queries, copy)
                        self.scratch.queries[kv_head, copy, of_head] = rows

        self.start_tile(number + 1)

    def work(self, cursor: Cursor) -> None:
        """Works on a block that has arrived: whole if all queries see all of it, or by pieces."""
        config, place = self.config, cursor.number & (self.config.places - 1)
        first, low, high = self.columns(cursor)[1:]
        self.wait_pages(high - low, place)
        buffers = [pages.at[place] for pages in self.scratch.pages]
        block, some = softmax.Block(config, buffers, 0, config.block_pages), config.piece_pages
        begins = cursor.block == 0
        done = self.add_whole(cursor, block, first, begins)

        @pl.when(~done & (high > low))
        def _():
            begin = lax.div(low, some)

            @pl.loop(begin, lax.div(high + (some - 1), some))
            def _(number):
                piece = dataclasses.replace(block, first_page=number * some, num_pages=some)
                column, begins_here = first + number * some, begins & (number == begin)
                done = self.add_whole(cursor, piece, column, begins_here)

                @pl.when(~done)
                def _():
                    spans = self.scratch.spans[cursor.tile & 1] - column * config.format.page_size
                    sums, queries = self.scratch.sums, self.scratch.queries
                    softmax.add_masked(sums, queries, piece, self.logits, begins_here, spans)

    def add_whole(
        self, cursor: Cursor, block: softmax.Block, column: jax.Array, begins: jax.Array
    ) -> jax.Array:
        """Adds a block or a piece if all queries see all of it; says whether it did."""
        tile, page_size = self.tile(cursor.tile), self.config.format.page_size
        token, num_tokens = column * page_size, block.num_pages * page_size
        whole = (tile.all_from <= token) & (token + num_tokens <= tile.all_to)
        sums, before, queries = self.scratch.sums, self.scratch.before, self.scratch.queries

        def add() -> jax.Array:
            piece = dataclasses.replace(block, num_pages=self.config.piece_pages)
            pl.when(begins)(lambda: softmax.begin(sums, queries, piece, self.logits))
            failed = softmax.add_whole(sums, before, queries, block, self.logits)
            pl.when(failed)(lambda: softmax.restore(sums, before))
            return ~failed

        return lax.cond(whole, add, lambda: jnp.bool_(False))

    def finish(self, number: jax.Array) -> None:
        """Sends a tile's results on their way."""
        config = self.config
        pl.when(number > self.first_tile)(lambda: self.wait_results(number - 1))
        tile = self.tile(number)
        any_seen = tile.end > tile.begin
        out, lse = self.scratch.out, self.scratch.lse

        @pl.loop(0, config.head_rows // SUBLANES)
        def _(group):
            by_head = []
            for index in range(SUBLANES):
                head = jnp.minimum(group * SUBLANES + index, config.num_heads - 1)
                rows, logs = softmax.finish(self.scratch.sums, *config.rows_of(head), any_seen)
                by_head.append(rows)
                lse[pl.ds(group * SUBLANES + index, 1), :] = softmax.as_lanes(logs)
            heads = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
            out[:, heads, :] = jnp.swapaxes(jnp.stack(by_head), 0, 1)

        for there, copy in self.results_of(number):
            pl.when(there)(copy.start)

    def wait_results(self, number: jax.Array) -> None:
        for there, copy in self.results_of(number):
            pl.when(there)(copy.wait)

    def results_of(self, number: jax.Array) -> Iterator[tuple[Any, Any]]:
        tile, semaphore = self.tile(number), self.scratch.out_semaphore
        for size, offset in _digits(tile.num_queries, self.config.tile_tokens):
            source = self.scratch.out.at[pl.ds(offset, size)]
            target = self.outputs.out.at[self.shard, pl.ds(tile.first_query + offset, size)]
            yield tile.num_queries & size != 0, pltpu.make_async_copy(source, target, semaphore)
        lse = self.scratch.lse, self.outputs.lse.at[self.shard, number]
        yield number >= 0, pltpu.make_async_copy(*lse, semaphore)


def _digits(count: jax.Array, most: int) -> Iterator[tuple[int, jax.Array]]:
    """The binary digits of a number up to `most`: their value, and what those above it make."""
    for digit in reversed(range(most.bit_length())):
        yield 1 << digit, (count >> (digit + 1)) << (digit + 1)


def kernel(*refs, config: Config, logits: Logits) -> None:
    """The body of the `pallas_call`."""
    num_inputs = len(Inputs._fields)
    inputs, outputs, scratch = refs[:num_inputs], refs[num_inputs:][:2], refs[num_inputs + 2 :]
    Kernel(config, logits, Inputs(*inputs), Outputs(*outputs), Scratch(*scratch)).run()


def scratch_shapes(config: Config, *, interpreted: bool) -> Scratch:
    page_format, tokens = config.format, config.tile_tokens
    kv_heads, rows, row_dim = page_format.num_kv_heads, config.rows, page_format.row_dim
    float32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    semaphores = lambda count: pltpu.SemaphoreType.DMA((count,))
    return Scratch(
        pages=page_buffers(page_format, config.places, config.block_pages, interpreted=interpreted),
        ids=pltpu.SMEM((2 * config.places * LANES,), jnp.int32),
        arriving=float32(tokens, config.head_rows, row_dim),
        spans=pltpu.VMEM((2, tokens, LANES), jnp.int32),
        queries=pltpu.VMEM((kv_heads, page_format.pack, rows, row_dim), page_format.compute_dtype),
        sums=softmax.Sums(
            float32(kv_heads, rows, LANES),
            float32(kv_heads, rows, LANES),
            float32(kv_heads, rows, row_dim),
        ),
        before=softmax.Before(float32(kv_heads, rows, LANES), float32(kv_heads, rows, row_dim)),
        out=float32(tokens, config.head_rows, row_dim),
        lse=float32(config.head_rows, tokens),
        page_semaphores=semaphores(config.places),
        id_semaphores=semaphores(2 * config.places),
        query_semaphore=pltpu.SemaphoreType.DMA,
        out_semaphore=pltpu.SemaphoreType.DMA,
    )
