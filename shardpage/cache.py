"""`PagedKVCache`, the pages of one attention layer, and `write_kv`, which fills them in place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from . import backends, validate
from .kv_layout import PACKED_ROW, CacheSizes, KVLayout
from .layout import ShardLayout
from .pages import local_range, seq_shard_index
from .placement import as_int32, place, platform_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value"),
    meta_fields=("kv_layout", "head_dim"),
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of one layer in pages. A pytree: goes through `jax.jit`, can be donated.

    Attributes:
      key: pages of keys, in `kv_layout`; of a fused cache, keys and values.
      value: pages of values; None if fused.
      kv_layout: "blocks_first", "heads_first" or "fused"; static. Attend with
        `page_attention(query, cache.key, cache.value, ..., kv_layout=cache.kv_layout)`.
      head_dim: numbers a token and head; static. Rows of a packed cache hold several tokens.
    """

    key: Any
    value: Any
    kv_layout: validate.KVLayoutName
    head_dim: int

    @classmethod
    def zeros(
        cls, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, **options: Any
    ) -> "PagedKVCache":
        """Makes an empty cache, each device its own part: it is never whole on one of them.

        Takes the arguments of `abstract`, and raises its errors.
        """
        abstract = cls.abstract(num_pages, num_kv_heads, page_size, head_dim, **options)

        def make(array: jax.ShapeDtypeStruct) -> jax.Array:
            zeros = functools.partial(jnp.zeros, array.shape, array.dtype)
            return jax.jit(zeros, out_shardings=array.format)()

        return jax.tree.map(make, abstract)

    @classmethod
    def abstract(
        cls,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: Any = jnp.bfloat16,
        kv_layout: validate.KVLayoutName | None = None,
        packed: bool | None = None,
        mesh: Mesh | None = None,
        layout: ShardLayout | None = None,
    ) -> "PagedKVCache":
        """Shapes, dtypes and shardings of a cache, to compile for devices that are not there.

        Args:
          num_pages: pages over all devices.
          num_kv_heads: KV heads over all devices.
          page_size: tokens a page.
          head_dim: numbers a token and head.
          dtype: float32, bfloat16 or float16.
          kv_layout: "blocks_first", "heads_first" or "fused"; None for what suits the mesh's
            devices: "fused" on TPU (half as many DMAs), "blocks_first" elsewhere.
          packed: keep tokens of a narrow head together in rows of 128 numbers, `[..., page_size *
            head_dim / 128, 128]`, which a TPU does not pad to twice their size and more. None
            does so on TPU where head_dim divides 128 and a page fills whole tiles of 8 rows.
          mesh: devices to split it over; None for one device.
          layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.

        Raises:
          ValueError: if a size is not positive or does not divide over the mesh.
        """
        sizes = CacheSizes(num_pages, num_kv_heads, page_size, head_dim)
        for name, size in sizes._asdict().items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        on_tpu = platform_of(mesh, None) == "tpu"
        kv_layout = kv_layout or ("fused" if on_tpu else "blocks_first")
        kv = validate.named_kv_layout(kv_layout)
        if mesh is None:
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            layout = layout or ShardLayout.of(mesh)
            validate.mesh_layout(mesh, layout)
            validate.divisibility(layout.shards(mesh), layout, sizes)
            sharding = NamedSharding(mesh, layout.cache_spec(kv))
        shape = kv.shape(sizes, _packing(sizes, packed, on_tpu))
        # Left to itself, a TPU keeps rows that are no multiple of 128 transposed, and every kernel
        # call would begin with a copy of the cache into row-major order.
        order = Layout(tuple(range(len(shape)))) if on_tpu else None
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=Format(order, sharding))
        validate.cache_arrays(array, None)
        return cls(array, None if kv.fused else array, kv_layout, head_dim)

    @property
    def format(self) -> "PagedKVCache":
        """How the arrays lie in memory and over devices: what `out_shardings` of a `jax.jit` takes.

        A TPU program returns rows that are no multiple of 128 numbers in an order of its own unless
        told otherwise, and then cannot write in place: say `out_shardings=cache.format` for a
        function that returns such a cache (see `abstract`). Elsewhere it changes nothing.
        """
        return jax.tree.map(lambda array: array.format, self)

    @property
    def sizes(self) -> CacheSizes:
        """`(num_pages, num_kv_heads, page_size, head_dim)` over all devices."""
        return validate.named_kv_layout(self.kv_layout).sizes(self.key.shape, self.head_dim)

    def bytes_per_device(self) -> int:
        """Bytes of keys and values on each device."""
        return sum(
            x.dtype.itemsize * functools.reduce(int.__mul__, x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(self)
        )


def _packing(sizes: CacheSizes, packed: bool | None, on_tpu: bool) -> int:
    """Tokens in a row of a cache."""
    packing, rest = divmod(PACKED_ROW, sizes.head_dim)
    possible = packing > 1 and rest == 0 and sizes.page_size % packing == 0
    pays = on_tpu and sizes.page_size % (8 * packing) == 0
    if packed and not possible:
        raise ValueError(
            f"packed=True needs a head_dim below {PACKED_ROW} that divides it, and a page_size "
            f"that is a multiple of {PACKED_ROW} // head_dim; got {sizes}"
        )
    wanted = pays if packed is None else packed
    return packing if wanted and possible else 1


def write_kv(
    cache: PagedKVCache,
    key: Float[Array, "num_tokens num_kv_heads head_dim"],
    value: Float[Array, "num_tokens num_kv_heads head_dim"],
    seq_ids: Int[Array, " num_tokens"],
    positions: Int[Array, " num_tokens"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    backend: Literal["xla", "pallas_tpu"] | None = None,
) -> PagedKVCache:
    """Writes tokens into the pages of their sequences, in place.

    Appending is one token a sequence, prefill many; a call may mix both. On a mesh, tokens are
    split over `seqs` in equal contiguous parts like queries, and each device writes into its own
    pages what its part brings, without communication: pad a part with `seq_ids == -1`.

    Args:
      cache: the cache; **donated**: use the result in its stead.
      key: `[num_tokens, num_kv_heads, head_dim]`, any float dtype; cast to the cache's.
      value: as key.
      seq_ids: `[num_tokens]` int32, the row of `block_tables` that a token belongs to, counted
        over all devices. -1 drops the token.
      positions: `[num_tokens]` int32, the token's position in its sequence. Two tokens of one
        call at one position leave either there.
      block_tables: `[num_seqs, max_blocks]` int32, global page ids.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      backend: "xla" or "pallas_tpu"; None for the one made for the mesh's devices.

    Returns:
      The cache with the tokens written. A token outside its table, of a row of another `seqs`
      shard, or whose table entry is no page of that shard is dropped; `validate_writes` finds
      such tokens on the host.

    Raises:
      ValueError: if shapes contradict each other or the mesh.
    """
    kv = validate.named_kv_layout(cache.kv_layout)
    validate.backend_name(backend)
    tokens = (key, value, seq_ids, positions, block_tables)
    validate.write_arrays(cache.key, cache.value, kv, cache.head_dim, *tokens)
    platform = platform_of(mesh, cache.key)
    call = _Call(kv, backend or backends.default_for(platform))
    arrays = _Arrays(
        cache.key, cache.value, key, value, *map(as_int32, (seq_ids, positions, block_tables))
    )
    if mesh is not None:
        layout = layout or ShardLayout.of(mesh)
        validate.mesh_layout(mesh, layout)
        shards = layout.shards(mesh)
        validate.divisibility(shards, layout, cache.sizes, block_tables.shape[0])
        validate.divisible_tokens(shards, layout, key.shape[0])
        call = dataclasses.replace(call, mesh=mesh, layout=layout)
        arrays = place(arrays, call.array_specs(), mesh, caches=("key_cache", "value_cache"))
    caches = (arrays.key_cache, arrays.value_cache)
    traced = any(isinstance(cache, Tracer) for cache in caches)
    formats = None if traced or platform != "tpu" else jax.tree.map(lambda x: x.format, caches)
    new = _writer(call, formats)(caches, arrays._replace(key_cache=None, value_cache=None))
    return PagedKVCache(new[0], new[1], cache.kv_layout, cache.head_dim)


class _Arrays(NamedTuple):
    """The arrays of a call; as a tree of PartitionSpecs, their split."""

    key_cache: Any
    value_cache: Any
    key: Any
    value: Any
    seq_ids: Any
    positions: Any
    block_tables: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static of a call."""

    kv: KVLayout
    backend: str
    mesh: Mesh | AbstractMesh | None = None
    layout: ShardLayout | None = None

    def array_specs(self) -> _Arrays:
        assert self.layout is not None
        layout, cache = self.layout, self.layout.cache_spec(self.kv)
        tokens, ids = layout.query_spec, layout.lens_spec
        return _Arrays(cache, cache, tokens, tokens, ids, ids, layout.tables_spec)


@functools.cache
def _writer(call: _Call, formats: tuple | None) -> Callable:
    write = functools.partial(_write, call)
    return jax.jit(write, donate_argnums=0, out_shardings=formats)


def _write(call: _Call, caches: tuple, arrays: _Arrays) -> tuple:
    write_shard = functools.partial(_write_shard, call)
    if call.mesh is None:
        return write_shard(caches, arrays)
    specs = call.array_specs()
    cache_specs = (specs.key_cache, specs.value_cache)
    return jax.shard_map(
        write_shard,
        mesh=call.mesh,
        in_specs=(cache_specs, specs._replace(key_cache=None, value_cache=None)),
        out_specs=cache_specs,
        check_vma=True,
    )(caches, arrays)


def _write_shard(call: _Call, caches: tuple, arrays: _Arrays) -> tuple:
    """One device's part: finds where each of its tokens goes, and writes those that it holds."""
    sizes = call.kv.sizes(caches[0].shape, arrays.key.shape[-1])
    num_rows, max_blocks = arrays.block_tables.shape
    pages = local_range(sizes.num_pages, call.layout)
    row = arrays.seq_ids - seq_shard_index(call.layout) * num_rows
    block, slot = arrays.positions // sizes.page_size, arrays.positions % sizes.page_size
    inside = (row >= 0) & (row < num_rows) & (block >= 0) & (block < max_blocks)
    page = arrays.block_tables.at[row, block].get(mode="clip") - pages.first
    held = inside & (page >= 0) & (page < sizes.num_pages)
    write = backends.load_write(call.backend)
    key, value = (x.astype(caches[0].dtype) for x in (arrays.key, arrays.value))
    return write(call.kv, *caches, key, value, jnp.where(held, page, sizes.num_pages), slot)
