"""What comes from HBM: pages into a ring of buffers, and the page ids that say which.

Every copy is asynchronous. A place of a ring is refilled as soon as it was used, so that all its
others are in flight meanwhile; one semaphore per place counts the bytes of a whole block.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...page_format import PageFormat
from .geometry import LANES
from .walk import Cursor, Walk

_UNROLL = 8  # page copies issued between two branches, where their number is not known


@dataclasses.dataclass(frozen=True)
class ResidentTable:
    """All page ids in scalar memory: `ids` is flat, `width` of them per query."""

    ids: Any
    width: int
    block_pages: int
    walk: Walk

    def start(self, cursor: Cursor, entry: jax.Array) -> None:
        """Nothing to fetch."""

    def wait(self, entry: jax.Array) -> None:
        """Nothing to wait for."""

    def page_ids(self, cursor: Cursor, entry: jax.Array):
        """A function from a page of the block to its id."""
        base = self.walk.query(cursor.segment) * self.width + cursor.block * self.block_pages
        return lambda page: self.ids[base + page]


@dataclasses.dataclass(frozen=True)
class PagedTable:
    """Page ids in HBM, `[queries, windows, 1, 128]`: a flat ring of windows in scalar memory.

    Each block fetches the window with its ids, although several share one: half a KiB per block
    buys a pipeline without branches. A cursor that is done fetches some window all the same.
    """

    windows: Any
    ring: Any
    semaphores: Any
    block_pages: int
    walk: Walk

    def start(self, cursor: Cursor, entry: jax.Array) -> None:
        query = jnp.minimum(self.walk.query(cursor.segment), self.windows.shape[0] - 1)
        window = lax.div(cursor.block * self.block_pages, LANES)
        self._copy(self.windows.at[query, window, 0], entry).start()

    def wait(self, entry: jax.Array) -> None:
        self._copy(self.windows.at[0, 0, 0], entry).wait()

    def _copy(self, window: Any, entry: jax.Array):
        target = self.ring.at[pl.ds(pl.multiple_of(entry * LANES, LANES), LANES)]
        return pltpu.make_async_copy(window, target, self.semaphores.at[entry])

    def page_ids(self, cursor: Cursor, entry: jax.Array):
        """A function from a page of the block to its id."""
        base = entry * LANES + lax.rem(cursor.block * self.block_pages, LANES)
        return lambda page: self.ring[base + page]


@dataclasses.dataclass(frozen=True)
class PageRing:
    """Blocks of pages on their way to `buffers`, `[ring_blocks, block_pages, *page_shape]` each."""

    format: PageFormat
    block_pages: int
    caches: Sequence[Any]
    buffers: Sequence[Any]
    semaphores: Any
    first_head: jax.Array | int

    def start_full(self, page_ids, place: jax.Array) -> None:
        """Fetches a whole block; no branches, so it overlaps with the arithmetic around it."""
        for page in range(self.block_pages):
            self._start_page(page_ids, page, place)

    def start(self, page_ids, num_pages: jax.Array, place: jax.Array) -> None:
        """Fetches the first pages of a block."""
        unroll = min(_UNROLL, self.block_pages)
        chunks = lax.div(num_pages, unroll)

        @pl.loop(0, chunks)
        def _(chunk):
            for page in range(unroll):
                self._start_page(page_ids, chunk * unroll + page, place)

        pl.loop(chunks * unroll, num_pages)(lambda page: self._start_page(page_ids, page, place))

    def _start_page(self, page_ids, page: jax.Array | int, place: jax.Array) -> None:
        heads = pl.ds(self.first_head, self.format.num_kv_heads)
        source, semaphore = self.format.page_at(page_ids(page), heads), self.semaphores.at[place]
        for cache, buffer in zip(self.caches, self.buffers, strict=True):
            pltpu.make_async_copy(cache.at[source], buffer.at[place, page], semaphore).start()

    def wait_full(self, place: jax.Array) -> None:
        self._wait(place, self.block_pages)

    def wait(self, num_pages: jax.Array, place: jax.Array) -> None:
        """Waits for the bytes of this many pages: one wait for each binary digit of the number."""
        bit = 1 << (self.block_pages.bit_length() - 1)
        while bit:
            pl.when(num_pages & bit != 0)(lambda bit=bit: self._wait(place, bit))
            bit //= 2

    def _wait(self, place: jax.Array, num_pages: int) -> None:
        for buffer in self.buffers:
            pages = buffer.at[place, pl.ds(0, num_pages)]
            pltpu.make_async_copy(pages, pages, self.semaphores.at[place]).wait()
