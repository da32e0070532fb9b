"""JAX's own TPU calls, `paged_attention` and `ragged_paged_attention` of its Pallas ops."""

import functools
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from ..array_checks import rank
from ..cache import PagedKVCache
from ..options import BackendName, Tuning
from . import errors_named, ragged
from .ejkernel import page_attention

DEFAULT_MASK_VALUE = -2.381976426469702e38


@functools.partial(
    jax.jit,
    static_argnames=(
        "mask_value",
        "attn_logits_soft_cap",
        "pages_per_compute_block",
        "megacore_mode",
        "inline_seq_dim",
    ),
)
def paged_attention(
    q: Float[Array, "batch num_heads head_dim"],
    k_pages: Float[Array, "num_kv_heads num_pages page_size head_dim"],
    v_pages: Float[Array, "num_kv_heads num_pages page_size head_dim"],
    lengths: Int[Array, " batch"],
    page_indices: Int[Array, "batch pages_per_sequence"],
    *,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int,
    megacore_mode: Literal["kv_head", "batch"] | None = None,
    inline_seq_dim: bool = True,
) -> Float[Array, "batch num_heads head_dim"]:
    """`jax.experimental.pallas.ops.tpu.paged_attention.paged_attention`.

    There is no scale: the caller has multiplied `q` by it. Any page size, `pages_per_compute_block`
    and head_dim will do, lengths of 0 give zeros, and float32 stays float32.

    Raises:
      NotImplementedError: for a `QuantizedTensor`, and what `page_attention` refuses.
      ValueError: if arguments contradict each other.
    """
    for name, pages in {"k_pages": k_pages, "v_pages": v_pages}.items():
        quantized = type(pages).__name__ if hasattr(pages, "scales") else None
        ragged.refused(**{name: (quantized, "quantised pages are not read; pass float pages")})
    rank("k_pages", k_pages, "[num_kv_heads, num_pages, page_size, head_dim]")
    words = {"key_cache": "k_pages", "value_cache": "v_pages", "context_lens": "lengths"}
    words |= {"query": "q", "block_tables": "page_indices"}
    with errors_named(**words):
        out: Any = page_attention(
            q,
            k_pages,
            v_pages,
            lengths,
            page_indices,
            attn_scale=1.0,
            mask_value=mask_value,
            attn_logits_soft_cap=attn_logits_soft_cap,
            pages_per_compute_block=pages_per_compute_block,
            megacore_mode=megacore_mode,
            inline_seq_dim=inline_seq_dim,
            kv_layout="heads_first",
        )
    return out


@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale",
        "sliding_window",
        "soft_cap",
        "mask_value",
        "k_scale",
        "v_scale",
        "num_kv_pages_per_block",
        "num_queries_per_block",
        "vmem_limit_bytes",
        "backend",
    ),
)
def ragged_paged_attention(
    q: Float[Array, "max_num_tokens num_heads head_dim"],
    kv_pages: Float[Array, "num_pages page_size num_kv_heads_x2 head_dim"],
    kv_lens: Int[Array, " max_num_seqs"],
    page_indices: Int[Array, "max_num_seqs pages_per_seq"],
    cu_q_lens: Int[Array, " max_num_seqs_and_1"],
    num_seqs: Int[Array, "1"],
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = DEFAULT_MASK_VALUE,
    k_scale: float | None = None,
    v_scale: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Float[Array, "max_num_tokens num_heads head_dim"]:
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention.ragged_paged_attention`.

    Reads `kv_pages` (k0 v0 k1 v1 ...) where they lie; they hold the new tokens already. Of float8
    pages `k_scale` and `v_scale` are what they are multiples of. Rows behind the last token are
    zeros. `mask_value`, `num_queries_per_block` and `vmem_limit_bytes` change no
    result and have no effect. `backend` is ours: None takes what suits the devices.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: if the backend does not have what is asked for.
    """
    ragged.checked_hints(num_queries_per_block=num_queries_per_block, vmem=vmem_limit_bytes)
    rank("num_seqs", num_seqs, "[1]")
    rank("q", q, "[max_num_tokens, num_heads, head_dim]")
    batch = ragged.rows(kv_lens, page_indices, cu_q_lens, num_seqs[0])
    words: dict[str, Any] = {"scale": "sm_scale", "window": "sliding_window"}
    with errors_named(**words, pages_per_block="num_kv_pages_per_block"):
        options = ragged.Options(
            sm_scale,
            soft_cap,
            sliding_window,
            v_scale=v_scale,
            tuning=Tuning(backend=backend, pages_per_block=num_kv_pages_per_block),
            k_scale=k_scale,
        )
        rank("kv_pages", kv_pages, "[num_pages, page_size, 2 * num_kv_heads, head_dim]")
        scales = ragged.scales("kv_pages", kv_pages, kv_pages.shape[2] // 2, options)
        layout = {"kv_layout": "interleaved", "head_dim": q.shape[2]}
        cache = PagedKVCache.of(kv_pages, **layout, scales=scales)
        return ragged.step(ragged.Tokens(q, None, None, None), cache, batch, options)[0]
