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
import functools
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
            self.for_own(lambda which: self.block(segment, i, which))
            return 0

        lax.fori_loop(0, segment.length, block, 0)

    def drain(self, steps: jax.Array, drain: Callable[..., None]) -> None:
        """Waits until the last blocks are taken."""
        free = self.scratch.blocks.key_free, self.scratch.blocks.value_free
        self.for_own(lambda which: drain(free[which], self.config.wide_stages, steps))

    def for_own(self, body: Callable[[int], None]) -> None:
        """Runs `body` for keys (0) and values (1), or for those of them that are this one's."""
        for which in (0, 1):
            if self.config.wideners == 1:
                body(which)
            else:
                pl.when(self.number == which)(functools.partial(body, which))

    def block(self, segment: Segment, i: jax.Array, which: int) -> None:
        """Keys or values of a block, and their scales."""
        config, arriving, blocks = self.config, self.scratch.arriving, self.scratch.blocks
        assert arriving is not None
        step = segment.step + i
        slot, wide = (
            lax.rem(step, jnp.int32(stages)) for stages in (config.stages, config.wide_stages)
        )
        source = (arriving.key, arriving.value)[which].at[slot]
        target = (blocks.key, blocks.value)[which].at[wide]
        if which == 0 or (config.scale_copies and config.wideners > 1):
            plgpu.barrier_wait(arriving.key_full.at[slot])
        if which == 1:
            plgpu.barrier_wait(arriving.value_full.at[slot])

        @pl.when(step >= config.wide_stages)
        def _():
            plgpu.barrier_wait((blocks.key_free, blocks.value_free)[which].at[wide])

        self.widen(source, target, marked=which == 0)
        if config.scale_copies:
            self.scales(segment, i, which, slot, wide)
        plgpu.commit_smem()
        plgpu.barrier_arrive((blocks.key_full, blocks.value_full)[which].at[wide])
        if which == 0 or config.scale_copies:
            plgpu.barrier_arrive(arriving.key_free.at[slot])
        if which == 1:
            plgpu.barrier_arrive(arriving.value_free.at[slot])

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

    def scales(
        self, segment: Segment, i: jax.Array, which: int, slot: jax.Array, wide: jax.Array
    ) -> None:
        """In the order of tokens. A token that is NaN, in whichever of its scales, is so in its
        key's, and 0 in its value's, as is what is not read: a weight of 0 would not silence it."""
        config, tiles, scales = self.config, self.tiles, self.scratch.scales
        assert scales is not None
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        first = (first_block(config, start) + segment.block + i) * config.block_tokens
        piece, (value_lane, _) = config.piece_tokens, scale_lanes(config)
        for j in range(config.block_tokens // piece):
            key, value = (
                load(scales.arriving.at[slot, j, pl.ds(lane, piece)], COLUMNS)
                for lane in (0, value_lane)
            )
            finite, own = value * 0.0 == 0.0, pl.ds(j * piece, piece)
            if which == 0:
                scales.key[wide, own] = jnp.where(finite, key, jnp.nan)
                continue
            behind = plgpu.broadcasted_iota(jnp.int32, (piece,), 0, layout=COLUMNS)
            token = first + j * piece + behind
            read = finite & (token >= start) & (token < stop)
            scales.value[wide, own] = jnp.where(read, value, 0.0)


def _layout(columns: int) -> Any:
    """Of 64 rows of so many columns, of which 32 threads read, and then write, whole rows.

    So no two of them meet in a bank of shared memory.
    """
    rows = WARP * _VECTOR // columns
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
