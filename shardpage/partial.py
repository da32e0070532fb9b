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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .arguments import array, shown


class Partial(NamedTuple):
    """Attention over some keys, and the log of their softmax denominator."""

    out: Float[Array, "*batch heads dim"]
    lse: Float[Array, "*batch heads"]


def finite(lse: jax.Array) -> jax.Array:
    """Replaces -inf (no keys) by 0, so that a difference of two empties is not NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def _merge(
    parts: Partial,
    largest: Callable[[Any], jax.Array],
    total: Callable[[Partial], Partial],
    of_part: Callable[[jax.Array], jax.Array] = lambda peak: peak,
) -> Partial:
    """The formula above, for many partials in float32: in pytrees, or along axes of their own.

    `largest` and `total` reduce them to one per result; `of_part` goes from a result's value back
    to the parts that it comes from.
    """
    peak = finite(largest(lax.stop_gradient(parts.lse)))
    weight = jax.tree.map(lambda lse: jnp.exp(lse - of_part(peak)), parts.lse)
    weighted = jax.tree.map(lambda out, w: out * w[..., None], parts.out, weight)
    return normalize(*total(Partial(weighted, weight)), peak)


def merge(a: Partial, b: Partial) -> Partial:
    """Merges two partials over disjoint keys."""
    both = jax.tree.map(lambda x, y: (x, y), a, b)
    return _merge(both, lambda lse: jnp.maximum(*lse), lambda x: Partial(*(p + q for p, q in x)))


def merge_stacked(parts: Partial) -> Partial:
    """Merges partials that are stacked along a first axis."""
    total = lambda parts: Partial(*(jnp.sum(x, axis=0) for x in parts))
    return _merge(parts, lambda lse: jnp.max(lse, axis=0), total)


def merge_segments(parts: Partial, segment: jax.Array, num_segments: int) -> Partial:
    """Merges partials along the first axis by the segment that each belongs to."""
    ids = {"segment_ids": segment, "num_segments": num_segments}
    return _merge(
        parts,
        lambda lse: jax.ops.segment_max(lse, **ids),
        lambda parts: unpack(jax.ops.segment_sum(pack(parts), **ids)),
        of_part=lambda peak: peak[segment],
    )


def merge_over_axis(
    partial: Partial, axis_name: str | tuple[str, ...], *, gather_up_to_bytes: int = 0
) -> Partial:
    """Merges the partials of all devices along mesh axes: one pmax of lse, one psum of the rest.

    If the partials of all devices take at most `gather_up_to_bytes`, all of them are sent to every
    device in one psum and merged there: more bytes, one collective instead of two.
    """
    num_devices = lax.axis_size(axis_name)
    if num_devices * (partial.out.nbytes + partial.lse.nbytes) <= gather_up_to_bytes:
        # An all_gather, written as a psum: `shard_map` then knows that the result is replicated.
        mine = jnp.arange(num_devices) == lax.axis_index(axis_name)
        mine = mine.reshape(-1, *(1,) * partial.out.ndim)
        return merge_stacked(unpack(lax.psum(jnp.where(mine, pack(partial), 0.0), axis_name)))
    total = lambda parts: unpack(lax.psum(pack(parts), axis_name))
    return _merge(partial, lambda lse: lax.pmax(lse, axis_name), total)


def merge_scattered(partial: Partial, axis_name: str | tuple[str, ...]) -> Partial:
    """Merges as `merge_over_axis` does, and leaves each device its share of the heads alone.

    A pmax of lse, and a reduce-scatter of the rest: the (heads x dim) of a token are sent once.
    """

    def total(parts: Partial) -> Partial:
        heads = parts.lse.ndim - 1
        scatter = {"scatter_dimension": heads, "tiled": True}
        return unpack(lax.psum_scatter(pack(parts), axis_name, **scatter))

    peak = finite(lax.pmax(lax.stop_gradient(partial.lse), axis_name))
    weight = jnp.exp(partial.lse - peak)
    summed = total(Partial(partial.out * weight[..., None], weight))
    share = summed.lse.shape[-1]
    own = lax.dynamic_slice_in_dim(peak, lax.axis_index(axis_name) * share, share, axis=-1)
    return normalize(*summed, own)


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


def pack(partial: Partial) -> Float[Array, "*batch heads dim_and_one"]:
    """Both arrays as one, which moves at once."""
    return jnp.concatenate([partial.out, partial.lse[..., None]], axis=-1)


def unpack(rows: Float[Array, "*batch heads dim_and_one"]) -> Partial:
    """The inverse of `pack`."""
    return Partial(rows[..., :-1], rows[..., -1])


def add_sinks(partial: Partial, sinks: Float[Array, " heads"]) -> Partial:
    """Joins one sink logit per head to the denominator: it takes weight, and adds no value.

    A sink is a partial over one key whose value is zero; one of -inf is no sink.
    """
    lse = jnp.broadcast_to(sinks.astype(jnp.float32), partial.lse.shape)
    return merge(partial, Partial(jnp.zeros_like(partial.out), lse))


def mark(partial: Partial, invalid: Bool[Array, " batch"] | None) -> Partial:
    """Gives invalid queries an lse of inf: of that a merge makes NaN, and so does `finish`.

    Not of NaN: where an exponential or a maximum follows a select of a NaN that is written in the
    program, XLA's CPU compiler may take it that there is none, and the mark is gone.
    """
    if invalid is None:
        return partial
    return partial._replace(lse=jnp.where(invalid[:, None], jnp.inf, partial.lse))


def spread_nan(partial: Partial, *, by_lse: bool = False) -> Partial:
    """Makes a head NaN as a whole where its lse is NaN or inf, or any of its output not finite.

    A weighted mean of finite values is finite: what is not has read a NaN or an infinity.

    Args:
      by_lse: whether wherever an output is not finite its lse is not either.
    """
    broken = ~(partial.lse < jnp.inf)
    if not by_lse:
        broken |= ~jnp.all(jnp.isfinite(partial.out), axis=-1)
    nan = lambda where, x: jnp.where(where, jnp.nan, x)
    return Partial(nan(broken[..., None], partial.out), nan(broken, partial.lse))


def finish(partial: Partial, dtype: Any, *, by_lse: bool = False) -> Partial:
    """What a caller gets where nothing is merged any more; `by_lse` as `spread_nan` has it."""
    out, lse = spread_nan(partial, by_lse=by_lse)
    return Partial(out.astype(dtype), lse)


def merge_partials(
    out_a: Float[Array, "*batch heads dim"],
    lse_a: Float[Array, "*batch heads"],
    out_b: Float[Array, "*batch heads dim"],
    lse_b: Float[Array, "*batch heads"],
) -> tuple[Float[Array, "*batch heads dim"], Float[Array, "*batch heads"]]:
    """Merges two attention results over disjoint keys into the one over all of them.

    Args:
      out_a, out_b: attention over the ones and over the others, any float dtype.
      lse_a, lse_b: natural log of their softmax denominators, float32; -inf where there is no key.

    Returns:
      `(out, lse)` over the union: out in `out_a`'s dtype, lse in float32. The identity is
      `(0, -inf)`, and merging two of those gives it again.

    Raises:
      ValueError: if the shapes do not match.
    """
    for name, value in {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}.items():
        array(name, value)
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        raise ValueError(
            f"merge_partials needs out [..., heads, dim] and lse [..., heads] of equal leading "
            f"shapes; got out {out_a.shape} and {out_b.shape}, lse {lse_a.shape} and {lse_b.shape}"
        )
    return _merge_cast(out_a, lse_a, out_b, lse_b)


@jax.jit  # eagerly each of its fifteen operations would be a program
def _merge_cast(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
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

    Raises:
      ValueError: if an argument is no array, or no axis has that name here.
    """
    array("out", out)
    array("lse", lse)
    try:
        lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"axis_name={shown(axis_name)} must name one or several axes of the shard_map that "
            "this is called in"
        ) from None
    merged = merge_over_axis(_float32(out, lse), axis_name)
    return merged.out.astype(out.dtype), merged.lse


def _float32(out: jax.Array, lse: jax.Array) -> Partial:
    return Partial(out.astype(jnp.float32), lse.astype(jnp.float32))
