"""How the pages of a KV cache lie in memory: which axis of the arrays is what.

Everything that differs between the layouts is said once, here, as the position of an axis.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

Axis = str | tuple[str, ...] | None

PACKED_ROW = 128


def unpacked(cache: jax.Array | None, head_dim: int) -> jax.Array | None:
    """A view of a cache with one token a row; outside of TPUs this moves nothing."""
    if cache is None or cache.shape[-1] == head_dim:
        return cache
    return cache.reshape(*cache.shape[:-2], -1, head_dim)


class CacheSizes(NamedTuple):
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class _Axes:
    pages: int
    heads: int
    ndim: int
    dims: str


class KVLayout(enum.Enum):
    """The three layouts of a paged cache. The last two axes are always `page_size, head_dim`.

    They may be *packed*: `page_size / n, n * head_dim` with `n * head_dim == 128`, the same bytes
    in the same order. A TPU pads rows to 128 numbers, so this halves the cache of head_dim 64.
    """

    BLOCKS_FIRST = _Axes(pages=0, heads=1, ndim=4, dims="[pages, kv_heads, page, dim]")
    HEADS_FIRST = _Axes(pages=1, heads=0, ndim=4, dims="[kv_heads, pages, page, dim]")
    FUSED = _Axes(pages=0, heads=2, ndim=5, dims="[pages, 2, kv_heads, page, dim]")

    @property
    def fused(self) -> bool:
        """Whether keys and values share one array (axis 1 tells them apart)."""
        return self is KVLayout.FUSED

    def sizes(self, shape: tuple[int, ...], head_dim: int | None = None) -> CacheSizes:
        """Reads the sizes off the shape of a cache array; packed, if `head_dim` is narrower."""
        axes = self.value
        head_dim = head_dim or shape[-1]
        page_size = shape[-2] * shape[-1] // head_dim
        return CacheSizes(shape[axes.pages], shape[axes.heads], page_size, head_dim)

    def shape(self, sizes: CacheSizes, packing: int = 1) -> tuple[int, ...]:
        """The shape of a cache array of these sizes, with `packing` tokens in a row."""
        leading = [2] * (self.value.ndim - 2)
        leading[self.value.pages] = sizes.num_pages
        leading[self.value.heads] = sizes.num_kv_heads
        return (*leading, sizes.page_size // packing, sizes.head_dim * packing)

    def partition_spec(self, pages: Axis, heads: Axis) -> PartitionSpec:
        """The split of a cache array: `pages` and `heads` are the mesh axes of those two."""
        spec: list[Axis] = [None] * self.value.ndim
        spec[self.value.pages], spec[self.value.heads] = pages, heads
        return PartitionSpec(*spec)

    def gather(
        self,
        key_cache: Float[Array, "..."],
        value_cache: Float[Array, "..."] | None,
        page_ids: Int[Array, "items pages"],
    ) -> tuple[
        Float[Array, "items kv_heads tokens dim"], Float[Array, "items kv_heads tokens dim"]
    ]:
        """Fetches pages as contiguous tokens, heads outermost, whatever the layout.

        One XLA gather that writes its result in the order the matmuls want: no transpose of
        what was fetched, and none of a cache.
        """
        if self.fused:
            both = _gather_pages(key_cache, page_ids, self.value.pages)
            return both[0], both[1]
        assert value_cache is not None
        return (
            _gather_pages(key_cache, page_ids, self.value.pages),
            _gather_pages(value_cache, page_ids, self.value.pages),
        )

    def scatter_add(
        self,
        key_cache: Float[Array, "..."],
        value_cache: Float[Array, "..."] | None,
        page_ids: Int[Array, "items pages"],
        key: Float[Array, "items kv_heads tokens dim"],
        value: Float[Array, "items kv_heads tokens dim"],
    ) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
        """Adds tokens to their pages: the transpose of `gather`."""
        axis = self.value.pages
        if self.fused:
            return _scatter_add_pages(key_cache, page_ids, jnp.stack([key, value]), axis), None
        assert value_cache is not None
        return (
            _scatter_add_pages(key_cache, page_ids, key, axis),
            _scatter_add_pages(value_cache, page_ids, value, axis),
        )


def _token_dims(lead: int) -> tuple[int, ...]:
    """Where a page's own axes lie in `[*lead, items, kv_heads, pages, page_size, dim]`."""
    return (*range(lead), lead + 1, lead + 3, lead + 4)


def _gather_pages(cache: jax.Array, page_ids: jax.Array, pages_axis: int) -> jax.Array:
    """`[*lead, items, kv_heads, pages * page_size, dim]`, lead being (2,) of a fused cache."""
    lead = cache.ndim - 4
    num_items, num_pages = page_ids.shape
    slice_sizes = list(cache.shape)
    slice_sizes[pages_axis] = 1
    fetched = lax.gather(
        cache,
        page_ids[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=_token_dims(lead),
            collapsed_slice_dims=(pages_axis,),
            start_index_map=(pages_axis,),
        ),
        tuple(slice_sizes),
        mode=lax.GatherScatterMode.CLIP,
    )
    *lead_shape, _, num_kv_heads, _, page_size, head_dim = fetched.shape
    return fetched.reshape(*lead_shape, num_items, num_kv_heads, num_pages * page_size, head_dim)


def _scatter_add_pages(
    cache: jax.Array, page_ids: jax.Array, tokens: jax.Array, pages_axis: int
) -> jax.Array:
    lead = cache.ndim - 4
    *before, num_tokens, head_dim = tokens.shape
    num_pages = page_ids.shape[1]
    updates = tokens.reshape(*before, num_pages, num_tokens // num_pages, head_dim)
    return lax.scatter_add(
        cache,
        page_ids[..., None],
        updates,
        lax.ScatterDimensionNumbers(
            update_window_dims=_token_dims(lead),
            inserted_window_dims=(pages_axis,),
            scatter_dims_to_operand_dims=(pages_axis,),
        ),
        mode=lax.GatherScatterMode.CLIP,
    )
