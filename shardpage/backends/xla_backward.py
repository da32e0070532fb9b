"""Gradients of the XLA backend: the same walk again, with the softmax recomputed from lse."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ..pages import LocalPages
from ..partial import Partial
from ..spec import AttentionSpec
from ..vma import vary_over, varying_axes
from .xla import fetch, masked_logits, plan_walk, split_heads
from .xla_walk import Items, walk_blocks


def gradients(
    spec: AttentionSpec,
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array | None,
    pages: LocalPages,
    partial: Partial,
    cotangent: Partial,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of query and caches, from those of `(out, lse)`.

    With weights w = exp(logits - lse), out = sum(w v): d out / d logits = w (v - out) and
    d lse / d logits = w (FlashAttention-2, Dao 2023, section 3.1, with the lse term added).
    """
    blocks, walk = plan_walk(spec, query, key_cache, pages)
    d_out, d_lse = cotangent
    # The part of d logits / w that is one number a query head.
    offset = d_lse - jnp.sum(d_out * partial.out, axis=-1)
    lse = jnp.where(partial.lse == -jnp.inf, 0.0, partial.lse)
    matmul = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def add_block(items: Items, state: tuple[jax.Array, jax.Array, jax.Array | None]):
        d_query, d_key_cache, d_value_cache = state
        key, value = (
            jnp.where(items.valid[:, None, :, None], x, jnp.zeros((), x.dtype))
            for x in fetch(spec.kv, key_cache, value_cache, items)
        )
        queries = split_heads(query[items.seq], key)
        by_head = lambda x: x[items.seq].reshape(queries.shape[:3])
        capped = masked_logits(queries, key, items.valid, spec)
        valid = items.valid[:, None, None]
        weights = jnp.where(valid, jnp.exp(capped - by_head(lse)[..., None]), 0.0)
        key, value, queries = (x.astype(jnp.float32) for x in (key, value, queries))
        d_out_block = split_heads(d_out[items.seq], key)
        d_weights = matmul("wkgd,wktd->wkgt", d_out_block, value) + by_head(offset)[..., None]
        d_logits = weights * d_weights * spec.scale
        if spec.soft_cap is not None:
            d_logits *= jnp.where(valid, 1 - (capped / spec.soft_cap) ** 2, 0.0)
        d_key = matmul("wkgt,wkgd->wktd", d_logits, queries)
        d_value = matmul("wkgt,wkgd->wktd", weights, d_out_block)
        d_block = matmul("wkgt,wktd->wkgd", d_logits, key).reshape(-1, *query.shape[1:])
        d_query = d_query.at[items.seq].add(d_block)
        return d_query, *spec.kv.scatter_add(d_key_cache, d_value_cache, items.ids, d_key, d_value)

    zeros = jax.tree.map(
        lambda x: vary_over(jnp.zeros(x.shape, jnp.float32), varying_axes(query, key_cache, pages)),
        (query, key_cache, value_cache),
    )
    grads = walk_blocks(walk, blocks.pages, blocks.page_size, add_block, zeros)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, (query, key_cache, value_cache))
