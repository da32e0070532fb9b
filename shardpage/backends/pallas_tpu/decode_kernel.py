"""Decode attention over pages: one persistent kernel per core.

    ids    |s0|s1|s2|...            (tables too large for scalar memory: ids run ahead of pages)
    pages     |s0|s1|s2|s3|...      two rings of steps, refilled in turn
    math            |s0|s1|s2|...   while one ring is worked on, the other is refilled

The walk over blocks is flat (see `walk`). A *step* is a few blocks that follow each other on it, of
one query or of several: each is a softmax by itself, so that the latencies of one hide behind the
arithmetic of the others, and then joins what its query saw before. All blocks are masked, and all
copies predicated: a step is one straight piece of code, whose copies go to another buffer than its
loads come from, so that the compiler is free to issue them whenever the arithmetic waits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import softmax, walk
from .agenda import Paged, Resident
from .config import Config
from .fetch import Ring, in_kernel, page_buffers
from .geometry import LANES, SUBLANES
from .walk import Block

_RINGS = 2


class How(NamedTuple):
    """What is computed, besides shapes."""

    logits: softmax.Logits
    first_page: Callable[[jax.Array], jax.Array]  # of a layer's number; -1 of one that there is not
    final: bool  # whether nothing is merged with the results any more


class Inputs(NamedTuple):
    """References to what the kernel is given."""

    schedule: Any  # see `walk`; in scalar memory, or its blocks in HBM if the agenda is paged
    ids: Any  # page ids, likewise
    layer: Any  # [1] in scalar memory: whose pages are meant
    query: Any  # [1, queries, rows, row_dim]
    caches: Sequence[Any]  # in HBM: the arrays, and the scales of tokens


class Scratch(NamedTuple):
    """References to what a core keeps in fast memory."""

    pages: Any  # for each ring and each of `caches` [places, step_pages, ...]: `page_buffers`
    sums: softmax.Sums  # of the segment at work
    suspect: Any  # [8, row_dim]: NaN if any result has been
    steps: Any  # [agenda_steps * step_lanes] in scalar memory, if it is paged
    ids: Any  # [agenda_steps * step_blocks * 256], likewise; and a few that are not used
    page_semaphores: Any  # for each ring [places]
    step_semaphores: Any  # [agenda_steps]
    id_semaphores: Any  # [agenda_steps]


class Kernel:
    """One core's run. Its methods are the phases of the pipeline."""

    def __init__(
        self, config: Config, how: How, inputs: Inputs, outputs: Sequence[Any], scratch: Scratch
    ):
        schedule, ids, layer, query, caches = inputs
        core = pl.program_id(0)
        by_heads = config.cores.by_heads
        self.config, self.sizes, self.how = config, config.sizes, how
        self.query, (self.out, self.lse) = query, outputs
        self.sums, self.suspect = scratch.sums, scratch.suspect
        walk_core = 0 if by_heads else core
        num_steps = config.lengths.num_steps(config.num_queries)
        whose = {"core": walk_core, "num_steps": num_steps, "sizes": config.sizes}
        if config.sizes.paged:
            semaphores = (scratch.step_semaphores, scratch.id_semaphores)
            buffers = (schedule.blocks, ids, scratch.steps, scratch.ids, *semaphores)
            windows = -(-config.max_pages // LANES)
            self.agenda = Paged(*buffers, windows, **whose)
        else:
            self.agenda = Resident(schedule.blocks, ids, config.max_pages, **whose)
        page_format = config.geometry.format
        # Where ids count from: said once here, it costs nothing in each copy.
        begin = how.first_page(layer[0])
        axes = [page_format.layout.value.pages] * page_format.num_arrays + [0]  # scales', if any
        first = jnp.maximum(begin, 0)
        caches = in_kernel(page_format, caches)
        caches = [_pages_from(x, first, axis) for x, axis in zip(caches, axes, strict=False)]
        self.is_missing = begin < 0  # there is no such layer
        num_blocks = jnp.where(self.is_missing, 0, schedule.num_blocks[walk_core])
        self.num_steps = _cdiv(num_blocks, self.sizes.step_blocks)
        self.vacant, self.first_vacant = schedule.vacant, walk_core * config.num_segments
        self.num_vacant = schedule.num_vacant[walk_core]
        first_head = core * page_format.num_kv_heads if by_heads else 0
        self.rings = [
            Ring(page_format, self.sizes, caches, pages, semaphores, first_head)
            for pages, semaphores in zip(scratch.pages, scratch.page_semaphores, strict=True)
        ]

    def run(self) -> None:
        softmax.store(self.sums, softmax.nothing(*self.sums.out.shape))
        self.suspect[...] = jnp.zeros(self.suspect.shape, jnp.float32)
        self.fill()
        self.vacate()
        self.wait(jnp.int32(0), 0, jnp.int32(0))
        places = (jnp.int32(0), jnp.int32(self.sizes.ring_places - 1))
        place, _ = lax.fori_loop(0, self.num_steps >> 1, self.two_steps, places)
        pl.when(self.num_steps & 1 == 1)(lambda: self.work(self.num_steps - 1, 0, place))
        # What nobody needed.
        self.agenda.end((self.num_steps & ~1) + (2 * self.sizes.ring_places - 1))
        if self.how.final:
            pl.when(jnp.sum(self.suspect[...]) != 0)(self.spread_nan)

    def fill(self) -> None:
        """Starts the first copies: for every place of both rings but the last."""
        self.agenda.begin()
        last = self.sizes.ring_places - 1

        @pl.loop(0, last)
        def _(place):
            for ring in range(_RINGS):
                self.fetch_in_loops(2 * place + ring, ring, place)

        self.fetch_in_loops(jnp.int32(2 * last), 0, jnp.int32(last))

    def vacate(self) -> None:
        """Says of segments without blocks that they see nothing; NaN of what must not be used."""

        @pl.loop(0, jnp.where(self.is_missing, self.config.num_segments, self.num_vacant))
        def _(index):
            entry = jnp.where(self.is_missing, ~index, self.vacant[self.first_vacant + index])
            segment, is_invalid = walk.vacancy(entry)
            for ref, nothing in ((self.out, 0.0), (self.lse, -jnp.inf)):
                value = jnp.where(is_invalid, jnp.nan, nothing)
                ref[0, segment] = jnp.full(ref.shape[2:], value, jnp.float32).astype(ref.dtype)

    def spread_nan(self) -> None:
        """Makes heads of which an element is NaN so as a whole, lse included.

        Hardly ever called: only if there is a NaN, which each block adds to `suspect`.
        """

        @pl.loop(0, self.config.num_segments)
        def _(segment):
            out = self.out[0, segment].astype(jnp.float32)
            nan = jnp.sum(jnp.where(out == out, 0.0, jnp.nan), axis=1, keepdims=True)
            self.out[0, segment] = (out + nan).astype(self.out.dtype)
            by_row = jnp.broadcast_to(nan, (out.shape[0], LANES))
            self.lse[0, segment] += softmax.as_lanes(by_row, self.config.geometry.lse_tiles)

    def two_steps(self, number: jax.Array, places: tuple) -> tuple[jax.Array, jax.Array]:
        """Works on a step of each ring, and refills the place that the other was worked on before.

        Ends with a wait: the compiler hurries with what stands before one, here with the copies,
        of which it would otherwise issue most when all arithmetic is done.
        """
        place, before = places
        step, ahead = 2 * number, 2 * self.sizes.ring_places - 1
        following = jnp.where(place + 1 == self.sizes.ring_places, 0, place + 1)
        for ring, free, next_place in ((0, before, place), (1, place, following)):

            def work(in_runs: bool, ring: int = ring, free: jax.Array = free) -> None:
                self.fetch(step + ring + ahead, 1 - ring, free, in_runs=in_runs)
                self.work(step + ring, ring, place)

            self.either(step + ring + ahead, work)
            self.wait(step + ring + 1, 1 - ring, next_place)
        return following, place

    def either(self, step: jax.Array, work: Callable[[bool], None]) -> None:
        """Works with copies of runs where a step's pages come in such, or of pages.

        One branch a step: within it, arithmetic and copies stay one straight piece of code.
        """
        if self.sizes.run_pages == 1:
            work(False)
        else:
            in_runs = self.agenda.block(step, 0).in_runs
            lax.cond(in_runs, lambda: work(True), lambda: work(False))

    def fetch(self, step: jax.Array, ring: int, place: jax.Array, *, in_runs: bool) -> None:
        """Fetches what the blocks of a step need."""
        self.agenda.prefetch(step)
        target = self.rings[ring]
        start = target.start_runs if in_runs else target.start_block
        for index in range(self.sizes.step_blocks):
            self.fetch_block(step, index, place, start)

    def fetch_in_loops(self, step: jax.Array, ring: int, place: jax.Array) -> None:
        """The same in less code."""
        self.agenda.prefetch(step)
        start = self.rings[ring].start_in_loop
        pl.loop(0, self.sizes.step_blocks)(lambda i: self.fetch_block(step, i, place, start))

    def fetch_block(self, step: jax.Array, index: Any, place: jax.Array, start: Any) -> None:
        block = self.agenda.block(step, index)
        first_id = self.agenda.first_id(block, step, index)
        start(block.num_pages, lambda page: self.agenda.ids[first_id + page], index, place)

    def wait(self, step: jax.Array, ring: int, place: jax.Array) -> None:
        """Waits until the pages of a step have arrived."""
        self.rings[ring].wait(self.agenda.block(step, 0).step_pages, place)

    def work(self, step: jax.Array, ring: int, place: jax.Array) -> None:
        """Works on the blocks of a step, of which each begins, goes on with or ends a segment."""
        blocks = [self.agenda.block(step, index) for index in range(self.sizes.step_blocks)]
        if self.config.heads_per_pass < self.config.geometry.format.num_kv_heads:
            (block,) = blocks
            self.work_in_passes(block, ring, place)
            return
        views = [self.view(block, index, ring, place) for index, block in enumerate(blocks)]
        found = softmax.attend(views, self.how.logits)
        sums = softmax.load(self.sums)
        for block, new in zip(blocks, found, strict=True):
            sums = softmax.add(softmax.forget(sums, block.begins == 1), new)
            self.leave(sums, block)
        softmax.store(self.sums, sums)

    def work_in_passes(self, block: Block, ring: int, place: jax.Array) -> None:
        """Works on a large block: some heads after the others, lest the code become too long."""
        whole, heads = self.view(block, 0, ring, place), self.config.heads_per_pass

        @pl.loop(0, self.config.geometry.format.num_kv_heads // heads)
        def _(index):
            view, rows = whole.of_heads(index * heads, heads)
            (new,) = softmax.attend([view], self.how.logits)
            refs = softmax.Sums(*(ref.at[rows] for ref in self.sums))
            sums = softmax.forget(softmax.load(refs), block.begins == 1)
            softmax.store(refs, softmax.add(sums, new))

        self.leave(softmax.load(self.sums), block)

    def leave(self, sums: softmax.Sums, block: Block) -> None:
        """Leaves a segment's result: each of its blocks overwrites what the one before it left."""
        out, lse = softmax.finish(sums)
        if self.how.final:
            broken = softmax.broken(out)
            out += broken
            self.suspect[...] += broken.reshape(-1, *self.suspect.shape).sum(axis=0)
        self.out[0, block.segment] = out.astype(self.out.dtype)
        self.lse[0, block.segment] = softmax.as_lanes(lse, self.config.geometry.lse_tiles)

    def view(self, block: Block, index: int, ring: int, place: jax.Array) -> softmax.View:
        num_pages = self.sizes.block_pages
        return softmax.View(
            geometry=self.config.geometry,
            buffers=self.rings[ring].pages,
            place=place,
            first_page=index * num_pages,
            num_pages=num_pages,
            used_pages=block.num_pages,
            query=self.query.at[0, self.query_of(block.segment)],
            span=softmax.Span(block.start, block.stop),
        )

    def query_of(self, segment: jax.Array) -> jax.Array:
        splits = self.config.num_splits
        return segment if splits == 1 else lax.div(segment, splits)


def _pages_from(cache: Any, first: jax.Array, axis: int) -> Any:
    return cache.at[(*(slice(None),) * axis, pl.ds(first, cache.shape[axis]))]


def _cdiv(value: jax.Array, divisor: int) -> jax.Array:
    return lax.div(value + (divisor - 1), divisor)


def kernel(*refs, config: Config, how: How) -> None:
    """The body of the `pallas_call`."""
    num_inputs = len(Inputs._fields)
    inputs, outputs, scratch = refs[:num_inputs], refs[num_inputs:][:2], refs[num_inputs + 2 :]
    Kernel(config, how, Inputs(*inputs), outputs, Scratch(*scratch)).run()


def scratch_shapes(config: Config, *, interpreted: bool) -> Scratch:
    geometry, page_format, sizes = config.geometry, config.geometry.format, config.sizes
    rows, row_dim = geometry.rows, page_format.row_dim
    float32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    twice = lambda shape: (shape,) * _RINGS
    semaphores = lambda count: pltpu.SemaphoreType.DMA((count,))
    # Scalars and semaphores of a paged agenda; each semaphore costs a few cycles at the end.
    if_paged = lambda count: count if sizes.paged else 1
    scalars = lambda count: pltpu.SMEM((if_paged(count),), jnp.int32)
    ring = sizes.ring_places, sizes.step_pages
    not_used = sizes.run_pages - 1  # ids that are read behind the last
    return Scratch(
        pages=twice(page_buffers(page_format, *ring, interpreted=interpreted)),
        sums=softmax.Sums(float32(rows, LANES), float32(rows, LANES), float32(rows, row_dim)),
        suspect=float32(SUBLANES, row_dim),
        steps=scalars(sizes.agenda_steps * sizes.step_lanes),
        ids=scalars(sizes.agenda_steps * sizes.step_blocks * 2 * LANES + not_used),
        page_semaphores=twice(semaphores(sizes.ring_places)),
        step_semaphores=semaphores(if_paged(sizes.agenda_steps)),
        id_semaphores=semaphores(if_paged(sizes.agenda_steps)),
    )
