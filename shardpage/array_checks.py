"""Errors that concern arrays: ranks, dtypes, and shapes that must agree. Values are checked in
`table_checks`, options by themselves."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from . import arguments
from .arguments import INT32_MAX
from .cache import PagedKVCache, check_dtype
from .plan import MadeFor


def rank(name: str, array: Any, dims: str) -> None:
    """Checks that an array has these axes: `"[num_seqs, max_blocks]"`."""
    arguments.array(name, array)
    if array.ndim != (0 if dims == "a scalar" else len(dims.split(","))):
        raise ValueError(f"{name} must be {dims}; got {array.shape}")


def cache_arrays(key_cache: Any, value_cache: Any) -> None:
    """Checks that the arrays of keys and of values have a supported dtype and belong together."""
    arguments.array("key_cache", key_cache)
    check_dtype("key_cache.dtype", key_cache.dtype)
    if value_cache is None:
        return
    arguments.array("value_cache", value_cache)
    if (value_cache.shape, value_cache.dtype) != (key_cache.shape, key_cache.dtype):
        raise ValueError(
            f"key_cache is {key_cache.dtype}{list(key_cache.shape)} but value_cache "
            f"{value_cache.dtype}{list(value_cache.shape)}; they must be equal in shape and dtype"
        )


def attention(
    query: Any, cache: PagedKVCache, context_lens: Any, block_tables: Any, sinks: Any
) -> None:
    """Checks the arrays of `attend` against each other."""
    _floating("query", query, "[num_seqs, num_heads, head_dim]")
    _integers("context_lens", context_lens, "[num_seqs]")
    _table(block_tables, cache)
    for name, array in (("context_lens", context_lens), ("block_tables", block_tables)):
        if array.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} has {array.shape[0]} rows, query {query.shape[0]} sequences; "
                "pass one row per sequence"
            )
    _sinks(sinks, query.shape[1])
    if min(*query.shape, *cache.key.shape) < 1:
        raise ValueError(
            f"no axis may be empty; got query {query.shape} and a cache of {cache.key.shape}"
        )
    query_heads(query.shape[1], cache.format.num_kv_heads)


def query_heads(num_heads: int, num_kv_heads: int) -> None:
    """Checks that query heads split over KV heads."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads=} must be a multiple of {num_kv_heads=}: each KV head serves the same "
            "number of query heads"
        )


def _sinks(sinks: Any, num_heads: int) -> None:
    if sinks is None:
        return
    arguments.array("sinks", sinks)
    if sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks has shape {sinks.shape}; pass one logit per query head: ({num_heads},)"
        )
    _floating("sinks", sinks, "[num_heads]")


def tables(cache: Any, context_lens: Any, block_tables: Any, query_lens: Any) -> None:
    """Checks the arrays of `make_plan` against each other."""
    _cache(cache)
    _table(block_tables, cache)
    lens = {"context_lens": context_lens, "query_lens": query_lens}
    for name, array in lens.items():
        if name == "query_lens" and array is None:
            continue
        _integers(name, array, "[num_seqs]")
        if array.shape[0] != block_tables.shape[0]:
            raise ValueError(
                f"{name} has {array.shape[0]} entries, block_tables {block_tables.shape[0]} rows; "
                "pass one per sequence"
            )


def planned(
    query: Any, cache: Any, plan_made_for: MadeFor, num_queries: int, layer_: Any, sinks: Any
) -> None:
    """Checks the arrays of `attend` against its plan."""
    _floating("query", query, "[num_queries, num_heads, head_dim]")
    _cache(cache)
    made_for(cache, plan_made_for)
    layer(cache, layer_)
    wanted = (num_queries, plan_made_for.num_heads, cache.head_dim)
    if query.shape != wanted:
        raise ValueError(
            f"query has shape {query.shape}; the plan was made for num_queries, num_heads and the "
            f"cache's head_dim of {wanted}"
        )
    _sinks(sinks, plan_made_for.num_heads)


def made_for(cache: PagedKVCache, plan_made_for: MadeFor) -> None:
    """Checks that a plan holds for this cache."""
    actual = (cache.format, cache.num_pages)
    if actual != (plan_made_for.page_format, plan_made_for.num_pages):
        raise ValueError(
            f"the plan was made for {plan_made_for.num_pages} pages of "
            f"{plan_made_for.page_format}, this cache has {cache.num_pages} of {cache.format}; "
            "make a plan for each kind of cache"
        )


def layer(cache: PagedKVCache, layer_: Any) -> None:
    """Checks that a layer is named where the cache has several, and is one of them."""
    if layer_ is None and cache.num_layers is None:
        return
    if layer_ is None:
        raise ValueError(
            f"the cache holds {cache.num_layers} layers; pass layer=, from 0, which may be traced"
        )
    if cache.num_layers is None:
        raise ValueError(
            f"layer={arguments.shown(layer_)} of a cache of one layer; make one of several with "
            "PagedKVCache.zeros(..., num_layers=), or leave layer out"
        )
    if hasattr(layer_, "dtype") and not isinstance(layer_, np.integer):
        _integers("layer", layer_, "a scalar")
    else:
        arguments.integer("layer", layer_, least=0, most=cache.num_layers - 1)


def _cache(cache: Any) -> None:
    what = "a PagedKVCache: make one with .zeros(), or with .of() from arrays of your own"
    arguments.instance("cache", cache, PagedKVCache, what)
    cache_arrays(cache.key, cache.value)
    cache_scales(cache)


def cache_scales(cache: PagedKVCache) -> None:
    """Checks that a cache has scales if, and only if, it is quantised."""
    if cache.format.quantised != bool(cache.scales):
        has = "needs scales" if cache.format.quantised else "has no scales"
        raise ValueError(
            f"a cache of {cache.format.dtype} {has}; make it with PagedKVCache.zeros(dtype=), or "
            "of arrays of your own with PagedKVCache.of(..., scales=)"
        )


def write(
    cache: PagedKVCache, key: Any, value: Any, seq_ids: Any, positions: Any, block_tables: Any
) -> None:
    """Checks the arrays of `write_kv` against each other."""
    new_tokens(cache, key, value)
    for name, array in (("seq_ids", seq_ids), ("positions", positions)):
        _integers(name, array, "[num_tokens]")
        if array.shape != key.shape[:1]:
            raise ValueError(f"{name} has {array.shape[0]} entries for {key.shape[0]} tokens")
    _table(block_tables, cache)


def new_tokens(cache: Any, key: Any, value: Any) -> None:
    """Checks the keys and values of new tokens against their cache."""
    _cache(cache)
    page_format, dims = cache.format, "[num_tokens, num_kv_heads, head_dim]"
    if page_format.num_arrays != len(cache.arrays):
        raise ValueError("a fused cache has value=None, any other both key and value")
    rank("key", key, dims)
    wanted = (key.shape[0], page_format.num_kv_heads, page_format.key_dim)
    for name, array in (("key", key), ("value", value)):
        arguments.array(name, array)
        if array.shape != wanted:
            raise ValueError(
                f"{name} has shape {array.shape}; a cache of {page_format.num_kv_heads} KV heads "
                f"takes {wanted}: {dims}"
            )
        _floating(name, array, dims)


def _table(block_tables: Any, cache: PagedKVCache) -> None:
    """Checks a table, every position of which must be an int32."""
    _integers("block_tables", block_tables, "[num_seqs, max_blocks]")
    (rows, columns), page_size = block_tables.shape, cache.format.page_size
    if rows == 0:
        raise ValueError("block_tables has 0 rows; it needs one per sequence, and at least one")
    if columns == 0:
        raise ValueError("block_tables has 0 columns; it needs at least one, -1 if nothing is used")
    if columns * page_size > INT32_MAX:
        raise ValueError(
            f"block_tables of {columns} columns hold {columns * page_size} tokens of {page_size=}; "
            f"positions are int32: at most {INT32_MAX} tokens"
        )


def _floating(name: str, array: Any, dims: str) -> None:
    rank(name, array, dims)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point; got {array.dtype}")
    if array.dtype.itemsize < 2:
        raise ValueError(
            f"{name} has dtype {array.dtype}, which keeps too few digits for an exact result; "
            "cast it to bfloat16 or float32 first"
        )


def _integers(name: str, array: Any, dims: str) -> None:
    rank(name, array, dims)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, int32 best; got {array.dtype}")
    if jnp.iinfo(array.dtype).bits < 8:
        raise ValueError(f"{name} has dtype {array.dtype}, which holds too little; use int32")
