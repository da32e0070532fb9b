"""Putting tokens into pages in place: a ring of tiles on their way in and out again.

HBM is written in tiles: 8, 16 or 32 rows of one page, for all KV heads. A tile that gets tokens is
read, changed and written back; nothing else of the cache is touched. Tokens come sorted, so that
a tile is on its way only once however many tokens go there, and tiles never meet. Scales of tokens
are written in the same way: a tile is the row of all scales of a page, of each KV head.

Tiles are taken a few at a time, in one straight piece of code whose copies are predicated. Tiles
and tokens are handled as words of 32 bits: of two rows of bfloat16, say, the half of each word that
belongs to one. A tile that a prompt fills is put together at once: its tokens follow each other.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...page_format import SCALE_DTYPE, PageFormat
from .geometry import LANES, SUBLANES, round_up

_RING_BYTES = 6 << 20
_REGISTER_BYTES = 4 << 10
_MAX_RING = 16
_MAX_TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles that pages of this format are written in."""

    format: PageFormat
    most_together: int = _MAX_TOGETHER

    @property
    def dtype(self) -> np.dtype:
        return self.format.dtype

    @property
    def num_arrays(self) -> int:
        return self.format.num_arrays

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """Axes of a page before its rows."""
        return self.format.heads_shape

    @property
    def page_rows(self) -> int:
        return self.format.page_rows

    @property
    def row_dim(self) -> int:
        return self.format.row_dim

    @property
    def row_tokens(self) -> int:
        """Tokens per row."""
        return self.format.pack

    @property
    def kernel_name(self) -> str:
        return "shardpage_write"

    def slot(self, slot: Any) -> Any:
        """Slots of a page in the order in which a row has them."""
        return slot

    def token_of(self, lane: jax.Array) -> jax.Array:
        """Which token of its row an element belongs to."""
        return lax.div(lane, self.format.key_dim)

    def at(self, page: Any, first_row: Any) -> tuple:
        """The index of a tile in a cache array."""
        return self.format.page_at(page, slice(None), pl.ds(first_row, self.rows))

    @property
    def rows(self) -> int:
        """Rows per tile and head: the smallest block that every generation writes unshifted."""
        rows = SUBLANES * 4 // self.dtype.itemsize
        return rows if self.page_rows % rows == 0 else SUBLANES

    @property
    def rows_per_word(self) -> int:
        return 4 // self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """One tile of one cache array."""
        return (*self.heads_shape, self.rows, self.row_dim)

    @property
    def max_tokens(self) -> int:
        """Tokens that one tile may get."""
        return self.rows * self.row_tokens

    @property
    def together(self) -> int:
        """Tiles in a group: fewer where two groups would not fit, and what they spill: each token
        that is put takes a register of 4 KiB for each head."""
        spilled = 2 * self.format.num_kv_heads * self.row_parts * _REGISTER_BYTES
        return max(1, min(self.most_together, _RING_BYTES // (2 * self._num_bytes + spilled)))

    @property
    def ring(self) -> int:
        """Groups of tiles on their way; even: half of them in, half of them out."""
        groups = _RING_BYTES // (self._num_bytes * self.together)
        return max(2, min(_MAX_RING, groups // 2 * 2))

    @property
    def row_parts(self) -> int:
        """Rows of tokens in memory that a row is: of 128 elements, of which alone loads may be
        strided; or as it is."""
        whole, rest = divmod(self.row_dim, LANES)
        return 1 if rest else whole

    @property
    def token_rows(self) -> int:
        """Rows of all keys, or of all values, of a token in memory."""
        return self.format.num_kv_heads * self.row_parts

    @property
    def may_be_full(self) -> bool:
        """Whether a tile may be put together at once."""
        return self.row_tokens == 1 and self.row_dim // self.row_parts <= LANES

    @property
    def _num_bytes(self) -> int:
        *others, row_dim = self.shape
        elements = math.prod(others) * round_up(row_dim, LANES)
        return self.num_arrays * elements * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class ScaleTiles(Tiles):
    """The rows of scales of such pages."""

    @property
    def dtype(self) -> np.dtype:
        return SCALE_DTYPE

    @property
    def num_arrays(self) -> int:
        return 1

    @property
    def heads_shape(self) -> tuple[int, ...]:
        return self.format.page_scales_shape[:1]

    @property
    def page_rows(self) -> int:
        return 1

    @property
    def rows(self) -> int:
        return 1

    @property
    def row_dim(self) -> int:
        return self.format.page_scales_shape[-1]

    @property
    def row_tokens(self) -> int:
        return self.format.page_size

    @property
    def kernel_name(self) -> str:
        return "shardpage_write_scales"

    def slot(self, slot: Any) -> Any:
        return self.format.scale_lane(slot)

    def token_of(self, lane: jax.Array) -> jax.Array:
        return lax.rem(lane, self.format.page_size)  # of keys, then of values

    def at(self, page: Any, first_row: Any) -> tuple:
        return (page,)


class Schedule(NamedTuple):
    """Tokens sorted by tile, for scalar memory; int32. Dropped tokens are last.

    There are as many tiles as tokens at most, and a group more, which get no token.
    """

    num_tiles: Int[Array, " 1"]
    page: Int[Array, " num_tiles"]
    row: Int[Array, " num_tiles"]  # the tile's first, in its page
    first: Int[Array, " num_tiles"]  # its first token; then where the last tile ends
    token: Int[Array, " num_tokens_plus_1"]  # its number before sorting
    slot: Int[Array, " num_tokens_plus_1"]  # counted in its tile
    full: Int[Array, " num_tiles"]  # 1 if it gets tokens that follow each other, one in each slot


def schedule(
    tiles: Tiles, num_pages: int, page: Int[Array, " num_tokens"], slot: Int[Array, " num_tokens"]
) -> Schedule:
    """Sorts tokens by the tile that they go to. A page id outside of the cache drops a token."""
    num_tokens = page.shape[0]
    held = (page >= 0) & (page < num_pages)
    tiles_per_page = tiles.page_rows // tiles.rows
    tile = page * tiles_per_page + slot // tiles.max_tokens
    tile = jnp.where(held, tile, num_pages * tiles_per_page)
    order = jnp.argsort(tile).astype(jnp.int32)
    tile = tile[order]
    before = jnp.concatenate([jnp.full((1,), -1, jnp.int32), tile[:-1]])
    starts = (tile != before) & held[order]
    num_held = jnp.sum(held, dtype=jnp.int32)
    first = jnp.sort(jnp.where(starts, jnp.arange(num_tokens, dtype=jnp.int32), num_held))
    first = jnp.concatenate([first, jnp.full((_MAX_TOGETHER,), num_held)])
    order, tile = (jnp.append(x, jnp.int32(0)) for x in (order, tile))
    place = slot[order] % tiles.max_tokens
    follows = (jnp.diff(order) == 1) & (jnp.diff(place) == 1)
    following = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(follows, dtype=jnp.int32)])
    others = tiles.max_tokens - 1
    last = jnp.minimum(first + others, num_tokens)
    full = (place[first] == 0) & (following[last] - following[first] == others)
    return Schedule(
        num_tiles=jnp.sum(starts, dtype=jnp.int32).reshape(1),
        page=tile[first] // tiles_per_page,
        row=tile[first] % tiles_per_page * tiles.rows,
        first=first,
        token=order,
        slot=place,
        full=full.astype(jnp.int32),
    )


class Scratch(NamedTuple):
    """References; tiles one for each cache array."""

    tiles: Sequence[Any]  # [ring, together, *heads, rows, row_dim]
    fetched: Any  # semaphores, [ring]
    stored: Any


def scratch_shapes(tiles: Tiles) -> Scratch:
    buffer = pltpu.VMEM((tiles.ring, tiles.together, *tiles.shape), tiles.dtype)
    semaphores = pltpu.SemaphoreType.DMA((tiles.ring,))
    return Scratch((buffer,) * tiles.num_arrays, semaphores, semaphores)


def kernel(
    schedule, layer, tokens, caches_in, *caches_and_scratch, tiles: Tiles, first_page: Any
) -> None:
    """The body of the `pallas_call`; the caches after `caches_in` are the same, aliased."""
    caches, scratch = caches_and_scratch[: len(caches_in)], caches_and_scratch[len(caches_in) :]
    Kernel(tiles, schedule, first_page(layer[0]), tokens, caches, Scratch(*scratch)).run()


class Tile(NamedTuple):
    """A tile of the schedule, and its place in the ring."""

    number: jax.Array
    place: jax.Array
    member: jax.Array | int  # of its group


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The phases of the pipeline, each of a group of tiles."""

    tiles: Tiles
    schedule: Any
    first_page: jax.Array  # added to all page ids; -1 of no layer, to which nothing is written
    tokens: Any  # words, of all keys, then of all values: see `Tiles.token_rows`
    caches: Sequence[Any]
    scratch: Scratch

    def run(self) -> None:
        ahead = self.tiles.ring // 2
        num_groups = lax.div(self.num_tiles + (self.tiles.together - 1), self.tiles.together)
        pl.loop(0, jnp.minimum(ahead, num_groups))(self.fetch)

        @pl.loop(0, num_groups)
        def _(group):
            # The place of the coming group was last used by the one `ahead` before this.
            pl.when(group >= ahead)(lambda: self.wait(group - ahead, self.scratch.stored))
            self.wait(group, self.scratch.fetched)
            pl.when(group + ahead < num_groups)(lambda: self.fetch(group + ahead))
            self.put_all(group)
            self.store(group)

        first = jnp.maximum(num_groups - ahead, 0)
        pl.loop(first, num_groups)(lambda group: self.wait(group, self.scratch.stored))

    @property
    def num_tiles(self) -> jax.Array:
        return jnp.where(self.first_page < 0, 0, self.schedule.num_tiles[0])

    def group(self, group: jax.Array) -> list[Tile]:
        place, first = lax.rem(group, self.tiles.ring), group * self.tiles.together
        return [Tile(first + index, place, index) for index in range(self.tiles.together)]

    def fetch(self, group: jax.Array) -> None:
        for tile in self.group(group):
            for copy in self.copies(tile, self.scratch.fetched, in_=True):
                pl.when(tile.number < self.num_tiles)(copy.start)

    def store(self, group: jax.Array) -> None:
        for tile in self.group(group):
            for copy in self.copies(tile, self.scratch.stored, in_=False):
                pl.when(tile.number < self.num_tiles)(copy.start)

    def wait(self, group: jax.Array, semaphores: Any) -> None:
        """Waits for the tiles of a group: one wait for each binary digit of their number."""
        place = lax.rem(group, self.tiles.ring)
        count = jnp.minimum(self.num_tiles - group * self.tiles.together, self.tiles.together)
        for digit in reversed(range(self.tiles.together.bit_length())):
            for buffer in self.scratch.tiles:
                tiles = buffer.at[place, pl.ds(0, 1 << digit)]
                copy = pltpu.make_async_copy(tiles, tiles, semaphores.at[place])
                pl.when(count & (1 << digit) != 0)(copy.wait)

    def copies(self, tile: Tile, semaphores: Any, *, in_: bool) -> list[Any]:
        page = self.schedule.page[tile.number] + self.first_page
        first_row = pl.multiple_of(self.schedule.row[tile.number], self.tiles.rows)
        at = self.tiles.at(page, first_row)
        ends = [
            (cache.at[at], buffer.at[tile.place, tile.member])
            for cache, buffer in zip(self.caches, self.scratch.tiles, strict=True)
        ]
        semaphore = semaphores.at[tile.place]
        pairs = ends if in_ else [(buffer, cache) for cache, buffer in ends]
        return [pltpu.make_async_copy(source, target, semaphore) for source, target in pairs]

    def put_all(self, group: jax.Array) -> None:
        """Puts the first token of each tile, and then the others of those that get several."""
        tiles, first = self.group(group), self.schedule.first
        for tile in tiles:
            self.put(tile, first[tile.number], tile.number < self.num_tiles)
        begin = group * self.tiles.together
        end = jnp.minimum(begin + self.tiles.together, self.num_tiles)

        @pl.when(first[end] - first[begin] > end - begin)
        def _():
            @pl.loop(0, self.tiles.together)
            def _(member):
                tile = Tile(begin + member, tiles[0].place, member)
                self.put_others(tile, first[tile.number] + 1, first[tile.number + 1])

    def put_others(self, tile: Tile, begin: jax.Array, end: jax.Array) -> None:
        one_by_one = lambda: pl.loop(begin, end)(lambda token: self.put(tile, token, True))
        if not self.tiles.may_be_full:
            one_by_one()
            return
        is_full = self.schedule.full[tile.number] == 1
        pl.when(is_full)(lambda: self.put_full(tile, self.schedule.token[begin - 1]))
        pl.when(~is_full)(one_by_one)

    def put_full(self, tile: Tile, first_token: jax.Array) -> None:
        """Replaces a tile with tokens that follow each other."""
        in_word = self.tiles.rows_per_word
        count = self.tiles.rows // in_word
        for ref, head in self.heads(tile):
            parts = [self.words(first_token + i, head, count, in_word) for i in range(in_word)]
            own = [part & self.bits_of(jnp.int32(i)) for i, part in enumerate(parts)]
            ref[...] = pltpu.bitcast(functools.reduce(jnp.bitwise_or, own), self.tiles.dtype)

    def put(self, tile: Tile, token: jax.Array, really: jax.Array | bool) -> None:
        """Replaces a token's elements in its tile."""
        own = self.own_bits(self.schedule.slot[token], really)
        others, number = ~own, self.schedule.token[token]
        for ref, head in self.heads(tile):
            old = pltpu.bitcast(ref[...], jnp.int32)
            words = (old & others) | (self.words(number, head) & own)
            ref[...] = pltpu.bitcast(words, self.tiles.dtype)

    def heads(self, tile: Tile) -> Iterator[tuple[Any, int]]:
        """A tile's rows of each head, keys' first, with the head's number in a token."""
        heads = np.ndindex(len(self.caches), *self.tiles.heads_shape)
        for number, (which, *head) in enumerate(heads):
            yield self.scratch.tiles[which].at[(tile.place, tile.member, *head)], number

    def words(self, token: jax.Array, head: int, count: int = 1, stride: int = 1) -> jax.Array:
        """A head's words of some tokens, each `stride` after the one before."""
        rows, parts = self.tiles.token_rows, self.tiles.row_parts
        step = stride * rows if count > 1 else 1
        which, own = divmod(head, self.tiles.format.num_kv_heads)
        first = which * (self.tokens.shape[0] // 2) + token * rows + own * parts
        words = [self.tokens[pl.ds(first + part, count, step), :] for part in range(parts)]
        return words[0] if parts == 1 else jnp.concatenate(words, axis=1)

    def own_bits(self, slot: jax.Array, really: jax.Array | bool) -> jax.Array:
        """The bits of a tile's words, [rows of words, row_dim], that belong to a slot."""
        tiles, in_word = self.tiles, self.tiles.rows_per_word
        row = lax.div(slot, tiles.row_tokens)
        bits = jnp.where(really, self.bits_of(row & (in_word - 1)), 0)
        shape = (tiles.rows // in_word, tiles.row_dim)
        own = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.div(row, in_word)
        if tiles.row_tokens > 1:
            lane = lax.broadcasted_iota(jnp.int32, shape, 1)
            own &= tiles.token_of(lane) == lax.rem(slot, tiles.row_tokens)
        return jnp.where(own, bits, 0)

    def bits_of(self, row: jax.Array) -> jax.Array:
        """The bits of a word that belong to one of its rows."""
        width = 8 * self.tiles.dtype.itemsize
        return jnp.int32(-1) if width == 32 else jnp.int32((1 << width) - 1) << (row * width)
