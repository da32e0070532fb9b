"""`read_pages`, `write_pages`: pages out of a cache and into another, whatever mesh and layout.

In between they are one array whose axes are always the same, `[num_layers, num_pages, 2,
num_kv_heads, page_size, head_dim]`, keys before values: on devices, its heads split like the
cache's, or on the host. Of a quantised cache they are that and the scales: `QuantisedPages`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import array_checks, sharded, transfer_checks
from .arguments import instance
from .cache import PagedKVCache
from .page_format import SCALE_DTYPE, ScaleOf, updates_widen
from .quantise import mark
from .shard_layout import ShardLayout, Split, axis_names
from .tables import PageRange, within

_PAGES = (None, None, None, "heads", None, None)
_SCALES: dict[ScaleOf, tuple] = {
    "token": (None, None, None, "heads", None),
    "head": (None, None, "heads"),
}


class QuantisedPages(NamedTuple):
    """Pages of a quantised cache: an element is what is stored times its scale.

    Attributes:
      elements: `[num_layers, num_pages, 2, num_kv_heads, page_size, head_dim]`, in the cache's
        dtype, keys before values.
      scales: float32; of each token `[num_layers, num_pages, 2, num_kv_heads, page_size]`, in the
        order of tokens, or of each KV head `[num_layers, 2, num_kv_heads]`.
    """

    elements: Any
    scales: Any


Pages = Float[Array, "num_layers num_pages 2 num_kv_heads page_size head_dim"] | QuantisedPages


def read_pages(
    cache: PagedKVCache,
    page_ids: Sequence[int] | Int[np.ndarray, " num_pages"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
) -> Pages:
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
      before values; one layer of a cache without layers. Of a quantised cache `QuantisedPages`,
      that and the scales; those of padding are zeros. On a mesh KV heads are split as in the cache,
      the rest is on all devices. `jax.device_get` brings it to the host.

    Raises:
      ValueError: if an id is no page of the cache, or the mesh is not the cache's.
    """
    split = _checked_split(cache, mesh, layout)
    ids = transfer_checks.page_ids(cache, page_ids)
    dims = (_PAGES,) if cache.scale == "none" else (_PAGES, _SCALES[cache.scale])
    read = sharded.run(_read_here, None, split, (cache, ids), (None, (None,)), dims)
    return read[0] if cache.scale == "none" else QuantisedPages(*read)


def write_pages(
    cache: PagedKVCache,
    page_ids: Sequence[int] | Int[np.ndarray, " num_pages"],
    pages: Pages,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
) -> PagedKVCache:
    """Puts pages that `read_pages` read, of this cache or another, into a cache, in place.

    Layouts, packing, meshes and page ids of the two may differ; layers, KV heads, page size,
    head_dim, dtype, and what a scale covers must not. Scales of KV heads must be equal in both:
    under `jax.jit`, where values cannot be looked at, pages of other ones are written as NaN.

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
    ids = transfer_checks.page_ids(cache, page_ids)
    transfer_checks.named_once(ids)
    elements, scales = pages if isinstance(pages, QuantisedPages) else (pages, None)
    transfer_checks.kind(cache, scales is not None)
    transfer_checks.elements(cache, len(ids), elements)
    transfer_checks.scales(cache, elements, scales)
    inputs, dims = (
        (cache, elements, scales, ids),
        (None, _PAGES, _SCALES.get(cache.scale, ()), (None,)),
    )
    return sharded.run(_write_here, None, split, inputs, dims, donate=True)


def _read_here(
    options: None, split: Split | None, cache: PagedKVCache, page_ids: jax.Array
) -> tuple[jax.Array, ...]:
    """One device's part: those of the pages that it holds, joined with the others'."""
    here = PageRange.here(cache.num_pages, split)
    local = page_ids - here.first
    held = within(local, 0, here.num_pages)[:, None, None, None]
    axes = () if split is None else axis_names(split.layout.pages)

    def joined(mine: jax.Array, dtype: Any) -> jax.Array:
        mine = jnp.where(held if mine.ndim == 5 else held[..., None], mine, 0)
        return lax.bitcast_convert_type(lax.psum(mine, axes) if axes else mine, dtype)

    dtype = cache.format.dtype
    pages = [_bits(_taken(x, local, _pages_axis(cache))) for x in cache.arrays]
    elements = joined(_to_canonical(cache, pages), dtype)
    match cache.scale:
        case "none":
            return (elements,)
        case "head":
            return (elements, _head_scales(cache))
        case "token":
            of_pages = _bits(_taken(cache.scales[0], local, _scales_axis(cache)))
            return (elements, joined(_scales_to_canonical(cache, of_pages), SCALE_DTYPE))


def _write_here(
    options: None,
    split: Split | None,
    cache: PagedKVCache,
    elements: jax.Array,
    scales: jax.Array | None,
    page_ids: jax.Array,
) -> PagedKVCache:
    """One device's part: the pages that it holds."""
    at = page_ids - PageRange.here(cache.num_pages, split).first
    if cache.scale == "head":
        elements = _unless_of_other_scales(cache, elements, scales)
    dtype = cache.format.dtype
    pages = [lax.bitcast_convert_type(x, dtype) for x in _from_canonical(cache, _bits(elements))]
    pairs = zip(cache.arrays, pages, strict=True)
    written = cache.replace(_put(x, new, at, _pages_axis(cache)) for x, new in pairs)
    if cache.scale != "token":
        return written
    of_pages = _scales_from_canonical(cache, scales)
    new = [_put(x, of_pages, at, _scales_axis(cache)) for x in cache.scales]
    return written.replace(written.arrays, new)


def _taken(array: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    return jnp.take(array, at, axis=axis, mode="clip")


def _bits(array: jax.Array) -> jax.Array:
    """As integers: floats that are added, or widened, keep neither -0 nor the bits of a NaN."""
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))


def _unless_of_other_scales(cache: PagedKVCache, elements: jax.Array, scales: Any) -> jax.Array:
    """Elements that stand for what they did; NaN where their KV head has another scale here."""
    same = (scales == _head_scales(cache))[:, None, :, :, None, None]
    dtype = cache.format.dtype
    kept = jnp.where(same, _bits(elements), mark(dtype).view(np.uint8))
    return lax.bitcast_convert_type(kept, dtype)


def _put(array: jax.Array, pages: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """Puts pages at these places along the axis, where there are such places."""
    one_by_one, at_once = (functools.partial(f, axis=axis) for f in (_one_by_one, _at_once))
    if not updates_widen(array.dtype):
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

    jaxlib 0.10's CPU compiler widens a whole cache of bfloat16 or float8 around an update, for each
    page, and thereby changes the bits of NaN all over it.
    """
    count = array.shape[axis]
    places = jnp.where(within(at, 0, count), at, count)
    arriving = jnp.full(count, -1, jnp.int32)
    arriving = arriving.at[places].set(jnp.arange(len(at), dtype=jnp.int32), mode="drop")
    old, new = _bits(array), _taken(_bits(pages), arriving, axis)
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


def _scales_to_canonical(cache: PagedKVCache, scales: jax.Array) -> jax.Array:
    """`[num_layers, num_pages, 2, num_kv_heads, page_size]` of pages' scales."""
    scales = scales if cache.num_layers is not None else scales[None]
    return jnp.stack(cache.format.scales_by_token(scales), axis=2)


def _scales_from_canonical(cache: PagedKVCache, scales: Any) -> jax.Array:
    """The reverse."""
    in_pages = cache.format.scales_in_pages(scales[:, :, 0], scales[:, :, 1])
    return in_pages if cache.num_layers is not None else in_pages[0]


def _head_scales(cache: PagedKVCache) -> jax.Array:
    """`[num_layers, 2, num_kv_heads]` of a cache's scales of KV heads."""
    (scales,) = cache.scales
    return (scales if cache.num_layers is not None else scales[None]).swapaxes(1, 2)


def _scales_axis(cache: PagedKVCache) -> int:
    """That of pages in the cache's array of tokens' scales."""
    return int(cache.num_layers is not None)


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
    array_checks.cache_scales(cache)
    split = Split.of(mesh, layout)
    if split is not None:
        split.check_cache(cache.format, cache.num_pages)
    elif _is_concrete(cache.key) and len(cache.key.devices()) > 1:
        raise ValueError(f"the cache is spread over {cache.key.sharding}; pass mesh= as well")
    return split


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, Tracer)
