"""`write` of the TPU backend: only the tiles that get tokens are read and written, in place."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ...cache import PagedKVCache
from ...options import Tuning
from ...plan import Writes
from ...varying import vary_together
from . import write_kernel
from .chip import interpreter
from .config import check_format
from .transforms import as_kernel

# Bounds what a call takes besides the cache: scalar memory for its schedule, tokens in float32.
_TOKENS_PER_CALL = 1 << 13


def write(
    cache: PagedKVCache,
    key: Float[Array, "tokens num_kv_heads key_dim"],
    value: Float[Array, "tokens num_kv_heads value_dim"],
    writes: Writes,
    tuning: Tuning,
) -> PagedKVCache:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    check_format(cache.format)
    tokens = cache.format.to_arrays(key, value, lambda both: jnp.stack(both, axis=1))
    for start in range(0, key.shape[0], _TOKENS_PER_CALL):
        part = slice(start, start + _TOKENS_PER_CALL)
        some = Writes(*(x[part] for x in writes))
        call = as_kernel(_write, tuning)
        cache = cache.replace(call(cache, [x[part] for x in tokens], some))
    return cache


def _write(
    tuning: Tuning, cache: PagedKVCache, tokens: Sequence[jax.Array], writes: Writes
) -> tuple[jax.Array, ...]:
    tiles = write_kernel.Tiles(cache.format)
    schedule, order = write_kernel.schedule(tiles, cache.num_pages, *writes)
    # A row per token, its elements repeated for each place that it may have in a cache row.
    rows = tuple(
        jnp.tile(x[order].astype(jnp.float32), cache.format.pack).reshape(-1, *tiles.token_shape)
        for x in tokens
    )
    schedule, rows, arrays = vary_together(schedule, rows, cache.arrays)
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    hbm_arrays, num_before = (hbm,) * len(arrays), len(schedule) + len(rows)
    shape_of = lambda array: jax.ShapeDtypeStruct(
        array.shape, array.dtype, manual_axis_type=jax.typeof(array).manual_axis_type
    )
    return pl.pallas_call(
        functools.partial(write_kernel.kernel, tiles=tiles),
        in_specs=[jax.tree.map(lambda _: scalar, schedule), (hbm,) * len(rows), hbm_arrays],
        out_specs=hbm_arrays,
        out_shape=jax.tree.map(shape_of, arrays),
        input_output_aliases={num_before + i: i for i in range(len(arrays))},
        scratch_shapes=write_kernel.scratch_shapes(tiles, len(arrays)),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpreter(tuning),
        name="shardpage_write",
    )(schedule, rows, arrays)
