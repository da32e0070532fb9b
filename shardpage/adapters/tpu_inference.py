"""tpu-inference's ragged paged attention (v3), its variant for head_dim 64, and the sharded call.

All three write the new tokens, then attend, and return the output and the cache, which is donated
(queries, keys and values, which theirs donates too, stay valid). The cache is read and written as
it lies: `[pages, page_size, rows / n, n, 128]`, `n` rows of a token to a 32-bit word.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from .. import sharded
from ..arguments import instance
from ..options import BackendName, Tuning
from ..shard_layout import ShardLayout, Split
from ..tables import linear_index
from . import errors_named, ragged

_DONT_DEBUG = "it prints from their kernel; leave debug_mode out"
# What a mesh of theirs splits sequences and heads over, and how tokens lie on ours.
_DATA, _HEADS = ("data", "attn_dp", "attn_dp_expert"), ("model", "expert")
_TOKENS = ("seqs", "heads", None)
_WORDS = {"scale": "sm_scale", "window": "sliding_window", "causal": "use_causal_mask"}


@functools.partial(
    jax.jit,
    static_argnames=(
        "use_causal_mask",
        "update_kv_cache",
        "skip_kv_mask",
        "sm_scale",
        "sliding_window",
        "soft_cap",
        "out_dtype",
        "mask_value",
        "q_scale",
        "k_scale",
        "v_scale",
        "chunk_prefill_size",
        "d_block_sizes",
        "p_block_sizes",
        "m_block_sizes",
        "vmem_limit_bytes",
        "debug_mode",
        "disable_bounds_checks",
        "disable_semaphore_checks",
        "backend",
    ),
    donate_argnames=("kv_cache",),
)
def ragged_paged_attention(
    queries: Float[Array, "max_num_tokens num_heads head_dim"],
    keys: Float[Array, "max_num_tokens num_kv_heads head_dim"],
    values: Float[Array, "max_num_tokens num_kv_heads head_dim"],
    kv_cache: Float[Array, "num_pages page_size words n row"],
    kv_lens: Int[Array, " max_num_seqs"],
    page_indices: Int[Array, " max_num_seqs_times_pages"],
    cu_q_lens: Int[Array, " max_num_seqs_and_1"],
    distribution: Int[Array, "3"],
    *,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    skip_kv_mask: bool = False,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: Any = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
    disable_bounds_checks: bool = True,
    disable_semaphore_checks: bool = True,
    backend: BackendName | None = None,
) -> tuple[
    Float[Array, "max_num_tokens num_heads head_dim"],
    Float[Array, "num_pages page_size words n row"],
]:
    """tpu-inference's `kernels.ragged_paged_attention.v3.kernel.ragged_paged_attention`.

    Accumulates in float32 whatever `out_dtype` is. Of `distribution` the last entry, the number of
    sequences, decides. Of a float8 cache, keys and values are float8 as well, and `k_scale` and
    `v_scale` are what they are multiples of. A `q_scale` would quantise queries, which stay as they
    are. What tunes or guards their kernel (block sizes, limits, checks, `mask_value`,
    `skip_kv_mask`) has no effect. `backend` is ours: None takes what suits the devices.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: for `debug_mode`, and if the backend does not have what is asked for.
    """
    del mask_value, q_scale, disable_bounds_checks, disable_semaphore_checks
    ragged.refused(debug_mode=(debug_mode, _DONT_DEBUG))
    if skip_kv_mask and use_causal_mask:
        raise ValueError("skip_kv_mask=True is for use_causal_mask=False; leave it out")
    ragged.checked_hints(
        chunk_prefill_size=chunk_prefill_size,
        vmem_limit_bytes=vmem_limit_bytes,
        d_block_sizes=d_block_sizes,
        p_block_sizes=p_block_sizes,
        m_block_sizes=m_block_sizes,
    )
    batch = ragged.rows(kv_lens, page_indices, cu_q_lens, ragged.last_of(distribution))
    options = ragged.Options(
        sm_scale,
        soft_cap,
        sliding_window,
        use_causal_mask,
        v_scale,
        ragged.out_dtype_of(queries, out_dtype),
        tuning=Tuning(backend=backend),
        k_scale=k_scale,
    )
    cache = ragged.words(kv_cache, keys.shape[1], queries.shape[2], options, shared=False)
    tokens = ragged.Tokens(queries, keys, values, None)
    with errors_named(**_WORDS):
        out, cache = ragged.filled_step(tokens, cache, batch, options, update=update_kv_cache)
    return out, cache.key


@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale",
        "sliding_window",
        "soft_cap",
        "mask_value",
        "q_scale",
        "k_scale",
        "v_scale",
        "chunk_prefill_size",
        "num_kv_pages_per_block",
        "num_queries_per_block",
        "vmem_limit_bytes",
        "debug_mode",
        "backend",
    ),
    donate_argnames=("kv_cache",),
)
def ragged_paged_attention_hd64(
    queries: Float[Array, "max_num_tokens num_heads 64"],
    keys: Float[Array, "max_num_tokens num_kv_heads 64"],
    values: Float[Array, "max_num_tokens num_kv_heads 64"],
    kv_cache: Float[Array, "num_pages page_size words n 128"],
    kv_lens: Int[Array, " max_num_seqs"],
    page_indices: Int[Array, " max_num_seqs_times_pages"],
    cu_q_lens: Int[Array, " max_num_seqs_and_1"],
    distribution: Int[Array, "3"],
    attention_sink: Float[Array, " num_heads"] | None = None,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
    backend: BackendName | None = None,
) -> tuple[
    Float[Array, "max_num_tokens num_heads 64"], Float[Array, "num_pages page_size words n 128"]
]:
    """tpu-inference's `kernels.ragged_paged_attention.v3.kernel_hd64.ragged_paged_attention_hd64`.

    A row of 128 holds a head's key and its value; where KV heads do not fill words, heads of zeros
    do. Else as `ragged_paged_attention`.
    """
    del mask_value, q_scale
    ragged.refused(debug_mode=(debug_mode, _DONT_DEBUG))
    ragged.checked_hints(
        chunk_prefill_size=chunk_prefill_size,
        vmem_limit_bytes=vmem_limit_bytes,
        num_kv_pages_per_block=num_kv_pages_per_block,
        num_queries_per_block=num_queries_per_block,
    )
    batch = ragged.rows(kv_lens, page_indices, cu_q_lens, ragged.last_of(distribution))
    options = ragged.Options(
        sm_scale,
        soft_cap,
        sliding_window,
        v_scale=v_scale,
        tuning=Tuning(backend=backend),
        k_scale=k_scale,
    )
    cache = ragged.words(kv_cache, keys.shape[1], queries.shape[2], options, shared=True)
    tokens = ragged.Tokens(queries, keys, values, attention_sink)
    with errors_named(**_WORDS):
        out, cache = ragged.filled_step(tokens, cache, batch, options)
    return out, cache.key


def sharded_ragged_paged_attention(
    mesh: Mesh | AbstractMesh,
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    kv_cache: Float[Array, "num_pages page_size words n row"],
    kv_lens: Int[Array, " num_seqs"],
    page_indices: Int[Array, " num_seqs_times_pages"],
    cu_q_lens: Int[Array, " num_seqs_and_1"],
    distribution: Int[Array, " three"],
    attention_sink: Float[Array, " num_heads"] | None,
    sm_scale: float,
    attention_chunk_size: int | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    update_kv_cache: bool = True,
    use_causal_mask: bool = True,
    attn_logits_soft_cap: float | None = None,
    *,
    layout: ShardLayout | None = None,
    backend: BackendName | None = None,
) -> tuple[
    Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_pages page_size words n row"]
]:
    """tpu-inference's `layers.common.attention_interface.sharded_ragged_paged_attention`.

    Each data shard has its own batch: its part of the tokens, lengths, tables and running sums (one
    entry longer than its sequences), `distribution` (three entries), and page ids that count from
    its first page. Sinks, `update_kv_cache` and bidirectional attention are had with any head_dim.
    `attention_chunk_size` is a sliding window, as theirs is. Fewer KV heads than head shards are
    repeated, as theirs are.

    Args:
      backend: as `ragged_paged_attention` has it.
      layout: which mesh axes split what; None for the axes that tpu-inference names: sequences over
        data, attn_dp and attn_dp_expert, heads over model and expert. With `context=` a sequence's
        pages are split as well, in any placement; page ids count over these shards.

    Raises:
      ValueError: if the mesh has none of those axes, or arguments contradict each other.
      NotImplementedError: if the backend does not have what is asked for.
    """
    del q_scale
    layout = _layout_of(mesh) if layout is None else layout
    split, shards = Split.of(mesh, layout), layout.shards(mesh)
    k, v = (_repeated(x, shards.heads) for x in (k, v))
    shared = q.shape[2] == 64
    options = ragged.Options(
        sm_scale,
        attn_logits_soft_cap,
        attention_chunk_size,
        use_causal_mask,
        v_scale,
        None if shared else ragged.out_dtype_of(q, None),
        tuning=Tuning(backend=backend),
        k_scale=k_scale,
    )
    sizes = (k.shape[1], q.shape[2])
    cache = ragged.words(kv_cache, *sizes, options, shared=shared, shards=shards.heads)
    spare = (cache.format.num_kv_heads - k.shape[1]) // shards.heads
    *filled, batch = sharded.run(
        _batch_here,
        (spare, cache.num_pages // shards.seqs),
        split,
        (q, k, v, attention_sink, kv_lens, page_indices, cu_q_lens, distribution),
        (_TOKENS, _TOKENS, _TOKENS, ("heads",), *(("seqs",),) * 4),
        (_TOKENS, _TOKENS, _TOKENS, ("heads",), ("seqs",)),
    )
    tokens = ragged.Tokens(*filled)
    names = {"scale": "sm_scale", "window": "attention_chunk_size", "causal": "use_causal_mask"}
    with errors_named(**names, soft_cap="attn_logits_soft_cap"):
        out, cache = ragged.step(
            tokens, cache, batch, options, update=update_kv_cache, mesh=mesh, layout=layout
        )
    if spare:
        heads = q.shape[1] // shards.heads
        (out,) = sharded.run(_first_heads, heads, split, (out,), (_TOKENS,), (_TOKENS,))
    return out, cache.key


def _batch_here(
    options: tuple[int, int],
    split: Split,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
) -> tuple[Any, ...]:
    """One device's part: heads that fill words, and its batch with global page ids."""
    spare, num_pages = options
    last = ragged.last_of(distribution)
    batch = ragged.rows(kv_lens, page_indices, cu_q_lens, last)
    there = (batch.block_tables >= 0) & (batch.block_tables < num_pages)
    shard = linear_index(split.layout.seqs)
    ids = jnp.where(there, batch.block_tables + shard * num_pages, -1)
    tokens = ragged.Tokens(q, k, v, sinks).filled(spare)
    return *tokens, batch._replace(block_tables=ids)


def _first_heads(count: int, split: Split, out: jax.Array) -> tuple[jax.Array]:
    return (out[:, :count],)


def _repeated(x: jax.Array, shards: int) -> jax.Array:
    """Keys or values, of fewer heads than shards repeated."""
    heads = x.shape[1]
    if heads % shards and shards % heads:
        raise ValueError(
            f"{heads} KV heads over {shards} head shards; these must be a multiple of the heads, "
            "or divide them"
        )
    return jnp.repeat(x, shards // heads, axis=1) if heads < shards else x


def _layout_of(mesh: Mesh | AbstractMesh) -> ShardLayout:
    instance("mesh", mesh, Mesh | AbstractMesh, "a jax.sharding.Mesh")
    seqs, heads = (
        tuple(name for name in names if name in mesh.axis_names) for names in (_DATA, _HEADS)
    )
    others = [name for name in mesh.axis_names if name not in seqs + heads]
    wide = {name: mesh.shape[name] for name in others if mesh.shape[name] > 1}
    if wide:
        raise ValueError(
            f"the mesh has axes {wide} that split neither tokens {_DATA} nor heads {_HEADS}; say "
            "what they split with layout=ShardLayout(seqs=, heads=, context=)"
        )
    return ShardLayout(seqs or None, heads or None, None)
