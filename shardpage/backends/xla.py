"""The portable backend: XLA operations only, for CPUs, GPUs and TPUs alike.

It walks over blocks of pages, never over the whole context at once, so temporaries do not grow
with it. All sequences' blocks form one flat list of work items; the list is cut into equal
shares, *lanes*, that advance side by side. A long sequence among short ones is thereby spread
over the lanes, and no lane waits for another. (The idea of Stream-K, Osama et al. 2023, applied
to the keys of decode attention.)

    lane 0:  [seq 0: blocks 0 1 2] [seq 1: block 0]         slot 0, slot 1
    lane 1:  [seq 1: blocks 1 2 3] [seq 2: block 0]         slot 2, slot 3
    lane 2:  [seq 2: block 1] [seq 3: block 0] [seq 4: 0]   slot 4, slot 5, slot 6

Each lane keeps one partial softmax a sequence, in slot `sequence + lane`; the slots of one
sequence merge at the end.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..kv_layout import KVLayout, unpacked
from ..pages import LocalPages
from ..partial import Partial, finite, merge, normalize, pack, unpack
from ..spec import HUGE_SOFT_CAP, UNCAPPED, AttentionSpec
from ..vma import vary_over, vary_together, varying_axes
from .xla_walk import Items, Walk, make_walk, walk_blocks

# Bytes of keys and values that one step fetches. A CPU wants them to stay in its caches between
# the fetch and the matmuls; a GPU wants a step to outlast by far the launch of its kernels.
_STEP_BYTES = {"cpu": 2 << 20, "gpu": 256 << 20}
_STEP_BYTES_ELSEWHERE = 64 << 20
# Tokens of one lane's block, where a step holds several lanes.
_LANE_TOKENS = 512
# Queries of a KV head up to which a GPU reduces keys, and values, as it reads them. Beyond, its
# arithmetic takes longer than the matmul's detour through memory.
_MAX_STREAMED = {"keys": 8, "values": 2}


def attend(
    query: Float[Array, "num_seqs num_heads head_dim"],
    key_cache: Float[Array, "..."],
    value_cache: Float[Array, "..."] | None,
    pages: LocalPages,
    spec: AttentionSpec,
) -> Partial:
    """Attends over local pages; see `shardpage.backends` for the contract.

    Differentiable in reverse mode with respect to query and caches.

    Raises:
      NotImplementedError: for options that only `pallas_tpu` has.
    """
    if spec.megacore_mode not in (None, "auto"):
        raise NotImplementedError(
            f"megacore_mode={spec.megacore_mode!r} splits a kernel over two TPU cores; the xla "
            "backend has no kernel to split: use backend='pallas_tpu', or megacore_mode=None"
        )
    if spec.interpret:
        raise NotImplementedError(
            "interpret=True runs a Pallas kernel in the interpreter; the xla backend has none: "
            "use backend='pallas_tpu', or interpret=None"
        )
    caches = (unpacked(cache, query.shape[-1]) for cache in (key_cache, value_cache))
    return _attend(spec, *vary_together(query.astype(key_cache.dtype), *caches, pages))


class Blocks(NamedTuple):
    """Static sizes of the walk."""

    pages: int
    lanes: int
    page_size: int

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size


def choose_blocks(spec: AttentionSpec, cache: jax.Array, num_seqs: int, max_pages: int) -> Blocks:
    """Sizes the steps of the walk: about `_STEP_BYTES` of keys and values each."""
    sizes = spec.kv.sizes(cache.shape)
    page_bytes = 2 * sizes.num_kv_heads * sizes.page_size * sizes.head_dim * cache.dtype.itemsize
    step_pages = max(_STEP_BYTES.get(spec.platform, _STEP_BYTES_ELSEWHERE) // page_bytes, 1)
    pages = spec.pages_per_compute_block
    if pages is None:
        one_lane = spec.platform == "cpu"
        pages = step_pages if one_lane else min(step_pages, max(_LANE_TOKENS // sizes.page_size, 1))
    pages = max(min(pages, max_pages), 1)
    num_items = num_seqs * -(-max_pages // pages)
    lanes = min(max(step_pages // pages, 1), num_items)
    if spec.num_splits > 1:
        lanes = min(max(lanes, spec.num_splits), num_items)
    return Blocks(pages, max(lanes, 1), sizes.page_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    spec: AttentionSpec,
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array | None,
    pages: LocalPages,
) -> Partial:
    blocks, walk = plan_walk(spec, query, key_cache, pages)

    def attend_block(items: Items, slots: jax.Array) -> jax.Array:
        key, value = fetch(spec.kv, key_cache, value_cache, items)
        block = block_attention(query[items.seq], key, value, items.valid, spec)
        merged = merge(unpack(slots.at[items.slot].get(mode="clip")), block)
        return slots.at[items.slot].set(pack(merged), mode="drop", unique_indices=True)

    num_seqs, num_heads, head_dim = query.shape
    nothing = Partial(
        jnp.zeros((walk.num_slots, num_heads, head_dim), jnp.float32),
        jnp.full((walk.num_slots, num_heads), -jnp.inf, jnp.float32),
    )
    slots = vary_over(pack(nothing), varying_axes(query, key_cache, pages))
    on_gpu = spec.platform == "gpu"
    slots = unpack(
        walk_blocks(walk, blocks.pages, blocks.page_size, attend_block, slots, peel_last=on_gpu)
    )
    return slots if walk.num_lanes == 1 else _merge_slots(slots, walk.slot_seq, num_seqs)


def plan_walk(
    spec: AttentionSpec, query: jax.Array, key_cache: jax.Array, pages: LocalPages
) -> tuple[Blocks, Walk]:
    """The static sizes of a call's walk, and its list of work."""
    blocks = choose_blocks(spec, key_cache, query.shape[0], pages.ids.shape[1])
    return blocks, make_walk(pages, blocks.tokens, blocks.lanes, spec.num_splits)


def fetch(
    kv: KVLayout, key_cache: jax.Array, value_cache: jax.Array | None, items: Items
) -> tuple[Float[Array, "lanes kv_heads tokens dim"], Float[Array, "lanes kv_heads tokens dim"]]:
    """Gathers the items' keys and values; what must not be read is zero in the values.

    A masked logit cannot undo a NaN there, since 0 * NaN = NaN in the second matmul.
    """
    # Without the barrier XLA's CPU compiler widens a bfloat16 cache to float32 *before* the loop:
    # a hidden copy of twice its size.
    key_cache, value_cache, ids = lax.optimization_barrier((key_cache, value_cache, items.ids))
    key, value = kv.gather(key_cache, value_cache, ids)
    return key, jnp.where(items.valid[:, None, :, None], value, jnp.zeros((), value.dtype))


def masked_logits(
    query: Float[Array, "lanes kv_heads queries dim"],
    key: Float[Array, "lanes kv_heads tokens dim"],
    valid: Bool[Array, "lanes tokens"],
    spec: AttentionSpec,
) -> Float[Array, "lanes kv_heads queries tokens"]:
    """Scaled, soft-capped logits in float32; -inf where a token is not attended to.

    NaN where a NaN or an infinity was read: it must not look like a masked logit.
    """
    if _streamed("keys", query.shape[2], spec):
        queries, keys = query.astype(jnp.float32), key.astype(jnp.float32)
        products = [queries[:, :, i, None] * keys for i in range(query.shape[2])]
        logits = _sums(products, axis=3)
    elif spec.platform == "cpu" and key.dtype == jnp.float32:
        # Keys on the left: 8 % less time a call on jax 0.10, the same on 0.12; not in bfloat16.
        logits = _matmul("wktd,wkgd->wktg", key, query).swapaxes(2, 3)
    else:
        logits = _matmul("wkgd,wktd->wkgt", query, key)
    logits = logits * spec.scale
    logits = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
    if spec.soft_cap is not None:
        logits = _soft_capped(logits, spec.soft_cap)
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
    spec: AttentionSpec,
) -> Partial:
    """Softmax attention of each lane's query over one block of its keys."""
    logits = masked_logits(split_heads(query, key), key, valid, spec)
    peak = finite(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - peak[..., None])
    if _streamed("values", weights.shape[2], spec):
        values = value.astype(jnp.float32)
        products = [weights[:, :, i, :, None] * values for i in range(weights.shape[2])]
        if len(products) == 1 and key.shape[2] % 2 == 0:
            # Of one array XLA would make two reductions, and write the products in between.
            out = _sums(jnp.split(products[0], 2, axis=2), axis=2).sum(axis=2, keepdims=True)
        else:
            out = _sums(products, axis=2)
    else:
        out = _matmul("wkgt,wktd->wkgd", weights.astype(value.dtype), value)
    block = normalize(out, jnp.sum(weights, axis=-1), peak)
    return Partial(block.out.reshape(query.shape), block.lse.reshape(query.shape[:2]))


def split_heads(
    query: Float[Array, "lanes num_heads dim"], key: Float[Array, "lanes kv_heads tokens dim"]
) -> Float[Array, "lanes kv_heads queries dim"]:
    """Groups query heads under the KV head that they share."""
    num_lanes, _, head_dim = query.shape
    return query.reshape(num_lanes, key.shape[1], -1, head_dim)


def _streamed(what: str, num_queries: int, spec: AttentionSpec) -> bool:
    """Whether to reduce keys or values as they are fetched, instead of a matmul.

    XLA's GPU compiler fuses the gather of pages into a reduction but not into a matmul, for which
    it writes what was fetched to memory and reads it again: three passes instead of one.
    """
    return spec.platform == "gpu" and num_queries <= _MAX_STREAMED[what]


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


def _merge_slots(slots: Partial, slot_seq: jax.Array, num_seqs: int) -> Partial:
    """Merges the slots of each sequence; an unused slot is `(0, -inf)` and changes nothing."""
    of_seq = {"segment_ids": slot_seq, "num_segments": num_seqs}
    peak = finite(jax.ops.segment_max(slots.lse, **of_seq))
    weight = jnp.exp(slots.lse - peak[slot_seq])
    weighted = Partial(slots.out * weight[..., None], weight)
    return normalize(*unpack(jax.ops.segment_sum(pack(weighted), **of_seq)), peak)


def _forward(spec, query, key_cache, value_cache, pages):
    partial = _attend(spec, query, key_cache, value_cache, pages)
    return partial, (query, key_cache, value_cache, pages, partial)


def _backward(spec, residuals, cotangent):
    from .xla_backward import gradients  # only those who differentiate pay for it

    query, key_cache, value_cache, pages, partial = residuals
    grads = gradients(spec, query, key_cache, value_cache, pages, partial, cotangent)
    return (*grads, None)


_attend.defvjp(_forward, _backward)
