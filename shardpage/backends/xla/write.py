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
    # A write through a view of words would, before an `attend` in one program, copy the cache.
    rows = cache if cache.layout.token_major else cache.unpacked()
    key, value, scales = tokens
    if rows.layout.token_major:
        arrivals = rows.format.join_tokens(key, value)
    else:
        arrivals = rows.format.to_arrays(key, value, lambda both: jnp.stack(both, axis=1))
    put = lambda array, before, new: _put(rows.layout, before, new, writes).reshape(array.shape)
    written = cache.replace(map(put, cache.arrays, rows.arrays, arrivals))
    if scales is None:
        return written
    lane = cache.format.scale_lane(writes.slot)[:, None] + jnp.array([0, cache.format.page_size])
    at = (writes.page[:, None], slice(None), 0, lane)
    by_lane = scales.swapaxes(1, 2)
    return written.replace(
        written.arrays, (array.at[at].set(by_lane, mode="drop") for array in cache.scales)
    )


def _put(layout: KVLayout, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    if array.dtype != jnp.bfloat16 or jax.__version_info__ >= (0, 11):
        return _scatter(layout, array, tokens, writes)
    select, scatter = (functools.partial(f, layout) for f in (_select, _scatter))
    return lax.platform_dependent(array, tokens, writes, cpu=select, default=scatter)


def _scatter(layout: KVLayout, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    if layout is KVLayout.HEADS_FIRST:
        return array.at[:, writes.page, writes.slot].set(tokens.swapaxes(0, 1), mode="drop")
    before_slot = (slice(None),) * (0 if layout.token_major else array.ndim - 3)
    return array.at[(writes.page, *before_slot, writes.slot)].set(tokens, mode="drop")


def _select(layout: KVLayout, array: jax.Array, tokens: jax.Array, writes: Writes) -> jax.Array:
    """One pass over the cache that takes a token where there is one.

    jaxlib 0.10's CPU compiler widens a whole bfloat16 cache to float32 around a scatter or a
    dynamic_update_slice; a select it does in place. Measured on 33 MB: 3 ms and 66 KB of
    temporaries, where the scatter takes 100 ms and 67 MB.
    """
    pages_axis = layout.value.pages
    slots_axis = 1 if layout.token_major else array.ndim - 2
    slot_token = jnp.full((array.shape[pages_axis], array.shape[slots_axis]), -1, jnp.int32)
    indices = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    slot_token = slot_token.at[writes.page, writes.slot].set(indices, mode="drop")

    shape = [1] * (array.ndim - 1)
    shape[pages_axis], shape[slots_axis] = slot_token.shape
    slot_token = slot_token.reshape(shape)
    others = [axis for axis in range(array.ndim - 1) if axis not in (pages_axis, slots_axis)]
    index = [lax.broadcasted_iota(jnp.int32, array.shape[:-1], axis) for axis in others]
    arriving = tokens.at[(slot_token, *index)].get(mode="clip")
    return jnp.where(slot_token[..., None] >= 0, arriving, array)
