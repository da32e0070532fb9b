"""The arithmetic of one step: attention of each lane's query over one block of its pages."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ...cache import PagedKVCache
from ...options import HUGE_SOFT_CAP, UNCAPPED, Attention
from ...partial import Partial, finite, normalize
from .pages import gather
from .products import query_key, weight_value
from .walk import Items


def fetch(
    cache: PagedKVCache, items: Items
) -> tuple[Float[Array, "lanes kv_heads tokens dim"], Float[Array, "lanes kv_heads tokens dim"]]:
    """Gathers the items' keys and values; what must not be read is zero in the values.

    A masked logit cannot undo a NaN there, since 0 * NaN = NaN in the second matmul.
    """
    # Without the barrier XLA's CPU compiler widens a bfloat16 cache to float32 *before* the loop:
    # a hidden copy of twice its size.
    cache, ids = lax.optimization_barrier((cache, items.ids))
    key, value = gather(cache, ids)
    return key, jnp.where(items.valid[:, None, :, None], value, jnp.zeros((), value.dtype))


def masked_logits(
    query: Float[Array, "lanes kv_heads queries dim"],
    key: Float[Array, "lanes kv_heads tokens dim"],
    valid: Bool[Array, "lanes tokens"],
    attention: Attention,
    platform: str | None,
) -> Float[Array, "lanes kv_heads queries tokens"]:
    """Scaled, soft-capped logits in float32; -inf where a token is not attended to.

    NaN where a NaN or an infinity was read: it must not look like a masked logit.
    """
    logits = query_key(query, key, platform) * attention.scale_of(query.shape[-1])
    logits = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
    if attention.soft_cap is not None:
        logits = _soft_capped(logits, attention.soft_cap)
    return jnp.where(valid[:, None, None], logits, -jnp.inf)


def _soft_capped(logits: jax.Array, cap: float) -> jax.Array:
    ratio = logits / cap
    capped = cap * jnp.tanh(ratio)
    return jnp.where(jnp.abs(ratio) < UNCAPPED, logits, capped) if cap > HUGE_SOFT_CAP else capped


def block_attention(
    query: Float[Array, "lanes num_heads dim"],
    key: Float[Array, "lanes kv_heads tokens dim"],
    value: Float[Array, "lanes kv_heads tokens dim"],
    valid: Bool[Array, "lanes tokens"],
    attention: Attention,
    platform: str | None,
) -> Partial:
    """Softmax attention of each lane's query over one block of its keys."""
    logits = masked_logits(split_heads(query, key), key, valid, attention, platform)
    peak = finite(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - peak[..., None])
    out = weight_value(weights, value, platform)
    block = normalize(out, jnp.sum(weights, axis=-1), peak)
    lanes_and_heads = query.shape[:2]
    return Partial(block.out.reshape(*lanes_and_heads, -1), block.lse.reshape(lanes_and_heads))


def split_heads(
    query: Float[Array, "lanes num_heads dim"], key: Float[Array, "lanes kv_heads tokens dim"]
) -> Float[Array, "lanes kv_heads queries dim"]:
    """Groups query heads under the KV head that they share."""
    num_lanes, _, dim = query.shape
    return query.reshape(num_lanes, key.shape[1], -1, dim)
