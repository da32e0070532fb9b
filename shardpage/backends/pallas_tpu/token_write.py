"""Putting tokens into token-major pages in place: a copy each, as all heads of one lie together."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...cache import PagedKVCache, first_page
from ...options import Tuning
from ...plan import Writes
from ...quantise import Stored
from ...varying import result_as, vary_together
from .chip import interpreter
from .transforms import as_kernel

_UNROLL = 8  # tokens between two branches


def put(cache: PagedKVCache, tokens: Stored, writes: Writes, tuning: Tuning) -> PagedKVCache:
    """Writes tokens into local pages; a page id outside of the cache drops one."""
    new = cache.format.join_tokens(tokens.key, tokens.value)
    layer = jnp.zeros(1, jnp.int32) if cache.layer is None else cache.layer.reshape(1)
    call = as_kernel(functools.partial(_call, cache.num_layers or 1, cache.num_pages), tuning)
    return cache.replace(call(*_padded(writes, cache.num_pages), layer, tuple(new), cache.arrays))


def _padded(writes: Writes, num_pages: int) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """To whole rounds of the loop, with tokens that are dropped."""
    spare = -len(writes.page) % _UNROLL
    return jnp.pad(writes.page, (0, spare), constant_values=num_pages), jnp.pad(
        writes.slot, (0, spare)
    )


def _call(num_layers: int, num_pages: int, tuning: Tuning, *inputs: Any) -> tuple[jax.Array, ...]:
    *where, tokens, arrays = vary_together(*inputs)
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    in_hbm, num_before = (hbm,) * len(arrays), len(where) + len(tokens)
    return pl.pallas_call(
        functools.partial(_kernel, num_layers=num_layers, num_pages=num_pages),
        in_specs=[scalar, scalar, scalar, in_hbm, in_hbm],
        out_specs=in_hbm,
        out_shape=tuple(result_as(array, array.shape, array.dtype) for array in arrays),
        input_output_aliases={num_before + i: i for i in range(len(arrays))},
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpreter(tuning),
        name="shardpage_write_tokens",
    )(*where, tokens, arrays)


def _kernel(
    page: Any,
    slot: Any,
    layer: Any,
    tokens: Sequence[Any],  # in HBM, [tokens, *token_shape]
    before: Sequence[Any],
    *caches_and_semaphore: Any,
    num_layers: int,
    num_pages: int,
) -> None:
    """The body of the `pallas_call`; the caches after `before` are the same, aliased."""
    *caches, semaphore = caches_and_semaphore
    begin = first_page(layer[0], num_layers=num_layers, num_pages=num_pages)

    def start(token: jax.Array) -> jax.Array:
        held = (page[token] >= 0) & (page[token] < num_pages) & (begin >= 0)

        @pl.when(held)
        def _():
            at = (begin + page[token], slot[token])
            for new, cache in zip(tokens, caches, strict=True):
                pltpu.make_async_copy(new.at[token], cache.at[at], semaphore).start()

        return held.astype(jnp.int32)

    def start_some(number: jax.Array, started: jax.Array) -> jax.Array:
        return started + sum(start(number * _UNROLL + i) for i in range(_UNROLL))

    started = lax.fori_loop(0, page.shape[0] // _UNROLL, start_some, jnp.int32(0))
    # One wait for each binary digit of their number.
    for digit in range(tokens[0].shape[0].bit_length()):
        for new in tokens:
            some = new.at[pl.ds(0, 1 << digit)]
            copy = pltpu.make_async_copy(some, some, semaphore)
            pl.when(started & (1 << digit) != 0)(copy.wait)
