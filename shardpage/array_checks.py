"""Errors that concern arrays: ranks, dtypes, and shapes that must agree. Values are checked in
`table_checks`, options by themselves."""

from typing import Any

import jax.numpy as jnp

from . import arguments
from .arguments import INT32_MAX
from .cache import PagedKVCache, check_dtype


def rank(name: str, array: Any, dims: str) -> None:
    """Checks that an array has these axes: `"[num_seqs, max_blocks]"`."""
    arguments.array(name, array)
    if array.ndim != len(dims.split(",")):
        raise ValueError(f"{name} must be {dims}; got {array.shape}")


def cache_arrays(key_cache: Any, value_cache: Any) -> None:
    """Checks that the arrays of a cache have a supported dtype and belong together."""
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
    num_heads, num_kv_heads = query.shape[1], cache.format.num_kv_heads
    if sinks is not None:
        arguments.array("sinks", sinks)
        if sinks.shape != (num_heads,):
            raise ValueError(
                f"sinks has shape {sinks.shape}; pass one logit per query head: ({num_heads},)"
            )
        _floating("sinks", sinks, "[num_heads]")
    if min(*query.shape, *cache.key.shape) < 1:
        raise ValueError(
            f"no axis may be empty; got query {query.shape} and a cache of {cache.key.shape}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads=} must be a multiple of {num_kv_heads=}: each KV head serves the same "
            "number of query heads"
        )


def write(
    cache: PagedKVCache, key: Any, value: Any, seq_ids: Any, positions: Any, block_tables: Any
) -> None:
    """Checks the arrays of `write_kv` against each other."""
    what = "a PagedKVCache: make one with .zeros(), or with .of() from arrays of your own"
    arguments.instance("cache", cache, PagedKVCache, what)
    cache_arrays(cache.key, cache.value)
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
    for name, array in (("seq_ids", seq_ids), ("positions", positions)):
        _integers(name, array, "[num_tokens]")
        if array.shape != key.shape[:1]:
            raise ValueError(f"{name} has {array.shape[0]} entries for {key.shape[0]} tokens")
    _table(block_tables, cache)


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
