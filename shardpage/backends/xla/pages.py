"""Fetching pages with one XLA gather, and its transpose."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ...cache import PagedKVCache


class Tokens(NamedTuple):
    """What was fetched: as stored, and the scale of each token, where each has one."""

    key: Any  # [items, kv_heads, tokens, dim]
    value: Any
    key_scale: Any = None  # [items, kv_heads, tokens] float32
    value_scale: Any = None
    may_be_nan: bool = True  # whether an element of a value may be


def gather(cache: PagedKVCache, page_ids: Int[Array, "items pages"]) -> Tokens:
    """Fetches pages as contiguous tokens, heads outermost, whatever the layout.

    Scales of tokens are `apart`. One XLA gather per array that writes its result in the order the
    matmuls want: no transpose of what was fetched, and none of a cache. Of token-major pages what
    was fetched is transposed.
    """
    page_ids, dim = cache.in_layer(page_ids), cache.head_dim
    if cache.layout.token_major:
        tokens = [array.at[page_ids].get(mode="clip") for array in cache.arrays]
        key, value = map(_by_head, cache.format.split_tokens(tokens))
    else:
        pages_axis = cache.layout.value.pages
        fetched = [_gather(array, page_ids, pages_axis, dim) for array in cache.arrays]
        key, value = fetched[0] if cache.format.fused else fetched
    if cache.scale != "token":
        return Tokens(key, value)
    pages = cache.scales[0].at[scale_at(cache, page_ids)].get(mode="clip").swapaxes(1, 2)
    scales = cache.format.scales_by_token(pages)
    return Tokens(key, value, *(x.reshape(*x.shape[:2], -1) for x in scales))


def apart(cache: PagedKVCache) -> PagedKVCache:
    """The same with the axis of layers in each array again, if it has layers.

    So it is handed to a loop. Around a reshape of an array with an axis of one, as scales have it,
    XLA copies all of it; and it writes an array once more for who takes it in another shape.
    """
    if cache.layer is None:
        return cache
    axis, layers = cache.layout.value.pages, cache.num_layers
    split = lambda x, axis: x.reshape(*x.shape[:axis], layers, -1, *x.shape[axis + 1 :])
    by_token = cache.scale == "token"
    scales = [split(x, 0) if by_token else x for x in cache.scales]
    return cache.replace([split(x, axis) for x in cache.arrays], scales)


def together(cache: PagedKVCache) -> PagedKVCache:
    """One of `apart` with its pages in one range, as `gather` takes it; scales stay apart."""
    if cache.layer is None:
        return cache
    axis = cache.layout.value.pages
    merge = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return cache.replace(map(merge, cache.arrays))


def scale_at(cache: PagedKVCache, page_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Where pages, numbered over all layers, are in an array of scales that is `apart`."""
    return (page_ids,) if cache.layer is None else jnp.divmod(page_ids, cache.num_pages)


def scatter_add(
    cache: PagedKVCache,
    page_ids: Int[Array, "items pages"],
    key: Float[Array, "items kv_heads tokens dim"],
    value: Float[Array, "items kv_heads tokens dim"],
) -> PagedKVCache:
    """Adds tokens to their pages: the transpose of `gather`."""
    page_ids = cache.in_layer(page_ids)
    if cache.layout.token_major:
        tokens = cache.format.join_tokens(*(_by_page(x, page_ids.shape[1]) for x in (key, value)))
        pairs = zip(cache.arrays, tokens, strict=True)
        return cache.replace(array.at[page_ids].add(new, mode="clip") for array, new in pairs)
    tokens = cache.format.to_arrays(key, value, jnp.stack)
    pairs = zip(cache.arrays, tokens, strict=True)
    pages_axis = cache.layout.value.pages
    return cache.replace(_scatter_add(array, page_ids, new, pages_axis) for array, new in pairs)


def _by_head(tokens: jax.Array) -> jax.Array:
    """`[items, kv_heads, pages * page_size, dim]` of `[items, pages, page_size, kv_heads, dim]`."""
    num_items, _, _, num_kv_heads, dim = tokens.shape
    return tokens.reshape(num_items, -1, num_kv_heads, dim).swapaxes(1, 2)


def _by_page(tokens: jax.Array, num_pages: int) -> jax.Array:
    """The reverse."""
    num_items, num_kv_heads, _, dim = tokens.shape
    return tokens.swapaxes(1, 2).reshape(num_items, num_pages, -1, num_kv_heads, dim)


def _token_dims(array: jax.Array) -> tuple[int, ...]:
    """Where a page's own axes lie in `[*lead, items, kv_heads, pages, page_size, dim]`."""
    lead = array.ndim - 4
    return (*range(lead), lead + 1, lead + 3, lead + 4)


def _gather(array: jax.Array, page_ids: jax.Array, pages_axis: int, dim: int) -> jax.Array:
    """`[*lead, items, kv_heads, pages * page_size, dim]`, lead being (2,) of a fused cache."""
    page = tuple(1 if axis == pages_axis else size for axis, size in enumerate(array.shape))
    dims = lax.GatherDimensionNumbers(_token_dims(array), (pages_axis,), (pages_axis,))
    clip = lax.GatherScatterMode.CLIP
    fetched = lax.gather(array, page_ids[..., None], dims, page, mode=clip)
    return fetched.reshape(*fetched.shape[:-3], -1, dim)


def _scatter_add(
    array: jax.Array, page_ids: jax.Array, tokens: jax.Array, pages_axis: int
) -> jax.Array:
    updates = tokens.reshape(*tokens.shape[:-2], page_ids.shape[1], *array.shape[-2:])
    dims = lax.ScatterDimensionNumbers(_token_dims(array), (pages_axis,), (pages_axis,))
    clip = lax.GatherScatterMode.CLIP
    return lax.scatter_add(array, page_ids[..., None], updates, dims, mode=clip)
