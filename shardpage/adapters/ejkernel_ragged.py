"""ejkernel's ragged calls: `ragged_page_attention_v2`, `_v3` and `unified_attention`.

Their mesh, in_specs and out_specs wrap the call in a `jax.shard_map`, as theirs do: page ids are
those of a device's own part of the cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..arguments import array, shown
from ..cache import PagedKVCache
from ..options import BackendName, Tuning
from . import errors_named, ragged

_BACKENDS: dict[str | None, BackendName | None] = {
    None: None,
    "auto": None,
    "xla": "xla",
    "pallas": "pallas_tpu",
}
_NAMES = {"scale": "softmax_scale", "soft_cap": "logits_soft_cap", "window": "sliding_window"}


def ragged_page_attention_v2(
    queries: Float[Array, "total_tokens num_heads head_dim"],
    kv_pages: Float[Array, "num_pages page_size num_kv_heads_x2 head_dim"],
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs pages_per_seq"],
    query_start_loc: Int[Array, " num_seqs_and_1"],
    num_seqs: Any,
    softmax_aux: Float[Array, " num_heads"] | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | None = None,
    mask_value: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: str | None = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> Float[Array, "total_tokens num_heads head_dim"]:
    """ejkernel's `ragged_page_attention_v2`, over k0 v0 k1 v1 ... pages that are only read.

    Matmul operands have the pages' dtype and sums are float32, whatever `compute_dtype` is. What
    tunes their kernels (`cfg`, `optimized`, `vmem_limit_bytes`, `mask_value`) has no effect.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: for a `platform` of GPU kernels, or what the backend does not have.
    """
    del compute_dtype, optimized, mask_value, cfg
    ragged.checked_hints(vmem_limit_bytes=vmem_limit_bytes)
    options = ragged.Options(
        softmax_scale, logits_soft_cap, sliding_window, tuning=Tuning(backend=backend_of(platform))
    )
    arrays = (queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux)
    call = functools.partial(_v2, options)
    return _mapped(call, arrays, mesh, in_specs, out_specs)


def ragged_page_attention_v3(
    queries: Float[Array, "total_tokens num_heads head_dim"],
    keys: Float[Array, "total_tokens num_kv_heads head_dim"],
    values: Float[Array, "total_tokens num_kv_heads head_dim"],
    kv_cache: Float[Array, "num_pages page_size words n row"],
    kv_lens: Int[Array, " max_num_seqs"],
    block_tables: Int[Array, " max_num_seqs_times_pages"],
    query_start_loc: Int[Array, " max_num_seqs_and_1"],
    distribution: Int[Array, "3"],
    softmax_aux: Float[Array, " num_heads"] | None = None,
    /,
    *,
    softmax_scale: float = 1.0,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    vmem_limit_bytes: int | None = None,
    platform: str | None = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> tuple[
    Float[Array, "total_tokens num_heads head_dim"], Float[Array, "num_pages page_size words n row"]
]:
    """ejkernel's `ragged_page_attention_v3`: writes the new tokens, attends; the cache is donated.

    The last entry of `distribution` is the number of sequences. With head_dim 64 key and value of a
    head share a row of 128, where the cache has that many. Of a float8 cache, keys and values are
    float8 as well, and `k_scale` and `v_scale` are what they are multiples of. `q_scale` (queries
    stay as they are), `cfg` and `vmem_limit_bytes` have no effect.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: for a `platform` of GPU kernels, or what the backend does not have.
    """
    del q_scale, cfg
    ragged.checked_hints(vmem_limit_bytes=vmem_limit_bytes)
    options = ragged.Options(
        softmax_scale,
        logits_soft_cap,
        sliding_window,
        v_scale=v_scale,
        tuning=Tuning(backend=backend_of(platform)),
        k_scale=k_scale,
    )
    tokens = (queries, keys, values, kv_cache)
    arrays = (*tokens, kv_lens, block_tables, query_start_loc, distribution, softmax_aux)
    call = functools.partial(_v3, options)
    return _mapped(call, arrays, mesh, in_specs, out_specs)


def unified_attention(
    queries: Float[Array, "total_tokens num_heads head_dim"],
    key_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    value_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    kv_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    query_start_loc: Int[Array, " num_seqs_and_1"],
    alibi_slopes: Float[Array, " num_heads"] | None = None,
    qq_bias: Float[Array, "queries queries"] | None = None,
    softmax_aux: Float[Array, " num_heads"] | None = None,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    seq_threshold_3d: int | None = None,
    platform: str | None = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    cfg: Any = None,
) -> Float[Array, "total_tokens num_heads head_dim"]:
    """ejkernel's `unified_attention`, whose caches (blocks, then slots, then heads) are only read.

    `causal=False`, which theirs refuses, shows each token its whole sequence. A window or cap of 0
    is none, as theirs. `seq_threshold_3d` and `cfg` tune their kernels, and have no effect.

    Raises:
      ValueError: if arguments contradict each other.
      NotImplementedError: for `alibi_slopes`, `qq_bias`, a `platform` of GPU kernels, or what the
        backend does not have.
    """
    del seq_threshold_3d, cfg
    for name, bias in {"alibi_slopes": alibi_slopes, "qq_bias": qq_bias}.items():
        if bias is not None:
            raise NotImplementedError(
                f"{name} adds to each logit, which no backend does; pass None, and use positions "
                "that keys and queries carry (rotary) or ejkernel's own call"
            )
    options = ragged.Options(
        softmax_scale, logits_soft_cap or None, sliding_window or None, causal,
        tuning=Tuning(backend=backend_of(platform)),
    )  # fmt: skip
    caches = (queries, key_cache, value_cache)
    arrays = (*caches, kv_lens, block_tables, query_start_loc, None, None, softmax_aux)
    call = functools.partial(_unified, options)
    return _mapped(call, arrays, mesh, in_specs, out_specs)


def backend_of(platform: str | None) -> BackendName | None:
    """Ours for theirs.

    Raises:
      NotImplementedError: for their kernels for GPUs.
    """
    if platform not in _BACKENDS:
        raise NotImplementedError(
            f"platform={shown(platform)} is a kernel of ejkernel's; use 'xla', 'pallas' (TPU), or "
            "None for what suits the devices"
        )
    return _BACKENDS[platform]


def _mapped(
    call: Callable[..., Any], arrays: tuple[Any, ...], mesh: Any, in_specs: Any, out_specs: Any
) -> Any:
    """The call as it is or, where all three are given, in a `shard_map` of these."""
    given = [each is not None for each in (mesh, in_specs, out_specs)]
    if not any(given):
        return call(*arrays)
    if not all(given):
        raise ValueError(
            "mesh, in_specs and out_specs go together: pass all three, or none inside a shard_map"
        )
    specs = tuple(in_specs)
    if len(specs) != len(arrays):
        raise ValueError(
            f"in_specs has {len(specs)} entries for {len(arrays)} arrays; None where one is None"
        )
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=out_specs)(*arrays)


@functools.partial(jax.jit, static_argnums=0)
def _v2(options, queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, sinks):
    array("queries", queries)
    num_seqs = jnp.asarray(num_seqs, jnp.int32).reshape(())  # an integer, or [1]
    batch = ragged.rows(context_lens, block_tables, query_start_loc, num_seqs)
    cache = PagedKVCache.of(kv_pages, kv_layout="interleaved", head_dim=queries.shape[2])
    return _named_step(options, ragged.Tokens(queries, None, None, sinks), cache, batch)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _v3(options, queries, keys, values, kv_cache, kv_lens, tables, starts, distribution, sinks):
    array("kv_cache", kv_cache)
    batch = ragged.rows(kv_lens, tables, starts, ragged.last_of(distribution))
    num_kv_heads, head_dim = keys.shape[1:]
    per_word = kv_cache.shape[3]
    shared = head_dim == 64 and kv_cache.shape[2] == -(-num_kv_heads // per_word)
    cache = ragged.words(kv_cache, num_kv_heads, head_dim, options, shared=shared)
    out, cache = _named_step(options, ragged.Tokens(queries, keys, values, sinks), cache, batch)
    return out, cache.key


@functools.partial(jax.jit, static_argnums=0)
def _unified(options, queries, key, value, kv_lens, tables, starts, alibi, qq_bias, sinks):
    array("queries", queries)
    batch = ragged.rows(kv_lens, tables, starts, kv_lens.shape[0])
    cache = PagedKVCache.of(key, value, kv_layout="tokens_first", head_dim=queries.shape[2])
    return _named_step(options, ragged.Tokens(queries, None, None, sinks), cache, batch)[0]


def _named_step(
    options: ragged.Options, tokens: ragged.Tokens, cache: PagedKVCache, batch: ragged.Rows
) -> tuple[jax.Array, PagedKVCache]:
    """The step, its errors in ejkernel's words."""
    with errors_named(**_NAMES, sinks="softmax_aux"):
        run = ragged.step if tokens.key is None else ragged.filled_step
        return run(tokens, cache, batch, options)
