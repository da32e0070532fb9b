"""What comes from HBM: the pages of steps, into two rings that are refilled in turn.

Every copy is asynchronous, and which of a block's pages are fetched is said by predicates, not by
branches: the compiler then issues the copies of one step under the arithmetic of another.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...cache import PagedKVCache
from ...page_format import SCALE_DTYPE, PageFormat
from . import token_major
from .sizes import Sizes

_UNROLL = 8  # page copies issued between two branches, in loops


def hbm_arrays(cache: PagedKVCache, *, interpreted: bool) -> tuple[jax.Array, ...]:
    """What pages are fetched from: the cache's arrays, and the scales of tokens."""
    arrays = cache.arrays
    if cache.layout.token_major:
        as_words = functools.partial(token_major.words_of_array, cache.format)
        arrays = tuple(as_words(array, interpreted=interpreted) for array in arrays)
    return arrays + (kept_in_hbm(cache.scales) if cache.scale == "token" else ())


def in_kernel(page_format: PageFormat, caches: Sequence[Any]) -> list[Any]:
    """References to `hbm_arrays`, of which `parts_of_page` takes parts."""
    if not page_format.layout.token_major:
        return list(caches)
    arrays, scales = caches[: page_format.num_arrays], caches[page_format.num_arrays :]
    return [*(token_major.words_of_ref(page_format, array) for array in arrays), *scales]


def kept_in_hbm(scales: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Scales where they are: some megabytes the compiler would copy to fast memory, all of them."""
    return tuple(pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in scales)


def parts_of_page(page_format: PageFormat, caches: Sequence[Any], page: Any, heads: Any):
    """References to the parts of a page, or of several: in each array, and among the scales."""
    whole = page_format.layout.token_major
    at = page if whole else page_format.page_at(page, heads)
    arrays, scales = caches[: page_format.num_arrays], caches[page_format.num_arrays :]
    return [*(cache.at[at] for cache in arrays), *(scale.at[page, heads] for scale in scales)]


def page_buffers(page_format: PageFormat, *lead: int, interpreted: bool) -> tuple[Any, ...]:
    """Fast memory for the parts of `lead` pages."""
    shape, dtype = page_format.page_shape, page_format.dtype
    if page_format.layout.token_major:
        shape = token_major.buffer_shape(page_format, interpreted=interpreted)
        dtype = np.dtype(np.int32)
    pages = pltpu.VMEM((*lead, *shape), dtype)
    scales = pltpu.VMEM((*lead, *page_format.page_scales_shape), SCALE_DTYPE)
    return (pages,) * page_format.num_arrays + (scales,) * (page_format.scale == "token")


def filled(page_format: PageFormat, buffers: Sequence[Any], axes: int) -> list[Any]:
    """Of references to pages in such memory, with as many axes before a page's, what is copied."""
    if not page_format.layout.token_major:
        return list(buffers)
    arrays, scales = buffers[: page_format.num_arrays], buffers[page_format.num_arrays :]
    return [*(token_major.filled(page_format, array, axes) for array in arrays), *scales]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Steps on their way to one of the rings, or there."""

    format: PageFormat
    sizes: Sizes
    caches: Sequence[Any]  # of `in_kernel`, from the page that ids count from
    pages: Sequence[Any]  # [places, step_pages, ...] for each of them, of `page_buffers`
    semaphores: Any  # [places], which count the bytes of a whole step
    first_head: jax.Array | int

    def start_block(self, num_pages, page_ids: Any, index: Any, place: jax.Array) -> None:
        """Fetches the first pages of a block; no branches."""
        for page in range(self.sizes.block_pages):
            self._start(page, num_pages, page_ids, index, place)

    def start_runs(self, num_pages, page_ids: Any, index: Any, place: jax.Array) -> None:
        """The same where ids follow each other in runs: those that are whole, and single pages."""
        run = self.sizes.run_pages
        for page in range(0, self.sizes.block_pages, run):
            self._start(page, num_pages, page_ids, index, place, count=run)
        for page in range(run - 1):
            self._start((num_pages & -run) + page, num_pages, page_ids, index, place)

    def start_in_loop(self, num_pages, page_ids: Any, index: Any, place: jax.Array) -> None:
        """The same in less code."""
        unroll = math.gcd(_UNROLL, self.sizes.block_pages)

        @pl.loop(0, lax.div(num_pages + (unroll - 1), unroll))
        def _(chunk):
            for page in range(unroll):
                self._start(chunk * unroll + page, num_pages, page_ids, index, place)

    def _start(
        self, page: jax.Array | int, num_pages, page_ids, index, place, count: int = 1
    ) -> None:
        """Fetches a page, and those that follow it, if they are among the first."""
        # Read whether it is needed or not: that is one instruction, and predicated it is three.
        pages = page_ids(page) if count == 1 else pl.ds(page_ids(page), count)
        heads = pl.ds(self.first_head, self.format.num_kv_heads)
        sources = parts_of_page(self.format, self.caches, pages, heads)

        @pl.when(page + (count - 1) < num_pages)
        def _():
            first = index * self.sizes.block_pages + page
            several = count > 1
            at = pl.ds(first, count) if several else first
            there = filled(self.format, [ring.at[place, at] for ring in self.pages], int(several))
            for source, target in zip(sources, there, strict=True):
                pltpu.make_async_copy(source, target, self.semaphores.at[place]).start()

    def wait(self, step_pages: jax.Array, place: jax.Array) -> None:
        """Waits for the pages of a step: one wait for each binary digit of their number."""
        for digit in reversed(range(self.sizes.step_pages.bit_length())):
            some = pl.ds(0, 1 << digit)

            @pl.when(step_pages & (1 << digit) != 0)
            def _(some=some):
                there = [ring.at[place, some] for ring in self.pages]
                for buffer in filled(self.format, there, 1):
                    self._wait(buffer, place)

    def _wait(self, buffer: Any, place: jax.Array) -> None:
        pltpu.make_async_copy(buffer, buffer, self.semaphores.at[place]).wait()
