"""`write` of the TPU backend: only the tiles that get tokens are read and written, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ...cache import PagedKVCache, first_page
from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Writes
from ...varying import result_as, vary_together
from . import write_kernel
from .chip import chip_of, interpreter
from .config import check_format
from .geometry import LANES, SUBLANES, round_up
from .transforms import as_kernel

# Of tokens that a call keeps in fast memory.
_TOKEN_BYTES = 4 << 20


def prepare_writes(
    writes: Writes, num_pages: int, page_format: PageFormat, tuning: Tuning
) -> tuple[write_kernel.Schedule, ...]:
    """Sorts the tokens of each call of the kernel; see `shardpage.backends` for the contract."""
    check_format(page_format)
    tiles = write_kernel.Tiles(page_format)
    parts = _parts(writes.page.shape[0], page_format)
    return tuple(
        write_kernel.schedule(tiles, num_pages, writes.page[part], writes.slot[part])
        for part in parts
    )


def _parts(num_tokens: int, page_format: PageFormat) -> list[slice]:
    """The tokens of each call."""
    rows = 2 * page_format.num_kv_heads
    most = max(SUBLANES, _TOKEN_BYTES // (4 * rows * round_up(page_format.row_dim, LANES)))
    return [slice(first, first + most) for first in range(0, num_tokens, most)]


def write(
    cache: PagedKVCache,
    key: Float[Array, "tokens num_kv_heads key_dim"],
    value: Float[Array, "tokens num_kv_heads value_dim"],
    writes: Writes,
    work: tuple[write_kernel.Schedule, ...],
    tuning: Tuning,
) -> PagedKVCache:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    for part, schedule in zip(_parts(key.shape[0], cache.format), work, strict=True):
        words = _words(key[part], value[part], cache.format)
        cache = cache.replace(as_kernel(_write, tuning)(cache, words, schedule))
    return cache


def _words(key: jax.Array, value: jax.Array, page_format: PageFormat) -> jax.Array:
    """Tokens as words that have an element in each place: in both halves, in all parts of a row.

    All keys, then all values: so XLA has nothing to move.
    """
    both = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in (key, value)])
    if page_format.dtype.itemsize == 2:
        half = lax.bitcast_convert_type(both, jnp.uint16).astype(jnp.uint32)
        both = half | half << 16
    words = jnp.tile(lax.bitcast_convert_type(both, jnp.int32), page_format.pack)
    row_parts = write_kernel.Tiles(page_format).row_parts
    return words.reshape(-1, page_format.row_dim // row_parts)


def _write(
    tuning: Tuning, cache: PagedKVCache, words: jax.Array, schedule: write_kernel.Schedule
) -> tuple[jax.Array, ...]:
    chip = chip_of(tuning)
    tiles = write_kernel.Tiles(cache.format, chip.step_blocks)
    layer = jnp.zeros(1, jnp.int32) if cache.layer is None else cache.layer.reshape(1)
    *before, arrays = vary_together(schedule, layer, words, cache.arrays)
    layers = {"num_layers": cache.num_layers or 1, "num_pages": cache.num_pages}
    begin = functools.partial(first_page, **layers)
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    hbm_arrays, num_before = (hbm,) * len(arrays), len(schedule) + 2
    shape_of = lambda array: result_as(array, array.shape, array.dtype)
    return pl.pallas_call(
        functools.partial(write_kernel.kernel, tiles=tiles, first_page=begin),
        in_specs=[
            jax.tree.map(lambda _: scalar, schedule),
            scalar,
            pl.BlockSpec(memory_space=pltpu.VMEM),
            hbm_arrays,
        ],
        out_specs=hbm_arrays,
        out_shape=jax.tree.map(shape_of, arrays),
        input_output_aliases={num_before + i: i for i in range(len(arrays))},
        scratch_shapes=write_kernel.scratch_shapes(tiles),
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, vmem_limit_bytes=chip.vmem_bytes
        ),
        interpret=interpreter(tuning),
        name="shardpage_write",
    )(*before, arrays)
