"""`read_pages`, `write_pages`: pages out of a cache and into another, whatever mesh and layout.

In between they are one array whose axes are always the same, `[num_layers, num_pages, 2,
num_kv_heads, page_size, head_dim]`, keys before values: on devices, its heads split like the
cache's, or on the host.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import array_checks, sharded
from .arguments import array, instance
from .cache import PagedKVCache
from .shard_layout import ShardLayout, Split, axis_names
from .table_checks import integers
from .tables import PageRange, within

_PAGES = (None, None, None, "heads", None, None)


def read_pages(
    cache: PagedKVCache,
    page_ids: Sequence[int] | Int[np.ndarray, " num_pages"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
) -> Float[Array, "num_layers num_pages 2 num_kv_heads page_size head_dim"]:
    """Copies pages out of a cache, bit by bit.

    Memory and traffic are those of the pages, whatever the size of the cache. Compiled once for
    each number of pages: pad with -1 to keep these numbers few.

    Args:
      cache: the cache; stays as it is.
      page_ids: `[num_pages]` global ids, on the host, in the order of the result (a sequence's:
        `PageAllocator.pages`); -1 is padding, and reads zeros.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.

    Returns:
      `[num_layers, num_pages, 2, num_kv_heads, page_size, head_dim]` in the cache's dtype, keys
      before values; one layer of a cache without layers. On a mesh KV heads are split as in the
      cache, the rest is on all devices. `np.asarray` brings it to the host.

    Raises:
      ValueError: if an id is no page of the cache, or the mesh is not the cache's.
    """
    split = _checked_split(cache, mesh, layout)
    ids = _checked_ids(cache, page_ids)
    return sharded.run(_read_here, None, split, (cache, ids), (None, (None,)), (_PAGES,))[0]


def write_pages(
    cache: PagedKVCache,
    page_ids: Sequence[int] | Int[np.ndarray, " num_pages"],
    pages: Float[Array, "num_layers num_pages 2 num_kv_heads page_size head_dim"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
) -> PagedKVCache:
    """Puts pages that `read_pages` read, of this cache or another, into a cache, in place.

    Layouts, packing, meshes and page ids of the two may differ; layers, KV heads, page size,
    head_dim and dtype must not.

    Args:
      cache: the cache; **donated**: use the result in its stead.
      page_ids: `[num_pages]` global ids, on the host: where each page goes; -1 drops it.
      pages: as `read_pages` gives them, on any devices of this process, or on the host.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.

    Returns:
      The cache with the pages written, bit by bit what was read.

    Raises:
      ValueError: if an id is no page of the cache or named twice, the pages do not fit the cache,
        or the mesh is not the cache's.
    """
    split = _checked_split(cache, mesh, layout)
    ids = _checked_ids(cache, page_ids)
    used, counts = np.unique(ids[ids >= 0], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"page_ids names page {used[counts > 1][0]} twice; name each page once")
    _check_pages(cache, len(ids), pages)
    inputs, dims = (cache, pages, ids), (None, _PAGES, (None,))
    return sharded.run(_write_here, None, split, inputs, dims, donate=True)


def _read_here(
    options: None, split: Split | None, cache: PagedKVCache, page_ids: jax.Array
) -> tuple[jax.Array]:
    """One device's part: those of the pages that it holds, joined with the others'."""
    here = PageRange.here(cache.num_pages, split)
    local = page_ids - here.first
    held = within(local, 0, here.num_pages)[:, None, None, None, None]
    # As integers: a sum of floats keeps neither -0 nor the bits of a NaN.
    kind = jnp.dtype(f"uint{8 * cache.format.dtype.itemsize}")
    taken = [jnp.take(x, local, axis=_pages_axis(cache), mode="clip") for x in cache.arrays]
    bits = _to_canonical(cache, [lax.bitcast_convert_type(x, kind) for x in taken])
    bits = jnp.where(held, bits, 0)
    if split is not None and (axes := axis_names(split.layout.pages)):
        bits = lax.psum(bits, axes)
    return (lax.bitcast_convert_type(bits, cache.format.dtype),)


def _write_here(
    options: None,
    split: Split | None,
    cache: PagedKVCache,
    pages: jax.Array,
    page_ids: jax.Array,
) -> PagedKVCache:
    """One device's part: the pages that it holds."""
    at = page_ids - PageRange.here(cache.num_pages, split).first
    pairs = zip(cache.arrays, _from_canonical(cache, pages), strict=True)
    return cache.replace(_put(x, new, at, _pages_axis(cache)) for x, new in pairs)


def _put(array: jax.Array, pages: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """Puts pages at these places along the axis, where there are such places."""
    one_by_one, at_once = (functools.partial(f, axis=axis) for f in (_one_by_one, _at_once))
    if array.dtype != jnp.bfloat16 or jax.__version_info__ >= (0, 11):
        return one_by_one(array, pages, at)
    return lax.platform_dependent(array, pages, at, cpu=at_once, default=one_by_one)


def _one_by_one(array: jax.Array, pages: jax.Array, at: jax.Array, *, axis: int) -> jax.Array:
    held = within(at, 0, array.shape[axis])
    order = jnp.argsort(~held)  # those held come first

    def put(number: jax.Array, array: jax.Array) -> jax.Array:
        index = order[number]
        page = lax.dynamic_slice_in_dim(pages, index, 1, axis)
        return lax.dynamic_update_slice_in_dim(array, page, at[index], axis)

    return lax.fori_loop(0, jnp.sum(held, dtype=jnp.int32), put, array)


def _at_once(array: jax.Array, pages: jax.Array, at: jax.Array, *, axis: int) -> jax.Array:
    """One pass over the cache that takes a page where there is one, as integers.

    jaxlib 0.10's CPU compiler widens a whole bfloat16 cache to float32 around an update, for each
    page, and thereby changes the bits of NaN all over it.
    """
    count = array.shape[axis]
    places = jnp.where(within(at, 0, count), at, count)
    arriving = jnp.full(count, -1, jnp.int32)
    arriving = arriving.at[places].set(jnp.arange(len(at), dtype=jnp.int32), mode="drop")
    old, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (array, pages))
    new = jnp.take(new, arriving, axis=axis, mode="clip")
    arrives = jnp.expand_dims(arriving >= 0, [n for n in range(array.ndim) if n != axis])
    return lax.bitcast_convert_type(jnp.where(arrives, new, old), array.dtype)


def _to_canonical(cache: PagedKVCache, arrays: Sequence[jax.Array]) -> jax.Array:
    """`[num_layers, num_pages, 2, num_kv_heads, page_size, head_dim]` of pages of each array."""
    page_format = cache.format
    if cache.num_layers is None:
        arrays = [jnp.expand_dims(x, cache.layout.value.pages) for x in arrays]
    if cache.layout.token_major:
        return jnp.stack(page_format.split_tokens(arrays), axis=2).swapaxes(-2, -3)
    arrays = [jnp.moveaxis(x, _heads_axis(cache), -3) for x in arrays]
    pages = arrays[0] if page_format.fused else jnp.stack(arrays, axis=2)
    return pages.reshape(*pages.shape[:-2], page_format.page_size, page_format.key_dim)


def _from_canonical(cache: PagedKVCache, pages: jax.Array) -> list[jax.Array]:
    """The reverse."""
    page_format = cache.format
    if cache.layout.token_major:
        pages = pages.swapaxes(-2, -3)
        arrays = list(page_format.join_tokens(pages[:, :, 0], pages[:, :, 1]))
    else:
        pages = pages.reshape(*pages.shape[:-2], page_format.page_rows, page_format.row_dim)
        arrays = [pages] if page_format.fused else [pages[:, :, 0], pages[:, :, 1]]
        arrays = [jnp.moveaxis(x, -3, _heads_axis(cache)) for x in arrays]
    if cache.num_layers is None:
        arrays = [jnp.squeeze(x, cache.layout.value.pages) for x in arrays]
    return arrays


def _heads_axis(cache: PagedKVCache) -> int:
    """That of KV heads in an array with an axis of layers."""
    axes = cache.layout.value
    return axes.heads + (axes.heads > axes.pages)


def _pages_axis(cache: PagedKVCache) -> int:
    """That of pages in the cache's arrays."""
    return cache.layout.value.pages + (cache.num_layers is not None)


def _checked_split(cache: Any, mesh: Any, layout: ShardLayout | None) -> Split | None:
    """The split, if the cache can be split so."""
    instance("cache", cache, PagedKVCache, "a PagedKVCache, as .zeros() or .of() make them")
    array_checks.cache_arrays(cache.key, cache.value)
    split = Split.of(mesh, layout)
    if split is not None:
        split.check_cache(cache.format, cache.num_pages)
    elif _is_concrete(cache.key) and len(cache.key.devices()) > 1:
        raise ValueError(f"the cache is spread over {cache.key.sharding}; pass mesh= as well")
    return split


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, Tracer)


def _checked_ids(cache: PagedKVCache, page_ids: Any) -> np.ndarray:
    if isinstance(page_ids, Tracer):
        raise ValueError("page_ids is traced; it is looked at on the host: pass Python integers")
    ids = integers("page_ids", page_ids, "[num_pages]")
    wrong = ids[(ids < -1) | (ids >= cache.num_pages)]
    if wrong.size:
        raise ValueError(
            f"page_ids holds {wrong[0]}; the cache has pages 0 to {cache.num_pages - 1}, and -1 is "
            "padding"
        )
    return ids.astype(np.int32)


def _check_pages(cache: PagedKVCache, num_pages: int, pages: Any) -> None:
    """Checks that pages are what `read_pages` would read of this cache."""
    array("pages", pages)
    page_format = cache.format
    wanted = {
        "num_layers": cache.num_layers or 1,
        "len(page_ids)": num_pages,
        "keys and values": 2,
        "num_kv_heads": page_format.num_kv_heads,
        "page_size": page_format.page_size,
        "head_dim": page_format.key_dim,
    }
    if pages.shape != tuple(wanted.values()):
        names = ", ".join(f"{name}={size}" for name, size in wanted.items())
        raise ValueError(
            f"pages has shape {pages.shape}; this cache takes {tuple(wanted.values())}: {names}"
        )
    if pages.dtype != page_format.dtype:
        raise ValueError(
            f"pages has dtype {pages.dtype}, the cache {page_format.dtype}; cast them if rounding "
            f"is meant: pages.astype({page_format.dtype.name!r})"
        )
