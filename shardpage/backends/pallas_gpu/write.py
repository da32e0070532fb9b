"""`write` of the GPU backend: each token is copied to its slot, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ...cache import PagedKVCache
from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Writes
from ...quantise import Stored
from ...varying import vary_together
from . import pages, write_kernel
from .config import refuse
from .mosaic import as_kernel, compiler_params, in_place, interpreter, num_sms


def prepare_writes(writes: Writes, num_pages: int, page_format: PageFormat, tuning: Tuning) -> None:
    """Copies of single tokens need no order; see `shardpage.backends` for the contract."""
    refuse(page_format, tuning)


def write(
    cache: PagedKVCache,
    tokens: Stored,
    writes: Writes,
    work: None,
    tuning: Tuning,
) -> PagedKVCache:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    key, value, scales = tokens
    if not len(key):
        return cache
    writes = writes._replace(page=cache.in_layer(writes.page))
    if cache.padding:
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, cache.padding))) for x in (key, value))
    call = as_kernel(functools.partial(_write, cache.format), tuning)
    arrays = call(pages.arrays(cache), key, value, writes)
    pairs = zip(arrays, cache.arrays, strict=True)
    cache = cache.replace(array.reshape(shaped.shape) for array, shaped in pairs)
    return cache if scales is None else _put_scales(cache, scales, writes)


def _put_scales(cache: PagedKVCache, scales: jax.Array, writes: Writes) -> PagedKVCache:
    """Single elements, which no copy brings: XLA's scatter, in place."""
    lane = writes.slot[:, None] + jnp.array([0, cache.format.page_size])
    at = (writes.page[:, None], slice(None), 0, lane)
    put = lambda array: array.at[at].set(scales.swapaxes(1, 2), mode="drop")
    return cache.replace(cache.arrays, map(put, cache.scales))


def _write(
    page_format: PageFormat,
    tuning: Tuning,
    arrays: tuple[jax.Array, ...],
    key: jax.Array,
    value: jax.Array,
    writes: Writes,
) -> list[Any]:
    arrays, key, value, writes = vary_together(arrays, key, value, writes)
    num_ctas = write_kernel.num_ctas(len(key), num_sms(tuning))
    num_pages = arrays[0].shape[page_format.layout.value.pages]
    return in_place(
        functools.partial(write_kernel.kernel, page_format=page_format, num_pages=num_pages),
        arrays,
        [key, value, *writes],
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="shardpage_write",
        compiler_params=compiler_params(),
        **interpreter(tuning),
    )
