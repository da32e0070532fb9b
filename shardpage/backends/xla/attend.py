"""`attend` of the XLA backend: a walk over blocks of pages, never over a whole context at once.

Temporaries do not grow with the context. All queries' blocks form one flat list of work items; the
list is cut into equal shares, *lanes*, that advance side by side. A long sequence among short ones
is thereby spread over the lanes, and no lane waits for another. (The idea of Stream-K, Osama et al.
2023, applied to the keys of decode attention.)

    lane 0:  [query 0: blocks 0 1 2] [query 1: block 0]           part 0, part 1
    lane 1:  [query 1: blocks 1 2 3] [query 2: block 0]           part 2, part 3
    lane 2:  [query 2: block 1] [query 3: block 0] [query 4: 0]   part 4, part 5, part 6

Each lane keeps the partial softmax of the queries that it is at, and leaves it as part
`query + lane` with every block; the parts of one query merge at the end.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...cache import PagedKVCache
from ...options import Attention, Tuning
from ...page_format import PageFormat
from ...partial import Partial, finish, mark, merge, merge_segments
from ...plan import Reads
from ...quantise import no_gradients
from ...varying import vary_over, vary_together, varying_axes
from .backward import gradients
from .block import block_attention, fetch
from .pages import apart
from .walk import Items, Walk, walk_blocks


def attend(
    query: Float[Array, "queries num_heads key_dim"],
    cache: PagedKVCache,
    reads: Reads,
    work: tuple[Walk, ...],
    attention: Attention,
    tuning: Tuning,
    *,
    final: bool = False,
) -> Partial:
    """Attends over local pages; see `shardpage.backends` for the contract.

    Differentiable in reverse mode with respect to query and cache.
    """
    refuse_kernel_options(tuning)
    rows = query.astype(cache.format.compute_dtype)
    arrays = vary_together(rows, apart(cache), reads, work)
    out_dtype = query.dtype if final else jnp.float32
    how = How(attention, tuning.platform, out_dtype, cache.format)
    partial = cast(Partial, _attend(how, *arrays))
    return finish(mark(partial, reads.invalid_in(cache)), query.dtype) if final else partial


def refuse_kernel_options(tuning: Tuning) -> None:
    """Refuses what only `pallas_tpu` has."""
    if tuning.cores not in (None, "auto", "off"):
        raise NotImplementedError(
            f"cores={tuning.cores!r} splits a kernel over two TPU cores; the xla backend has no "
            "kernel to split: use backend='pallas_tpu', or None"
        )
    if tuning.interpret:
        raise NotImplementedError(
            "interpret=True runs a Pallas kernel in the interpreter; the xla backend has none: "
            "use backend='pallas_tpu', or interpret=None"
        )


class How(NamedTuple):
    """What is computed, besides shapes."""

    attention: Attention
    platform: str | None
    out_dtype: Any  # float32 if something is merged with the results, or for gradients
    page_format: PageFormat


class State(NamedTuple):
    """What a walk has found so far."""

    out: jax.Array  # of each part; see `_words`
    lse: jax.Array
    current: Partial  # of the tile that each lane is at


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: How, query: jax.Array, cache: PagedKVCache, reads: Reads, work: tuple[Walk, ...]
) -> Partial:
    num_queries, num_heads, _ = query.shape
    attention, platform, out_dtype, page_format = how
    page_size, on_gpu = page_format.page_size, platform == "gpu"

    def attend_block(items: Items, state: State) -> State:
        tokens = fetch(cache, items)
        # As `fetch` does it, lest a bfloat16 array be widened whole, before the loop.
        queries, rows = lax.optimization_barrier((query, items.query))
        queries = queries.at[rows].get(mode="clip")
        block = block_attention(queries, tokens, items.valid, attention, platform)
        begins = items.begins[:, None, None]
        out, lse = state.current
        before = Partial(jnp.where(begins[..., None], 0.0, out), jnp.where(begins, -jnp.inf, lse))
        current = merge(before, block)
        put = lambda x, new: x.at[items.part].set(new, mode="drop", unique_indices=True)
        in_words = state.out.dtype == jnp.uint16
        new = _words(current.out.astype(out_dtype)) if in_words else current.out
        return State(put(state.out, new), put(state.lse, current.lse), current)

    def empty(*shape: int, dtype: Any = jnp.float32) -> Partial:
        out = jnp.zeros((*shape, num_heads, page_format.value_dim), dtype)
        lse = jnp.full(out.shape[:-1], -jnp.inf, jnp.float32)
        axes = varying_axes(query, cache, reads)
        return Partial(*(vary_over(x, axes) for x in (out, lse)))

    def run(walk: Walk, left: Partial) -> Partial:
        state = State(_words(left.out), left.lse, empty(walk.num_lanes, walk.tiles.size))
        state = walk_blocks(walk, reads, page_size, attend_block, state, peel_last=on_gpu)
        return Partial(lax.bitcast_convert_type(state.out, left.out.dtype), state.lse)

    def walk_over(partial: Partial, walk: Walk) -> Partial:
        if not walk.shared:
            return run(walk, partial)
        parts = run(walk, empty(walk.num_parts(num_queries)))
        found = merge_segments(parts, walk.part_query, num_queries)
        return _as(out_dtype, merge(_as(jnp.float32, partial), found))

    return functools.reduce(walk_over, work, empty(num_queries, dtype=out_dtype))


def _as(dtype: Any, partial: Partial) -> Partial:
    return partial._replace(out=partial.out.astype(dtype))


def _words(out: jax.Array) -> jax.Array:
    """As integers if of 16 bits: to change a part, XLA's CPU compiler would widen all of them."""
    return lax.bitcast_convert_type(out, jnp.uint16) if out.dtype.itemsize == 2 else out


def _forward(how, query, cache, reads, work):
    if how.page_format.quantised:
        raise no_gradients(how.page_format.dtype)
    exactly = how._replace(out_dtype=jnp.float32)
    partial = cast(Partial, _attend(exactly, query, cache, reads, work))
    return _as(how.out_dtype, partial), (query, cache, reads, work, partial)


def _backward(how, residuals, cotangent):
    cotangent = _as(jnp.float32, cotangent)
    d_query, d_cache = gradients(how.attention, how.platform, *residuals, cotangent=cotangent)
    return d_query, d_cache, None, None


_attend.defvjp(_forward, _backward)
