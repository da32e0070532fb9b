"""Writing tokens into pages with XLA, in place on a donated cache."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..kv_layout import KVLayout, unpacked


def write(
    kv: KVLayout,
    key_cache: Float[Array, "..."],
    value_cache: Float[Array, "..."] | None,
    key: Float[Array, "num_tokens num_kv_heads head_dim"],
    value: Float[Array, "num_tokens num_kv_heads head_dim"],
    page_ids: Int[Array, " num_tokens"],
    slots: Int[Array, " num_tokens"],
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    tokens = jnp.stack([key, value], axis=1) if kv.fused else key
    written = _put(kv, key_cache, tokens, page_ids, slots)
    return written, None if kv.fused else _put(kv, value_cache, value, page_ids, slots)


def _put(kv: KVLayout, cache, tokens, page_ids, slots):
    rows = unpacked(cache, tokens.shape[-1])
    if cache.dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11):
        args = (rows, tokens, page_ids, slots)
        written = lax.platform_dependent(
            *args, cpu=lambda *args: _select(kv, *args), default=lambda *args: _scatter(kv, *args)
        )
    else:
        written = _scatter(kv, rows, tokens, page_ids, slots)
    return written.reshape(cache.shape)


def _scatter(kv: KVLayout, cache, tokens, page_ids, slots):
    if kv is KVLayout.HEADS_FIRST:
        return cache.at[:, page_ids, slots].set(tokens.swapaxes(0, 1), mode="drop")
    before_slot = (slice(None),) * (cache.ndim - 3)
    return cache.at[(page_ids, *before_slot, slots)].set(tokens, mode="drop")


def _select(kv: KVLayout, cache, tokens, page_ids, slots):
    """One pass over the cache that takes a token where there is one.

    jaxlib 0.10's CPU compiler widens a whole bfloat16 cache to float32 around a scatter or a
    dynamic_update_slice; a select it does in place. Measured on 33 MB: 3 ms and 66 KB of
    temporaries, where the scatter takes 100 ms and 67 MB.
    """
    sizes = kv.sizes(cache.shape)
    slot_token = jnp.full((sizes.num_pages, sizes.page_size), -1, jnp.int32)
    numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    slot_token = slot_token.at[page_ids, slots].set(numbers, mode="drop")

    shape = [1] * (cache.ndim - 1)
    shape[kv.value.pages], shape[-1] = slot_token.shape
    slot_token = slot_token.reshape(shape)
    others = [axis for axis in range(cache.ndim - 2) if axis != kv.value.pages]
    index = [lax.broadcasted_iota(jnp.int32, cache.shape[:-1], axis) for axis in others]
    arriving = tokens.at[(slot_token, *index)].get(mode="clip")
    return jnp.where(slot_token[..., None] >= 0, arriving, cache)
