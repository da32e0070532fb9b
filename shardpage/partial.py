"""Partial softmax results and their merge: the algebra that makes every split exact.

A partial is `(out, lse)`: the attention over *some* keys and the natural logarithm of the
softmax denominator over those keys. Two partials over disjoint keys merge to the partial over
their union,

    lse = log(exp(lse_a) + exp(lse_b))
    out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

which is associative and commutative, with identity `(0, -inf)`: no keys at all. (The merge of
FlashAttention's split-KV and of Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some keys, and the log of their softmax denominator."""

    out: Float[Array, "*batch heads dim"]
    lse: Float[Array, "*batch heads"]


def finite(lse: jax.Array) -> jax.Array:
    """Replaces -inf (no keys) by 0, so that a difference of two empties is not NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def merge(a: Partial, b: Partial) -> Partial:
    """Merges two partials over disjoint keys, in float32."""
    peak = lax.stop_gradient(finite(jnp.maximum(a.lse, b.lse)))
    weight_a, weight_b = jnp.exp(a.lse - peak), jnp.exp(b.lse - peak)
    total = weight_a + weight_b
    out = a.out * weight_a[..., None] + b.out * weight_b[..., None]
    return normalize(out, total, peak)


def normalize(out: jax.Array, total: jax.Array, peak: jax.Array) -> Partial:
    """A partial from an unnormalised sum `out`, its denominator `total`, both over exp(peak).

    A denominator of 0 means that no keys were seen. NaN is not 0: it stays, and is never taken for
    "no keys".
    """
    some = total != 0
    safe = jnp.where(some, total, 1.0)
    return Partial(
        jnp.where(some[..., None], out / safe[..., None], 0.0),
        jnp.where(some, peak + jnp.log(safe), -jnp.inf),
    )


def merge_over_axis(
    partial: Partial, axis_name: str | tuple[str, ...], *, at_once_bytes: int = 0
) -> Partial:
    """Merges the partials of all devices along mesh axes: one pmax of lse, one psum of the rest.

    Args:
      at_once_bytes: up to which size, in bytes, the partials of all devices go to each of them
        in one psum instead: more bytes for one collective less.
    """
    out, lse = partial
    num_devices = lax.axis_size(axis_name)
    if num_devices * (out.nbytes + lse.nbytes) <= at_once_bytes:
        # An all_gather, whose result `shard_map` would not know to be the same everywhere.
        mine = jnp.arange(num_devices) == lax.axis_index(axis_name)
        mine = mine.reshape(-1, *(1,) * out.ndim)
        return _merge_stacked(unpack(lax.psum(jnp.where(mine, pack(partial), 0.0), axis_name)))
    peak = finite(lax.pmax(lax.stop_gradient(lse), axis_name))
    weight = jnp.exp(lse - peak)
    total = unpack(lax.psum(pack(Partial(out * weight[..., None], weight)), axis_name))
    return normalize(*total, peak)


def _merge_stacked(partials: Partial) -> Partial:
    """Merges partials that are stacked along a new first axis."""
    out, lse = partials
    peak = finite(lax.stop_gradient(jnp.max(lse, axis=0)))
    weight = jnp.exp(lse - peak)
    return normalize(jnp.sum(out * weight[..., None], axis=0), jnp.sum(weight, axis=0), peak)


def pack(partial: Partial) -> Float[Array, "*batch heads dim_and_one"]:
    """Both arrays as one, which moves at once."""
    return jnp.concatenate([partial.out, partial.lse[..., None]], axis=-1)


def unpack(rows: Float[Array, "*batch heads dim_and_one"]) -> Partial:
    """What `pack` has packed."""
    return Partial(rows[..., :-1], rows[..., -1])


def add_sinks(partial: Partial, sinks: Float[Array, " heads"]) -> Partial:
    """Joins one sink logit per head to the denominator: it takes weight, and adds no value.

    A sink is a partial over one key whose value is zero; one of -inf is no sink.
    """
    lse = jnp.broadcast_to(sinks.astype(jnp.float32), partial.lse.shape)
    return merge(partial, Partial(jnp.zeros_like(partial.out), lse))


def spread_nan(partial: Partial) -> Partial:
    """Makes a head NaN as a whole, lse included, where any of its output is not finite.

    A weighted mean of finite values is finite: what is not has read a NaN or an infinity.
    """
    broken = ~jnp.all(jnp.isfinite(partial.out), axis=-1)
    return Partial(
        jnp.where(broken[..., None], jnp.nan, partial.out), jnp.where(broken, jnp.nan, partial.lse)
    )


def merge_partials(
    out_a: Float[Array, "*batch heads dim"],
    lse_a: Float[Array, "*batch heads"],
    out_b: Float[Array, "*batch heads dim"],
    lse_b: Float[Array, "*batch heads"],
) -> tuple[Float[Array, "*batch heads dim"], Float[Array, "*batch heads"]]:
    """Merges two attention results over disjoint keys into the one over all of them.

    Args:
      out_a: attention over the first keys, any float dtype.
      lse_a: natural log of its softmax denominator, float32; -inf where it saw no key.
      out_b: attention over the other keys.
      lse_b: natural log of its softmax denominator.

    Returns:
      `(out, lse)` over the union: out in `out_a`'s dtype, lse in float32. The identity is
      `(0, -inf)`, and merging two of those gives it again.

    Raises:
      ValueError: if the shapes do not match.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"merge_partials needs out [..., heads, dim] and lse [..., heads] of equal leading "
            f"shapes; got out {out_a.shape} and {out_b.shape}, lse {lse_a.shape} and {lse_b.shape}"
        )
    merged = merge(_float32(out_a, lse_a), _float32(out_b, lse_b))
    return merged.out.astype(out_a.dtype), merged.lse


def merge_across(
    out: Float[Array, "*batch heads dim"],
    lse: Float[Array, "*batch heads"],
    axis_name: str | tuple[str, ...],
) -> tuple[Float[Array, "*batch heads dim"], Float[Array, "*batch heads"]]:
    """Merges attention results over mesh axes, inside a `shard_map`.

    Each device along `axis_name` attended over its own keys, e.g. with
    `page_attention(..., return_lse=True)` and `mesh=None`; all of them get the merged result.

    Args:
      out: this device's attention, any float dtype.
      lse: natural log of this device's softmax denominator, float32.
      axis_name: one or several axes of the surrounding `shard_map`.

    Returns:
      `(out, lse)` over all devices' keys, equal on all of them; out in its own dtype.
    """
    merged = merge_over_axis(_float32(out, lse), axis_name)
    return merged.out.astype(out.dtype), merged.lse


def _float32(out: jax.Array, lse: jax.Array) -> Partial:
    return Partial(out.astype(jnp.float32), lse.astype(jnp.float32))
