"""The arithmetic of one step: attention of each lane's query over one block of its pages."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from ...cache import PagedKVCache
from ...options import HUGE_SOFT_CAP, UNCAPPED, Attention
from ...partial import Partial, finite, normalize
from ...quantise import INT8_NAN
from .pages import Tokens, gather, together
from .products import query_key, weight_value
from .walk import Items


def fetch(cache: PagedKVCache, items: Items) -> Tokens:
    """Gathers the items' keys and values, as matmuls take them, of a cache that is `apart`.

    What no query of a tile reads is zero in values that could be NaN: a masked logit cannot undo
    that, since 0 * NaN = NaN in the second matmul.
    """
    # Without the barrier XLA's CPU compiler widens a bfloat16 cache to float32 *before* the loop:
    # a hidden copy of twice its size.
    cache, ids = lax.optimization_barrier((cache, items.ids))
    cache = together(cache)
    fetched, dtype = gather(cache, ids), cache.format.dtype
    key, value = (x.astype(cache.format.compute_dtype) for x in fetched[:2])
    if dtype != np.int8:
        read = jnp.any(items.valid, axis=1)
        value = jnp.where(read[:, None, :, None], value, jnp.zeros((), value.dtype))
    key_scale, value_scale = fetched.key_scale, fetched.value_scale
    if value_scale is not None:
        # A token that is NaN, in whichever of its scales, is so in the logits of who reads it.
        finite_scale = jnp.isfinite(value_scale)
        key_scale = jnp.where(finite_scale, key_scale, jnp.nan)
        value_scale = jnp.where(finite_scale, value_scale, 0.0)
    elif dtype == np.int8:
        key_scale = jnp.where(fetched.key[..., 0] == INT8_NAN, jnp.nan, 1.0)
    return Tokens(key, value, key_scale, value_scale, dtype != np.int8)


def masked_logits(
    query: Float[Array, "lanes kv_heads tile queries dim"],
    tokens: Tokens,
    valid: Bool[Array, "lanes tile tokens"],
    attention: Attention,
    platform: str | None,
) -> Float[Array, "lanes kv_heads tile queries tokens"]:
    """Scaled, soft-capped logits in float32; -inf where a token is not attended to.

    NaN where a NaN or an infinity was read: it must not look like a masked logit.
    """
    rows = query.reshape(*query.shape[:2], -1, query.shape[-1])
    factor = attention.scale_of(query.shape[-1])
    if tokens.key_scale is not None:
        factor = tokens.key_scale[:, :, None] * factor
    logits = query_key(rows, tokens.key, platform) * factor
    logits = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
    if attention.soft_cap is not None:
        logits = _soft_capped(logits, attention.soft_cap)
    logits = logits.reshape(*query.shape[:-1], -1)
    return jnp.where(valid[:, None, :, None], logits, -jnp.inf)


def _soft_capped(logits: jax.Array, cap: float) -> jax.Array:
    ratio = logits / cap
    capped = cap * jnp.tanh(ratio)
    return jnp.where(jnp.abs(ratio) < UNCAPPED, logits, capped) if cap > HUGE_SOFT_CAP else capped


def block_attention(
    query: Float[Array, "lanes tile num_heads dim"],
    tokens: Tokens,
    valid: Bool[Array, "lanes tile tokens"],
    attention: Attention,
    platform: str | None,
) -> Partial:
    """Softmax attention of each lane's tile of queries over one block of its keys."""
    queries, value = split_heads(query, tokens.key), tokens.value
    logits = masked_logits(queries, tokens, valid, attention, platform)
    peak = finite(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - peak[..., None])
    total = jnp.sum(weights, axis=-1)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    if tokens.value_scale is not None:
        rows *= tokens.value_scale[:, :, None]
    if query.shape[1] > 1 and tokens.may_be_nan:
        value, broken = _finite_values(value, valid)
        total = jnp.where(broken[..., None], jnp.nan, total)
    out = weight_value(rows, value, platform).reshape(*queries.shape[:-1], -1)
    return Partial(*map(join_heads, normalize(out, total, peak)))


def _finite_values(
    value: Float[Array, "lanes kv_heads tokens dim"], valid: Bool[Array, "lanes tile tokens"]
) -> tuple[Float[Array, "lanes kv_heads tokens dim"], Bool[Array, "lanes kv_heads tile"]]:
    """Values without NaN and infinity, and which queries read one.

    One that another query of the tile reads would reach all of them, since 0 * NaN = NaN.
    """
    fine = jnp.all(jnp.isfinite(value), axis=-1)
    broken = jnp.any(valid[:, None] & ~fine[:, :, None], axis=-1)
    return jnp.where(fine[..., None], value, jnp.zeros((), value.dtype)), broken


def split_heads(
    query: Float[Array, "lanes tile num_heads ..."], key: Float[Array, "lanes kv_heads tokens dim"]
) -> Float[Array, "lanes kv_heads tile queries ..."]:
    """Groups query heads under the KV head that they share."""
    lanes, tile = query.shape[:2]
    return query.reshape(lanes, tile, key.shape[1], -1, *query.shape[3:]).swapaxes(1, 2)


def join_heads(
    grouped: Float[Array, "lanes kv_heads tile queries ..."],
) -> Float[Array, "lanes tile num_heads ..."]:
    """The inverse of `split_heads`."""
    lanes, _, tile = grouped.shape[:3]
    return grouped.swapaxes(1, 2).reshape(lanes, tile, -1, *grouped.shape[4:])
