"""Where the bytes of a cache's pages are, in words of JSON: for tools that move or keep them.

`describe` knows caches; `page_ranges` knows the description alone, and shows how to read it.
"""

import itertools
import math
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

    Raises:
      ValueError: if the arrays are on no devices, as NumPy's and those traced are.
    """
    page_format = cache.format
    names = (("key", "value"),) if page_format.num_arrays == 1 else (("key",), ("value",))
    shards = []
    for number, (array, holds) in enumerate(zip(cache.arrays, names, strict=True)):
        shards += _shards(cache, number, array, holds)
    return {
        "version": 1,
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


def page_ranges(description: dict[str, Any], page: int, layer: int = 0) -> list[dict[str, Any]]:
    """Finds the bytes of one page.

    Args:
      description: of `PagedKVCache.describe`, perhaps of another process, by way of JSON.
      page: its global id.
      layer: which layer's.

    Returns:
      For each device that holds some of it, `device`, `replica`, `kv_heads` and `ranges`: `array`,
      `offset` and `length` in bytes of contiguous pieces. One after another they are
      `[2, kv_heads, page_size, head_dim]`, keys before values.

    Raises:
      ValueError: if there is no such page or layer.
    """
    for name, value, count in (
        ("page", page, description["num_pages"]),
        ("layer", layer, description["num_layers"]),
    ):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} is none of the cache's, 0 to {count - 1}")
    page_size, token = description["page_size"], description["head_dim"] * description["itemsize"]
    found: dict[int, dict[str, Any]] = {}
    for shard in description["shards"]:
        first, stop = shard["pages"]
        if not first <= page < stop:
            continue
        device = {name: shard[name] for name in ("device", "replica", "kv_heads")}
        ranges = found.setdefault(shard["device"]["id"], device | {"ranges": []})["ranges"]
        strides = shard["strides"]
        at = layer * strides["layer"] + (page - first) * strides["page"]
        heads = range(shard["kv_heads"][1] - shard["kv_heads"][0])
        for kv, head, slot in itertools.product(
            range(len(shard["holds"])), heads, range(page_size)
        ):
            of_head = kv * strides["kv"] + head * strides["kv_head"]
            _append(ranges, shard["array"], at + of_head + slot * strides["token"], token)
    return list(found.values())


def _append(ranges: list[dict[str, int]], array: int, offset: int, length: int) -> None:
    """Adds a piece, or makes the last one longer where it begins at its end."""
    last = ranges[-1] if ranges else None
    if last and (last["array"], last["offset"] + last["length"]) == (array, offset):
        last["length"] += length
    else:
        ranges.append({"array": array, "offset": offset, "length": length})


def _shards(cache: Any, number: int, array: Any, holds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each device's part of an array."""
    sharding: Any = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    try:
        indices = sharding.devices_indices_map(array.shape)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            "the cache is on no devices that could be described; make it with PagedKVCache.zeros "
            "or .abstract, of a mesh of devices, and describe it outside of jax.jit"
        ) from error
    itemsize, axes = array.dtype.itemsize, _axes(cache)
    local_shape = sharding.shard_shape(array.shape)
    strides = _strides(cache, local_shape, itemsize)
    # In words a place of the axis of heads may hold half a head, or several.
    of_heads = axes.index("kv_head")
    heads, places = cache.format.num_kv_heads, array.shape[of_heads]
    replicas: dict[Any, int] = {}
    shards = []
    for device, index in indices.items():
        ranges = [list(slice_.indices(n)[:2]) for slice_, n in zip(index, array.shape, strict=True)]
        pages = ranges[axes.index("page")]
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
