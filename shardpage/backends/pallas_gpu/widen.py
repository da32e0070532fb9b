"""The warpgroups that widen the blocks of a quantised cache, from where copies bring them to where
the matmuls of those that attend take them; scales of tokens they put in the order of tokens.

    fetch     K0 V0 K1 V1 ...                  elements of 8 bits, and scales
    widen        K0 K1 ...                     bfloat16, which holds them all exactly
    widen           V0 V1 ...
    attend          S0 P0 O0 | S1 P1 O1 ...

A widened element is not multiplied by its token's scale: those of keys go to the logits, those of
values to the weights, in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...quantise import INT8_NAN
from .config import Config, scale_lanes, swizzle_bytes
from .mosaic import MMA_ROWS, WARP, load
from .scratch import Scratch
from .share import Segment, first_block
from .softmax import COLUMNS
from .tiles import Tiles

_VECTOR = 8  # elements that a thread reads, and writes, at once


@dataclasses.dataclass(frozen=True)
class Widener:
    """What such a warpgroup sees."""

    config: Config
    tiles: Tiles
    scratch: Scratch
    number: jax.Array  # among those that widen

    def segment(self, segment: Segment) -> None:
        """Widens the blocks of a segment one by one."""

        def block(i, _):
            step = segment.step + i
            if self.config.wideners == 1:
                self.keys(step)
                self.values(segment, i)
            else:
                pl.when(self.number == 0)(lambda: self.keys(step))
                pl.when(self.number == 1)(lambda: self.values(segment, i))
            return 0

        lax.fori_loop(0, segment.length, block, 0)

    def drain(self, steps: jax.Array, drain: Callable[..., None]) -> None:
        """Waits until the last blocks are taken."""
        blocks, count = self.scratch.blocks, self.config.wide_stages
        for number, free in enumerate((blocks.key_free, blocks.value_free)):
            if self.config.wideners == 1:
                drain(free, count, steps)
            else:
                pl.when(self.number == number)(lambda free=free: drain(free, count, steps))

    def keys(self, step: jax.Array) -> None:
        arriving, blocks = self.scratch.arriving, self.scratch.blocks
        assert arriving is not None
        stored, wide = self.slot(step, self.config.stages), self.slot(step, self.config.wide_stages)
        plgpu.barrier_wait(arriving.key_full.at[stored])
        self.wait(blocks.key_free, wide, step)
        self.widen(arriving.key.at[stored], blocks.key.at[wide], marked=True)
        plgpu.commit_smem()
        plgpu.barrier_arrive(blocks.key_full.at[wide])
        plgpu.barrier_arrive(arriving.key_free.at[stored])

    def values(self, segment: Segment, i: jax.Array) -> None:
        """Before them the scales, which those who attend take with the keys."""
        arriving, blocks, step = self.scratch.arriving, self.scratch.blocks, segment.step + i
        assert arriving is not None
        stored, wide = self.slot(step, self.config.stages), self.slot(step, self.config.wide_stages)
        plgpu.barrier_wait(arriving.value_full.at[stored])
        if self.config.scale_copies:
            self.scales(segment, i)
            plgpu.commit_smem()
            plgpu.barrier_arrive(blocks.key_full.at[wide])
        self.wait(blocks.value_free, wide, step)
        self.widen(arriving.value.at[stored], blocks.value.at[wide], marked=False)
        plgpu.commit_smem()
        plgpu.barrier_arrive(blocks.value_full.at[wide])
        plgpu.barrier_arrive(arriving.value_free.at[stored])

    def slot(self, step: jax.Array, stages: int) -> jax.Array:
        """Where in a ring a block is."""
        return lax.rem(step, jnp.int32(stages))

    def wait(self, free: Any, slot: jax.Array, step: jax.Array) -> None:
        """Until what a slot held before is taken."""

        @pl.when(step >= self.config.wide_stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

    def widen(self, source: Any, target: Any, *, marked: bool) -> None:
        """Copies a block; `marked` where an element of int8 may say that its token is NaN."""
        config = self.config
        tokens, dim = source.shape
        columns = swizzle_bytes(dim, config.format.dtype)
        layout = _layout(columns)
        for row in range(0, tokens, MMA_ROWS):
            for column in range(0, dim, columns):
                part = pl.ds(row, MMA_ROWS), pl.ds(column, columns)
                elements = load(source.at[part], layout)
                if config.format.dtype != np.int8:
                    elements = elements.astype(jnp.float32)  # what conversions go through
                wide = elements.astype(config.format.compute_dtype)
                if marked and config.format.dtype == np.int8 and not config.scale_copies:
                    wide = jnp.where(wide == INT8_NAN, jnp.nan, wide)
                target[part] = wide

    def scales(self, segment: Segment, i: jax.Array) -> None:
        """A token that is NaN, in whichever of its scales, is so in the logits of who reads it."""
        config, tiles, scales = self.config, self.tiles, self.scratch.scales
        assert scales is not None
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        first = (first_block(config, start) + segment.block + i) * config.block_tokens
        step, piece, (value_lane, _) = segment.step + i, config.piece_tokens, scale_lanes(config)
        stored, slot = self.slot(step, config.stages), self.slot(step, config.scale_stages)
        for j in range(config.block_tokens // piece):
            key, value = (
                load(scales.arriving.at[stored, j, pl.ds(lane, piece)], COLUMNS)
                for lane in (0, value_lane)
            )
            behind = plgpu.broadcasted_iota(jnp.int32, (piece,), 0, layout=COLUMNS)
            token = first + j * piece + behind
            finite = value * 0.0 == 0.0
            read = finite & (token >= start) & (token < stop)
            own = pl.ds(j * piece, piece)
            scales.key[slot, own] = jnp.where(finite, key, jnp.nan)
            scales.value[slot, own] = jnp.where(read, value, 0.0)


def _layout(columns: int) -> Any:
    """Of 64 rows of so many columns, of which 32 threads read, and then write, whole rows.

    So no two of them meet in a bank of shared memory.
    """
    rows = WARP * _VECTOR // columns
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
