"""`write` of the TPU backend, in place: of tiles, only those that get tokens are touched."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...cache import PagedKVCache, first_page
from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Writes
from ...quantise import Stored
from ...varying import result_as, vary_together
from . import token_write, write_kernel
from .chip import chip_of, interpreter
from .config import check_format
from .fetch import kept_in_hbm
from .geometry import LANES, SUBLANES, round_up
from .transforms import as_kernel

# Of tokens that a call keeps in fast memory.
_TOKEN_BYTES = 4 << 20


def prepare_writes(
    writes: Writes, num_pages: int, page_format: PageFormat, tuning: Tuning
) -> tuple[tuple[write_kernel.Schedule, ...], ...]:
    """Sorts the tokens of each call of the kernel; see `shardpage.backends` for the contract."""
    check_format(page_format)
    parts = _parts(writes.page.shape[0], page_format)
    tiles = list(_tiles(page_format))
    slots = [each.slot(writes.slot) for each in tiles]
    return tuple(
        tuple(
            write_kernel.schedule(each, num_pages, writes.page[part], slot[part])
            for each, slot in zip(tiles, slots, strict=True)
        )
        for part in parts
    )


def _tiles(page_format: PageFormat, *together: int) -> Iterator[write_kernel.Tiles]:
    """What is written in tiles: elements, unless tokens are whole, and scales of tokens."""
    if not page_format.layout.token_major:
        yield write_kernel.Tiles(page_format, *together)
    if page_format.scale == "token":
        yield write_kernel.ScaleTiles(page_format, *together)


def _parts(num_tokens: int, page_format: PageFormat) -> list[slice]:
    """The tokens of each call."""
    rows = 2 * page_format.num_kv_heads
    most = max(SUBLANES, _TOKEN_BYTES // (4 * rows * round_up(page_format.row_dim, LANES)))
    return [slice(first, first + most) for first in range(0, num_tokens, most)]


def write(
    cache: PagedKVCache,
    tokens: Stored,
    writes: Writes,
    work: tuple[tuple[write_kernel.Schedule, ...], ...],
    tuning: Tuning,
) -> PagedKVCache:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    parts, together = _parts(len(tokens.key), cache.format), chip_of(tuning).step_blocks
    if cache.layout.token_major:
        cache = token_write.put(cache, tokens, writes, tuning)
    for part, schedules in zip(parts, work, strict=True):
        some = jax.tree.map(operator.itemgetter(part), tokens)
        for tiles, schedule in zip(_tiles(cache.format, together), schedules, strict=True):
            put = functools.partial(_put, tuning, tiles, cache, schedule)
            if isinstance(tiles, write_kernel.ScaleTiles):
                scales = put(_scale_words(some, tiles), kept_in_hbm(cache.scales))
                cache = cache.replace(cache.arrays, scales)
            else:
                cache = cache.replace(put(_words(some, tiles), cache.arrays))
    return cache


def _words(tokens: Stored, tiles: write_kernel.Tiles) -> jax.Array:
    """Tokens as words that have an element in each place: of all rows, and all parts of a row.

    All keys, then all values: so XLA has nothing to move.
    """
    both = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in (tokens.key, tokens.value)])
    if tiles.rows_per_word > 1:
        width = 8 * tiles.dtype.itemsize
        element = lax.bitcast_convert_type(both, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        both = element * np.uint32(sum(1 << place for place in range(0, 32, width)))
    words = jnp.tile(lax.bitcast_convert_type(both, jnp.int32), tiles.row_tokens)
    return words.reshape(-1, tiles.row_dim // tiles.row_parts)


def _scale_words(tokens: Stored, tiles: write_kernel.Tiles) -> jax.Array:
    """A token's scales in each place of a row: of its key, then of its value."""
    assert tokens.scales is not None
    words = lax.bitcast_convert_type(tokens.scales, jnp.int32)
    words = jnp.repeat(words, tiles.row_tokens, axis=-1)
    return words.reshape(-1, tiles.row_dim // tiles.row_parts)


def _put(
    tuning: Tuning,
    tiles: write_kernel.Tiles,
    cache: PagedKVCache,
    schedule: write_kernel.Schedule,
    words: jax.Array,
    arrays: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Puts tokens into tiles of these arrays of a cache."""
    layers = {"num_layers": cache.num_layers or 1, "num_pages": cache.num_pages}
    call = functools.partial(_call, tiles, functools.partial(first_page, **layers))
    layer = jnp.zeros(1, jnp.int32) if cache.layer is None else cache.layer.reshape(1)
    return as_kernel(call, tuning)(schedule, layer, words, arrays)


def _call(
    tiles: write_kernel.Tiles,
    begin: Callable[[jax.Array], jax.Array],
    tuning: Tuning,
    *inputs: Any,
) -> tuple[jax.Array, ...]:
    schedule, *before, arrays = vary_together(*inputs)
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    hbm_arrays, num_before = (hbm,) * len(arrays), len(schedule) + len(before)
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
            disable_bounds_checks=True, vmem_limit_bytes=chip_of(tuning).vmem_bytes
        ),
        interpret=interpreter(tuning),
        name=tiles.kernel_name,
    )(schedule, *before, arrays)
