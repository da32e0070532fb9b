"""Named cases of paged attention, and the data for them.

A case names shapes and options; `make` fills it with data that is hard to get right by accident:
every page holds other values, physical pages are permuted, table entries that must not be looked
up are garbage, and every slot that must not be read is NaN.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
import pytest

from launch.bench.shapes import SHAPES

from . import quantised

KV_LAYOUTS = ("blocks_first", "heads_first", "fused")
TOKEN_LAYOUTS = ("tokens_first", "interleaved", "interleaved_words")
PLACEMENTS = ("contiguous", "round_robin", "random", "lopsided")

Placement = Literal["contiguous", "round_robin", "random", "lopsided"]

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: quantised.dtype_of(name) for name in quantised.DTYPES},
}
_GARBAGE = (-1, -(2**31), 2**31 - 1)


def _rng(seed: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(seed.encode()))


@dataclasses.dataclass(frozen=True)
class Case:
    """The shapes, dtypes and options of one call. Everything is hashable.

    Attributes:
      name: unique among the cases; also the seed of what is drawn at random.
      lens: "ragged" (0, 1, a page's edges, the full table, random between), "full", or the
        context lengths themselves, in tokens.
      dtype: of the caches.
      query_dtype: of the query, where it is not the caches', or, of quantised ones, float32.
      scale: what a scale of quantised caches covers: a "token" or a "head".
      sinks: whether there is a sink logit per query head.
    """

    name: str
    num_seqs: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    page_size: int = 16
    max_blocks: int = 4
    lens: Literal["ragged", "full"] | tuple[int, ...] = "ragged"
    dtype: str = "float32"
    query_dtype: str | None = None
    scale: str = "none"
    sinks: bool = False
    attn_scale: float | None = None
    max_context_len: int | None = None
    num_splits: int = 0
    attn_logits_soft_cap: float | None = None
    pages_per_compute_block: int | None = None
    sliding_window: int | None = None

    @property
    def options(self) -> dict:
        """The keyword arguments of `page_attention` that this case sets."""
        names = (
            "attn_scale",
            "max_context_len",
            "num_splits",
            "attn_logits_soft_cap",
            "pages_per_compute_block",
            "sliding_window",
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def reference_options(self) -> dict:
        """The same for the oracle, which knows nothing of splits and blocks."""
        return {
            "scale": self.attn_scale,
            "soft_cap": self.attn_logits_soft_cap,
            "sliding_window": self.sliding_window,
            "max_context_len": self.max_context_len,
        }

    @property
    def context_lens(self) -> np.ndarray:
        """[num_seqs] int32."""
        full = self.max_blocks * self.page_size
        full = min(full, self.max_context_len or full)
        if self.lens == "full":
            lens = [full] * self.num_seqs
        elif self.lens == "ragged":
            edges = [full, 0, 1, self.page_size, full - 1, self.page_size + 1]
            drawn = _rng(self.name).integers(0, full + 1, size=self.num_seqs)
            lens = [min(length, full) for length in [*edges, *drawn][: self.num_seqs]]
        else:
            assert len(self.lens) == self.num_seqs
            lens = self.lens
        return np.array(lens, np.int32)

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)


# Small enough that the oracle's loops take a moment. Each case adds one thing to the first.
CASES = (
    Case("plain"),
    Case("mha_dim8", num_heads=4, head_dim=8, page_size=8),
    Case("gqa3_dim80", num_heads=6, num_kv_heads=2, head_dim=80, page_size=8),
    Case("gqa4_dim96", num_heads=16, head_dim=96, page_size=8),
    Case("gqa8_dim128_bf16", num_heads=16, num_kv_heads=2, head_dim=128, dtype="bfloat16"),
    Case("mqa_dim256", num_heads=4, num_kv_heads=1, head_dim=256, page_size=8),
    Case("page1", page_size=1, max_blocks=37),
    Case("page64", page_size=64, max_blocks=3, num_seqs=6),
    Case("page256", page_size=256, max_blocks=2, num_seqs=6, num_heads=2, num_kv_heads=1),
    Case("bf16", dtype="bfloat16"),
    Case("f16", dtype="float16"),
    Case("f32_query_bf16_cache", dtype="bfloat16", query_dtype="float32"),
    Case("bf16_query_f32_cache", query_dtype="bfloat16"),
    Case("attn_scale", attn_scale=0.3),
    Case("soft_cap", attn_logits_soft_cap=1.5),
    Case("window", sliding_window=21),
    Case("window_inside_page", sliding_window=5),
    Case("window_past_context", sliding_window=1000),
    Case("sinks", sinks=True),
    Case("max_context_len", max_context_len=41, max_blocks=9),
    Case("no_split", num_splits=1, max_blocks=7),
    Case("three_splits", num_splits=3, max_blocks=7),
    Case("more_splits_than_pages", num_splits=16),
    Case("one_page_blocks", pages_per_compute_block=1),
    Case("three_page_blocks", pages_per_compute_block=3, max_blocks=7),
    Case("block_past_table", pages_per_compute_block=64),
    Case("all_empty", lens=(0, 0), num_seqs=2),
    Case("one_long_sequence", num_seqs=1, max_blocks=40, page_size=8, lens="full"),
    Case(
        "everything",
        num_heads=12,
        max_blocks=7,
        dtype="bfloat16",
        sinks=True,
        attn_scale=0.2,
        max_context_len=109,
        num_splits=2,
        attn_logits_soft_cap=2.0,
        pages_per_compute_block=2,
        sliding_window=50,
    ),
)

# What is measured, not checked against the oracle: the shapes of the benches.
WORKLOADS = tuple(
    Case(
        shape.name,
        num_seqs=shape.num_seqs,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        max_blocks=shape.max_blocks,
        lens=tuple(map(int, shape.context_lens)),
        dtype=shape.dtype,
    )
    for shape in SHAPES
)


def named(name: str) -> Case:
    """The case or workload of this name."""
    return {case.name: case for case in (*CASES, *WORKLOADS)}[name]


@dataclasses.dataclass
class Inputs:
    """The arrays of one call, NumPy, global."""

    query: np.ndarray
    key_cache: np.ndarray
    value_cache: np.ndarray | None
    context_lens: np.ndarray
    block_tables: np.ndarray
    sinks: np.ndarray | None
    case: Case
    kv_layout: str
    seed: int
    num_pages: int
    num_seq_shards: int
    scales: Any = None  # of quantised caches, as `page_attention` takes them
    pages: tuple[quantised.Pages, ...] = ()  # of their keys and their values

    @property
    def arrays(self) -> tuple:
        """The positional arguments of `page_attention`."""
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.context_lens,
            self.block_tables,
        )


def make(
    case: Case,
    kv_layout: str = "blocks_first",
    seed: int = 0,
    *,
    num_seq_shards: int = 1,
    num_context_shards: int = 1,
    placement: Placement = "random",
    poison: bool = True,
    packed: bool = False,
    in_order: bool = False,
) -> Inputs:
    """Draws the arrays of a case.

    Args:
      case: the shapes and options.
      kv_layout: of the caches.
      seed: other seeds give other data in the same shapes.
      num_seq_shards: sequences and their pages are split over this many shards.
      num_context_shards: so is, within each of those, the context of a sequence.
      placement: which context shard holds a sequence's n-th page: "contiguous" ranges,
        "round_robin", "random", or "lopsided" (all on the last shard).
      poison: put NaN in every slot that must not be read.
      packed: put as many tokens as fit in rows of 128 elements.
      in_order: let a sequence's pages of a shard follow each other; else they lie anywhere.

    Returns:
      The arrays, as NumPy. Page 0 of every shard is never used. What the tokens hold depends on
      case and seed alone, and so does the result: not on the layout, the shards, the placement.
    """
    lens = case.context_lens
    first_tokens = np.maximum(0, lens - case.sliding_window) if case.sliding_window else 0 * lens
    block_tables, pages_per_shard = _page_tables(
        case, first_tokens, num_seq_shards, num_context_shards, placement, seed, in_order
    )
    num_pages = pages_per_shard * num_seq_shards * num_context_shards

    rng = _rng(f"{case.name}/{seed}")
    query = rng.standard_normal((case.num_seqs, case.num_heads, case.head_dim), np.float32)
    sinks = rng.standard_normal(case.num_heads, np.float32) if case.sinks else None
    token = (case.num_kv_heads, case.head_dim)
    caches = np.full((2, num_pages, case.page_size, *token), np.nan, np.float32)
    for table, first, stop in zip(block_tables, first_tokens, lens, strict=True):
        for position in range(first, stop):
            page, slot = table[position // case.page_size], position % case.page_size
            caches[:, page, slot] = rng.standard_normal((2, *token), np.float32)
    if not poison:
        caches = np.where(np.isnan(caches), rng.standard_normal(caches.shape, np.float32), caches)

    query_dtype, scales, pages = case.query_dtype or case.dtype, None, ()
    if case.scale == "none":
        stored = caches.astype(_DTYPES[case.dtype])
    else:
        kept = ~np.isnan(caches).any(axis=(0, 3, 4))
        stored, scales, pages = quantise(np.nan_to_num(caches), case, kept, packed)
        query_dtype = case.query_dtype or "float32"
    key_cache, value_cache = lay_out(*stored, kv_layout)
    if packed:
        key_cache, value_cache = map(packed_rows, (key_cache, value_cache))
    return Inputs(
        query=query.astype(_DTYPES[query_dtype]),
        key_cache=key_cache,
        value_cache=value_cache,
        context_lens=lens,
        block_tables=block_tables,
        sinks=sinks,
        case=case,
        kv_layout=kv_layout,
        seed=seed,
        num_pages=num_pages,
        num_seq_shards=num_seq_shards,
        scales=scales,
        pages=pages,
    )


def quantise(caches, case, kept: np.ndarray, packed: bool, head_scales=None):
    """Keys and values `[pages, page, kv_heads, dim]` as a case, or step, stores them: the arrays,
    their scales, and what they stand for. What is not kept `[pages, page]` is poison."""
    if case.scale == "head" and head_scales is None:
        head_scales = [quantised.calibrated(tokens[kept], case.dtype) for tokens in caches]
    pages = tuple(
        quantised.pages_of(tokens, case.dtype, scales, kept)
        for tokens, scales in zip(caches, head_scales or (None, None), strict=True)
    )
    scales = tuple(x.scales for x in pages)
    if case.scale == "token":
        scales = quantised.lay_out_scales(*scales, 128 // case.head_dim if packed else 1)
    return [x.stored for x in pages], scales, pages


def packed_rows(cache: np.ndarray | None) -> np.ndarray | None:
    """A cache, or none, with as many tokens in a row as fill 128 elements."""
    return None if cache is None else cache.reshape(*cache.shape[:-2], -1, 128)


def lay_out(keys: np.ndarray, values: np.ndarray, kv_layout: str):
    """Caches in a layout, from [num_pages, page_size, num_kv_heads, head_dim] keys and values."""
    if kv_layout in TOKEN_LAYOUTS:
        return _lay_out_tokens(keys, values, kv_layout)
    order = {"blocks_first": (0, 2, 1, 3), "heads_first": (2, 0, 1, 3), "fused": (0, 2, 1, 3)}
    keys, values = (np.ascontiguousarray(a.transpose(order[kv_layout])) for a in (keys, values))
    return (np.stack([keys, values], axis=1), None) if kv_layout == "fused" else (keys, values)


def _lay_out_tokens(keys: np.ndarray, values: np.ndarray, kv_layout: str):
    """Token-major caches; of words, padded to rows of 128 with NaN, or shared by key and value."""
    if kv_layout == "tokens_first":
        return keys, values
    num_pages, page_size, num_kv_heads, head_dim = keys.shape
    if kv_layout == "interleaved":
        pairs = [x[:, :, head] for head in range(num_kv_heads) for x in (keys, values)]
        return np.stack(pairs, axis=2), None
    if head_dim == 64:
        rows = np.concatenate([keys, values], axis=-1)
    else:
        pad = [(0, 0)] * 3 + [(0, padding_of(head_dim))]
        nothing = np.array(-128 if keys.dtype == np.int8 else np.nan, keys.dtype)
        padded = [np.pad(x, pad, constant_values=nothing) for x in (keys, values)]
        rows, _ = _lay_out_tokens(*padded, "interleaved")
    per_word = 4 // keys.dtype.itemsize
    return rows.reshape(num_pages, page_size, -1, per_word, rows.shape[-1]), None


def padding_of(head_dim: int) -> int:
    """Of keys and values in words."""
    return 0 if head_dim == 64 else -head_dim % 128


def cache_options(kv_layout: str, head_dim: int) -> dict:
    """The keyword arguments of `PagedKVCache.of` for arrays of `lay_out`."""
    padding = padding_of(head_dim) if kv_layout == "interleaved_words" else 0
    return {"kv_layout": kv_layout, "head_dim": head_dim, "padding": padding}


def cache_shape(case: Case, num_pages: int, kv_layout: str) -> tuple[int, ...]:
    """The shape of (each of) the cache array(s)."""
    token, per_word = (case.page_size, case.head_dim), 4 // _DTYPES[case.dtype].itemsize
    return {
        "blocks_first": (num_pages, case.num_kv_heads, *token),
        "heads_first": (case.num_kv_heads, num_pages, *token),
        "fused": (num_pages, 2, case.num_kv_heads, *token),
        "tokens_first": (num_pages, case.page_size, case.num_kv_heads, case.head_dim),
        "interleaved": (num_pages, case.page_size, 2 * case.num_kv_heads, case.head_dim),
        "interleaved_words": (
            num_pages,
            case.page_size,
            2 * case.num_kv_heads // per_word,
            per_word,
            case.head_dim + padding_of(case.head_dim),
        ),
    }[kv_layout]


def build_mesh(spec: str, axis_type: str = "Auto") -> jax.sharding.Mesh:
    """A mesh over the first devices, e.g. `build_mesh("data=2,kv=4", "Explicit")`."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in spec.split(","))}
    num_devices = math.prod(sizes.values())
    if num_devices > jax.device_count():
        pytest.skip(f"{spec} needs {num_devices} devices, here are {jax.device_count()}")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(getattr(jax.sharding.AxisType, axis_type),) * len(sizes),
        devices=jax.devices()[:num_devices],
    )


def _page_tables(
    case: Case,
    first_tokens: np.ndarray,
    num_seq_shards: int,
    num_context_shards: int,
    placement: Placement,
    seed: int,
    in_order: bool,
) -> tuple[np.ndarray, int]:
    """Block tables [num_seqs, max_blocks], and how many pages a page shard has."""
    rng = _rng(f"tables of {case.name}/{seed}")
    assert case.num_seqs % num_seq_shards == 0
    shard_of_block = np.full((case.num_seqs, case.max_blocks), -1)
    for seq, length in enumerate(case.context_lens):
        needed = slice(first_tokens[seq] // case.page_size, -(-length // case.page_size))
        seq_shard = seq // (case.num_seqs // num_seq_shards)
        shard_of_block[seq, needed] = (
            seq_shard * num_context_shards
            + _context_shards(placement, case.max_blocks, num_context_shards, rng)[needed]
        )

    # Page 0 of each shard stays unused, and one more at least.
    shards = range(num_seq_shards * num_context_shards)
    pages_per_shard = 2 + max(int(np.sum(shard_of_block == shard)) for shard in shards)
    free = [shard * pages_per_shard + 1 + rng.permutation(pages_per_shard - 1) for shard in shards]
    free = [sorted(pages, reverse=True) if in_order else list(pages) for pages in free]
    num_pages = pages_per_shard * len(shards)
    garbage = np.array([*_GARBAGE, num_pages, *rng.integers(0, num_pages, size=4)], np.int64)
    block_tables = rng.choice(garbage, size=shard_of_block.shape).astype(np.int32)
    for seq, block in np.argwhere(shard_of_block >= 0):
        block_tables[seq, block] = free[shard_of_block[seq, block]].pop()
    return block_tables, pages_per_shard


def _context_shards(
    placement: Placement, max_blocks: int, num_shards: int, rng: np.random.Generator
) -> np.ndarray:
    """The context shard of each of a sequence's blocks."""
    blocks = np.arange(max_blocks)
    match placement:
        case "contiguous":
            return blocks // -(-max_blocks // num_shards)
        case "round_robin":
            return blocks % num_shards
        case "random":
            return rng.integers(0, num_shards, size=max_blocks)
        case "lopsided":
            return np.full(max_blocks, num_shards - 1)


def names(cases: Sequence[Case]) -> list[str]:
    """Test ids."""
    return [case.name for case in cases]
