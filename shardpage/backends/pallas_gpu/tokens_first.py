"""How a warpgroup attends with few queries to the blocks of a quantised cache: tokens are the rows
of its matmuls.

    keys [tokens, key_dim] x queries^T -> weights [tokens, queries] -> shared memory
    values^T [value_dim, tokens] x weights            -> sums [value_dim, queries]

A wgmma has 64 rows, of which the 8 query heads of a KV head would fill 8, and as few as 8 columns.
So what a block costs here is little, and what is left of the time is the memory's. Keys are taken
as they are stored (`split.py`), and a token's scales are one number to a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import split
from .blocks import Blocks
from .mosaic import MMA_ROWS, load
from .softmax import COLUMNS, LOWEST, ROWS, WGMMA, State, mean, product


class TokensFirst(Blocks):
    """The blocks of a segment, for a unit's queries."""

    lse_layout = COLUMNS

    def attend(self) -> tuple[jax.Array, jax.Array]:
        """The weighted mean over all blocks, and lse in base 2; see `softmax.mean`."""
        state = lax.fori_loop(0, self.segment.length, self.block, self.nothing())
        return mean(state._replace(total=state.total.sum(axis=0)), query_axis=1)

    def nothing(self) -> State:
        """The state before any key: `total` in 64 rows, to be added up."""
        columns = self.config.query_rows
        full = lambda shape, value, layout: plgpu.layout_cast(
            jnp.full(shape, value, jnp.float32), layout
        )
        return State(
            full((columns,), LOWEST, COLUMNS),
            full((MMA_ROWS, columns), 0.0, WGMMA),
            full((self.config.out_dim, columns), 0.0, WGMMA),
        )

    def block(self, i: jax.Array, state: State) -> State:
        """Takes a block in."""
        config, scales = self.config, self.scratch.scales
        key, value = self.scratch.taken
        key_slot, value_slot = self.slot(key, i), self.slot(value, i)
        plgpu.barrier_wait(key.full.at[key_slot])
        products = self.products(key.blocks.at[key_slot])
        plgpu.barrier_arrive(key.free.at[key_slot])
        plgpu.barrier_wait(value.full.at[value_slot])
        if scales is not None:  # those of keys come with the values
            products = _by_token(products, scales.key.at[value_slot])
        logits = self.masked(i, self.logits.in_base_2(products), COLUMNS, token_axis=0)

        peak = jnp.maximum(state.peak, logits.max(axis=0) * self.logits.factor)
        weights = jnp.exp2(logits * self.logits.factor - _columns(peak, logits.shape))
        shrink = jnp.exp2(state.peak - peak)
        total = state.total * _columns(shrink, state.total.shape)
        for row in range(0, config.block_tokens, MMA_ROWS):
            total += weights[row : row + MMA_ROWS]
        if scales is not None:
            weights = _by_token(weights, scales.value.at[value_slot])
        # No warp is still in the matmul before this one: all have met for the peak.
        self.scratch.weights.transpose((1, 0))[...] = _turned(
            weights.astype(config.format.compute_dtype)
        )
        self.zero_unread(i)
        plgpu.commit_smem()
        values = product(
            value.blocks.at[value_slot].transpose((1, 0)), self.scratch.weights.transpose((1, 0))
        )
        plgpu.barrier_arrive(value.free.at[value_slot])
        return State(peak, total, state.sums * _columns(shrink, values.shape) + values)

    def products(self, keys_ref: Any) -> jax.Array:
        """Keys times queries, `[tokens, queries]`, but for the scales of tokens."""
        config = self.config
        copy = pl.ds(self.query_slot * config.copy_rows, config.copy_rows)
        query = self.scratch.query.at[copy].transpose((1, 0))
        dtype = jnp.int32 if config.format.dtype == jnp.int8 else jnp.float32
        multiplied = product(keys_ref, query, dtype)
        units = self.scratch.query_units.at[self.query_slot, pl.ds(0, config.query_rows)]
        products = split.products(multiplied, config.query_rows, config.format)
        return products * _columns(load(units, COLUMNS), products.shape)

    def store(self, result: tuple[jax.Array, jax.Array], out: Any, lse_out: Any) -> None:
        """Copies a unit's rows to `out`, some columns at a time."""
        config, staged_out, staged_lse = self.config, self.scratch.out, self.scratch.lse
        means, lse = result
        for column in range(0, config.out_dim, config.store_chunk):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has left
            staged_out.transpose((1, 0))[...] = _turned(means[column : column + config.store_chunk])
            if column == 0:
                staged_lse[...] = lse
            plgpu.commit_smem()
            target = out.at[:, pl.ds(column, config.store_chunk)]
            plgpu.copy_smem_to_gmem(staged_out, target)
            if column == 0:
                plgpu.copy_smem_to_gmem(staged_lse, lse_out.at[pl.ds(0, config.query_rows)])


def _columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One for each query, for all rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def _by_token(rows: jax.Array, scales_ref: Any) -> jax.Array:
    """Rows `[tokens, queries]`, each times its token's scale."""
    return rows * lax.broadcast_in_dim(load(scales_ref, ROWS), rows.shape, [0])


def _turned(x: jax.Array) -> jax.Array:
    """In the layout that is stored transposed."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
