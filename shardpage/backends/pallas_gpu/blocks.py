"""How a warpgroup attends to the blocks of one segment.

One warpgroup alone waits for the memory, and takes each block as it comes:

    keys P values | keys P values | ...             P: the softmax

Two wait for the matrix unit. There the values of a block are multiplied together with the keys of
the next: each warpgroup has one long piece of work for the unit and one softmax, and while one has
its softmax, the other has the unit:

    keys P | values keys | P           | values keys | P ...
         keys            | values keys | P           | values keys ...
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import softmax
from .config import Config
from .mosaic import MMA_ROWS, load
from .scratch import Scratch
from .share import Segment, first_block
from .softmax import Logits
from .tiles import Tiles

Carry = tuple[softmax.State, Any]  # and the weights of the last block, [64, block_tokens]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a segment, for one warpgroup's queries.

    `scratch` has the ring of blocks and its barriers.
    """

    config: Config
    logits: Logits
    tiles: Tiles
    scratch: Scratch
    segment: Segment
    query: Any  # [64, key_dim], in shared memory
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
        query: Any,
        warpgroup: jax.Array,
    ) -> "Blocks":
        """Loads what is read of a tile once for all of its blocks."""
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        all_start = start if tiles.all_start is None else tiles.all_start[segment.tile]
        all_stop = stop if tiles.all_stop is None else tiles.all_stop[segment.tile]
        first = (first_block(config, start) + segment.block) * config.block_tokens
        return cls(
            config, logits, tiles, scratch, segment, query, warpgroup, start, stop, all_start,
            all_stop, first,
        )  # fmt: skip

    def attend(self) -> softmax.State:
        """The partial softmax over all blocks."""
        config, length = self.config, self.segment.length
        weights = jnp.zeros((MMA_ROWS, config.block_tokens), self.weights_dtype)
        weights = plgpu.layout_cast(weights, softmax.WGMMA)
        carry = softmax.nothing(config.format.value_dim), weights
        if config.consumers == 1:
            one = lambda i, carry: self.values(i, self.keys(i, carry))
            return lax.fori_loop(0, length, one, carry)[0]
        carry = lax.fori_loop(0, jnp.minimum(length, 1), self.keys, carry)
        carry = lax.fori_loop(1, length, self.values_and_keys, carry)
        return lax.fori_loop(jnp.maximum(length - 1, 0), length, self.values, carry)[0]

    def keys(self, i: jax.Array, carry: Carry) -> Carry:
        """Weighs a block."""
        slot, blocks = self.slot(i), self.scratch.blocks
        plgpu.barrier_wait(blocks.key_full.at[slot])
        products = softmax.products(self.query, blocks.key.at[slot])
        products = self.times_scales(products, slot)
        plgpu.barrier_arrive(blocks.key_free.at[slot])
        return self.weigh(i, carry[0], products)

    def values(self, i: jax.Array, carry: Carry) -> Carry:
        """Adds the values of a block that was weighed."""
        slot, blocks = self.slot(i), self.scratch.blocks
        state, weights = carry
        plgpu.barrier_wait(blocks.value_full.at[slot])
        self.zero_unread(i)
        scaled = self.weights(i, weights)
        state = softmax.add_values(state, scaled, blocks.value.at[slot], self.stage)
        plgpu.barrier_arrive(blocks.value_free.at[slot])
        return state, weights

    def values_and_keys(self, i: jax.Array, carry: Carry) -> Carry:
        """Adds the values of the block before, and weighs this one."""
        slot, before, blocks = self.slot(i), self.slot(i - 1), self.scratch.blocks
        state, weights = carry
        plgpu.barrier_wait(blocks.key_full.at[slot])
        plgpu.barrier_wait(blocks.value_full.at[before])
        self.zero_unread(i - 1)
        weights = self.weights(i - 1, weights)
        state, products = softmax.add_values_and_multiply(
            state, weights, blocks.value.at[before], self.stage, self.query, blocks.key.at[slot]
        )
        products = self.times_scales(products, slot)
        plgpu.barrier_arrive(blocks.key_free.at[slot])
        plgpu.barrier_arrive(blocks.value_free.at[before])
        return self.weigh(i, state, products)

    def weigh(self, i: jax.Array, state: softmax.State, products: jax.Array) -> Carry:
        """Takes the products of a block in. Only a block that sticks out is masked."""
        first = self.first_token(i)
        mask = lambda logits: softmax.seen(logits, first, *self.own_span())
        logits = self.logits.in_base_2(products)
        logits = lax.cond(
            self.sticks_out(i, self.all_start, self.all_stop), mask, lambda logits: logits, logits
        )
        state, weights = softmax.weigh(state, logits, self.logits.factor)
        return state, weights.astype(self.weights_dtype)

    @property
    def weights_dtype(self) -> Any:
        """Of weights that wait for their values, and for the scales of these."""
        scaled = self.scratch.scales is not None
        return jnp.dtype(jnp.float32) if scaled else self.config.format.compute_dtype

    def times_scales(self, products: jax.Array, slot: jax.Array) -> jax.Array:
        """Products of queries and keys, times the scale of each token's key."""
        scales = self.scratch.scales
        return products if scales is None else _by_token(products, scales.key.at[slot])

    def weights(self, i: jax.Array, weights: jax.Array) -> jax.Array:
        """Weights as matmuls take them, times the scale of each token's value."""
        scales = self.scratch.scales
        if scales is not None:
            weights = _by_token(weights, scales.value.at[self.slot(i)])
        return weights.astype(self.config.format.compute_dtype)

    def zero_unread(self, i: jax.Array) -> None:
        @pl.when(self.sticks_out(i, self.start, self.stop))
        def _():
            value = self.scratch.blocks.value.at[self.slot(i)]
            softmax.zero_unread(value, self.first_token(i), self.start, self.stop)

    @property
    def stage(self) -> Any:
        """Where the interpreter puts weights."""
        weights = self.scratch.weights
        return None if weights is None else weights.at[self.warpgroup]

    def slot(self, i: jax.Array) -> jax.Array:
        """Where in the ring a block is."""
        return lax.rem(self.segment.step + i, jnp.int32(self.config.block_stages))

    def first_token(self, i: jax.Array) -> jax.Array:
        return self.first + i * self.config.block_tokens

    def sticks_out(self, i: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        """Whether a block has tokens outside `[start, stop)`."""
        first = self.first_token(i)
        return (first < start) | (first + self.config.block_tokens > stop)

    def own_span(self) -> tuple[jax.Array, jax.Array]:
        """What this warpgroup's queries read: all of them the same, or each row its own."""
        tiles = self.tiles
        if tiles.starts is None or tiles.stops is None:
            return self.start, self.stop
        own = pl.ds(self.warpgroup * MMA_ROWS, MMA_ROWS)
        start, stop = (
            load(x.at[self.segment.tile, own], softmax.ROWS) for x in (tiles.starts, tiles.stops)
        )
        return start, stop


def _by_token(rows: jax.Array, scales_ref: Any) -> jax.Array:
    """Rows `[64, tokens]`, each column times its token's scale."""
    scales = load(scales_ref, softmax.COLUMNS)
    return rows * lax.broadcast_in_dim(scales, rows.shape, [1])
