"""Errors in what `read_pages` and `write_pages` are given: ids, pages, and the scales of pages."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .arguments import array
from .cache import PagedKVCache
from .page_format import SCALE_DTYPE
from .table_checks import integers

_COVERED = {"token": "token", "head": "KV head"}


def page_ids(cache: PagedKVCache, ids: Any) -> np.ndarray:
    """Checks the ids of pages, or -1; gives them as int32."""
    if isinstance(ids, Tracer):
        raise ValueError("page_ids is traced; it is looked at on the host: pass Python integers")
    ids = integers("page_ids", ids, "[num_pages]")
    wrong = ids[(ids < -1) | (ids >= cache.num_pages)]
    if wrong.size:
        raise ValueError(
            f"page_ids holds {wrong[0]}; the cache has pages 0 to {cache.num_pages - 1}, and -1 is "
            "padding"
        )
    return ids.astype(np.int32)


def named_once(ids: np.ndarray) -> None:
    """Checks that no page is written twice."""
    used, counts = np.unique(ids[ids >= 0], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"page_ids names page {used[counts > 1][0]} twice; name each page once")


def kind(cache: PagedKVCache, has_scales: bool) -> None:
    """Checks that pages have scales if, and only if, their cache has."""
    dtype, scale = cache.format.dtype, cache.scale
    if has_scales and scale == "none":
        raise ValueError(
            f"pages are QuantisedPages, and a cache of {dtype} has no scales; multiply them: "
            "pages.elements.astype('float32') * pages.scales[..., None] of tokens' scales"
        )
    if scale != "none" and not has_scales:
        raise ValueError(
            f"pages are an array, and this cache of {dtype} has a scale of each {_COVERED[scale]}; "
            "pass QuantisedPages(elements, scales), as read_pages reads them of such a cache"
        )


def elements(cache: PagedKVCache, num_pages: int, pages: Any) -> None:
    """Checks that pages are what `read_pages` would read of this cache, their scales apart."""
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
    if pages.dtype == page_format.dtype:
        return
    way_out = f"cast them if rounding is meant: pages.astype({page_format.dtype.name!r})"
    if page_format.quantised:
        way_out = "write_kv quantises tokens anew, of pages.elements times their scales"
    raise ValueError(f"pages has dtype {pages.dtype}, the cache {page_format.dtype}; {way_out}")


def scales(cache: PagedKVCache, pages: Any, given: Any) -> None:
    """Checks that the scales of pages cover what the cache's do, and are equal of KV heads."""
    if cache.scale == "none":
        return
    array("pages.scales", given)
    num_layers, num_pages, _, num_kv_heads, page_size, _ = pages.shape
    by_scale = {
        "token": (num_layers, num_pages, 2, num_kv_heads, page_size),
        "head": (num_layers, 2, num_kv_heads),
    }
    if given.shape != by_scale[cache.scale] or given.dtype != SCALE_DTYPE:
        raise ValueError(
            f"pages.scales are {given.dtype}{list(given.shape)}; this cache has a scale of each "
            f"{_COVERED[cache.scale]}, and takes float32 {by_scale[cache.scale]}: make both caches "
            "with the same scales="
        )
    if cache.scale == "head":
        _same(cache, given)


def _same(cache: PagedKVCache, given: Any) -> None:
    """Checks that scales of KV heads are the cache's, where values can be looked at."""
    (own,) = cache.scales
    for x in (given, own):
        if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return
    own = np.asarray(own if cache.num_layers is not None else own[None]).swapaxes(1, 2)
    unlike = np.argwhere(np.asarray(given) != own)
    if len(unlike):
        layer, kv, head = unlike[0]
        raise ValueError(
            f"pages.scales of the {('keys', 'values')[kv]} of KV head {head} in layer {layer} are "
            f"{np.asarray(given)[layer, kv, head]}, this cache's {own[layer, kv, head]}; make both "
            "caches with the same scales=, or quantise anew: write_kv of pages.elements times them"
        )
