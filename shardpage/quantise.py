"""New keys and values as a quantised cache stores them: multiples of a scale, rounded.

An element is what is stored times its scale. Symmetric: 0 is stored as 0. A token of which an
element is NaN or infinite reads as NaN, also where the dtype has none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .cache import PagedKVCache
from .page_format import SCALE_DTYPE, SMALLEST_SCALE

# What no number is stored as: int8's lowest, in the first element of a key, says that its token is
# NaN, where no scale of its own could say so.
INT8_NAN = -128


class Stored(NamedTuple):
    """Tokens in the cache's dtype."""

    key: jax.Array  # [tokens, num_kv_heads, key_dim]
    value: jax.Array
    scales: jax.Array | None = None  # [tokens, num_kv_heads, 2] float32, of keys and of values


def store(
    cache: PagedKVCache,
    key: Float[Array, "tokens num_kv_heads key_dim"],
    value: Float[Array, "tokens num_kv_heads value_dim"],
) -> Stored:
    """Tokens as this cache keeps them; `cache` is of the layer that they go to.

    Rounds to the nearest, to even between two, and clips. A token's own scale is its largest
    element over the largest number that is stored (times its float32 reciprocal), so that nothing
    of it is clipped by more than a rounding.
    """
    dtype = cache.format.dtype
    match cache.scale:
        case "none":
            return Stored(key.astype(dtype), value.astype(dtype))
        case "token":
            return _refuse_gradients(_by_token, dtype, key, value)
        case "head":
            return _refuse_gradients(_by_head, dtype, key, value, cache.scales[0])


def mark(dtype: np.dtype) -> np.ndarray:
    """What the first element of a key is where its token is NaN and has no scale of its own."""
    return np.array(INT8_NAN if dtype == np.int8 else np.nan, dtype)


def largest(dtype: np.dtype) -> float:
    """The largest number that is stored."""
    return float(jnp.iinfo(dtype).max if dtype == np.int8 else jnp.finfo(dtype).max)


def _by_token(dtype: np.dtype, key: jax.Array, value: jax.Array) -> Stored:
    """NaN in either makes both scales NaN: whoever reads the token sees it in its logits."""
    both = jnp.stack([key, value], axis=2).astype(SCALE_DTYPE)
    finite = jnp.isfinite(both)
    both = jnp.where(finite, both, 0)
    # Compilers make this product of a quotient, some of them: written so, all have the same bits.
    scales = jnp.max(jnp.abs(both), axis=-1) * np.float32(1 / largest(dtype))
    scales = jnp.maximum(scales, SMALLEST_SCALE)
    stored = _rounded(dtype, both / scales[..., None])
    scales = jnp.where(jnp.all(finite, axis=(2, 3))[..., None], scales, jnp.nan)
    return Stored(stored[:, :, 0], stored[:, :, 1], scales)


def _by_head(dtype: np.dtype, key: jax.Array, value: jax.Array, scales: jax.Array) -> Stored:
    both = jnp.stack([key, value], axis=2).astype(SCALE_DTYPE)
    finite = jnp.isfinite(both)
    stored = _rounded(dtype, jnp.where(finite, both, 0) / scales[None, ..., None])
    broken, first = ~jnp.all(finite, axis=(2, 3)), jnp.arange(key.shape[-1])[None, None] == 0
    marked = jnp.where(broken[..., None] & first, mark(dtype), stored[:, :, 0])
    return Stored(marked, stored[:, :, 1])


def _rounded(dtype: np.dtype, elements: jax.Array) -> jax.Array:
    most = largest(dtype)
    clipped = jnp.clip(elements, -most, most)
    return (jnp.round(clipped) if dtype == np.int8 else clipped).astype(dtype)


def no_gradients(dtype: np.dtype) -> NotImplementedError:
    """The error for who differentiates through such a cache."""
    return NotImplementedError(
        f"gradients through a cache of {dtype.name}: rounding has none; use a cache of float32, "
        "bfloat16 or float16"
    )


def _refuse_gradients(store: Any, dtype: np.dtype, *arrays: jax.Array) -> Stored:
    """Calls `store`; whoever differentiates it is told that rounding has no gradient."""

    def refuse(*_: Any) -> Any:
        raise no_gradients(dtype)

    call = jax.custom_vjp(lambda *arrays: store(dtype, *arrays))
    call.defvjp(refuse, refuse)
    return call(*arrays)
