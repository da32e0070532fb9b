"""Gradients of the XLA backend: the same walk again, with the softmax recomputed from lse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ...cache import PagedKVCache
from ...options import Attention
from ...partial import Partial, finite
from ...plan import Reads
from ...varying import vary_over, varying_axes
from .block import fetch, join_heads, masked_logits, split_heads
from .pages import Tokens, apart, scatter_add, together
from .walk import Items, Walk, walk_blocks


def gradients(
    attention: Attention,
    platform: str | None,
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: tuple[Walk, ...],
    partial: Partial,
    cotangent: Partial,
) -> tuple[jax.Array, PagedKVCache]:
    """Cotangents of query and cache, which is `apart`, from those of `(out, lse)`.

    With weights w = exp(logits - lse), out = sum(w v): d out / d logits = w (v - out) and
    d lse / d logits = w (FlashAttention-2, Dao 2023, section 3.1, with the lse term added).
    """
    d_out, d_lse = cotangent
    # The part of d logits / w that is one element per query head.
    offset, lse = d_lse - jnp.sum(d_out * partial.out, axis=-1), finite(partial.lse)
    matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def add_block(items: Items, state: tuple[jax.Array, PagedKVCache]):
        d_query, d_cache = state
        read = jnp.any(items.valid, 1)[:, None, :, None]
        key, value = (jnp.where(read, x, jnp.zeros((), x.dtype)) for x in fetch(cache, items)[:2])
        by_head = lambda x: split_heads(x.at[items.query].get(mode="clip"), key)
        queries = by_head(query)
        capped = masked_logits(queries, Tokens(key, value), items.valid, attention, platform)
        valid = items.valid[:, None, :, None]
        weights = jnp.where(valid, jnp.exp(capped - by_head(lse)[..., None]), 0.0)
        key, value, queries = (x.astype(jnp.float32) for x in (key, value, queries))
        d_out_block = by_head(d_out)
        d_weights = matmul("wkqgd,wktd->wkqgt", d_out_block, value) + by_head(offset)[..., None]
        d_logits = weights * d_weights * attention.scale_of(query.shape[-1])
        if attention.soft_cap is not None:
            d_logits *= jnp.where(valid, 1 - (capped / attention.soft_cap) ** 2, 0.0)
        d_key = matmul("wkqgt,wkqgd->wktd", d_logits, queries)
        d_value = matmul("wkqgt,wkqgd->wktd", weights, d_out_block)
        d_block = join_heads(matmul("wkqgt,wktd->wkqgd", d_logits, key))
        d_query = d_query.at[items.query].add(d_block, mode="drop")
        return d_query, scatter_add(d_cache, items.ids, d_key, d_value)

    axes = varying_axes(query, cache, reads)
    zero = lambda x: vary_over(jnp.zeros(x.shape, jnp.float32), axes)
    whole = together(cache)
    grads = zero(query), whole.replace(map(zero, whole.arrays))
    for walk in work:
        grads = walk_blocks(walk, reads, whole.format.page_size, add_block, grads)
    d_query, d_cache = grads
    pairs = zip(apart(d_cache).arrays, cache.arrays, strict=True)
    d_cache = dataclasses.replace(cache, arrays=tuple(g.astype(x.dtype) for g, x in pairs))
    return d_query.astype(query.dtype), dataclasses.replace(d_cache, layer=None)
