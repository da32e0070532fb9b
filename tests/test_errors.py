"""Every error about arguments, by its message: the value, the rule, the way out.

All are raised before anything is compiled. Those about meshes are in test_sharding.py, those about
wrong types in test_wrong_types.py.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardpage
from shardpage.backends import default_for

from .cases import build_mesh, cache_shape, named

PLAIN = named("plain")  # 8 sequences, 8 / 4 heads of 64, tables of 4 pages of 16
NUM_PAGES = 32


def call(kv_layout="blocks_first", **changes):
    """A call that is right but for the changes."""
    cache = jnp.zeros(cache_shape(PLAIN, NUM_PAGES, "blocks_first"))
    arguments = {
        "query": jnp.zeros((8, 8, 64)),
        "key_cache": cache,
        "value_cache": cache,
        "context_lens": jnp.zeros(8, jnp.int32),
        "block_tables": jnp.zeros((8, 4), jnp.int32),
        **changes,
    }
    return shardpage.page_attention(**arguments, kv_layout=kv_layout)


def zeros(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": zeros(8, 64)},
            r"query must be \[num_seqs, num_heads, head_dim\]; got \(8, 64\)",
        ),
        ({"query": zeros(8, 8, 64, dtype=jnp.int32)}, "query must be floating point; got int32"),
        (
            {"context_lens": zeros(8, 1, dtype=jnp.int32)},
            r"context_lens must be \[num_seqs\]; got \(8, 1\)",
        ),
        ({"context_lens": zeros(8)}, "context_lens must hold integers, int32 best; got float32"),
        (
            {"context_lens": zeros(6, dtype=jnp.int32)},
            "context_lens has 6 rows, query 8 sequences; pass one row per sequence",
        ),
        (
            {"block_tables": zeros(8, dtype=jnp.int32)},
            r"block_tables must be \[num_seqs, max_blocks\]; got \(8,\)",
        ),
        ({"block_tables": zeros(8, 4)}, "block_tables must hold integers, int32 best; got float32"),
        ({"block_tables": zeros(9, 4, dtype=jnp.int32)}, "block_tables has 9 rows, query 8"),
        ({"block_tables": zeros(8, 0, dtype=jnp.int32)}, "block_tables has 0 columns; it needs at"),
        ({"sinks": zeros(4)}, r"sinks has shape \(4,\); pass one logit per query head: \(8,\)"),
        (
            {"key_cache": zeros(32, 4, 16, 64, dtype=jnp.int16)},
            r"key_cache.dtype=int16 is no cache's; choose one of \('float32', 'bfloat16', 'flo",
        ),
        (
            {"value_cache": zeros(31, 4, 16, 64)},
            r"key_cache is float32\[32, 4, 16, 64\] but value_cache float32\[31, 4, 16, 64\]; they",
        ),
        (
            {"value_cache": zeros(32, 4, 16, 64, dtype=jnp.bfloat16)},
            r"but value_cache bfloat16\[32, 4, 16, 64\]; they must be equal in shape and dtype",
        ),
        (
            {"query": zeros(8, 8, 80)},
            "rows of 64 elements for head_dim=80; they must be equal, or",
        ),
        (
            {"query": zeros(8, 6, 64)},
            "num_heads=6 must be a multiple of num_kv_heads=4: each KV head serves the same number",
        ),
        ({"query": zeros(8, 0, 64)}, r"no axis may be empty; got query \(8, 0, 64\)"),
        (
            {"query": zeros(8, 8, 64, dtype=jnp.float8_e4m3fn)},
            "query has dtype float8_e4m3fn, which keeps too few digits .* cast it to bfloat16",
        ),
        *(
            ({"sinks": zeros(8, dtype=dtype)}, f"sinks must be floating point; got {dtype}")
            for dtype in ("bool", "int32", "complex64")
        ),
        (
            {"block_tables": jax.ShapeDtypeStruct((8, 2**27), jnp.int32)},
            "134217728 columns hold 2147483648 tokens .* at most 2147483647 tokens",
        ),
    ],
)
def test_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("kv_layout", "changes", "message"),
    [
        ("pages_first", {}, r"kv_layout='pages_first' is unknown; choose one of \('blocks_first'"),
        ("fused", {}, "keeps keys and values in one array .* with value_cache=None"),
        ("heads_first", {"value_cache": None}, "'heads_first' needs a value_cache; only 'fused'"),
        (
            None,
            {"value_cache": None},
            r"key_cache is a fused cache \[pages, 2, .*; got shape \(32, 4, 16, 64\)",
        ),
        (
            "fused",
            {"value_cache": None, "key_cache": zeros(32, 3, 4, 16, 64)},
            r"key_cache is a fused cache .*; got shape \(32, 3, 4, 16, 64\)",
        ),
        (
            "blocks_first",
            {name: zeros(32, 2, 4, 16, 64) for name in ("key_cache", "value_cache")},
            r"separate key and value caches are 4-dimensional \(a fused one of 5 dimensions",
        ),
        (
            None,
            {name: zeros(8, 4, 16, 64) for name in ("key_cache", "value_cache")},
            r"\(8, 4, 16, 64\) with 8 query heads is legal both as blocks_first .* as heads_first "
            r".*; say which with kv_layout=",
        ),
        (
            None,
            {name: zeros(32, 3, 16, 64) for name in ("key_cache", "value_cache")},
            r"8 query heads are a multiple of neither 3 KV heads \(blocks_first\) nor 32 \(heads_f",
        ),
    ],
)
def test_kv_layout(kv_layout, changes, message):
    with pytest.raises(ValueError, match=message):
        call(kv_layout=kv_layout, **changes)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("attn_scale", float("nan"), "attn_scale=nan must be a finite number or None for head_dim"),
        ("attn_scale", float("inf"), "attn_scale=inf must be a finite number"),
        ("max_context_len", 0, "max_context_len=0 must be a positive integer: tokens, or None for"),
        ("max_context_len", 1.5, "max_context_len=1.5 must be a positive integer"),
        ("num_splits", -1, "num_splits=-1 must be an integer >= 0: 0 chooses, 1 never splits"),
        ("num_splits", 2.0, "num_splits=2.0 must be an integer >= 0"),
        ("num_splits", True, "num_splits=True must be an integer >= 0"),
        ("mask_value", None, "mask_value=None stands in for -inf"),
        ("mask_value", float("-inf"), "mask_value=-inf stands in for -inf: it must lie in float32"),
        ("mask_value", -1e4, "mask_value=-10000.0 stands in for -inf: .* outweigh a real logit"),
        ("mask_value", -1e39, "mask_value=-1e.39 stands in for -inf: it must lie in float32's ran"),
        ("attn_logits_soft_cap", 0.0, "soft_cap=0.0 must be above 0, or None for no cap"),
        ("attn_logits_soft_cap", -3.0, "soft_cap=-3.0 must be above 0"),
        ("attn_logits_soft_cap", float("inf"), "soft_cap=inf must be a finite number above 0, or"),
        ("pages_per_compute_block", 0, "block=0 must be a positive integer: pages, or None to"),
        ("sliding_window", 0, "sliding_window=0 must be a positive integer: tokens, or None for"),
        ("sliding_window", -4, "sliding_window=-4 must be a positive integer"),
        ("sliding_window", 2**33, "sliding_window=8589934592 must be at most 2147483647: lengths"),
        (
            "sliding_window",
            np.int64(2**32 + 3),
            r"window=.*4294967299.* must be at most 2147483647",
        ),
        (
            "max_context_len",
            sys.maxsize,
            "max_context_len=9223372036854775807 must be at most 2147",
        ),
        ("num_splits", 2**40, "num_splits=1099511627776 must be at most 2147483647"),
        ("pages_per_compute_block", 2**31, "pages_per_compute_block=2147483648 must be at most"),
        (
            "attn_scale",
            1e39,
            r"attn_scale=1e\+39 must be 0 or between 2\*\*-126 and 2\*\*127 in si",
        ),
        ("attn_scale", 1e300, r"attn_scale=1e\+300 must be 0 or between"),
        ("attn_scale", 1e-40, "attn_scale=1e-40 must be 0 or between"),
        ("attn_logits_soft_cap", 3e38, r"soft_cap=3e\+38 must be 0 or between"),
        ("megacore_mode", "heads", r"megacore_mode='heads' must be one of \(None, 'auto', 'off', "),
        ("inline_seq_dim", 2, "inline_seq_dim must be True or False; got 2"),
        (
            "backend",
            "triton",
            r"backend='triton' is none of \('xla', 'pallas_tpu', 'pallas_gpu'\); None follows",
        ),
        ("interpret", "yes", "interpret must be True, False or None .*; got 'yes'"),
    ],
)
@pytest.mark.parametrize("spec", [None, "data=2,kv=2,context=2"])
def test_options(option, value, message, spec):
    with pytest.raises(ValueError, match=message):
        call(**{option: value}, mesh=spec and build_mesh(spec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": zeros(0, 8, 64), "context_lens": zeros(0, dtype=jnp.int32),
          "block_tables": zeros(0, 4, dtype=jnp.int32)}, "block_tables has 0 rows; it needs one"),
        ({"block_tables": jnp.zeros((8, 4), jnp.int4)}, "block_tables has dtype int4, which holds"),
        ({"context_lens": jnp.zeros(8, jnp.uint4)}, "context_lens has dtype uint4, which holds"),
    ],
)  # fmt: skip
def test_odd_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_cache_larger_than_any_memory():
    """XLA ends the process where it has to count so many bytes."""
    with pytest.raises(ValueError, match=r"the cache's number of elements=.* must be at most"):
        shardpage.PagedKVCache.zeros(2**50, 2**30, 16, 128)


def test_a_traced_option():
    with pytest.raises(ValueError, match="attn_scale is traced; it is a static option: pass a Py"):
        jax.jit(lambda scale: call(attn_scale=scale))(0.5)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("megacore_mode", "kv_head", "megacore_mode='kv_head' splits .* use backend='pallas_tpu'"),
        ("megacore_mode", "batch", "megacore_mode='batch' splits .* or None"),
        ("interpret", True, "interpret=True .* use backend='pallas_tpu', or interpret=None"),
    ],
)
def test_what_xla_cannot(option, value, message):
    with pytest.raises(NotImplementedError, match=message):
        call(backend="xla", **{option: value})


class TestTables:
    """Host side: names the sequence and the entry."""

    LENS = (33, 0, 16, 64)

    def check(self, message, lens=LENS, entry=None, **changes):
        tables = np.arange(16).reshape(4, 4)
        if entry is not None:
            index, value = entry
            tables[index] = value
        with pytest.raises(ValueError, match=message):
            shardpage.validate_tables(
                np.array(lens), tables, **{"num_pages": 16, "page_size": 16, **changes}
            )

    def test_pages_before_the_window_may_be_freed(self):
        tables = np.array([[-1, -1, 2, 3]])
        shardpage.validate_tables([60], tables, num_pages=4, page_size=16, sliding_window=20)
        with pytest.raises(ValueError, match="sequence 0, entry 1: page id -1 must be in"):
            shardpage.validate_tables([60], tables, num_pages=4, page_size=16, sliding_window=29)

    def test_accepts_what_is_right(self):
        tables = np.full((4, 4), -1)
        tables[0, :3], tables[2, 0], tables[3] = [0, 1, 2], 9, [8, 15, 10, 12]
        for num_seq_shards in (1, 2):
            shardpage.validate_tables(
                self.LENS,
                tables,
                num_pages=16,
                page_size=16,
                num_seq_shards=num_seq_shards,
                max_context_len=64,
            )

    def test_ids(self):
        self.check(r"sequence 0, entry 2: page id -1 must be in \[0, 16\)", entry=((0, 2), -1))
        self.check(r"sequence 3, entry 3: page id 16 must be in \[0, 16\)", entry=((3, 3), 16))

    def test_another_shards_page(self):
        self.check(
            r"sequence 2, entry 0: page id 7 must be in \[8, 16\), the pages of its shard 1 of 2",
            entry=((2, 0), 7),
            num_seq_shards=2,
        )

    def test_lengths(self):
        capacity = r"must be in \[0, 64\], its table's capacity \(4 blocks of 16 tokens\)"
        self.check("sequence 1: context_len 65 " + capacity, lens=(33, 65, 16, 64))
        self.check("sequence 2: context_len -1 " + capacity, lens=(33, 0, -1, 64))
        self.check(
            r"sequence 0: context_len 33 must be in \[0, 32\], max_context_len", max_context_len=32
        )

    def test_shapes(self):
        self.check("context_lens has 3 entries, block_tables 4 rows", lens=(1, 2, 3))
        self.check(r"context_lens must be \[num_seqs\]; got \(1, 4\)", lens=(self.LENS,))
        self.check("num_seqs=4 must be divisible by num_seq_shards=3", num_seq_shards=3)
        self.check("num_pages=15 must be divisible by num_seq_shards=2", num_pages=15,
                   num_seq_shards=2)  # fmt: skip


def test_an_old_jax_has_no_kernels(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    page_format = shardpage.PagedKVCache.abstract(8, 4, 16, 128).format
    assert default_for("tpu", "TPU v6e", page_format) == "xla"
    for backend in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match=r"needs JAX 0\.10 or .*backend='xla'"):
            call(backend=backend)
