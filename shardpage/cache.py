"""`PagedKVCache`: the keys and values of one attention layer, or of all, in pages."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from . import descriptor, scales_of
from .arguments import array, integer, shown
from .page_format import (
    PACKED_ROW,
    QUANTISED,
    SCALE_DTYPE,
    Axis,
    KVLayout,
    KVLayoutName,
    PageFormat,
    ScaleOf,
)
from .shard_layout import ShardLayout, Split

# XLA counts bytes in 63 bits, and ends the process where they are more.
_MAX_ELEMENTS = 2**60
DTYPES = ("float32", "bfloat16", "float16", *QUANTISED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages. A pytree: goes through `jax.jit`, can be donated.

    A cache of all layers of a model is one array (or two), in which an axis of layers stands before
    that of pages. A loop over layers carries it, in place.

    Attributes:
      arrays: pages of keys and pages of values, or one array of both.
      scales: of a quantised cache, float32: one array `[pages, kv_heads, 1, 2 * page_size]`, per
        page and KV head the scales of its keys, then those of its values (with an axis of layers
        before that of pages); or one `[kv_heads, 2]`, of the keys and of the values of a KV head
        (with an axis of layers before that of heads). An element is what is stored times its scale.
        A token that is NaN has NaN for both its scales, or, where they are of KV heads, -128 (int8)
        or NaN in the first element of its key: arrays of your own must say it so, too.
      layout: order of the arrays' axes; static.
      head_dim: elements per token and head; static. Rows of a packed cache hold several tokens.
      num_layers: layers that it holds; None of a cache of one layer, without such an axis; static.
      layer: whose pages are meant, where `of_layer` made one range of all layers'; else None.
      padding: elements behind each key and value of a token-major cache; static.
    """

    arrays: tuple[Any, ...]
    scales: tuple[Any, ...]
    layout: KVLayout = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})
    num_layers: int | None = dataclasses.field(default=None, metadata={"static": True})
    layer: Any = None
    padding: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def of(
        cls,
        key: Any,
        value: Any = None,
        *,
        kv_layout: KVLayoutName,
        head_dim: int,
        padding: int = 0,
        scales: Any = None,
    ) -> "PagedKVCache":
        """A cache of one's own arrays; `value` is None where `key` holds both.

        Arrays of one axis more than the layout has are of several layers: an axis of layers stands
        before that of pages. In a token-major one each key and each value may have `padding`
        elements behind its `head_dim` that hold nothing (and may be NaN). Quantised ones have
        float32 `scales`: the array of an equal cache's `scales`, or a pair of arrays `[kv_heads]`
        (of several layers: `[layers, kv_heads]`), of keys and of values.

        Raises:
          ValueError: if a row of theirs neither is one token's head nor packed with several, or
            scales are missing, too many, or of another shape or dtype.
        """
        cache = cls._unscaled(key, value, kv_layout, head_dim, padding)
        shape = cache.format, cache.num_pages, cache.num_layers
        return dataclasses.replace(cache, scales=scales_of.arrays(scales, *shape))

    @classmethod
    def _unscaled(
        cls, key: Any, value: Any, kv_layout: KVLayoutName, head_dim: int, padding: int
    ) -> "PagedKVCache":
        array("key", key)
        integer("head_dim", head_dim)
        kv = KVLayout.named(kv_layout)
        if kv.token_major:
            return _token_major(key, value, kv, head_dim, padding)
        if padding:
            raise ValueError(f"{padding=} is for token-major caches; {kv.label} ones have none")
        row = key.shape[-1]
        if row != head_dim and (row != PACKED_ROW or PACKED_ROW % head_dim):
            raise ValueError(
                f"the cache has rows of {row} elements for {head_dim=}; they must be equal, or the "
                f"cache packed in rows of {PACKED_ROW}, which head_dim must divide"
            )
        if value is not None:
            array("value", value)
        arrays = (key,) if value is None else (key, value)
        return cls(arrays, (), kv, head_dim, _num_layers(kv, key))

    @classmethod
    def zeros(
        cls, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, **options: Any
    ) -> "PagedKVCache":
        """Makes an empty cache, each device its own part: it is never whole on one of them.

        Takes the arguments of `abstract`, and raises its errors.
        """
        make = lambda x: _zeros(x.shape, x.dtype, x.format)()
        sizes, given = (num_pages, num_kv_heads, page_size, head_dim), options.get("scales")
        if isinstance(given, str) and given == "head":
            raise ValueError(
                "scales='head' says that there is one of each KV head; pass them: "
                "scales=(key_scales, value_scales), arrays [num_kv_heads], largest element / "
                "largest that is stored"
            )
        if given is None or isinstance(given, str):
            return jax.tree.map(make, cls.abstract(*sizes, **options))
        options["scales"] = "head"
        abstract = cls.abstract(*sizes, **options)
        pair = scales_of.of_heads(given, num_kv_heads, abstract.num_layers)
        made = jax.tree.map(make, dataclasses.replace(abstract, scales=()))
        scales = jax.device_put(pair, abstract.scales[0].sharding)
        return dataclasses.replace(made, scales=(scales,))

    @classmethod
    def abstract(
        cls,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: Any = jnp.bfloat16,
        kv_layout: KVLayoutName | None = None,
        packed: bool | None = None,
        num_layers: int | None = None,
        scales: Any = None,
        mesh: Mesh | None = None,
        layout: ShardLayout | None = None,
    ) -> "PagedKVCache":
        """Shapes, dtypes and shardings of a cache, to compile for devices that are not there.

        Args:
          num_pages: pages over all devices; of each layer.
          num_kv_heads: KV heads over all devices.
          page_size: tokens per page.
          head_dim: elements per token and head.
          dtype: float32, bfloat16 or float16; or quantised: int8, float8_e4m3fn or float8_e5m2.
          kv_layout: "blocks_first", "heads_first" or "fused"; None for what suits the mesh's
            devices: "fused" on TPU (half as many DMAs), "blocks_first" elsewhere. "tokens_first",
            "interleaved" or "interleaved_words" for pages as other libraries keep them.
          packed: keep tokens of a narrow head together in rows of 128 elements, `[..., page_size *
            head_dim / 128, 128]`, which a TPU does not pad to twice their size and more. None
            does so on TPU where head_dim divides 128 and a page fills whole tiles of 8 rows.
            Of "interleaved_words", whose rows are padded to a multiple of 128: let key and value
            share one; None does so where head_dim is 64.
          num_layers: layers to hold, each of `num_pages` pages; None for a cache of one layer,
            without an axis of layers.
          scales: of a quantised cache. None or "token": one of each token and KV head, found when
            it is written. "head": one of each KV head, which `zeros` is given as a pair of
            arrays `[num_kv_heads]` (or `[num_layers, num_kv_heads]`), of keys and of values:
            calibrated, the largest element that there will be over the largest that is stored.
          mesh: devices to split it over; None for one device.
          layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.

        Raises:
          ValueError: if a size is not positive or does not divide over the mesh, or there are no
            caches of this dtype.
        """
        sizes = {"num_pages": num_pages, "num_kv_heads": num_kv_heads, "page_size": page_size}
        for name, size in (sizes | {"head_dim": head_dim}).items():
            integer(name, size, most=_MAX_ELEMENTS)
        check_dtype("dtype", dtype)
        split = Split.of(mesh, layout)
        sharding: Any = SingleDeviceSharding(jax.local_devices()[0])
        on_tpu = ((split and split.platform) or jax.default_backend()) == "tpu"
        best = "fused" if on_tpu else "blocks_first"
        kv = KVLayout.named(best if kv_layout is None else kv_layout)
        dtype = np.dtype(dtype)
        scale = scales_of.option(scales, dtype)
        page_format = PageFormat(
            kv, num_kv_heads, page_size, head_dim, head_dim, dtype, scale=scale
        ).packed(packed, on_tpu)
        shape = page_format.array_shape(num_pages)
        if num_layers is not None:
            layers = integer("num_layers", num_layers, "layers, or None", most=_MAX_ELEMENTS)
            shape = (*shape[: kv.value.pages], layers, *shape[kv.value.pages :])
        integer("the cache's number of elements", math.prod(shape), most=_MAX_ELEMENTS)
        if split is not None:
            split.check_cache(page_format, num_pages)

        def array(shape: tuple[int, ...], dtype: Any, spec: Any) -> Any:
            # Left to itself, a TPU keeps rows that are no multiple of 128 transposed, and every
            # kernel call would begin with a copy of the cache into row-major order.
            order = Layout(tuple(range(len(shape)))) if on_tpu else None
            where = sharding if split is None else NamedSharding(split.mesh, spec(split.layout))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(order, where))

        pages = array(shape, dtype, functools.partial(_spec, kv, num_layers))
        arrays, scale_arrays = (pages,) * page_format.num_arrays, ()
        if scale != "none":
            shape = page_format.scales_shape(num_pages)
            shape = shape if num_layers is None else (num_layers, *shape)
            spec = functools.partial(_scales_spec, scale, num_layers)
            scale_arrays = (array(shape, SCALE_DTYPE, spec),)
        return cls(arrays, scale_arrays, kv, head_dim, num_layers, padding=page_format.padding)

    def to_tree(self) -> dict[str, Any]:
        """Arrays and format as dicts, lists and integers, which any checkpoint keeps.

        A checkpoint of a cache itself, restored without a target, is a dict of arrays that has lost
        their format; one of this tree is what `from_tree` takes. The tree of an abstract cache is
        a target: it says which devices the arrays are to lie on.

        Raises:
          ValueError: for one layer of a cache of several.
        """
        if self.layer is not None:
            raise ValueError("this is one layer of a cache; take the tree of the whole cache")
        sizes = {"head_dim": self.head_dim, "padding": self.padding}
        parts = {"arrays": list(self.arrays), "scales": list(self.scales)}
        return {self.kv_layout: sizes | parts}

    @classmethod
    def from_tree(cls, tree: Any) -> "PagedKVCache":
        """The cache of which `to_tree` made this, with the arrays as they are there now.

        Raises:
          ValueError: if it is another tree, or its arrays have not the shapes that it names.
        """
        try:
            ((kv_layout, parts),) = tree.items()
            head_dim, padding = int(parts["head_dim"]), int(parts["padding"])
            arrays, scales = list(parts["arrays"]), list(parts["scales"] or ())
            key, value = arrays if len(arrays) == 2 else (*arrays, None)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"no tree of a cache: {shown(tree)}; save cache.to_tree(), or restore a cache "
                "itself with PagedKVCache.abstract(...) as the target"
            ) from None
        one = scales[0] if scales else None
        sizes = {"head_dim": head_dim, "padding": padding}
        return cls.of(key, value, kv_layout=kv_layout, scales=one, **sizes)

    @property
    def key(self) -> Any:
        """Pages of keys; of a fused or interleaved cache, keys and values."""
        return self.arrays[0]

    @property
    def value(self) -> Any:
        """Pages of values; None if fused or interleaved."""
        return None if len(self.arrays) == 1 else self.arrays[1]

    @property
    def kv_layout(self) -> KVLayoutName:
        """The layout's name, for `page_attention(query, cache.key, cache.value, kv_layout=)`."""
        return self.layout.label

    @property
    def _layer_shape(self) -> tuple[int, ...]:
        """The shape of the array(s), without the axis of layers."""
        shape, axis = self.key.shape, self.layout.value.pages
        if self.num_layers is None:
            return shape
        if self.layer is None:
            return (*shape[:axis], *shape[axis + 1 :])
        return (*shape[:axis], shape[axis] // self.num_layers, *shape[axis + 1 :])

    @property
    def format(self) -> PageFormat:
        """What a page is; of this device's part of the KV heads, inside a `shard_map`."""
        array = jax.ShapeDtypeStruct(self._layer_shape, self.key.dtype)
        return PageFormat.of(self.layout, array, self.head_dim, self.padding, self.scale)

    @property
    def scale(self) -> ScaleOf:
        """What a scale covers: a KV head, or one token of it; "none" if there are none."""
        if not self.scales:
            return "none"
        has_layers = self.num_layers is not None and self.layer is None
        return "head" if self.scales[0].ndim - has_layers == 2 else "token"

    @property
    def num_pages(self) -> int:
        """Pages of a layer, over all devices or, inside a `shard_map`, of this one."""
        return self._layer_shape[self.layout.value.pages]

    def spec(self, layout: ShardLayout) -> PartitionSpec:
        """The split of (each of) the array(s) of keys and values."""
        return _spec(self.layout, self.num_layers, layout)

    def specs(self, layout: ShardLayout) -> "PagedKVCache":
        """The splits of all arrays, each in its place: what `in_specs` of a `shard_map` take."""
        arrays = (self.spec(layout),) * len(self.arrays)
        scales = (_scales_spec(self.scale, self.num_layers, layout),) * len(self.scales)
        return dataclasses.replace(self, arrays=arrays, scales=scales)

    def of_layer(self, layer: Any) -> "PagedKVCache":
        """All layers' pages as one range, of which those of `layer` are meant.

        Moves nothing: backends add `first_page` to page ids, and see one long cache.
        """
        axis = self.layout.value.pages
        merge = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        arrays = tuple(merge(x, axis) for x in self.arrays)
        scales = tuple(
            merge(x, 0) if self.scale == "token" else jnp.take(x, layer, axis=0, mode="clip")
            for x in self.scales
        )
        return dataclasses.replace(self, arrays=arrays, scales=scales, layer=layer)

    @property
    def first_page(self) -> Any:
        """What a backend adds to page ids; None where `of_layer` was not called."""
        if self.layer is None:
            return None
        assert self.num_layers is not None
        return first_page(self.layer, self.num_layers, self.num_pages)

    @property
    def num_array_pages(self) -> int:
        """Pages in the array(s): of all layers, where `of_layer` made one range of them."""
        return self.key.shape[self.layout.value.pages]

    def in_layer(self, page_ids: Any) -> Any:
        """Ids of a layer's pages as ids in the array(s); `num_pages`, of no page, stays of none,
        as do all ids of a layer that there is not."""
        if self.first_page is None:
            return page_ids
        there = (page_ids < self.num_pages) & (self.first_page >= 0)
        return jnp.where(there, page_ids + self.first_page, self.num_array_pages)

    @property
    def array_formats(self) -> "PagedKVCache":
        """How the arrays lie in memory and over devices: what `out_shardings` of a `jax.jit` takes.

        Unless told so, a TPU program returns rows that are no multiple of 128 elements in an order
        of its own, and cannot write in place: say `out_shardings=cache.array_formats` for a
        function that returns such a cache. Elsewhere it changes nothing.
        """
        return jax.tree.map(lambda array: array.format, self)

    def unpacked(self) -> "PagedKVCache":
        """The same with one token, or one key, per row; outside of TPUs this moves nothing but the
        scales of tokens, which lie as the tokens do."""
        if self.layout is KVLayout.INTERLEAVED_WORDS:
            rows = self.key.reshape(*self.key.shape[:-3], -1, self.head_dim + self.padding)
            return dataclasses.replace(self, arrays=(rows,), layout=KVLayout.INTERLEAVED)
        if self.layout.token_major or self.key.shape[-1] == self.head_dim:
            return self
        arrays = [x.reshape(*x.shape[:-2], -1, self.head_dim) for x in self.arrays]
        if self.scale != "token":
            return self.replace(arrays)
        by_token, unpacked = self.format.scales_by_token, dataclasses.replace(self.format, pack=1)
        return self.replace(arrays, [unpacked.scales_in_pages(*by_token(x)) for x in self.scales])

    def replace(self, arrays: Iterable[Any], scales: Iterable[Any] | None = None) -> "PagedKVCache":
        """The same with other arrays, and other scales if some are given."""
        scales = self.scales if scales is None else tuple(scales)
        return dataclasses.replace(self, arrays=tuple(arrays), scales=scales)

    def describe(self) -> dict[str, Any]:
        """Where the bytes of each page are, as JSON takes it; see `shardpage.descriptor`."""
        return descriptor.describe(self)

    def bytes_per_device(self) -> int:
        """Bytes of keys, values and scales on each device."""
        size = lambda x: x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        return sum(map(size, jax.tree.leaves(self)))


def first_page(layer: Any, num_layers: int, num_pages: int) -> jax.Array:
    """Where a layer's pages begin among those of all; -1 if there is no such layer.

    Scalar arithmetic alone, so that a kernel can do it.
    """
    return jnp.where((layer >= 0) & (layer < num_layers), layer * num_pages, -1)


def check_dtype(name: str, dtype: Any) -> None:
    """Checks that there are caches of this dtype; `name` is what the caller calls it."""
    try:
        named = jnp.dtype(dtype).name
    except TypeError:
        named = shown(dtype)
    if named not in DTYPES:
        raise ValueError(f"{name}={named} is no cache's; choose one of {DTYPES}")


def _scales_spec(scale: ScaleOf, num_layers: int | None, layout: ShardLayout) -> PartitionSpec:
    axes = [layout.heads, None] if scale == "head" else [layout.pages, layout.heads, None, None]
    return PartitionSpec(*(axes if num_layers is None else [None, *axes]))


def _num_layers(kv: KVLayout, key: Any) -> int | None:
    return key.shape[kv.value.pages] if key.ndim == kv.value.ndim + 1 else None


def _token_major(key: Any, value: Any, kv: KVLayout, head_dim: int, padding: int) -> PagedKVCache:
    integer("padding", padding, "elements, or 0", least=0)
    if (value is None) != kv.interleaved:
        has = "one array of both, and value=None" if kv.interleaved else "an array of each"
        raise ValueError(f"a cache of keys and values in kv_layout={kv.label!r} is {has}")
    if key.ndim not in (kv.value.ndim, kv.value.ndim + 1):
        raise ValueError(f"key has shape {key.shape}; {kv.label} is {kv.value.dims}")
    width, row = head_dim + padding, key.shape[-1]
    shared = kv is KVLayout.INTERLEAVED_WORDS and row == 2 * width
    rows = math.prod(key.shape[kv.value.heads - kv.value.ndim : -1])
    if (row != width and not shared) or (kv.interleaved and rows * (1 + shared) % 2):
        raise ValueError(
            f"key has shape {key.shape} for {head_dim=}, {padding=}; {kv.label} is "
            f"{kv.value.dims} with dim = head_dim + padding"
            + (", or twice that where key and value share a row" * (kv.value.ndim == 5))
        )
    arrays = (key,) if value is None else (key, value)
    return PagedKVCache(arrays, (), kv, head_dim, _num_layers(kv, key), padding=padding)


def _spec(kv: KVLayout, num_layers: int | None, layout: ShardLayout) -> PartitionSpec:
    axes: list[Axis] = [None] * kv.value.ndim
    axes[kv.value.pages], axes[kv.value.heads] = layout.pages, layout.heads
    if num_layers is not None:
        axes.insert(kv.value.pages, None)
    return PartitionSpec(*axes)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, array_format: Format) -> Any:
    """A program that makes zeros; kept, so that a cache for each layer compiles once."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=array_format)
