"""`write` of the XLA backend: a scatter into the pages of a donated cache, in place."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...cache import PagedKVCache
from ...options import Tuning
from ...page_format import KVLayout, PageFormat, updates_widen
from ...plan import Writes
from ...quantise import Stored
from .attend import refuse_kernel_options
from .pages import apart, scale_at


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
    how = How(cache.format, None if cache.layer is None else cache.num_layers)
    pairs = zip(cache.arrays, arrivals, strict=True)
    written = cache.replace(_put(how, array, new, writes) for array, new in pairs)
    return written if scales is None else _put_scales(written, scales, writes)


class How(NamedTuple):
    """What is static of a write into an array."""

    page_format: PageFormat
    num_layers: int | None  # whose pages are one range in it


def _put_scales(cache: PagedKVCache, scales: jax.Array, writes: Writes) -> PagedKVCache:
    lane = cache.format.scale_lane(writes.slot)[:, None] + jnp.array([0, cache.format.page_size])
    at = (*scale_at(cache, writes.page[:, None]), slice(None), 0, lane)
    by_lane = scales.swapaxes(1, 2)
    new = (x.at[at].set(by_lane, mode="drop") for x in apart(cache).scales)
    return cache.replace(cache.arrays, new)


def _put(how: How, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    scatter, select = (functools.partial(f, how) for f in (_scatter, _select))
    if not updates_widen(array.dtype):
        return scatter(array, tokens, writes)
    return lax.platform_dependent(array, tokens, writes, cpu=select, default=scatter)


def _scatter(how: How, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    layout, rows = how.page_format.layout, array
    if not layout.token_major:
        rows = array.reshape(*array.shape[:-2], -1, how.page_format.key_dim)
    if layout is KVLayout.HEADS_FIRST:
        rows = rows.at[:, writes.page, writes.slot].set(tokens.swapaxes(0, 1), mode="drop")
    else:
        before_slot = (slice(None),) * (0 if layout.token_major else rows.ndim - 3)
        rows = rows.at[(writes.page, *before_slot, writes.slot)].set(tokens, mode="drop")
    return rows.reshape(array.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _select(how: How, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    """One pass over the cache that takes a token where there is one: a fusion, in place.

    As integers, it stores nothing where nothing arrives. Measured on 33 MB of bfloat16: 0.4 ms and
    66 KB of temporaries, where the scatter takes 100 ms and 67 MB. XLA would copy an array that it
    reshapes: it keeps the caller's shape, with an axis of layers.
    """
    page_format, axis = how.page_format, how.page_format.layout.value.pages
    token_at = jnp.full((array.shape[axis], page_format.page_size), -1, jnp.int32)
    numbers = jnp.arange(len(tokens), dtype=jnp.int32)
    token_at = token_at.at[writes.page, writes.slot].set(numbers, mode="drop")
    layers = () if how.num_layers is None else (how.num_layers,)
    with_layers = lambda x: x.reshape(*x.shape[:axis], *layers, -1, *x.shape[axis + 1 :])
    bits = lambda x: lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))

    new = bits(tokens).at[token_at].get(mode="clip")  # [pages, page_size, ..., dim]
    arrives = jnp.expand_dims(token_at >= 0, tuple(range(2, new.ndim)))
    arrives = jnp.broadcast_to(arrives, new.shape)
    new, arrives = (with_layers(_as_pages(page_format, x)) for x in (new, arrives))
    taken = jnp.where(arrives, new, bits(with_layers(array)))
    return lax.bitcast_convert_type(taken, array.dtype).reshape(array.shape)


@_select.defjvp
def _select_jvp(how: How, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Integers have no derivative; the scatter's is the same."""
    moving, writes = primals[:2], primals[2]
    scatter = lambda array, tokens: _scatter(how, array, tokens, writes)
    return _select(how, *primals), jax.jvp(scatter, moving, tangents[:2])[1]


def _as_pages(page_format: PageFormat, tokens: jax.Array) -> jax.Array:
    """Tokens `[pages, page_size, ..., dim]` as pages of one of the cache's arrays."""
    if page_format.layout.token_major:
        return tokens
    rows = tokens.reshape(len(tokens), page_format.page_rows, page_format.pack, *tokens.shape[2:])
    pages = jnp.moveaxis(rows, (1, 2), (-3, -2))
    pages = pages.reshape(*pages.shape[:-2], page_format.row_dim)
    return pages.swapaxes(0, 1) if page_format.layout is KVLayout.HEADS_FIRST else pages
