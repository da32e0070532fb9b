"""Putting tokens into pages in place: a ring of tiles on their way in and out again.

HBM is written in tiles: 8 or 16 rows of one page, for all KV heads. A tile that gets tokens is
read, changed and written back; nothing else of the cache is touched. Tokens come sorted, so that
a tile is on its way only once however many tokens go there, and tiles never meet.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...page_format import PageFormat
from .geometry import SUBLANES

_RING_BYTES = 4 << 20
_MAX_RING = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles that pages of this format are written in."""

    format: PageFormat

    @property
    def rows(self) -> int:
        """Rows per tile and head: the smallest block that every generation writes unshifted."""
        rows = SUBLANES * 4 // self.format.dtype.itemsize
        return rows if self.format.page_rows % rows == 0 else SUBLANES

    @property
    def shape(self) -> tuple[int, ...]:
        """One tile of one cache array."""
        return (*self.format.heads_shape, self.rows, self.format.row_dim)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """One token for one cache array, as a row."""
        return (*self.format.heads_shape, 1, self.format.row_dim)

    @property
    def max_tokens(self) -> int:
        """Tokens that one tile may get."""
        return self.rows * self.format.pack

    @property
    def ring(self) -> int:
        """Tiles on their way; even, half of them in."""
        token_bytes = 4 * self.max_tokens * math.prod(self.token_shape)
        tile_bytes = math.prod(self.shape) * self.format.dtype.itemsize
        return max(2, min(_MAX_RING, _RING_BYTES // (tile_bytes + token_bytes) // 2 * 2))


class Schedule(NamedTuple):
    """Tokens sorted by tile, for scalar memory; int32. Dropped tokens are last."""

    first: Int[Array, " num_tokens_plus_1"]  # tile -> its first token; then where the last ends
    page: Int[Array, " num_tokens"]
    slot: Int[Array, " num_tokens"]
    num_tiles: Int[Array, " 1"]


def schedule(
    tiles: Tiles, num_pages: int, page: Int[Array, " num_tokens"], slot: Int[Array, " num_tokens"]
) -> tuple[Schedule, Int[Array, " num_tokens"]]:
    """Sorts tokens by the tile that they go to.

    Returns:
      The schedule, and the order of the tokens in it. A page id outside of the cache drops a token.
    """
    num_tokens = page.shape[0]
    held = (page >= 0) & (page < num_pages)
    tiles_per_page = tiles.format.page_rows // tiles.rows
    tile = page * tiles_per_page + slot // tiles.max_tokens
    tile = jnp.where(held, tile, num_pages * tiles_per_page)
    order = jnp.argsort(tile)
    tile = tile[order]
    before = jnp.concatenate([jnp.full((1,), -1, jnp.int32), tile[:-1]])
    starts = (tile != before) & held[order]
    num_held = jnp.sum(held, dtype=jnp.int32)
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    first = jnp.sort(jnp.append(jnp.where(starts, index, num_held), num_held))
    num_tiles = jnp.sum(starts, dtype=jnp.int32).reshape(1)
    return Schedule(first, page[order], slot[order], num_tiles), order


class Scratch(NamedTuple):
    """References, one of each per cache array, but for the semaphores."""

    tiles: Sequence[Any]  # [ring, *heads, rows, row_dim]
    tokens: Sequence[Any]  # [ring, max_tokens, *heads, 1, row_dim] float32
    fetched: Any  # semaphores, [ring]
    stored: Any


def scratch_shapes(tiles: Tiles, num_arrays: int) -> Scratch:
    buffer = pltpu.VMEM((tiles.ring, *tiles.shape), tiles.format.dtype)
    tokens = pltpu.VMEM((tiles.ring, tiles.max_tokens, *tiles.token_shape), jnp.float32)
    semaphores = pltpu.SemaphoreType.DMA((tiles.ring,))
    return Scratch((buffer,) * num_arrays, (tokens,) * num_arrays, semaphores, semaphores)


def kernel(schedule, tokens, caches_in, *caches_and_scratch, tiles: Tiles) -> None:
    """The body of the `pallas_call`; the caches after `caches_in` are the same, aliased."""
    caches, scratch = caches_and_scratch[: len(caches_in)], caches_and_scratch[len(caches_in) :]
    Kernel(tiles, schedule, tokens, caches, Scratch(*scratch)).run()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The phases of the pipeline; `tile` counts the tiles of the schedule."""

    tiles: Tiles
    schedule: Any
    tokens: Sequence[Any]  # [num_tokens, *heads, 1, row_dim] float32 in HBM
    caches: Sequence[Any]
    scratch: Scratch

    def run(self) -> None:
        count = self.schedule.num_tiles[0]
        ahead = self.tiles.ring // 2
        pl.loop(0, jnp.minimum(ahead, count))(self.start_fetch)

        @pl.loop(0, count)
        def _(tile):
            coming = tile + ahead
            # The place of the coming tile was last used by the one `ahead` before this.
            pl.when((tile >= ahead) & (coming < count))(lambda: self.wait_store(tile - ahead))
            pl.when(coming < count)(lambda: self.start_fetch(coming))
            self.wait_fetch(tile)
            pl.loop(*self.span(tile))(lambda token: self.put(tile, token))
            self.start_store(tile)

        pl.loop(jnp.maximum(count - 2 * ahead, 0), count)(self.wait_store)

    def place(self, tile: jax.Array) -> jax.Array:
        """A tile's place in the ring."""
        return lax.rem(tile, self.tiles.ring)

    def span(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tokens of a tile."""
        return self.schedule.first[tile], self.schedule.first[tile + 1]

    def start_fetch(self, tile: jax.Array) -> None:
        place, (first, end) = self.place(tile), self.span(tile)
        semaphore = self.scratch.fetched.at[place]
        for cache, buffer in zip(self.caches, self.scratch.tiles, strict=True):
            pltpu.make_async_copy(self.tile_of(cache, first), buffer.at[place], semaphore).start()

        @pl.loop(first, end)
        def _(token):
            for tokens, buffer in zip(self.tokens, self.scratch.tokens, strict=True):
                target = buffer.at[place, token - first]
                pltpu.make_async_copy(tokens.at[token], target, semaphore).start()

    def wait_fetch(self, tile: jax.Array) -> None:
        place = self.place(tile)
        semaphore = self.scratch.fetched.at[place]
        for buffer in self.scratch.tiles:
            pltpu.make_async_copy(buffer.at[place], buffer.at[place], semaphore).wait()

        @pl.loop(*self.span(tile))
        def _(_token):
            for buffer in self.scratch.tokens:
                pltpu.make_async_copy(buffer.at[place, 0], buffer.at[place, 0], semaphore).wait()

    def put(self, tile: jax.Array, token: jax.Array) -> None:
        """Replaces the token's elements in the tile."""
        place, page_format, shape = self.place(tile), self.tiles.format, self.tiles.shape[-2:]
        slot = lax.rem(self.schedule.slot[token], self.tiles.max_tokens)  # counted in the tile
        own = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.div(slot, page_format.pack)
        if page_format.pack > 1:
            lane = lax.broadcasted_iota(jnp.int32, shape, 1)
            own &= lax.div(lane, page_format.key_dim) == lax.rem(slot, page_format.pack)
        index = token - self.schedule.first[tile]
        for buffer, tokens in zip(self.scratch.tiles, self.scratch.tokens, strict=True):
            for head in np.ndindex(*page_format.heads_shape):
                old = buffer[(place, *head)].astype(jnp.float32)
                new = jnp.where(own, tokens[(place, index, *head)], old)
                buffer[(place, *head)] = new.astype(page_format.dtype)

    def start_store(self, tile: jax.Array) -> None:
        place = self.place(tile)
        for cache, buffer in zip(self.caches, self.scratch.tiles, strict=True):
            target = self.tile_of(cache, self.schedule.first[tile])
            pltpu.make_async_copy(buffer.at[place], target, self.scratch.stored.at[place]).start()

    def wait_store(self, tile: jax.Array) -> None:
        place = self.place(tile)
        semaphore = self.scratch.stored.at[place]
        for buffer in self.scratch.tiles:
            pltpu.make_async_copy(buffer.at[place], buffer.at[place], semaphore).wait()

    def tile_of(self, cache: Any, token: jax.Array):
        page = self.schedule.page[token]
        first_row = lax.div(self.schedule.slot[token], self.tiles.max_tokens) * self.tiles.rows
        rows = pl.ds(pl.multiple_of(first_row, self.tiles.rows), self.tiles.rows)
        return cache.at[self.tiles.format.page_at(page, slice(None), rows)]
