"""ejkernel's `page_attention`, whose calls run here unchanged; our public function, too."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from .. import array_checks, sharded
from ..arguments import instance, shown
from ..attention import attend_once
from ..cache import PagedKVCache
from ..options import Attention, BackendName, CoresMode, Mask, Tuning
from ..page_format import KVLayout, KVLayoutName
from ..shard_layout import ShardLayout, Split
from . import errors_named
from .ejkernel_ragged import backend_of
from .ejkernel_ragged import ragged_page_attention_v2 as ragged_page_attention_v2
from .ejkernel_ragged import ragged_page_attention_v3 as ragged_page_attention_v3
from .ejkernel_ragged import unified_attention as unified_attention

DEFAULT_MASK_VALUE = -2.381976426469702e38
# What stands in for -inf must not be a logit that could be real.
_MASK_VALUE_LIMIT = -1e30
_FLOAT32_MIN = float(np.finfo(np.float32).min)


def page_attention(
    query: Float[Array, "num_seqs num_heads head_dim"],
    key_cache: Float[Array, "..."],
    value_cache: Float[Array, "..."] | None,
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    attn_scale: float | None = None,
    max_context_len: int | None = None,
    num_splits: int = 0,
    *,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: CoresMode | None = None,
    inline_seq_dim: bool = True,
    sliding_window: int | None = None,
    kv_layout: KVLayoutName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    backend: BackendName | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    return_lse: bool = False,
    interpret: bool | None = None,
    scales: Any = None,
    platform: str | None = None,
    cfg: Any = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> (
    Float[Array, "num_seqs num_heads head_dim"]
    | tuple[Float[Array, "num_seqs num_heads head_dim"], Float[Array, "num_seqs num_heads"]]
):
    """Attends with one query token per sequence over keys and values kept in pages.

    Query head `h` uses KV head `h // (num_heads // num_kv_heads)`. Softmax and accumulation are
    in float32; matmul operands have the cache's dtype, bfloat16 if it is quantised.

    Args:
      query: `[num_seqs, num_heads, head_dim]`, any float dtype of 16 bits or more.
      key_cache: pages of keys in one of the layouts of `kv_layout`; float32, bfloat16 or float16,
        or with `scales` int8, float8_e4m3fn or float8_e5m2.
      value_cache: pages of values, as key_cache; None with a fused cache.
      context_lens: `[num_seqs]` int32, tokens of each sequence in the cache. 0 gives zeros, and
        -inf in lse.
      block_tables: `[num_seqs, max_blocks]` int32, page ids, *global* on a mesh. Entries at or
        past `ceil(context_len / page_size)` are never looked up.
      attn_scale: factor on the logits; None for `head_dim ** -0.5`.
      max_context_len: bound on context_lens, in tokens: what lies past it in the table is not
        looked up, and a longer context is invalid. None for the table's width.
      num_splits: the most parts that a sequence is split into and worked on in parallel. 0: chosen
        automatically; 1: never split. The result is the same up to rounding.
      mask_value: ejkernel's stand-in for -inf; must be finite and at most -1e30. Has no effect.
      attn_logits_soft_cap: `cap * tanh(logits / cap)` on scaled logits, before masking.
      pages_per_compute_block: pages of one step of the streaming loop; None chooses.
      megacore_mode: how `pallas_tpu` uses the two cores of a v4 or v5p chip: "kv_head" or
        "batch" splits the work by that; None and "auto" choose one of them; "off" uses one core.
        `xla` has no kernel to split: "kv_head" and "batch" are refused there.
      inline_seq_dim: True walks over all sequences in one kernel. False, a grid step per sequence,
        is refused by `pallas_tpu`, which could not fetch ahead then; `xla` has one walk for both.
      sliding_window: attend to positions `>= context_len - sliding_window` only; pages before
        that are not fetched and may have been freed.
      kv_layout: "blocks_first" `[pages, kv_heads, page, dim]`, "heads_first"
        `[kv_heads, pages, page, dim]`, or "fused" `[pages, 2, kv_heads, page, dim]` (keys, then
        values). None takes the only one of these that the shapes allow. The last two axes of each
        may be packed, `page * dim / 128, 128`, where head_dim divides 128. Token-major caches of
        other libraries are named: "tokens_first", "interleaved", "interleaved_words"; the last two
        with value_cache=None.
      mesh: splits the call over the devices of this mesh. None attends on one device, without
        collectives, also inside a `shard_map` of your own.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      backend: "xla", "pallas_tpu" or "pallas_gpu"; None for the one made for the mesh's devices.
      sinks: `[num_heads]`, a logit per query head that joins the softmax denominator once.
      return_lse: also return the natural log of the softmax denominator (sinks included).
      interpret: run a Pallas kernel in interpret mode; None where there is no TPU.
      scales: of a quantised cache, `cache.scales`, or as `PagedKVCache.of` takes them.
      platform: ejkernel's name of a backend: "xla", "pallas" (TPU) or None.
      cfg, num_warps, num_stages: what else ejkernel's registry passes on to tune its kernels; has
        no effect.

    Returns:
      `[num_seqs, num_heads, head_dim]` in the query's dtype; with `return_lse`, a pair of that
      and lse, `[num_seqs, num_heads]` float32, which `merge_partials` and `merge_across` take.
      A sequence whose context is longer than its table, or whose table holds a bad page id where
      it is looked up, gets NaN in both; `validate_tables` says on the host which and why. So does
      a head that reads a key, value or query that is not finite.

    Raises:
      ValueError: if arguments contradict each other or the mesh; the message says what would work.
      NotImplementedError: if the backend does not have an option; the message says which does.
    """
    del cfg, num_warps, num_stages
    _check_ends_here(mask_value)
    if platform is not None and backend is not None:
        raise ValueError(f"{platform=} and {backend=} both name a backend; leave one out")
    for name, value in {"inline_seq_dim": inline_seq_dim, "return_lse": return_lse}.items():
        instance(name, value, bool, "True or False")
    array_checks.rank("query", query, "[num_seqs, num_heads, head_dim]")
    array_checks.cache_arrays(key_cache, value_cache)
    kv = _layout(kv_layout, query.shape[1], key_cache, value_cache)
    options: dict[str, Any] = {"kv_layout": kv.label, "head_dim": query.shape[-1]}
    cache = PagedKVCache.of(key_cache, value_cache, **options, scales=scales)
    with errors_named(
        scale="attn_scale",
        soft_cap="attn_logits_soft_cap",
        window="sliding_window",
        pages_per_block="pages_per_compute_block",
        cores="megacore_mode",
    ):
        attention = Attention(attn_scale, attn_logits_soft_cap)
        mask = Mask(sliding_window, max_context_len=max_context_len)
        split = Split.of(mesh, layout)
        tuning = Tuning(
            backend=backend_of(platform) if backend is None else backend,
            num_splits=num_splits,
            pages_per_block=pages_per_compute_block,
            cores=megacore_mode,
            interpret=interpret,
        )
        tuning = sharded.resolve(tuning, split, cache)
        if not inline_seq_dim and tuning.backend == "pallas_tpu":
            raise NotImplementedError(
                "inline_seq_dim=False makes each sequence a grid step of its own, where nothing "
                "can be fetched ahead across sequences; pallas_tpu walks over all of them in one "
                "loop: use inline_seq_dim=True"
            )
        where = (query, cache, context_lens, block_tables, sinks)
        out, lse = attend_once(*where, mask, attention, tuning, split)
    return (out, lse) if return_lse else out


def _check_ends_here(mask_value: Any) -> None:
    """Checks the options that no result and no backend depends on."""
    real = isinstance(mask_value, int | float)
    if not real or not _FLOAT32_MIN <= mask_value <= _MASK_VALUE_LIMIT:
        raise ValueError(
            f"mask_value={shown(mask_value)} stands in for -inf: it must lie in float32's range "
            f"and be at most {_MASK_VALUE_LIMIT}, or it could outweigh a real logit; leave it at "
            "its default"
        )


def _layout(name: str | None, num_heads: int, key_cache: Any, value_cache: Any) -> KVLayout:
    """The cache's layout: as named, or the only legal one; never a guess.

    A layout is legal if the axis that it takes for KV heads divides the query heads.
    """
    if name is not None and KVLayout.named(name).token_major:
        return KVLayout.named(name)
    if value_cache is None or name == "fused":
        return _fused_layout(name, key_cache, value_cache)
    if key_cache.ndim != 4:
        raise ValueError(
            f"key_cache has shape {key_cache.shape}; separate key and value caches are "
            "4-dimensional (a fused one of 5 dimensions is passed with value_cache=None)"
        )
    if name is not None:
        return KVLayout.named(name)
    candidates = (KVLayout.BLOCKS_FIRST, KVLayout.HEADS_FIRST)
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            "kv_layout=None cannot be deduced inside a shard_map, where shapes are one shard's; "
            f"pass kv_layout= one of {[kv.label for kv in candidates]}"
        )
    num_kv_heads = {kv: key_cache.shape[kv.value.heads] for kv in candidates}
    legal = [kv for kv in candidates if num_heads % max(num_kv_heads[kv], 1) == 0]
    if len(legal) == 1:
        return legal[0]
    if legal:
        raise ValueError(
            f"a key_cache of shape {key_cache.shape} with {num_heads} query heads is legal both as "
            f"blocks_first {KVLayout.BLOCKS_FIRST.value.dims} and as heads_first "
            f"{KVLayout.HEADS_FIRST.value.dims}; say which with kv_layout="
        )
    raise ValueError(
        f"{num_heads} query heads are a multiple of neither {key_cache.shape[1]} KV heads "
        f"(blocks_first) nor {key_cache.shape[0]} (heads_first) of a key_cache of shape "
        f"{key_cache.shape}"
    )


def _fused_layout(name: str | None, key_cache: Any, value_cache: Any) -> KVLayout:
    dims = KVLayout.FUSED.value.dims
    if value_cache is not None:
        raise ValueError(
            f"kv_layout='fused' keeps keys and values in one array {dims}: pass it as key_cache "
            "with value_cache=None"
        )
    if name not in (None, "fused"):
        raise ValueError(f"kv_layout={name!r} needs a value_cache; only 'fused' goes without")
    if key_cache.ndim != 5 or key_cache.shape[1] != 2:
        raise ValueError(
            f"with value_cache=None, key_cache is a fused cache {dims}; got shape {key_cache.shape}"
        )
    return KVLayout.FUSED
