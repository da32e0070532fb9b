"""Where the bytes of a cache's pages are, in words of JSON: for tools that move or keep them.

`describe` knows caches; `page_ranges` knows the description alone, and shows how to read it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from jax.core import Tracer


def describe(cache: Any) -> dict[str, Any]:
    """Describes the buffers of a `PagedKVCache`: the method `describe` of a cache calls this.

    Returns:
      What `json.dumps` takes: the cache's sizes, and `shards`, one for each array and device. Key
      (value) element `e` of a token of KV head `h`, in page `p` of layer `l`, is at byte
      `l * strides.layer + (p - pages[0]) * strides.page + kv * strides.kv
      + (h - kv_heads[0]) * strides.kv_head + token * strides.token + e * itemsize`
      of the shard's buffer, where `kv` is the place of "key" ("value") in `holds`, and `pages` and
      `kv_heads` are the ranges `[first, stop)` that the shard has. Shards of equal ranges are
      replicas, numbered from 0. Buffers are row-major, as a host's copy of them is. Where `tiled`,
      on TPUs, device memory orders and pads the last two axes in a way of its own.

      `version` is 1. Of a quantised cache it is 2, and there is `scales` besides: who moves pages
      moves them as well. `of` is what one covers, a "token" or a "head"; `shards` are as above, of
      `PagedKVCache.scales`. The float32 scale of the key (value) of token `t` is at byte
      `l * strides.layer + (p - pages[0]) * strides.page + kv * strides.kv
      + (h - kv_heads[0]) * strides.kv_head + t % pack * strides.token + t // pack * strides.row`,
      where `pack` is `scales.pack`; one of a head is the same for all pages and tokens, with
      strides of 0.

    Raises:
      ValueError: if the arrays are on no devices, as NumPy's and those traced are.
    """
    page_format = cache.format
    names = (("key", "value"),) if page_format.num_arrays == 1 else (("key",), ("value",))
    shards, axes = [], _axes(cache)
    for number, (array, holds) in enumerate(zip(cache.arrays, names, strict=True)):
        shards += _shards(cache, number, array, holds, axes, _strides)
    description = {
        "version": 2 if cache.scales else 1,
        "kv_layout": cache.kv_layout,
        "dtype": page_format.dtype.name,
        "itemsize": page_format.dtype.itemsize,
        "num_layers": cache.num_layers or 1,
        "num_pages": cache.num_pages,
        "num_kv_heads": page_format.num_kv_heads,
        "page_size": page_format.page_size,
        "head_dim": page_format.key_dim,
        "shards": shards,
    }
    return description | ({"scales": _scales(cache)} if cache.scales else {})


def _scales(cache: Any) -> dict[str, Any]:
    """Where the scales of a quantised cache are."""
    (array,) = cache.scales
    names = ("key", "value")
    return {
        "of": cache.scale,
        "dtype": array.dtype.name,
        "itemsize": array.dtype.itemsize,
        "pack": cache.format.pack,
        "shards": _shards(cache, 0, array, names, _scale_axes(cache), _scale_strides),
    }


def page_ranges(description: dict[str, Any], page: int, layer: int = 0) -> list[dict[str, Any]]:
    """Finds the bytes of one page.

    Args:
      description: of `PagedKVCache.describe`, perhaps of another process, by way of JSON.
      page: its global id.
      layer: which layer's.

    Returns:
      For each device that holds some of it, `device`, `replica`, `kv_heads` and `ranges`: `array`,
      `offset` and `length` in bytes of contiguous pieces. One after another they are
      `[2, kv_heads, page_size, head_dim]`, keys before values. Of a quantised cache also
      `scale_ranges`, the same of the page's scales, `[2, kv_heads, page_size]` of tokens or
      `[2, kv_heads]` of KV heads, float32; `array` counts arrays of scales there.

    Raises:
      ValueError: if there is no such page or layer.
    """
    for name, value, count in (
        ("page", page, description["num_pages"]),
        ("layer", layer, description["num_layers"]),
    ):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} is none of the cache's, 0 to {count - 1}")
    size, tokens = description["head_dim"] * description["itemsize"], description["page_size"]
    at_token = lambda token, strides: token * strides["token"]
    found = _ranges_of(description["shards"], page, layer, tokens, at_token, size)
    scales = description.get("scales")
    if scales is not None:
        pack, tokens = scales["pack"], tokens if scales["of"] == "token" else 1
        at_scale = lambda token, strides: (
            token % pack * strides["token"] + token // pack * strides["row"]
        )
        where = scales["shards"], page, layer, tokens, at_scale, scales["itemsize"]
        of_scales = _ranges_of(*where)  # of KV heads on devices, too, that do not have the page
        for device, shown in found.items():
            shown["scale_ranges"] = of_scales[device]["ranges"]
    return list(found.values())


def _ranges_of(
    shards: list[dict[str, Any]],
    page: int,
    layer: int,
    num_tokens: int,
    at_token: Callable[[int, dict[str, int]], int],
    length: int,
) -> dict[int, dict[str, Any]]:
    """For each device, by its id, what it holds of a page: `length` bytes of each token."""
    found: dict[int, dict[str, Any]] = {}
    for shard in shards:
        first, stop = shard["pages"]
        if not first <= page < stop:
            continue
        device = {name: shard[name] for name in ("device", "replica", "kv_heads")}
        ranges = found.setdefault(shard["device"]["id"], device | {"ranges": []})["ranges"]
        strides = shard["strides"]
        at = layer * strides["layer"] + (page - first) * strides["page"]
        heads = range(shard["kv_heads"][1] - shard["kv_heads"][0])
        for kv, head, token in itertools.product(
            range(len(shard["holds"])), heads, range(num_tokens)
        ):
            of_head = kv * strides["kv"] + head * strides["kv_head"]
            _append(ranges, shard["array"], at + of_head + at_token(token, strides), length)
    return found


def _append(ranges: list[dict[str, int]], array: int, offset: int, length: int) -> None:
    """Adds a piece, or makes the last one longer where it begins at its end."""
    last = ranges[-1] if ranges else None
    if last and (last["array"], last["offset"] + last["length"]) == (array, offset):
        last["length"] += length
    else:
        ranges.append({"array": array, "offset": offset, "length": length})


def _shards(
    cache: Any,
    number: int,
    array: Any,
    holds: tuple[str, ...],
    axes: list[str],
    strides_of: Callable[[Any, tuple[int, ...], int], dict[str, int]],
) -> list[dict[str, Any]]:
    """Each device's part of an array, whose axes are these."""
    sharding: Any = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    try:
        indices = sharding.devices_indices_map(array.shape)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            "the cache is on no devices that could be described; make it with PagedKVCache.zeros "
            "or .abstract, of a mesh of devices, and describe it outside of jax.jit"
        ) from error
    itemsize, local_shape = array.dtype.itemsize, sharding.shard_shape(array.shape)
    strides = strides_of(cache, local_shape, itemsize)
    # In words a place of the axis of heads may hold half a head, or several.
    of_heads = axes.index("kv_head")
    heads, places = cache.format.num_kv_heads, array.shape[of_heads]
    replicas: dict[Any, int] = {}
    shards = []
    for device, index in indices.items():
        ranges = [list(slice_.indices(n)[:2]) for slice_, n in zip(index, array.shape, strict=True)]
        pages = ranges[axes.index("page")] if "page" in axes else [0, cache.num_pages]
        kv_heads = [place * heads // places for place in ranges[of_heads]]
        replica = replicas[*pages, *kv_heads] = replicas.get((*pages, *kv_heads), -1) + 1
        shard = {"array": number, "holds": list(holds), "device": _named(device)}
        shard |= {"replica": replica, "pages": pages, "kv_heads": kv_heads}
        shard |= {"nbytes": itemsize * math.prod(local_shape), "strides": strides}
        shards.append(shard | {"tiled": device.platform == "tpu"})
    return shards


def _named(device: Any) -> dict[str, Any]:
    return {"id": device.id, "process": device.process_index, "platform": device.platform}


def _strides(cache: Any, local_shape: tuple[int, ...], itemsize: int) -> dict[str, int]:
    """In bytes, of a shard's row-major buffer."""
    axes = _axes(cache)
    after = {name: math.prod(local_shape[axis + 1 :]) for axis, name in enumerate(axes)}
    names = ("layer", "page", "kv", "kv_head")
    strides = {name: itemsize * after.get(name, 0) for name in names}
    strides["token"] = itemsize * cache.head_dim  # also where a row holds several
    if cache.layout.token_major:
        row = itemsize * (cache.head_dim + cache.padding)
        interleaved = cache.layout.interleaved
        strides["token"] = itemsize * after["token"]
        strides["kv"], strides["kv_head"] = (row, 2 * row) if interleaved else (0, row)
    return strides


def _axes(cache: Any) -> list[str]:
    """What the axes of the cache's arrays are."""
    layout = cache.layout.value
    axes = ["kv"] * (layout.ndim - 2) + ["row", "element"]
    if cache.layout.token_major:
        axes = ["page", "token"] + ["row"] * (layout.ndim - 3) + ["element"]
    axes[layout.pages], axes[layout.heads] = "page", "kv_head"
    if cache.num_layers is not None:
        axes.insert(layout.pages, "layer")
    return axes


def _scale_axes(cache: Any) -> list[str]:
    """What the axes of its array of scales are."""
    axes = ["kv_head", "kv"] if cache.scale == "head" else ["page", "kv_head", "one", "lane"]
    return axes if cache.num_layers is None else ["layer", *axes]


def _scale_strides(cache: Any, local_shape: tuple[int, ...], itemsize: int) -> dict[str, int]:
    """In bytes, of a shard's row-major buffer of scales."""
    after = {name: math.prod(local_shape[i + 1 :]) for i, name in enumerate(_scale_axes(cache))}
    names = ("layer", "page", "kv", "kv_head", "token", "row")
    if cache.scale == "token":  # tokens of a packed row are as far apart as there are rows
        after |= {"kv": cache.format.page_size, "token": cache.format.page_rows, "row": 1}
    return {name: itemsize * after.get(name, 0) for name in names}
