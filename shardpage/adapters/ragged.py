"""What the ragged calls of other libraries share: their batches, scales and caches, as ours.

A batch is `kv_lens` (new tokens included), tables and `cu_q_lens`, the running sum of each
sequence's new tokens. The first `num_seqs` are real; what is behind them may be anything.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arguments import array, integer, number, shown
from ..attention import attend
from ..cache import PagedKVCache
from ..options import Tuning
from ..page_format import PACKED_ROW, QUANTISED, SCALE_DTYPE
from ..step import make_plan
from ..write import write_kv


class Rows(NamedTuple):
    """A batch as `make_plan` takes it."""

    context_lens: Int[Array, " num_seqs"]
    block_tables: Int[Array, "num_seqs pages"]
    query_lens: Int[Array, " num_seqs"]


class Options(NamedTuple):
    """How a batch is attended to. Hashable."""

    scale: float | None = 1.0
    soft_cap: float | None = None
    window: int | None = None
    causal: bool = True
    v_scale: float | None = None  # on the values
    out_dtype: Any = None  # None for the query's
    temperature_len: float | None = None  # see `_temperature`
    tuning: Tuning | None = None
    k_scale: float | None = None  # on the keys


class Tokens(NamedTuple):
    """Queries, new keys and values, and a sink logit for each head."""

    query: Float[Array, "max_num_tokens num_heads head_dim"]
    key: Any  # [max_num_tokens, num_kv_heads, head_dim], or None
    value: Any  # as key
    sinks: Any  # [num_heads], or None

    def filled(self, spare: int) -> "Tokens":
        """With `spare` KV heads of zeros more, and the query heads that use them."""
        if not spare:
            return self
        assert self.key is not None
        of_query = spare * (self.query.shape[1] // self.key.shape[1])
        pad = lambda x, heads: jnp.pad(x, [(0, 0), (0, heads), (0, 0)][3 - x.ndim :])
        key, value = (pad(x, spare) for x in (self.key, self.value))
        sinks = None if self.sinks is None else jnp.pad(self.sinks, (0, of_query))
        return Tokens(pad(self.query, of_query), key, value, sinks)


def rows(kv_lens: Any, tables: Any, cu_q_lens: Any, num_seqs: Any) -> Rows:
    """A batch whose tables are `[max_num_seqs, pages]`, or that flat."""
    for name, each in {"kv_lens": kv_lens, "page_indices": tables, "cu_q_lens": cu_q_lens}.items():
        array(name, each)
    if kv_lens.ndim != 1 or cu_q_lens.shape != (kv_lens.shape[0] + 1,):
        raise ValueError(
            f"kv_lens has shape {kv_lens.shape}, cu_q_lens {cu_q_lens.shape}; pass [max_num_seqs] "
            "and [max_num_seqs + 1]"
        )
    max_num_seqs = kv_lens.shape[0]
    if tables.size % max_num_seqs or (tables.ndim == 2 and tables.shape[0] != max_num_seqs):
        raise ValueError(
            f"page_indices has shape {tables.shape} for {max_num_seqs} sequences; each has a row "
            "of equal length"
        )
    real = jnp.arange(max_num_seqs, dtype=jnp.int32) < num_seqs
    query_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    lens, query_lens = (jnp.where(real, x, 0) for x in (kv_lens, query_lens))
    return Rows(lens, tables.reshape(max_num_seqs, -1), query_lens)


def last_of(distribution: Any) -> Any:
    """How many sequences are real, of `(decodes, + prefills, all)`."""
    array("distribution", distribution)
    if distribution.shape != (3,):
        raise ValueError(f"distribution has shape {distribution.shape}; pass (3,)")
    return distribution[2]


def step(
    tokens: Tokens,
    cache: PagedKVCache,
    batch: Rows,
    options: Options,
    *,
    update: bool = True,
    **split: Any,
) -> tuple[Float[Array, "max_num_tokens num_heads head_dim"], PagedKVCache]:
    """Writes the new tokens, unless there are none, and attends; the cache comes back.

    Of a quantised cache, which has `k_scale` and `v_scale` as scales, tokens are quantised already.
    """
    query = tokens.query
    num_queries, num_heads, _ = query.shape
    plan = make_plan(
        cache,
        *batch,
        num_heads=num_heads,
        num_queries=num_queries,
        window=options.window,
        causal=options.causal,
        tuning=options.tuning,
        **split,
    )
    if update and tokens.key is not None:
        cache = write_kv(cache, *_dequantised(tokens, cache), plan)
    out_dtype = jnp.dtype(options.out_dtype or query.dtype)
    scale, factor = options.scale, 1.0
    if cache.scale == "none":
        factor = options.v_scale if options.v_scale is not None else 1.0
        scale = scale if options.k_scale is None or scale is None else scale * options.k_scale
    if factor != 1 or out_dtype.itemsize > query.dtype.itemsize:  # rounded once, at the end
        query = query.astype(jnp.float32)
    if options.temperature_len is not None:
        warm = _temperature(plan.positions, options.temperature_len)
        query = query.astype(jnp.float32) * warm[:, None, None]
    how = {"scale": scale, "soft_cap": options.soft_cap, "sinks": tokens.sinks}
    out: Any = attend(query, cache, plan, **how)
    return (out if factor == 1 else out * factor).astype(out_dtype), cache


def _dequantised(tokens: Tokens, cache: PagedKVCache) -> tuple[jax.Array, jax.Array]:
    """New keys and values as numbers, which are stored as what they were."""
    key, value = tokens.key, tokens.value
    if cache.scale == "none":
        return key, value
    for name, x in {"keys": key, "values": value}.items():
        if x.dtype != cache.key.dtype:
            raise ValueError(
                f"{name} are {x.dtype} for a cache of {cache.key.dtype}; pass what it stores: "
                f"({name} / scale).astype({cache.key.dtype.name!r})"
            )
    (scales,) = cache.scales
    scaled = (x.astype(jnp.float32) * scales[None, :, i, None] for i, x in enumerate((key, value)))
    return tuple(scaled)


def _temperature(positions: Any, length: float) -> Any:
    """By how much logits of a token behind position `length` grow: log(position) / log(length)."""
    behind = jnp.log2(jnp.maximum(positions, 1).astype(jnp.float32)) / math.log2(length)
    return jnp.where(positions > math.floor(length), behind, 1.0)


def filled_step(
    tokens: Tokens, cache: PagedKVCache, batch: Rows, options: Options, *, update: bool = True
) -> tuple[Float[Array, "max_num_tokens num_heads head_dim"], PagedKVCache]:
    """`step` on a cache that may have more KV heads than the tokens, to fill words."""
    filled = tokens.filled(cache.format.num_kv_heads - tokens.key.shape[1])
    out, cache = step(filled, cache, batch, options, update=update)
    return out[:, : tokens.query.shape[1]], cache


def words(
    kv_cache: Any,
    num_kv_heads: int,
    head_dim: int,
    options: Options,
    *,
    shared: bool,
    shards: int = 1,
) -> PagedKVCache:
    """A cache `[pages, page, rows / n, n, 128]`: k0 v0 k1 v1 ..., or, `shared`, k0|v0 k1|v1 ...

    Of each of the `shards` of its heads the last may be spare, to fill words.
    """
    array("kv_cache", kv_cache)
    if kv_cache.ndim != 5:
        raise ValueError(
            f"kv_cache has shape {kv_cache.shape}; pass [pages, page_size, rows / n, n, 128]"
        )
    num_words, per_word, width = kv_cache.shape[2:]
    heads = num_kv_heads // shards
    row_dim = 2 * head_dim if shared else -(-head_dim // PACKED_ROW) * PACKED_ROW
    words_wanted = shards * -(-heads * (1 if shared else 2) // per_word)
    if (num_words, width) != (words_wanted, row_dim):
        wanted = (*kv_cache.shape[:2], words_wanted, per_word, row_dim)
        raise ValueError(
            f"kv_cache has shape {kv_cache.shape}; {num_kv_heads} KV heads of {head_dim=}, over "
            f"{shards} shards, take {wanted}"
        )
    heads = num_words * per_word // (1 if shared else 2)
    return PagedKVCache.of(
        kv_cache,
        kv_layout="interleaved_words",
        head_dim=head_dim,
        padding=0 if shared else row_dim - head_dim,
        scales=scales("kv_cache", kv_cache, heads, options),
    )


def scales(name: str, pages: Any, num_kv_heads: int, options: Options) -> Any:
    """Scales of a cache's keys and values, the same for all heads; None if it is not quantised."""
    array(name, pages)
    if pages.dtype == jnp.int8:
        raise NotImplementedError(
            f"{name} is int8, of which -128 says here that a token is NaN; keep it in float8, or a "
            "cache of ours: PagedKVCache.zeros(..., dtype='int8')"
        )
    if pages.dtype.name not in QUANTISED:
        return None
    factors = {"k_scale": options.k_scale, "v_scale": options.v_scale}
    return tuple(np.full(num_kv_heads, _positive(*each), SCALE_DTYPE) for each in factors.items())


def _positive(name: str, factor: float | None) -> float:
    meaning = "above 0, or None for 1"
    factor = 1.0 if factor is None else number(name, factor, meaning)
    if factor <= 0:
        raise ValueError(f"{name}={factor} must be {meaning}: numbers are stored over it")
    return factor


def checked_hints(**hints: Any) -> None:
    """Sizes by which their kernels are tuned: must be positive, and have no effect here."""
    for name, hint in hints.items():
        for size in hint if isinstance(hint, tuple) else (hint,):
            if size is not None:
                integer(name, size, "it tunes a kernel that is not used here")


def refused(**values: Any) -> None:
    """Refuses what there is no counterpart of: `name=(value, what to do)`."""
    for name, (value, way_out) in values.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}={shown(value)}: {way_out}")


def out_dtype_of(query: jax.Array, out_dtype: Any) -> Any:
    """The dtype of tpu-inference's and sglang-jax's results where none is named."""
    if out_dtype is not None:
        return out_dtype
    return jnp.float32 if query.dtype == jnp.float32 else jnp.bfloat16
