"""`attend`: paged attention over a cache by a plan, from checked arguments to a sharded call."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import array_checks, backends, sharded
from .arguments import instance
from .cache import PagedKVCache
from .options import Attention, Mask, Tuning
from .partial import add_sinks, finish, mark, merge_over_axis, merge_scattered
from .plan import MadeFor, Plan, Reads
from .shard_layout import Split, axis_names
from .step import reads_here

# A collective costs a GPU some 30 us, in which NVLink would move more than this.
_GATHER_UP_TO_BYTES = {"gpu": 1 << 20}

_QUERY = ("seqs", "heads", None)
_PLANNED_DIMS = (None, _QUERY, ("heads",), ("pages",), ())
_INPUT_DIMS = (None, _QUERY, ("heads",), ("seqs",), ("seqs", None))
_OUTPUT_DIMS = (_QUERY, ("seqs", "heads"))
_SPLIT_OUTPUT_DIMS = (("seqs", "all_heads", None), ("seqs", "all_heads"))


def attend(
    query: Float[Array, "num_queries num_heads head_dim"],
    cache: PagedKVCache,
    plan: Plan,
    *,
    layer: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    return_lse: bool = False,
    out_split: Literal["heads"] | None = None,
) -> (
    Float[Array, "num_queries num_heads head_dim"]
    | tuple[Float[Array, "num_queries num_heads head_dim"], Float[Array, "num_queries num_heads"]]
):
    """Attends with a step's queries over keys and values kept in pages, as the plan says.

    Query head `h` uses KV head `h // (num_heads // num_kv_heads)`. Softmax and accumulation are
    in float32; matmul operands have the cache's dtype.

    Args:
      query: `[num_queries, num_heads, head_dim]`, the step's new tokens, whose keys and values are
        in the cache already (`write_kv`); any float dtype of 16 bits or more.
      cache: the cache that the plan was made for.
      plan: of `make_plan`: who reads what, on which mesh, and how it is computed.
      layer: which layer of a cache made with `num_layers`, from 0; may be traced. One that there is
        not gives NaN.
      scale: factor on the logits; None for `head_dim ** -0.5`.
      soft_cap: `cap * tanh(logits / cap)` on scaled logits, before masking; None for no cap.
      sinks: `[num_heads]`, a logit per query head that joins the softmax denominator once.
      return_lse: also return the natural log of the softmax denominator (sinks included).
      out_split: "heads" leaves each device along `context` its share of the heads: they come
        merged by a reduce-scatter, in place of an all-reduce of all of them on each device.

    Returns:
      `[num_queries, num_heads, head_dim]` in the query's dtype; with `return_lse`, a pair of that
      and lse, `[num_queries, num_heads]` float32. Zeros and -inf where a query reads nothing, as
      padding does. NaN in both for the queries of a sequence with a bad table or length, and for a
      head that reads a key, value or query that is not finite.

    Raises:
      ValueError: if arguments contradict the plan or each other; the message says what would work.
      NotImplementedError: if the backend does not have an option; the message says which does.
    """
    instance("plan", plan, Plan, "a plan of make_plan")
    instance("return_lse", return_lse, bool, "True or False")
    array_checks.planned(query, cache, plan.made_for, plan.positions.shape[0], layer, sinks)
    attention, split = Attention(scale, soft_cap), plan.made_for.split
    output_dims = _OUTPUT_DIMS
    if out_split is not None:
        if out_split != "heads":
            raise ValueError(f"{out_split=} must be 'heads', or None for all heads everywhere")
        if split is None:
            raise ValueError("out_split='heads' splits over a mesh's context axis; plan with mesh=")
        split.check_out_split(plan.made_for.num_heads)
        output_dims = _SPLIT_OUTPUT_DIMS
    inputs = (cache, query, sinks, plan.reads, as_layer(layer))
    options = (plan.made_for.tuning, attention, out_split)
    out, lse = sharded.run(_attend_here, options, split, inputs, _PLANNED_DIMS, output_dims)
    return (out, lse) if return_lse else out


def as_layer(layer: Any) -> jax.Array | None:
    """A layer's number as an array; it may be traced already."""
    return None if layer is None else jnp.asarray(layer, jnp.int32)


def attend_once(
    query: Float[Array, "num_seqs num_heads head_dim"],
    cache: PagedKVCache,
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    sinks: Float[Array, " num_heads"] | None,
    mask: Mask,
    attention: Attention,
    tuning: Tuning,
    split: Split | None,
) -> tuple[Float[Array, "num_seqs num_heads head_dim"], Float[Array, "num_seqs num_heads"]]:
    """Plans and attends in one program, one query token per sequence: see `page_attention`."""
    array_checks.attention(query, cache, context_lens, block_tables, sinks)
    if split is not None:
        split.check_rows("num_seqs", query.shape[0], "sequences of context_len 0")
        split.check_cache(cache.format, cache.num_pages)
    tuning = sharded.resolve(tuning, split, cache)
    lens, tables = map(sharded.as_int32, (context_lens, block_tables))
    inputs, options = (cache, query, sinks, lens, tables), (mask, attention, tuning)
    return sharded.run(_attend_once_here, options, split, inputs, _INPUT_DIMS, _OUTPUT_DIMS)


def _attend_once_here(
    options: tuple[Mask, Attention, Tuning],
    split: Split | None,
    cache: PagedKVCache,
    query: jax.Array,
    sinks: jax.Array | None,
    context_lens: jax.Array,
    block_tables: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    mask, attention, tuning = options
    made_for = MadeFor(cache.format, cache.num_pages, query.shape[1], tuning, split)
    lens = (context_lens, None, len(query))
    reads, work, _ = reads_here(made_for, mask, lens, block_tables)
    return _attend_and_merge(cache, query, sinks, (reads, work), (tuning, attention, None), split)


def _attend_here(
    options: tuple[Tuning, Attention, str | None],
    split: Split | None,
    cache: PagedKVCache,
    query: jax.Array,
    sinks: jax.Array | None,
    planned: tuple[Reads, Any],
    layer: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One device's part of a planned call."""
    if layer is not None:
        cache = cache.of_layer(layer)
    return _attend_and_merge(cache, query, sinks, planned, options, split)


def _attend_and_merge(
    cache: PagedKVCache,
    query: jax.Array,
    sinks: jax.Array | None,
    planned: tuple[Reads, Any],
    how: tuple[Tuning, Attention, str | None],
    split: Split | None,
) -> tuple[jax.Array, jax.Array]:
    """Attends over this device's pages; merges with the others' of the same sequences."""
    (reads, work), (tuning, attention, out_split) = planned, how
    context = axis_names(split.layout.context) if split is not None else ()
    by_head = cache.scale == "head"
    final = not context and sinks is None and not by_head
    rows = _times_of_heads(query, cache, 0) if by_head else query
    with jax.named_scope("attend"):
        partial = backends.load(tuning).attend(
            rows, cache, reads, work, attention, tuning, final=final
        )
        if by_head:
            partial = partial._replace(out=_times_of_heads(partial.out, cache, 1))
    if final:
        return partial.out, partial.lse
    with jax.named_scope("merge"):
        partial = mark(partial, reads.invalid_in(cache))
        if context and out_split:
            partial, sinks = merge_scattered(partial, context), _own_heads(sinks, context)
        elif context:
            limit = _GATHER_UP_TO_BYTES.get(str(tuning.platform), 0)
            partial = merge_over_axis(partial, context, gather_up_to_bytes=limit)
        if sinks is not None:
            partial = add_sinks(partial, sinks)
        partial = finish(partial, query.dtype)
        return partial.out, partial.lse


def _times_of_heads(rows: jax.Array, cache: PagedKVCache, which: int) -> jax.Array:
    """Rows `[queries, num_heads, dim]` times the scale of their KV head's keys, or values."""
    scales = cache.scales[0][:, which]
    by_query_head = jnp.repeat(scales, rows.shape[1] // scales.shape[0], axis=0)
    return rows.astype(jnp.float32) * by_query_head[None, :, None]


def _own_heads(sinks: jax.Array | None, axes: tuple[str, ...]) -> jax.Array | None:
    """Of one entry per head, those whose output this device keeps."""
    if sinks is None:
        return None
    count = sinks.shape[0] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(sinks, lax.axis_index(axes) * count, count)
