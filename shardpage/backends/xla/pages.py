"""Fetching pages with one XLA gather, and its transpose."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ...cache import PagedKVCache


def gather(
    cache: PagedKVCache, page_ids: Int[Array, "items pages"]
) -> tuple[Float[Array, "items kv_heads tokens dim"], Float[Array, "items kv_heads tokens dim"]]:
    """Fetches pages as contiguous tokens, heads outermost, whatever the layout.

    One XLA gather per array that writes its result in the order the matmuls want: no transpose of
    what was fetched, and none of a cache.
    """
    axis = cache.layout.value.pages
    fetched = [_gather(array, page_ids, axis) for array in cache.arrays]
    key, value = fetched[0] if cache.format.fused else fetched
    return key, value


def scatter_add(
    cache: PagedKVCache,
    page_ids: Int[Array, "items pages"],
    key: Float[Array, "items kv_heads tokens dim"],
    value: Float[Array, "items kv_heads tokens dim"],
) -> PagedKVCache:
    """Adds tokens to their pages: the transpose of `gather`."""
    axis = cache.layout.value.pages
    tokens = cache.format.to_arrays(key, value, jnp.stack)
    added = (
        _scatter_add(array, page_ids, new, axis)
        for array, new in zip(cache.arrays, tokens, strict=True)
    )
    return cache.replace(added)


def _token_dims(lead: int) -> tuple[int, ...]:
    """Where a page's own axes lie in `[*lead, items, kv_heads, pages, page_size, dim]`."""
    return (*range(lead), lead + 1, lead + 3, lead + 4)


def _gather(array: jax.Array, page_ids: jax.Array, pages_axis: int) -> jax.Array:
    """`[*lead, items, kv_heads, pages * page_size, dim]`, lead being (2,) of a fused cache."""
    lead = array.ndim - 4
    num_items, num_pages = page_ids.shape
    slice_sizes = list(array.shape)
    slice_sizes[pages_axis] = 1
    fetched = lax.gather(
        array,
        page_ids[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=_token_dims(lead),
            collapsed_slice_dims=(pages_axis,),
            start_index_map=(pages_axis,),
        ),
        tuple(slice_sizes),
        mode=lax.GatherScatterMode.CLIP,
    )
    *lead_shape, _, num_kv_heads, _, page_size, dim = fetched.shape
    return fetched.reshape(*lead_shape, num_items, num_kv_heads, num_pages * page_size, dim)


def _scatter_add(
    array: jax.Array, page_ids: jax.Array, tokens: jax.Array, pages_axis: int
) -> jax.Array:
    lead = array.ndim - 4
    *before, num_tokens, dim = tokens.shape
    num_pages = page_ids.shape[1]
    updates = tokens.reshape(*before, num_pages, num_tokens // num_pages, dim)
    return lax.scatter_add(
        array,
        page_ids[..., None],
        updates,
        lax.ScatterDimensionNumbers(
            update_window_dims=_token_dims(lead),
            inserted_window_dims=(pages_axis,),
            scatter_dims_to_operand_dims=(pages_axis,),
        ),
        mode=lax.GatherScatterMode.CLIP,
    )
