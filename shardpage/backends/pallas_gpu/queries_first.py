"""How a warpgroup attends to the blocks of one segment: queries are the rows of its matmuls.

One warpgroup alone waits for the memory, and takes each block as it comes:

    keys P values | keys P values | ...             P: the softmax

Two wait for the matrix unit. There the values of a block are multiplied together with the keys of
the next: each warpgroup has one long piece of work for the unit and one softmax, and while one has
its softmax, the other has the unit:

    keys P | values keys | P           | values keys | P ...
         keys            | values keys | P           | values keys ...
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import softmax
from .blocks import Blocks
from .mosaic import MMA_ROWS, load
from .window import Window

Carry = tuple[softmax.State, Any]  # and the weights of the last block, [64, block_tokens]


class QueriesFirst(Blocks):
    """The blocks of a segment, for 64 rows of queries."""

    lse_layout = softmax.ROWS

    def attend(self) -> tuple[jax.Array, jax.Array]:
        """The weighted mean over all blocks, and lse; see `softmax.mean`."""
        return softmax.mean(self.state())

    def state(self) -> softmax.State:
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
        key, _ = self.scratch.taken
        slot = self.slot(key, i)
        plgpu.barrier_wait(key.full.at[slot])
        products = softmax.products(self.query, key.blocks.at[slot])
        products = self.times_scales(products, slot)
        plgpu.barrier_arrive(key.free.at[slot])
        return self.weigh(i, carry[0], products)

    def values(self, i: jax.Array, carry: Carry) -> Carry:
        """Adds the values of a block that was weighed."""
        _, value = self.scratch.taken
        slot = self.slot(value, i)
        state, weights = carry
        plgpu.barrier_wait(value.full.at[slot])
        self.zero_unread(i)
        scaled = self.weights(weights, slot)
        state = softmax.add_values(state, scaled, value.blocks.at[slot], self.stage)
        plgpu.barrier_arrive(value.free.at[slot])
        return state, weights

    def values_and_keys(self, i: jax.Array, carry: Carry) -> Carry:
        """Adds the values of the block before, and weighs this one."""
        key, value = self.scratch.taken
        slot, before = self.slot(key, i), self.slot(value, i - 1)
        state, weights = carry
        plgpu.barrier_wait(key.full.at[slot])
        plgpu.barrier_wait(value.full.at[before])
        self.zero_unread(i - 1)
        weights = self.weights(weights, before)
        state, products = softmax.add_values_and_multiply(
            state, weights, value.blocks.at[before], self.stage, self.query, key.blocks.at[slot]
        )
        products = self.times_scales(products, slot)
        plgpu.barrier_arrive(key.free.at[slot])
        plgpu.barrier_arrive(value.free.at[before])
        return self.weigh(i, state, products)

    def weigh(self, i: jax.Array, state: softmax.State, products: jax.Array) -> Carry:
        """Takes the products of a block in."""
        logits = self.masked(i, self.logits.in_base_2(products), softmax.ROWS, token_axis=1)
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

    def weights(self, weights: jax.Array, slot: jax.Array) -> jax.Array:
        """Weights as matmuls take them, times the scale of each token's value."""
        scales = self.scratch.scales
        if scales is not None:
            weights = _by_token(weights, scales.value.at[slot])
        return weights.astype(self.config.format.compute_dtype)

    @property
    def stage(self) -> Any:
        """Where the interpreter puts weights."""
        weights = self.scratch.weights
        return None if weights is None else weights.at[self.warpgroup]

    @property
    def query(self) -> Any:
        """`[64, key_dim]`, in shared memory."""
        own = self.query_slot * self.config.query_rows
        if self.config.consumers > 1:
            own += self.warpgroup * MMA_ROWS
        return self.scratch.query.at[pl.ds(own, MMA_ROWS)]

    def store(
        self,
        result: tuple[jax.Array, jax.Array],
        out: Any,
        lse_out: Any,
        window: Window | None = None,
        *,
        whole: bool = True,
    ) -> None:
        """Copies this warpgroup's rows of a unit to `out`, a chunk of columns at a time.

        Those of a window leave for where they belong; `whole` where all of its queries do.
        """
        config, scratch = self.config, self.scratch
        staged = scratch.out if out.dtype == scratch.out.dtype else scratch.part_out
        staged_out, staged_lse = (x.at[self.warpgroup] for x in (staged, scratch.lse))
        first = lax.rem(self.segment.unit, jnp.int32(config.fold)) * config.rows
        rows, own = config.rows, 0
        if config.consumers > 1:
            rows, own = MMA_ROWS, self.warpgroup * MMA_ROWS
        means, lse = result
        chunk = staged.shape[-1]
        for column in range(0, config.format.value_dim, chunk):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before has left
            staged_out[...] = means[:, column : column + chunk].astype(out.dtype)
            if column == 0:
                staged_lse[...] = lse
            plgpu.commit_smem()
            columns = pl.ds(column, chunk)
            if window is not None:
                window.store(staged_out, out, own, columns, whole=whole)
            else:
                target = out.at[pl.ds(own, rows), columns]
                plgpu.copy_smem_to_gmem(staged_out.at[pl.ds(first, rows)], target)
            if column == 0:
                plgpu.copy_smem_to_gmem(staged_lse, lse_out.at[pl.ds(own, MMA_ROWS)])


def _by_token(rows: jax.Array, scales_ref: Any) -> jax.Array:
    """Rows `[64, tokens]`, each column times its token's scale."""
    scales = load(scales_ref, softmax.COLUMNS)
    return rows * lax.broadcast_in_dim(scales, rows.shape, [1])
