"""sglang-jax's `ragged_paged_attention` (v3): tables ragged like the queries, a temperature."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..arguments import array, number
from ..options import BackendName, Tuning
from . import errors_named, ragged

_FLOAT32_MIN = -0.7 * float(jnp.finfo(jnp.float32).max)


@functools.partial(
    jax.jit,
    static_argnames=(
        "causal",
        "sm_scale",
        "sliding_window",
        "soft_cap",
        "mask_value",
        "q_scale",
        "k_scale",
        "v_scale",
        "xai_temperature_len",
        "softmax_dtype",
        "chunk_prefill_size",
        "d_block_sizes",
        "p_block_sizes",
        "m_block_sizes",
        "vmem_limit_bytes",
        "out_dtype",
        "skip_kv_mask",
        "disable_semaphore_checks",
        "debug_mode",
        "mask_aligned_to_cu_kv",
        "backend",
    ),
    donate_argnames=("kv_cache_fused",),
)
def ragged_paged_attention(
    queries: Float[Array, "max_num_tokens num_heads head_dim"],
    keys: Float[Array, "max_num_tokens num_kv_heads head_dim"],
    values: Float[Array, "max_num_tokens num_kv_heads head_dim"],
    kv_cache_fused: Float[Array, "num_pages page_size words n row"],
    kv_lens: Int[Array, " max_num_seqs"],
    page_indices: Int[Array, " entries"],
    cu_q_lens: Int[Array, " max_num_seqs_and_1"],
    cu_kv_lens: Int[Array, " max_num_seqs_and_1"],
    distribution: Int[Array, "3"],
    custom_mask: Int[Array, " entries"] | None,
    attention_sink: Float[Array, " num_heads"] | float | None = None,
    *,
    causal: int = 1,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = _FLOAT32_MIN,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    xai_temperature_len: float | None = None,
    softmax_dtype: Any = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    out_dtype: Any = None,
    skip_kv_mask: bool = False,
    disable_semaphore_checks: bool = True,
    debug_mode: bool = False,
    mask_aligned_to_cu_kv: bool = False,
    backend: BackendName | None = None,
) -> tuple[
    Float[Array, "max_num_tokens num_heads head_dim"],
    Float[Array, "num_pages page_size words n row"],
]:
    """sglang-jax's `kernels.ragged_paged_attention.ragged_paged_attention_v3`.

    Writes the new tokens, attends, and returns the output and the cache, which is donated (queries,
    keys and values, which theirs donates too, stay valid). A sequence's entries of `page_indices`
    begin at `cu_kv_lens / page_size`. The softmax is in float32, whatever `softmax_dtype` is. What
    tunes or guards their kernel (block sizes, limits, checks, `mask_value`, `skip_kv_mask`) has no
    effect, nor has `q_scale`: queries stay as they are. Of a float8 cache, keys and values are
    float8 as well, and `k_scale` and `v_scale` are what they are multiples of. `backend` is ours:
    None takes what suits the devices.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: for a `custom_mask`, `debug_mode`, and if the backend does not have what
        is asked for.
    """
    del mask_value, q_scale, softmax_dtype, disable_semaphore_checks, mask_aligned_to_cu_kv
    ragged.refused(debug_mode=(debug_mode, "it prints from their kernel; leave debug_mode out"))
    if custom_mask is not None:
        raise NotImplementedError(
            "custom_mask: a token here sees an interval of its sequence; verify drafts of a chain "
            "with causal=1 and custom_mask=None, a token after the other"
        )
    if skip_kv_mask and causal:
        raise ValueError("skip_kv_mask=True is for causal=0; leave it out")
    ragged.checked_hints(
        chunk_prefill_size=chunk_prefill_size,
        vmem_limit_bytes=vmem_limit_bytes,
        d_block_sizes=d_block_sizes,
        p_block_sizes=p_block_sizes,
        m_block_sizes=m_block_sizes,
    )
    if xai_temperature_len is not None:
        xai_temperature_len = number("xai_temperature_len", xai_temperature_len, "above 1, or None")
        if xai_temperature_len <= 1:
            raise ValueError(f"{xai_temperature_len=} must be above 1: its logarithm divides")
    options = ragged.Options(
        sm_scale,
        soft_cap,
        sliding_window,
        bool(causal),
        v_scale,
        ragged.out_dtype_of(queries, out_dtype),
        xai_temperature_len,
        Tuning(backend=backend),
        k_scale,
    )
    cache = ragged.words(kv_cache_fused, keys.shape[1], queries.shape[2], options, shared=False)
    tables = _tables(page_indices, cu_kv_lens, cache.format.page_size)
    batch = ragged.rows(kv_lens, tables, cu_q_lens, ragged.last_of(distribution))
    if attention_sink is not None:
        sinks = jnp.asarray(attention_sink, jnp.float32)
        attention_sink = jnp.broadcast_to(sinks, queries.shape[1]) if sinks.ndim == 0 else sinks
    tokens = ragged.Tokens(queries, keys, values, attention_sink)
    with errors_named(scale="sm_scale", window="sliding_window", sinks="attention_sink"):
        out, cache = ragged.filled_step(tokens, cache, batch, options)
    return out, cache.key


def _tables(page_indices: Any, cu_kv_lens: Any, page_size: int) -> jax.Array:
    """A row for each sequence: `[max_num_seqs, entries]`, since any may have all of them."""
    for name, each in {"page_indices": page_indices, "cu_kv_lens": cu_kv_lens}.items():
        array(name, each)
    first = -(-cu_kv_lens[:-1] // page_size)
    entry = first[:, None] + jnp.arange(page_indices.shape[0], dtype=jnp.int32)[None]
    return page_indices.at[entry].get(mode="fill", fill_value=-1)
