"""The two products of attention, `q k` and `w v`, as each platform computes them fastest.

XLA's GPU compiler fuses the gather of pages into a reduction but not into a matmul, for which it
writes what was fetched to memory and reads it again: three passes instead of one. So where few
queries share a KV head, a GPU reduces keys and values directly while they are read.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# On a GPU, up to this many queries per KV head are reduced directly while keys (values) are read;
# beyond that a matmul is faster.
_MAX_STREAMED_KEYS = 8
_MAX_STREAMED_VALUES = 2


def query_key(
    query: Float[Array, "lanes kv_heads queries dim"],
    key: Float[Array, "lanes kv_heads tokens dim"],
    platform: str | None,
) -> Float[Array, "lanes kv_heads queries tokens"]:
    """Dot products of queries and keys, in float32."""
    num_queries = query.shape[2]
    if platform == "gpu" and num_queries <= _MAX_STREAMED_KEYS:
        queries, keys = query.astype(jnp.float32), key.astype(jnp.float32)
        return _sums([queries[:, :, i, None] * keys for i in range(num_queries)], axis=3)
    if platform == "cpu" and key.dtype == jnp.float32:
        # Keys on the left: 8 % less time per call on jax 0.10, the same on 0.12; not in bfloat16.
        return _matmul("wktd,wkgd->wktg", key, query).swapaxes(2, 3)
    return _matmul("wkgd,wktd->wkgt", query, key)


def weight_value(
    weight: Float[Array, "lanes kv_heads queries tokens"],
    value: Float[Array, "lanes kv_heads tokens dim"],
    platform: str | None,
) -> Float[Array, "lanes kv_heads queries dim"]:
    """Sums of weighted values, in float32."""
    num_queries, num_tokens = weight.shape[2:]
    if platform != "gpu" or num_queries > _MAX_STREAMED_VALUES:
        return _matmul("wkgt,wktd->wkgd", weight.astype(value.dtype), value)
    values = value.astype(jnp.float32)
    products = [weight[:, :, i, :, None] * values for i in range(num_queries)]
    if num_queries > 1 or num_tokens % 2:
        return _sums(products, axis=2)
    # Given one operand, XLA splits the reduction in two and writes the products to memory between
    # them; given two halves it does not.
    return _sums(jnp.split(products[0], 2, axis=2), axis=2).sum(axis=2, keepdims=True)


def _sums(
    products: list[Float[Array, "lanes kv_heads tokens dim"]], axis: int
) -> Float[Array, "lanes kv_heads queries kept"]:
    """Sums of several arrays over an axis, in one reduction: what they share is read once."""
    zeros = (jnp.zeros((), jnp.float32),) * len(products)
    add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
    return jnp.stack(lax.reduce(tuple(products), zeros, add, (axis,)), axis=2)


def _matmul(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul that accumulates in float32 and does not cut float32 operands to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(dims, a, b, precision=precision, preferred_element_type=jnp.float32)
