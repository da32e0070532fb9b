"""The blocks of one segment, as a warpgroup that attends to them sees them.

`queries_first.py` and `tokens_first.py` are the two ways to do so.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .config import Config
from .mosaic import MMA_ROWS, load
from .scratch import Ring, Scratch
from .share import Segment, first_block
from .softmax import Logits, seen, zero_unread
from .tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a segment, for one warpgroup's queries.

    `scratch` has the rings of blocks and their barriers.
    """

    config: Config
    logits: Logits
    tiles: Tiles
    scratch: Scratch
    segment: Segment
    warpgroup: jax.Array
    start: jax.Array  # what the tile's queries read together
    stop: jax.Array
    all_start: jax.Array  # what each of them reads
    all_stop: jax.Array
    first: jax.Array  # token of the segment

    @classmethod
    def of(
        cls,
        config: Config,
        logits: Logits,
        tiles: Tiles,
        scratch: Scratch,
        segment: Segment,
        warpgroup: jax.Array,
    ) -> Any:  # one of this class, which the checks of types in tests cannot say
        """Loads what is read of a tile once for all of its blocks."""
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        all_start = start if tiles.all_start is None else tiles.all_start[segment.tile]
        all_stop = stop if tiles.all_stop is None else tiles.all_stop[segment.tile]
        first = (first_block(config, start) + segment.block) * config.block_tokens
        return cls(
            config, logits, tiles, scratch, segment, warpgroup, start, stop, all_start, all_stop,
            first,
        )  # fmt: skip

    @property
    def query_slot(self) -> jax.Array:
        """Where in shared memory the tile's queries are."""
        return lax.rem(self.segment.number, jnp.int32(self.config.query_slots))

    def slot(self, ring: Ring, i: jax.Array) -> jax.Array:
        """Where in a ring a block is."""
        return lax.rem(self.segment.step + i, jnp.int32(ring.blocks.shape[0]))

    def first_token(self, i: jax.Array) -> jax.Array:
        return self.first + i * self.config.block_tokens

    def sticks_out(self, i: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        """Whether a block has tokens outside `[start, stop)`."""
        first = self.first_token(i)
        return (first < start) | (first + self.config.block_tokens > stop)

    def masked(self, i: jax.Array, logits: jax.Array, layout: Any, *, token_axis: int) -> jax.Array:
        """Logits of a block, -inf for what is not read; only one that sticks out is masked."""
        first, queries = self.first_token(i), logits.shape[1 - token_axis]

        def mask(logits):
            return seen(logits, first, *self.own_span(queries, layout), token_axis=token_axis)

        sticks_out = self.sticks_out(i, self.all_start, self.all_stop)
        return lax.cond(sticks_out, mask, lambda logits: logits, logits)

    def zero_unread(self, i: jax.Array) -> None:
        """Zeroes values of a block that are not read."""

        @pl.when(self.sticks_out(i, self.start, self.stop))
        def _():
            value = self.scratch.taken[1]
            block = value.blocks.at[self.slot(value, i)]
            zero_unread(block, self.first_token(i), self.start, self.stop)

    def own_span(self, rows: int, layout: Any) -> tuple[jax.Array, jax.Array]:
        """What so many queries of this warpgroup read: all of them the same, or each its own."""
        tiles = self.tiles
        if tiles.starts is None or tiles.stops is None:
            return self.start, self.stop
        own = self.segment.tile, pl.ds(self.warpgroup * MMA_ROWS, rows)
        return load(tiles.starts.at[own], layout), load(tiles.stops.at[own], layout)
