"""Every error about arguments, and nothing else: values, the rule, and the way out."""

import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from . import backends
from .kv_layout import PACKED_ROW, CacheSizes, KVLayout
from .layout import ShardCounts, ShardLayout, axis_names
from .spec import MegacoreMode

KVLayoutName = typing.Literal["blocks_first", "heads_first", "fused"]

_CACHE_DTYPES = ("float32", "bfloat16", "float16")
# A logit below this would be a float32 overflow in the making; see `mask_value`.
_MASK_VALUE_LIMIT = -1e30
_FLOAT32_MIN = float(np.finfo(np.float32).min)
# What float32 holds without being flushed to 0, with room for a factor log2(e).
_FLOAT32_RANGE = (2.0**-126, 2.0**127)
_INT32_MAX = 2**31 - 1


def attention_arrays(
    query: Any, key_cache: Any, value_cache: Any, context_lens: Any, block_tables: Any, sinks: Any
) -> None:
    """Checks ranks and dtypes, and that sequences and heads agree. See `page_attention`."""
    rank("query", query, "[num_seqs, num_heads, head_dim]", 3)
    rank("context_lens", context_lens, "[num_seqs]", 1)
    rank("block_tables", block_tables, "[num_seqs, max_blocks]", 2)
    _floating("query", query)
    for name, array in (("context_lens", context_lens), ("block_tables", block_tables)):
        _integer(name, array)
        if array.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} has {array.shape[0]} rows, query {query.shape[0]} sequences; "
                "pass one row a sequence"
            )
    if block_tables.shape[1] == 0:
        raise ValueError("block_tables has 0 columns; it needs at least one, -1 if nothing is used")
    if sinks is not None:
        if sinks.shape != query.shape[1:2]:
            raise ValueError(
                f"sinks has shape {sinks.shape}; pass one logit a query head: ({query.shape[1]},)"
            )
        _floating("sinks", sinks)
    cache_arrays(key_cache, value_cache)


def cache_arrays(key_cache: Any, value_cache: Any) -> None:
    """Checks that the cache arrays have a supported dtype and belong together."""
    if str(key_cache.dtype) not in _CACHE_DTYPES:
        raise ValueError(
            f"key_cache has dtype {key_cache.dtype}; supported are {', '.join(_CACHE_DTYPES)}"
        )
    if value_cache is None:
        return
    if (value_cache.shape, value_cache.dtype) != (key_cache.shape, key_cache.dtype):
        raise ValueError(
            f"key_cache is {key_cache.dtype}{list(key_cache.shape)} but value_cache "
            f"{value_cache.dtype}{list(value_cache.shape)}; they must be equal in shape and dtype"
        )


def kv_layout(name: str | None, query: Any, key_cache: Any, value_cache: Any) -> KVLayout:
    """The cache's layout: as named, or the only legal one; never a guess.

    A layout is legal if the axis that it takes for KV heads divides the query heads.
    """
    if value_cache is None or name == "fused":
        return _fused_layout(name, key_cache, value_cache)
    if key_cache.ndim != 4:
        raise ValueError(
            f"key_cache has shape {key_cache.shape}; separate key and value caches are "
            "4-dimensional (a fused one of 5 dimensions is passed with value_cache=None)"
        )
    if name is not None:
        return named_kv_layout(name)
    candidates = {layout.name.lower(): layout for layout in KVLayout if not layout.fused}
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            "kv_layout=None cannot be deduced inside a shard_map, where shapes are one shard's; "
            f"pass kv_layout= one of {list(candidates)}"
        )
    num_heads = query.shape[1]
    legal = [
        label
        for label, layout in candidates.items()
        if num_heads % max(layout.sizes(key_cache.shape).num_kv_heads, 1) == 0
    ]
    if len(legal) == 1:
        return candidates[legal[0]]
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


def named_kv_layout(name: str) -> KVLayout:
    """The layout of this name."""
    if name not in typing.get_args(KVLayoutName):
        raise ValueError(
            f"kv_layout={name!r} is unknown; choose one of {typing.get_args(KVLayoutName)}"
        )
    return KVLayout[name.upper()]


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


def cache_row(key_cache: Any, head_dim: int) -> None:
    """Checks that a row of the cache holds one token's head, or is packed with several."""
    row = key_cache.shape[-1]
    if row != head_dim and (row != PACKED_ROW or head_dim < 1 or PACKED_ROW % head_dim):
        raise ValueError(
            f"the cache has rows of {row} numbers for {head_dim=}; they must be equal, or the "
            f"cache packed in rows of {PACKED_ROW}, which head_dim must divide"
        )


def head_sizes(query: Any, sizes: CacheSizes) -> None:
    """Checks that query heads fit the cache."""
    num_heads = query.shape[1]
    if min(sizes) < 1 or min(query.shape) < 1:
        raise ValueError(f"no axis may be empty; got query {query.shape} and cache {sizes}")
    if num_heads % sizes.num_kv_heads:
        raise ValueError(
            f"{num_heads=} must be a multiple of num_kv_heads={sizes.num_kv_heads}: each KV head "
            "serves the same number of query heads"
        )


def table_width(block_tables: Any, sizes: CacheSizes) -> None:
    """Checks that every position of a table is an int32."""
    tokens = block_tables.shape[1] * sizes.page_size
    if tokens > _INT32_MAX:
        raise ValueError(
            f"block_tables of {block_tables.shape[1]} columns hold {tokens} tokens of "
            f"page_size={sizes.page_size}; positions are int32: at most {_INT32_MAX} tokens"
        )


def options(
    *,
    attn_scale: Any,
    max_context_len: Any,
    num_splits: Any,
    mask_value: Any,
    attn_logits_soft_cap: Any,
    pages_per_compute_block: Any,
    megacore_mode: Any,
    inline_seq_dim: Any,
    sliding_window: Any,
    backend: Any,
    interpret: Any,
) -> None:
    """Checks the static options of `page_attention`, each by itself."""
    _positive_int("max_context_len", max_context_len, "tokens, or None for the table's width")
    _positive_int("pages_per_compute_block", pages_per_compute_block, "pages, or None to choose")
    _positive_int("sliding_window", sliding_window, "tokens, or None for all")
    if not _is_int(num_splits) or num_splits < 0:
        raise ValueError(
            f"{num_splits=} must be an integer >= 0: 0 chooses, 1 never splits a sequence, "
            "n splits each into at most n parts"
        )
    _within_int32("num_splits", num_splits)
    _finite("attn_scale", attn_scale, "or None for head_dim ** -0.5")
    _finite("attn_logits_soft_cap", attn_logits_soft_cap, "above 0, or None for no cap")
    if attn_logits_soft_cap is not None and attn_logits_soft_cap <= 0:
        raise ValueError(f"{attn_logits_soft_cap=} must be above 0, or None for no cap")
    if mask_value is None or not _FLOAT32_MIN <= mask_value <= _MASK_VALUE_LIMIT:
        raise ValueError(
            f"{mask_value=} stands in for -inf: it must lie in float32's range and be at most "
            f"{_MASK_VALUE_LIMIT}, or it could outweigh a real logit; leave it at its default"
        )
    megacore_modes = (None, *typing.get_args(MegacoreMode))
    if megacore_mode not in megacore_modes:
        raise ValueError(f"{megacore_mode=} must be one of {megacore_modes}")
    if not isinstance(inline_seq_dim, bool):
        raise ValueError(f"{inline_seq_dim=} must be True or False")
    if interpret not in (None, True, False):
        raise ValueError(f"{interpret=} must be True, False or None (only where there is no TPU)")
    backend_name(backend)


def backend_name(backend: Any) -> None:
    """Checks that there is such a backend."""
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"{backend=} is none of {backends.NAMES}; None follows the mesh")


def mesh_layout(mesh: Mesh | AbstractMesh, layout: ShardLayout) -> None:
    """Checks that the layout's axes are the mesh's, each used once."""
    used = [
        name for axis in (layout.seqs, layout.heads, layout.context) for name in axis_names(axis)
    ]
    for name in used:
        if name not in mesh.axis_names:
            raise ValueError(f"{layout} names {name!r}; the mesh has the axes {mesh.axis_names}")
        if used.count(name) > 1:
            raise ValueError(f"{layout} uses mesh axis {name!r} twice; an axis splits one thing")


def divisibility(
    shards: ShardCounts, layout: ShardLayout, sizes: CacheSizes, num_seqs: int | None = None
) -> None:
    """Checks that every split comes out even."""
    if num_seqs is not None and num_seqs % shards.seqs:
        padded = -(-num_seqs // shards.seqs) * shards.seqs
        raise ValueError(
            f"{num_seqs=} must be divisible by the {shards.seqs} shards of mesh axis "
            f"{layout.seqs!r}; pad to {padded} with sequences of context_len 0"
        )
    if sizes.num_pages % shards.pages:
        padded = -(-sizes.num_pages // shards.pages) * shards.pages
        raise ValueError(
            f"num_pages={sizes.num_pages} must be divisible by the {shards.pages} page shards of "
            f"mesh axes {layout.pages!r}; make the cache of {padded} pages"
        )
    if sizes.num_kv_heads % shards.heads:
        works = [
            n
            for n in range(1, shards.heads + 1)
            if shards.heads % n == 0 and sizes.num_kv_heads % n == 0
        ]
        factorings = ", ".join(f"{n} x {shards.heads // n}" for n in reversed(works))
        raise ValueError(
            f"num_kv_heads={sizes.num_kv_heads} must be divisible by the {shards.heads} shards of "
            f"mesh axis {layout.heads!r}. These heads x context factorings of the axis work: "
            f"{factorings}. Moving the surplus to context={layout.context or 'context'!r} costs no "
            "KV copies: each device keeps other pages of the same heads"
        )


def write_arrays(
    key_cache: Any,
    value_cache: Any,
    kv: KVLayout,
    head_dim: int,
    key: Any,
    value: Any,
    seq_ids: Any,
    positions: Any,
    block_tables: Any,
) -> None:
    """Checks the arrays of `write_kv` against each other."""
    if kv.fused != (value_cache is None):
        raise ValueError("a fused cache has value=None, any other both key and value")
    cache_arrays(key_cache, value_cache)
    sizes = kv.sizes(key_cache.shape, head_dim)
    rank("key", key, "[num_tokens, num_kv_heads, head_dim]", 3)
    wanted = (key.shape[0], sizes.num_kv_heads, sizes.head_dim)
    for name, array in (("key", key), ("value", value)):
        if array.shape != wanted:
            raise ValueError(
                f"{name} has shape {array.shape}; a cache of {sizes} takes {wanted}: "
                "[num_tokens, num_kv_heads, head_dim]"
            )
        _floating(name, array)
    for name, array in (("seq_ids", seq_ids), ("positions", positions)):
        rank(name, array, "[num_tokens]", 1)
        _integer(name, array)
        if array.shape != key.shape[:1]:
            raise ValueError(f"{name} has {array.shape[0]} entries for {key.shape[0]} tokens")
    rank("block_tables", block_tables, "[num_seqs, max_blocks]", 2)
    _integer("block_tables", block_tables)
    table_width(block_tables, sizes)


def divisible_tokens(shards: ShardCounts, layout: ShardLayout, num_tokens: int) -> None:
    """Checks that the tokens of a write split evenly."""
    if num_tokens % shards.seqs:
        padded = -(-num_tokens // shards.seqs) * shards.seqs
        raise ValueError(
            f"{num_tokens=} must be divisible by the {shards.seqs} shards of mesh axis "
            f"{layout.seqs!r}; pad to {padded} with seq_ids of -1"
        )


def rank(name: str, array: Any, dims: str, rank: int) -> None:
    if getattr(array, "ndim", None) != rank:
        raise ValueError(f"{name} must be {dims}; got {getattr(array, 'shape', type(array))}")


def _floating(name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point; got {array.dtype}")
    if array.dtype.itemsize < 2:
        raise ValueError(
            f"{name} has dtype {array.dtype}, which keeps too few digits for an exact result; "
            "cast it to bfloat16 or float32 first"
        )


def _integer(name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, int32 best; got {array.dtype}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _positive_int(name: str, value: Any, meaning: str) -> None:
    if value is not None and (not _is_int(value) or value < 1):
        raise ValueError(f"{name}={value!r} must be a positive integer: {meaning}")
    _within_int32(name, value)


def _within_int32(name: str, value: Any) -> None:
    if value is not None and value > _INT32_MAX:
        raise ValueError(
            f"{name}={value!r} must be at most {_INT32_MAX}: lengths and positions are int32"
        )


def _finite(name: str, value: Any, meaning: str) -> None:
    if isinstance(value, Tracer):
        raise ValueError(f"{name} is traced; it is a static option: pass a Python number")
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number {meaning}")
    low, high = _FLOAT32_RANGE
    if value and not low <= abs(value) <= high:
        raise ValueError(
            f"{name}={value!r} must be 0 or between 2**-126 and 2**127 in size: logits are float32"
        )
