"""The warpgroups that widen the blocks of a quantised cache, from where copies bring them to where
the matmuls of those that attend take them; scales of tokens they put in the order of tokens.

    fetch     K0 V0 K1 V1 ...                  elements of 8 bits, and scales
    widen        K0 V0 K1 V1 ...               bfloat16, which holds them all exactly
    attend          S0 P0 O0 | S1 P1 O1 ...

With few queries keys are taken as they are stored (`tokens_first.py`), and only values widened.
Of two warpgroups that widen, each has half of the tokens.

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
            for which in self.config.widened:
                self.block(segment, i, which)
            return 0

        lax.fori_loop(0, segment.length, block, 0)

    def drain(self, steps: jax.Array, drain: Callable[..., None]) -> None:
        """Waits until the last blocks are taken."""
        for which in self.config.widened:
            drain(self.scratch.taken[which].free, self.config.wide_stages, steps)

    def block(self, segment: Segment, i: jax.Array, which: int) -> None:
        """This warpgroup's tokens of a block of keys (0) or of values (1), and their scales."""
        config, arriving, wide = self.config, self.scratch.arriving, self.scratch.taken[which]
        step = segment.step + i
        slot, wide_slot = (
            lax.rem(step, jnp.int32(stages)) for stages in (config.stages, config.wide_stages)
        )
        plgpu.barrier_wait(arriving[which].full.at[slot])

        @pl.when(step >= config.wide_stages)
        def _():
            plgpu.barrier_wait(wide.free.at[wide_slot])

        tokens = config.block_tokens // config.wideners
        first = self.number * tokens if config.wideners > 1 else 0
        source, target = arriving[which].blocks.at[slot], wide.blocks.at[wide_slot]
        for row in range(0, tokens, min(tokens, MMA_ROWS)):
            part = pl.ds(first + row, min(tokens, MMA_ROWS))
            self.widen(source.at[part], target.at[part], marked=which == 0)
        if config.scale_copies:
            for scale in (which,) if len(config.widened) == 2 else (0, 1):
                self.scales(segment, i, scale, (slot, wide_slot), (first, tokens))
        plgpu.commit_smem()
        plgpu.barrier_arrive(wide.full.at[wide_slot])
        plgpu.barrier_arrive(arriving[which].free.at[slot])
        if config.scale_copies and which > config.scales_with:
            plgpu.barrier_arrive(arriving[config.scales_with].free.at[slot])

    def widen(self, source: Any, target: Any, *, marked: bool) -> None:
        """Copies some rows; `marked` where an element of int8 may say that its token is NaN."""
        config = self.config
        rows, dim = source.shape
        columns = swizzle_bytes(dim, config.format.dtype)
        layout = _layout(columns)
        for column in range(0, target.shape[1], columns):
            part = slice(None), pl.ds(column, columns)
            if column >= dim:  # rows of a matmul, which has 64 at a time
                zeros = jnp.zeros((rows, columns), config.format.compute_dtype)
                target[part] = plgpu.layout_cast(zeros, layout)
                continue
            elements = load(source.at[part], layout)
            if config.format.dtype != np.int8:
                elements = elements.astype(jnp.float32)  # what conversions go through
            wide = elements.astype(config.format.compute_dtype)
            if marked and config.format.dtype == np.int8 and not config.scale_copies:
                wide = jnp.where(wide == INT8_NAN, jnp.nan, wide)
            target[part] = wide

    def scales(
        self,
        segment: Segment,
        i: jax.Array,
        which: int,
        slots: tuple[jax.Array, jax.Array],
        own: tuple[Any, int],
    ) -> None:
        """In the order of tokens. A token that is NaN, in whichever of its scales, is so in its
        key's, and 0 in its value's, as is what is not read: a weight of 0 would not silence it."""
        config, tiles, scales = self.config, self.tiles, self.scratch.scales
        assert scales is not None
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        block = first_block(config, start) + segment.block + i
        first, tokens = own
        piece, (value_lane, _) = config.piece_tokens, scale_lanes(config)
        some = min(piece, tokens)
        layout = _vector(min(some, WARP))
        for at in range(0, tokens, some):
            number = lax.div(first + at, jnp.int32(piece))
            inside = first + at - number * piece
            key, value = (
                load(scales.arriving.at[slots[0], number, pl.ds(lane + inside, some)], layout)
                for lane in (0, value_lane)
            )
            finite, target = value * 0.0 == 0.0, pl.ds(first + at, some)
            if which == 0:
                scales.key[slots[1], target] = jnp.where(finite, key, jnp.nan)
                continue
            behind = plgpu.broadcasted_iota(jnp.int32, (some,), 0, layout=layout)
            token = block * config.block_tokens + first + at + behind
            read = finite & (token >= start) & (token < stop)
            scales.value[slots[1], target] = jnp.where(read, value, 0.0)


def _vector(length: int) -> Any:
    """Of a vector of a multiple of so many elements: each warp has all of it."""
    replicated = (plgpu.Replicated(WARP // length),) if length < WARP else ()
    tiling = plgpu.Tiling(((length,), (1,)))
    return plgpu.Layout.TILED(
        tiling, warp_dims=(plgpu.Replicated(4),), lane_dims=(*replicated, -2), vector_dim=-1
    )


def _layout(columns: int) -> Any:
    """Of 64 rows of so many columns, of which 32 threads read, and then write, whole rows.

    So no two of them meet in a bank of shared memory.
    """
    rows = WARP * _VECTOR // columns
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
