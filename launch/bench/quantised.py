"""Decode steps of quantised caches beside bfloat16's: the same tokens, in turn."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardpage import PagedKVCache, page_attention

from ..verify import oracle
from . import decode, inputs, timing
from .report import UNQUANTISED, Row
from .shapes import Shape

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


def rows(shapes: Sequence[Shape], platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures every cache on one shape after the other."""
    for shape in shapes:
        yield from measure(shape, platform, roof_gbps)
        jax.clear_caches()


def measure(shape: Shape, platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape, of bfloat16; an answer that misses the oracle is an error."""
    given = inputs.make(shape, 1 if platform == "cpu" else decode.REPEATS)
    queries, _, _, lens, tables = given.calls()
    calls, token_bytes, temp_bytes = {}, {}, {}
    for dtype in (UNQUANTISED, *DTYPES):
        cache, seen = _cache(given, dtype)
        arrays = (queries, cache, None, lens, tables)
        compiled = jax.jit(decode.in_one_program(_attend)).lower(*arrays).compile()
        call = functools.partial(compiled, *arrays)
        expected = inputs.expected(seen)
        error = expected.error_of(call()[-1])
        if error > expected.limit:
            raise RuntimeError(
                f"{shape.name}, {dtype}: error {error:.1e}, rounding allows {expected.limit:.1e}"
            )
        calls[dtype], temp_bytes[dtype] = call, timing.temp_bytes(compiled)
        token_bytes[dtype] = cache.format.page_bytes // shape.page_size
    queued = 1 if platform == "cpu" else timing.QUEUED
    num_tokens = int(shape.context_lens.sum())
    for dtype, timed in timing.in_turn(calls, given.repeats, queued=queued).items():
        useful = num_tokens * token_bytes[dtype]
        yield Row("quantised", shape.name, dtype, timed, useful, temp_bytes[dtype], roof_gbps)


def _attend(query: Any, cache: PagedKVCache, _: None, lens: Any, tables: Any) -> Any:
    layout = {"kv_layout": cache.kv_layout, "scales": cache.scales}
    return page_attention(query, cache.key, cache.value, lens, tables, **layout)


def _cache(given: inputs.Inputs, dtype: str) -> tuple[PagedKVCache, inputs.Inputs]:
    """The tokens in a cache of this dtype, with scales of tokens; and as they read."""
    layout: dict[str, Any] = {"kv_layout": "blocks_first", "head_dim": given.shape.head_dim}
    if dtype == UNQUANTISED:
        return PagedKVCache.of(given.key, given.value, **layout), given
    (key, key_scales), (value, value_scales) = (
        _quantised(pages, dtype) for pages in (given.key, given.value)
    )
    scales = jnp.concatenate([key_scales, value_scales], axis=-1)[:, :, None]
    cache = PagedKVCache.of(key, value, scales=scales, **layout)
    read = lambda stored, scales: stored.astype(jnp.float32) * scales[..., None]
    seen = {"key": read(key, key_scales), "value": read(value, value_scales)}
    return cache, dataclasses.replace(given, **seen)


@functools.partial(jax.jit, static_argnums=1)
def _quantised(pages: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Pages as stored, and a scale of each token and KV head `[pages, kv_heads, page_size]`."""
    pages = pages.astype(jnp.float32)
    scales = jnp.max(jnp.abs(pages), axis=-1) / oracle.largest(dtype)
    elements = pages / scales[..., None]
    elements = jnp.round(elements) if dtype == "int8" else elements
    return elements.astype(dtype), scales
