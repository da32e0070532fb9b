"""`write` of the XLA backend: a scatter into the pages of a donated cache, in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ...cache import PagedKVCache
from ...options import Tuning
from ...page_format import KVLayout, PageFormat
from ...plan import Writes
from ...quantise import Stored
from .attend import refuse_kernel_options
from .pages import scale_at, scales_of_layers

# What jaxlib 0.10's CPU compiler widens whole around a scatter or a dynamic_update_slice.
_WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def prepare_writes(writes: Writes, num_pages: int, page_format: PageFormat, tuning: Tuning) -> None:
    """A scatter needs no order of its own."""
    refuse_kernel_options(tuning)


def write(
    cache: PagedKVCache,
    tokens: Stored,
    writes: Writes,
    work: None,
    tuning: Tuning,
) -> PagedKVCache:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    writes = writes._replace(page=cache.in_layer(writes.page))
    if tokens.key.shape[0] == 1:
        # XLA makes a dynamic_update_slice of a scatter of one token, and on CPUs copies the cache
        # of all layers around it. Written twice, it stays a scatter.
        twice = functools.partial(jnp.repeat, repeats=2, axis=0)
        tokens, writes = jax.tree.map(twice, (tokens, writes))
    key, value, scales = tokens
    if cache.layout.token_major:
        arrivals = cache.format.join_tokens(key, value)
    else:
        arrivals = cache.format.to_arrays(key, value, lambda both: jnp.stack(both, axis=1))
    written = cache.replace(
        _put(cache, array, new, writes) for array, new in zip(cache.arrays, arrivals, strict=True)
    )
    return written if scales is None else _put_scales(written, scales, writes)


def _put_scales(cache: PagedKVCache, scales: jax.Array, writes: Writes) -> PagedKVCache:
    cache = scales_of_layers(cache)
    lane = cache.format.scale_lane(writes.slot)[:, None] + jnp.array([0, cache.format.page_size])
    at = (*scale_at(cache, writes.page[:, None]), slice(None), 0, lane)
    by_lane = scales.swapaxes(1, 2)
    new = (array.at[at].set(by_lane, mode="drop") for array in cache.scales)
    return cache.replace(cache.arrays, new)


def _put(cache: PagedKVCache, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    scatter, select = (functools.partial(f, cache) for f in (_scatter, _select))
    if array.dtype.name not in _WIDENED or jax.__version_info__ >= (0, 11):
        return scatter(array, tokens, writes)
    return lax.platform_dependent(array, tokens, writes, cpu=select, default=scatter)


def _scatter(cache: PagedKVCache, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    # A write through a view of words would, before an `attend` in one program, copy the cache.
    rows = array
    if not cache.layout.token_major:
        rows = array.reshape(*array.shape[:-2], -1, cache.head_dim)
    if cache.layout is KVLayout.HEADS_FIRST:
        rows = rows.at[:, writes.page, writes.slot].set(tokens.swapaxes(0, 1), mode="drop")
    else:
        before_slot = (slice(None),) * (0 if cache.layout.token_major else rows.ndim - 3)
        rows = rows.at[(writes.page, *before_slot, writes.slot)].set(tokens, mode="drop")
    return rows.reshape(array.shape)


def _select(cache: PagedKVCache, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    """One pass over the cache that takes a token where there is one: a fusion, in place.

    As integers, it stores nothing where nothing arrives. Measured on 33 MB of bfloat16: 0.4 ms and
    66 KB of temporaries, where the scatter takes 100 ms and 67 MB. The array has the shape of the
    caller's, with an axis of layers, since XLA would copy one that it reshapes.
    """
    axis, page_size = cache.layout.value.pages, cache.format.page_size
    kind = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = lambda x: lax.bitcast_convert_type(x, kind)
    token_at = jnp.full((array.shape[axis], page_size), -1, jnp.int32)
    numbers = jnp.arange(len(tokens), dtype=jnp.int32)
    token_at = token_at.at[writes.page, writes.slot].set(numbers, mode="drop")
    new = bits(tokens).at[token_at].get(mode="clip")  # [pages, page_size, ..., dim]
    arrives = jnp.expand_dims(token_at >= 0, tuple(range(2, new.ndim)))
    new, arrives = (_as_pages(cache, x) for x in (new, jnp.broadcast_to(arrives, new.shape)))
    layers = () if cache.layer is None else (cache.num_layers,)
    with_layers = lambda x: x.reshape(*x.shape[:axis], *layers, -1, *x.shape[axis + 1 :])
    taken = jnp.where(with_layers(arrives), with_layers(new), bits(with_layers(array)))
    return lax.bitcast_convert_type(taken, array.dtype).reshape(array.shape)


def _as_pages(cache: PagedKVCache, tokens: jax.Array) -> jax.Array:
    """Tokens `[pages, page_size, ..., dim]` as pages of one of the cache's arrays."""
    if cache.layout.token_major:
        return tokens
    page_format = cache.format
    rows = tokens.reshape(len(tokens), page_format.page_rows, page_format.pack, *tokens.shape[2:])
    pages = jnp.moveaxis(rows, (1, 2), (-3, -2))
    pages = pages.reshape(*pages.shape[:-2], page_format.row_dim)
    return pages.swapaxes(0, 1) if cache.layout is KVLayout.HEADS_FIRST else pages
