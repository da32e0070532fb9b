"""The cache: made sharded, written in place, by each device its own part."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from shardpage import (
    PageAllocator,
    PagedKVCache,
    ShardLayout,
    page_attention,
    validate_writes,
    write_kv,
)

from . import reference
from .cases import KV_LAYOUTS, TOKEN_LAYOUTS, build_mesh
from .quantised import DTYPES

SIZES = {"num_pages": 16, "num_kv_heads": 4, "page_size": 8, "head_dim": 64}


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, count, SIZES["num_kv_heads"], SIZES["head_dim"]), np.float32)


def expected_cache(caches, key, value, seq_ids, positions, tables, *, num_seq_shards=1):
    """The oracle: [2, num_pages, page_size, num_kv_heads, head_dim] after a write."""
    caches = caches.copy()
    num_seqs, max_blocks = tables.shape
    _, num_pages, page_size, _, _ = caches.shape
    for token, (seq, position) in enumerate(zip(seq_ids, positions, strict=True)):
        if not (0 <= seq < num_seqs and 0 <= position < max_blocks * page_size):
            continue
        shard = seq // (num_seqs // num_seq_shards)
        page = tables[seq, position // page_size]
        owned = num_pages // num_seq_shards
        here = token // (len(seq_ids) // num_seq_shards) == shard
        if here and shard * owned <= page < (shard + 1) * owned:
            caches[:, page, position % page_size] = key[token], value[token]
    return caches


def contents(cache):
    """[2, num_pages, page_size, num_kv_heads, head_dim] float32."""
    keys, values = reference._pages_of_tokens(
        np.asarray(cache.key).astype(np.float32),
        None if cache.value is None else np.asarray(cache.value).astype(np.float32),
        cache.kv_layout,
        cache.head_dim,
    )
    return np.stack([keys, values]).astype(np.float32)


def arrays(*values):
    return tuple(map(jnp.asarray, values))


PACKINGS = [
    *((kv_layout, packed) for kv_layout in KV_LAYOUTS for packed in (False, True)),
    *((kv_layout, None) for kv_layout in TOKEN_LAYOUTS),
]


@pytest.mark.parametrize(("kv_layout", "packed"), PACKINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prefill_and_append_land_where_the_table_says(kv_layout, dtype, packed):
    cache = PagedKVCache.zeros(**SIZES, dtype=dtype, kv_layout=kv_layout, packed=packed)
    tables = np.array([[5, 2, 9], [7, -1, -1], [0, 1, 3]], np.int32)
    expected = contents(cache)
    writes = [  # prefill of sequences 0 and 2 in one call, then an append to all, one dropped
        ([0] * 17 + [2] * 9, [*range(17), *range(9)]),
        ([0, 1, -1], [17, 0, 3]),
    ]
    for seed, (seq_ids, positions) in enumerate(writes):
        key, value = tokens(len(seq_ids), seed)
        rounded = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (key, value))
        expected = expected_cache(expected, *rounded, seq_ids, positions, tables)
        ids = (np.array(seq_ids, np.int32), np.array(positions, np.int32), tables)
        cache = write_kv(cache, *arrays(key, value, *ids))
    np.testing.assert_array_equal(contents(cache), expected)


@pytest.mark.parametrize(
    "spec",
    [
        "data=2,kv=2,context=2",
        "data=4,kv=2",
        "context=8",
    ],
)
def test_each_device_writes_its_own_pages(spec, axis_type):
    mesh = build_mesh(spec, axis_type)
    counts = ShardLayout.of(mesh).shards(mesh)
    cache = PagedKVCache.zeros(**SIZES, dtype=jnp.float32, mesh=mesh)
    allocator = PageAllocator(
        16, 8, num_seq_shards=counts.seqs, num_context_shards=counts.context, max_blocks=2
    )
    for seq in range(4):
        allocator.allocate(seq, 12, seq_shard=seq * counts.seqs // 4)
    tables = allocator.block_tables(range(4), max_blocks=2)
    key, value = tokens(48)
    seq_ids = np.repeat(np.arange(4, dtype=np.int32), 12)
    positions = np.tile(np.arange(12, dtype=np.int32), 4)
    validate_writes(
        seq_ids, positions, tables, num_pages=16, page_size=8, num_seq_shards=counts.seqs
    )
    expected = expected_cache(
        contents(cache), key, value, seq_ids, positions, tables, num_seq_shards=counts.seqs
    )
    cache = write_kv(cache, *arrays(key, value, seq_ids, positions, tables), mesh=mesh)
    chex.assert_tree_is_sharded(cache, devices=mesh.devices.flat)
    np.testing.assert_array_equal(contents(cache), expected)

    query = np.random.default_rng(1).standard_normal((4, 8, 64), np.float32)
    lens = np.full(4, 12, np.int32)
    out = page_attention(
        *arrays(query), cache.key, cache.value, *arrays(lens, tables), mesh=mesh,
        kv_layout=cache.kv_layout,
    )  # fmt: skip
    exact, _ = reference.page_attention(
        query, cache.key, cache.value, lens, tables, kv_layout=cache.kv_layout
    )
    np.testing.assert_allclose(out, exact, atol=1e-5)


@settings(max_examples=25)
@given(st.data())
def test_nothing_but_the_named_slots_changes(data):
    """Hypothesis over ids, positions and tables, sensible or not, on two `seqs` shards."""
    mesh = build_mesh("data=2,context=2")
    ids = st.integers(-3, 18)
    tables = np.array(data.draw(st.lists(ids, min_size=8, max_size=8)), np.int32).reshape(4, 2)
    seq_ids = np.array(data.draw(st.lists(st.integers(-2, 5), min_size=6, max_size=6)), np.int32)
    positions = np.array(data.draw(st.lists(st.integers(-9, 20), min_size=6, max_size=6)), np.int32)
    sites = [(t, s, p) for t, (s, p) in enumerate(zip(seq_ids, positions, strict=True)) if s >= 0]
    slots = [(tables[s, p // 8], p % 8) for _, s, p in sites if s < 4 and 0 <= p < 16]
    if len(set(slots)) < len(slots):
        return  # either of two tokens at one place may win
    cache = PagedKVCache.zeros(**SIZES, dtype=jnp.float32, mesh=mesh)
    key, value = tokens(6)
    expected = expected_cache(
        contents(cache), key, value, seq_ids, positions, tables, num_seq_shards=2
    )
    cache = write_kv(cache, *arrays(key, value, seq_ids, positions, tables), mesh=mesh)
    np.testing.assert_array_equal(contents(cache), expected)


# Memory


def written(kv_layout, dtype, num_tokens=8, layer=None, **sizes):
    sizes = {"num_pages": 512, "num_kv_heads": 8, "page_size": 16, "head_dim": 128} | sizes
    cache = PagedKVCache.abstract(**sizes, dtype=dtype, kv_layout=kv_layout)
    dtype = jnp.bfloat16 if cache.scales else dtype
    token = jax.ShapeDtypeStruct((num_tokens, sizes["num_kv_heads"], sizes["head_dim"]), dtype)
    ids = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    tables = jax.ShapeDtypeStruct((num_tokens, 4), jnp.int32)
    write = functools.partial(write_kv, layer=layer)
    call = jax.jit(write, donate_argnums=0).lower(cache, token, token, ids, ids, tables)
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return call.compile().memory_analysis(), cache_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *DTYPES])
@pytest.mark.parametrize("kv_layout", KV_LAYOUTS + TOKEN_LAYOUTS)
def test_a_write_aliases_the_donated_cache_and_copies_nothing(kv_layout, dtype):
    memory, cache_bytes = written(kv_layout, dtype)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50


@pytest.mark.parametrize(
    ("dtype", "scales", "kv_layout", "packed"),
    [
        ("bfloat16", None, "heads_first", None),
        ("bfloat16", None, "blocks_first", True),
        ("bfloat16", None, "interleaved_words", None),
        ("int8", "token", "fused", None),
        ("int8", "head", "blocks_first", True),
        ("float8_e4m3fn", "token", "heads_first", True),
        ("float8_e4m3fn", "head", "tokens_first", None),
        ("float8_e5m2", "token", "interleaved_words", None),
        ("float8_e5m2", "head", "fused", True),
    ],
)
def test_so_does_one_to_a_layer(dtype, scales, kv_layout, packed):
    options = {"num_layers": 3, "packed": packed, "scales": scales}
    sizes = {"page_size": 32, "head_dim": 64 if packed else 128}
    memory, cache_bytes = written(kv_layout, dtype, layer=1, **options, **sizes)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50


def test_the_eager_write_consumes_its_cache():
    cache = PagedKVCache.zeros(**SIZES)
    key, value = tokens(1)
    zero = np.zeros(1, np.int32)
    new = write_kv(cache, *arrays(key, value, zero, zero, np.zeros((1, 1), np.int32)))
    assert cache.key.is_deleted()
    assert not new.key.is_deleted()


def test_a_write_on_a_mesh_sends_nothing():
    mesh = build_mesh("data=2,kv=2,context=2")
    cache = PagedKVCache.zeros(**SIZES, mesh=mesh)

    def array(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    token = array((8, 4, 64), jnp.bfloat16, "data", "kv")
    ids, tables = array((8,), jnp.int32, "data"), array((4, 2), jnp.int32, "data")
    call = jax.jit(functools.partial(write_kv, mesh=mesh), donate_argnums=0)
    program = call.lower(cache, token, token, ids, ids, tables).compile()
    assert not re.search(r"\b(all-\w+|collective-\w+|reduce-scatter)\(", program.as_text())
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache.bytes_per_device()


def test_zeros_is_made_in_its_sharding_and_tells_its_bytes():
    mesh = build_mesh("data=2,kv=2,context=2")
    cache = PagedKVCache.zeros(**SIZES, dtype=jnp.float32, mesh=mesh)
    chex.assert_tree_is_sharded(cache, devices=mesh.devices.flat)
    assert cache.key.sharding.spec == PartitionSpec(("data", "context"), "kv", None, None)
    whole = 2 * 16 * 4 * 8 * 64 * 4
    assert cache.bytes_per_device() == whole // 8
    assert {shard.data.nbytes for shard in cache.key.addressable_shards} == {whole // 16}
    assert (cache.num_pages, cache.format.num_kv_heads, cache.format.page_size) == (16, 4, 8)


def test_a_packed_cache_is_the_same_bytes_in_wider_rows():
    cache = PagedKVCache.zeros(16, 4, 8, 32, packed=True, kv_layout="fused")
    chex.assert_tree_shape_prefix(cache, (16, 2, 4, 2, 128))
    assert (cache.num_pages, cache.format.page_size, cache.format.pack) == (16, 8, 4)


def test_words_have_the_shape_that_a_tpu_keeps():
    """Rows of 128, as many of them in a 32-bit word as fit; key and value of 64 share a row."""
    shape = functools.partial(PagedKVCache.abstract, 16, 4, 8, kv_layout="interleaved_words")
    assert shape(128).key.shape == (16, 8, 4, 2, 128)
    assert shape(80, dtype=jnp.float32).key.shape == (16, 8, 8, 1, 128)
    assert shape(80).padding == 48
    assert shape(192).key.shape == (16, 8, 4, 2, 256)
    assert shape(64).key.shape == (16, 8, 2, 2, 128)
    assert shape(64, packed=False).key.shape == (16, 8, 4, 2, 128)
    assert shape(64, packed=False).padding == 64
    for cache in map(shape, (64, 80, 128, 192)):
        given = PagedKVCache.of(
            cache.key, kv_layout=cache.kv_layout, head_dim=cache.head_dim, padding=cache.padding
        )
        assert given.format == cache.format
        assert given.format.array_shape(16) == cache.key.shape
        assert given.format.num_kv_heads == 4


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((4, 8, 5, 64), {}, r"interleaved is \[pages, page, 2 \* kv_heads, dim\]"),
        ((4, 8, 4, 80), {}, "for head_dim=64, padding=0; .* dim = head_dim . padding"),
        ((4, 8, 2, 2, 64), {"num_values": 1}, "'interleaved' is one array of both"),
        ((4, 8, 4), {}, r"key has shape \(4, 8, 4\); interleaved is \[pages"),
        ((4, 8, 2, 2, 80), {"kv_layout": "interleaved_words"}, "twice that where key and value"),
        ((4, 8, 4, 64), {"kv_layout": "tokens_first"}, "'tokens_first' is an array of each"),
        ((4, 8, 4, 64), {"kv_layout": "fused", "padding": 3}, "padding=3 is for token-major"),
        ((4, 8, 4, 64), {"padding": -1}, "padding=-1 must be"),
    ],
)
def test_arrays_that_are_no_such_cache_are_refused(shape, changes, message):
    options = {"kv_layout": "interleaved", "head_dim": 64} | changes
    key = np.zeros(shape, np.float32)
    arrays = [key] * (1 + options.pop("num_values", 0))
    with pytest.raises(ValueError, match=message):
        PagedKVCache.of(*arrays, **options)


def test_a_cache_goes_through_jit_and_tree_maps():
    cache = PagedKVCache.zeros(**SIZES, kv_layout="heads_first")
    assert jax.jit(lambda c: c)(cache).kv_layout == "heads_first"
    assert len(jax.tree.leaves(cache)) == 2
    assert len(jax.tree.leaves(PagedKVCache.zeros(**SIZES, kv_layout="fused"))) == 1


# Errors


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kv_layout", KV_LAYOUTS + TOKEN_LAYOUTS)
def test_a_tree_keeps_the_format(kv_layout, dtype, num_layers):
    cache = PagedKVCache.zeros(**SIZES, kv_layout=kv_layout, dtype=dtype, num_layers=num_layers)
    cache = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype), cache)
    # As a checkpoint gives it back: lists, NumPy's arrays and integers, empty lists as None.
    kept = jax.tree.map(np.asarray, cache.to_tree())
    kept[kv_layout]["scales"] = kept[kv_layout]["scales"] or None
    again = PagedKVCache.from_tree(kept)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    assert again.format == cache.format
    chex.assert_trees_all_equal(again, cache)


EMPTY = {"head_dim": 64, "padding": 0, "arrays": [], "scales": []}


@pytest.mark.parametrize(
    "tree", [{}, {"arrays": []}, {"upside_down": {}}, {"blocks_first": EMPTY}, None, [1]]
)
def test_another_tree_is_no_cache(tree):
    with pytest.raises(ValueError, match=r"no tree of a cache: .*save cache\.to_tree\(\)"):
        PagedKVCache.from_tree(tree)


def test_one_layer_has_no_tree():
    cache = PagedKVCache.zeros(**SIZES, num_layers=2)
    with pytest.raises(ValueError, match="take the tree of the whole cache"):
        cache.of_layer(0).to_tree()


def bad(**changes):
    key, value = tokens(4)
    cache = PagedKVCache.zeros(**SIZES)
    by_hand = changes.pop("dtype", cache.key.dtype), changes.pop("value_pages", len(cache.key))
    cache = jax.tree.map(lambda x: x.astype(by_hand[0]), cache)
    cache = cache.replace((cache.key, cache.value[: by_hand[1]]))
    ids = np.zeros(4, np.int32)
    args = {"key": key, "value": value, "seq_ids": ids, "positions": ids,
            "block_tables": np.zeros((2, 3), np.int32)} | changes  # fmt: skip
    options = {name: args.pop(name, None) for name in ("mesh", "backend")}
    return write_kv(cache, **{k: jnp.asarray(v) for k, v in args.items()}, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": np.zeros((4, 4, 32), np.float32)}, r"key has shape \(4, 4, 32\).*\(4, 4, 64\)"),
        ({"value": np.zeros((3, 4, 64), np.float32)}, r"value has shape \(3, 4, 64\)"),
        ({"key": np.zeros((4, 64), np.float32)}, r"key must be \[num_tokens"),
        ({"value": np.zeros((4, 4, 64), np.int32)}, "value must be floating point"),
        ({"seq_ids": np.zeros(3, np.int32)}, "seq_ids has 3 entries for 4 tokens"),
        ({"positions": np.zeros(4, np.float32)}, "positions must hold integers"),
        ({"positions": np.zeros((4, 1), np.int32)}, r"positions must be \[num_tokens\]"),
        ({"block_tables": np.zeros(3, np.int32)}, r"block_tables must be \[num_seqs, max_blocks\]"),
        ({"dtype": jnp.int16}, "dtype=int16 is no cache's; choose one of"),
        ({"dtype": jnp.int8}, r"a cache of int8 needs scales; .*\.of\(..., scales=\)"),
        ({"value_pages": 5}, r"key_cache is bfloat16\[.*\] but value_cache bfloat16\[5, .*must be"),
        ({"backend": "cuda"}, r"backend='cuda' is none of \('xla', 'pallas_tpu', 'pallas_gpu'\)"),
        ({"mesh": "data=8"}, r"num_seqs=2 must be divisible by the 8 shards"),
        ({"mesh": "data=8", "block_tables": np.zeros((8, 2), np.int32)},
         r"num_tokens=4 must be divisible by the 8 shards .* pad to 8 with seq_ids of -1"),
    ],
)  # fmt: skip
def test_bad_writes_are_refused(changes, message):
    if "mesh" in changes:
        changes = changes | {"mesh": build_mesh(changes["mesh"])}
    with pytest.raises(ValueError, match=message):
        bad(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pages": 0}, "num_pages=0 must be a positive integer"),
        ({"dtype": jnp.int16}, r"dtype=int16 is no cache's; choose one of \('float32', 'bfloat16"),
        ({"kv_layout": "pages"}, "kv_layout='pages' is unknown; choose one of"),
        ({"packed": True, "head_dim": 80}, "packed=True needs a head_dim below 128 that divides"),
        ({"packed": True, "page_size": 1}, "a page_size that is a multiple of 128 // head_dim"),
        ({"packed": True, "kv_layout": "interleaved"}, "the heads of a token lie between"),
        ({"packed": True, "kv_layout": "interleaved_words", "head_dim": 80}, "head_dim=80 is not"),
        ({"kv_layout": "interleaved_words", "num_kv_heads": 3}, "3 of bfloat16 do not fill words"),
        ({"kv_layout": "interleaved_words", "mesh": "kv=4"}, "in 2 words .* 4 shards .* 'kv' do"),
        ({"mesh": "kv=8"}, "num_kv_heads=4 must be divisible by the 8 shards"),
        ({"mesh": "context=8", "num_pages": 12}, "num_pages=12 must be divisible .* of 16 pages"),
    ],
)
def test_impossible_caches_are_refused(changes, message):
    if "mesh" in changes:
        changes = changes | {"mesh": build_mesh(changes["mesh"])}
    with pytest.raises(ValueError, match=message):
        PagedKVCache.zeros(**SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_ids": [0, 9]}, r"token 1 \(sequence 9, position 1\): seq_ids must be -1 or in"),
        ({"positions": [0, 16]}, r"the table holds positions in \[0, 16\), 2 blocks of 8 tokens"),
        ({"seq_ids": [0, 0]}, "the token lies in part 1 of 2, its sequence in 0"),
        ({"block_tables": [[9, 1], [2, 3], [8, 9], [9, 9]]},
         r"token 0 .*: page id 9 must be in \[0, 8\), the pages of shard 0 of 2"),
        ({"num_pages": 15}, "num_pages=15 must be divisible by num_seq_shards=2"),
    ],
)  # fmt: skip
def test_the_host_check_names_what_a_write_would_drop(changes, message):
    args = {"seq_ids": [0, 2], "positions": [0, 1],
            "block_tables": [[0, 1], [2, 3], [8, 9], [9, 9]], "num_pages": 16}  # fmt: skip
    validate_writes(**args, page_size=8, num_seq_shards=2)
    with pytest.raises(ValueError, match=message):
        validate_writes(**args | changes, page_size=8, num_seq_shards=2)
