"""`attend` of the XLA backend: a walk over blocks of pages, never over a whole context at once.

Temporaries do not grow with the context. All queries' blocks form one flat list of work items; the
list is cut into equal shares, *lanes*, that advance side by side. A long sequence among short ones
is thereby spread over the lanes, and no lane waits for another. (The idea of Stream-K, Osama et al.
2023, applied to the keys of decode attention.)

    lane 0:  [query 0: blocks 0 1 2] [query 1: block 0]           part 0, part 1
    lane 1:  [query 1: blocks 1 2 3] [query 2: block 0]           part 2, part 3
    lane 2:  [query 2: block 1] [query 3: block 0] [query 4: 0]   part 4, part 5, part 6

Each lane keeps one partial softmax per query, as part `query + lane`; the parts of one query merge
at the end.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...cache import PagedKVCache
from ...options import Attention, Tuning
from ...partial import Partial, finish, mark, merge, merge_segments
from ...plan import Reads
from ...varying import vary_over, vary_together, varying_axes
from .backward import gradients
from .block import block_attention, fetch
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
    arrays = vary_together(rows, cache.unpacked(), reads, work)
    partial = cast(Partial, _attend(attention, tuning.platform, *arrays))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    attention: Attention,
    platform: str | None,
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: tuple[Walk, ...],
) -> Partial:
    num_queries, num_heads, _ = query.shape
    page_size, on_gpu = cache.format.page_size, platform == "gpu"

    def attend_block(items: Items, parts: Partial) -> Partial:
        key, value = fetch(cache, items)
        # As `fetch` does it, lest a bfloat16 array be widened whole, before the loop.
        queries, rows = lax.optimization_barrier((query, items.query))
        queries = queries.at[rows].get(mode="clip")
        block = block_attention(queries, key, value, items.valid, attention, platform)
        before = Partial(*(x.at[items.part].get(mode="clip") for x in parts))
        put = lambda x, new: x.at[items.part].set(new, mode="drop", unique_indices=True)
        return Partial(*map(put, parts, merge(before, block)))

    def empty(num_parts: int) -> Partial:
        out = jnp.zeros((num_parts, num_heads, cache.format.value_dim), jnp.float32)
        lse = jnp.full(out.shape[:2], -jnp.inf, jnp.float32)
        axes = varying_axes(query, cache, reads)
        return Partial(*(vary_over(x, axes) for x in (out, lse)))

    def walk_over(partial: Partial, walk: Walk) -> Partial:
        run = functools.partial(walk_blocks, walk, reads, page_size, attend_block)
        if not walk.shared:
            return run(partial, peel_last=on_gpu)
        parts = run(empty(walk.num_parts(num_queries)), peel_last=on_gpu)
        return merge(partial, merge_segments(parts, walk.part_query, num_queries))

    return functools.reduce(walk_over, work, empty(num_queries))


def _forward(attention, platform, query, cache, reads, work):
    partial = _attend(attention, platform, query, cache, reads, work)
    return partial, (query, cache, reads, work, partial)


def _backward(attention, platform, residuals, cotangent):
    d_query, d_cache = gradients(attention, platform, *residuals, cotangent=cotangent)
    return d_query, d_cache, None, None


_attend.defvjp(_forward, _backward)
