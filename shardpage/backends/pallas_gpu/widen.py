"""The warpgroup that widens the blocks of a quantised cache, from where copies bring them to where
the matmuls of those that attend take them; scales of tokens it puts in the order of tokens.

    fetch     K0 V0 K1 V1 ...                  elements of 8 bits, and scales
    widen        K0 V0 K1 V1 ...               bfloat16, which holds them all exactly
    attend          S0 P0 O0 | S1 P1 O1 ...

A widened element is not multiplied by its token's scale: those of keys go to the logits, those of
values to the weights, in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...quantise import INT8_NAN
from .config import Config, scale_lanes, swizzle_bytes
from .mosaic import MMA_ROWS, load
from .scratch import Scratch
from .share import Segment, first_block
from .softmax import COLUMNS
from .tiles import Tiles

# Four elements of 8 bits side by side to a thread, which may be stored as they are.
_LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X


@dataclasses.dataclass(frozen=True)
class Widener:
    """What that warpgroup sees."""

    config: Config
    tiles: Tiles
    scratch: Scratch

    def segment(self, segment: Segment) -> None:
        """Widens the blocks of a segment one by one."""

        def block(i, _):
            self.block(segment, i)
            return 0

        lax.fori_loop(0, segment.length, block, 0)

    def block(self, segment: Segment, i: jax.Array) -> None:
        config, arriving, blocks = self.config, self.scratch.arriving, self.scratch.blocks
        assert arriving is not None
        step = segment.step + i
        stored, wide = (
            lax.rem(step, jnp.int32(stages)) for stages in (config.stages, config.wide_stages)
        )
        for which in (0, 1):
            source, target, full, free, arrived, taken = (
                pair[which]
                for pair in (
                    (arriving.key, arriving.value),
                    (blocks.key, blocks.value),
                    (blocks.key_full, blocks.value_full),
                    (blocks.key_free, blocks.value_free),
                    (arriving.key_full, arriving.value_full),
                    (arriving.key_free, arriving.value_free),
                )
            )
            plgpu.barrier_wait(arrived.at[stored])

            @pl.when(step >= config.wide_stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[wide])

            self.widen(source.at[stored], target.at[wide], marked=which == 0)
            if which == 0 and config.scale_copies:
                self.scales(segment, i, stored)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full.at[wide])
            plgpu.barrier_arrive(taken.at[stored])

    def widen(self, source: Any, target: Any, *, marked: bool) -> None:
        """Copies a block; `marked` where an element of int8 may say that its token is NaN."""
        config = self.config
        tokens, dim = source.shape
        columns = swizzle_bytes(dim, config.format.dtype)
        for row in range(0, tokens, MMA_ROWS):
            for column in range(0, dim, columns):
                part = pl.ds(row, MMA_ROWS), pl.ds(column, columns)
                elements = load(source.at[part], _LAYOUT)
                if config.format.dtype != np.int8:
                    elements = elements.astype(jnp.float32)  # what conversions go through
                wide = elements.astype(config.format.compute_dtype)
                if marked and config.format.dtype == np.int8 and not config.scale_copies:
                    wide = jnp.where(wide == INT8_NAN, jnp.nan, wide)
                target[part] = wide

    def scales(self, segment: Segment, i: jax.Array, stored: jax.Array) -> None:
        """A token that is NaN, in whichever of its scales, is so in the logits of who reads it."""
        config, scales, tiles = self.config, self.scratch.scales, self.tiles
        assert scales is not None
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        first = (first_block(config, start) + segment.block + i) * config.block_tokens
        step, piece = segment.step + i, config.piece_tokens
        slots = (
            lax.rem(step, jnp.int32(count))
            for count in (config.wide_stages, config.wide_stages + 1)
        )
        key_slot, value_slot = slots
        value_lane, _ = scale_lanes(config)
        for j in range(config.block_tokens // piece):
            key, value = (
                load(scales.arrived.at[stored, j, pl.ds(lane, piece)], COLUMNS)
                for lane in (0, value_lane)
            )
            behind = plgpu.broadcasted_iota(jnp.int32, (piece,), 0, layout=COLUMNS)
            token = first + j * piece + behind
            finite = value * 0.0 == 0.0
            read = finite & (token >= start) & (token < stop)
            own = pl.ds(j * piece, piece)
            scales.key[key_slot, own] = jnp.where(finite, key, jnp.nan)
            scales.value[value_slot, own] = jnp.where(read, value, 0.0)
