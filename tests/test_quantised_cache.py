"""The arrays of a quantised cache: how they are made, split, replaced; their bytes; who refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shardpage import (
    PageAllocator,
    PagedKVCache,
    QuantisedPages,
    ShardLayout,
    attend,
    make_plan,
    page_attention,
    read_pages,
    write_kv,
    write_pages,
)

from . import steps
from .cases import KV_LAYOUTS, TOKEN_LAYOUTS, build_mesh
from .quantised import DTYPES, SCALES, dtype_of
from .test_quantised import bits, kinds, quantised
from .test_step import on

SIZES = {"num_pages": 16, "num_kv_heads": 4, "page_size": 8, "head_dim": 64}
HEADS = (np.full(4, 0.02, np.float32), np.full(4, 0.03, np.float32))


def make(scale="token", **options):
    scales = HEADS if "num_layers" not in options else tuple(np.stack([x] * 3) for x in HEADS)
    options = {"dtype": "int8", "scales": scales if scale == "head" else None} | options
    return PagedKVCache.zeros(**SIZES | options)


def nbytes(cache):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_layout", KV_LAYOUTS + TOKEN_LAYOUTS)
@kinds
def test_takes_at_most_056_of_bfloat16s_bytes_with_its_scales(dtype, scale, kv_layout, head_dim):
    sizes = {"num_pages": 64, "num_kv_heads": 8, "page_size": 64, "head_dim": head_dim}
    options = {"kv_layout": kv_layout, "num_layers": 2}
    cache = PagedKVCache.abstract(**sizes, **options, dtype=dtype, scales=scale)
    assert nbytes(cache) <= 0.56 * nbytes(PagedKVCache.abstract(**sizes, **options))
    assert cache.bytes_per_device() == nbytes(cache)
    if scale == "token":
        assert cache.num_pages * cache.format.page_bytes * 2 == nbytes(cache)


@pytest.mark.parametrize("spec", [None, "data=2,context=2,kv=2"])
@kinds
def test_is_allocated_in_the_dtype_asked_for(dtype, scale, spec):
    """On its devices: what they hold, not what is said of it."""
    mesh = None if spec is None else build_mesh(spec)
    cache = make(scale, dtype=dtype, mesh=mesh, num_layers=3)
    assert {x.dtype for x in cache.arrays} == {dtype_of(dtype)}
    assert {x.dtype for x in cache.scales} == {np.dtype(np.float32)}
    held = {}
    for array in jax.tree.leaves(cache):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    assert set(held.values()) == {cache.bytes_per_device()}
    assert len(held) == (8 if spec else 1)
    elements = 3 * 2 * 16 * 4 * 8 * 64 // len(held)
    scales = 3 * 2 * 4 * (16 * 8 // len(held) if scale == "token" else 1 / (2 if spec else 1))
    assert cache.bytes_per_device() == elements + 4 * scales
    assert cache.format.quantised
    assert cache.scale == scale


def test_scales_are_split_as_their_pages_and_heads_are():
    mesh = build_mesh("data=2,context=2,kv=2")
    layout = ShardLayout.of(mesh)
    pages = ("data", "context")
    token, head = make(mesh=mesh, num_layers=3), make("head", mesh=mesh)
    assert token.scales[0].sharding.spec == PartitionSpec(None, pages, "kv", None, None)
    assert head.scales[0].sharding.spec == PartitionSpec("kv", None)
    for cache in (token, head, make(mesh=mesh, kv_layout="heads_first")):
        specs = cache.specs(layout)
        for array, spec in zip(jax.tree.leaves(cache), [*specs.arrays, *specs.scales], strict=True):
            assert array.sharding == jax.NamedSharding(mesh, spec)


@kinds
def test_goes_through_jit_as_it_lies(dtype, scale):
    """`array_formats` as a program's `out_shardings`; the same cache comes back."""
    mesh = build_mesh("data=2,context=2,kv=2")
    cache = make(scale, dtype=dtype, mesh=mesh, kv_layout="heads_first")
    same = jax.jit(lambda cache: cache, out_shardings=cache.array_formats)(cache)
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    for new, old in zip(jax.tree.leaves(same), jax.tree.leaves(cache), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(bits(new), bits(old))


def test_replace_keeps_its_scales_or_takes_others():
    cache = make()
    arrays = [x + jnp.int8(1) for x in cache.arrays]
    assert cache.replace(arrays).scales == cache.scales
    others = cache.replace(arrays, [x + 1 for x in cache.scales])
    assert float(others.scales[0].min()) == 1
    assert others.format == cache.format


@pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
@pytest.mark.parametrize("scale", SCALES)
def test_unpacked_stands_for_the_same_tokens(scale, kv_layout):
    """Scales of a packed cache lie as its tokens do: unpacked, they lie anew."""
    packed = steps.make(quantised("mixed", "int8", scale), kv_layout, packed=True)
    plain = steps.make(quantised("mixed", "int8", scale), kv_layout)
    unpacked = packed.cache().unpacked()
    assert unpacked.format == plain.cache().format
    for new, old in zip(jax.tree.leaves(unpacked), jax.tree.leaves(plain.cache()), strict=True):
        np.testing.assert_array_equal(bits(new), bits(old))


@pytest.mark.parametrize("scale", SCALES)
def test_in_a_shard_map_of_ones_own(scale):
    """`cache.specs` split its arrays and its scales; there calls have no mesh, and local ids."""
    mesh, step = build_mesh("kv=4"), quantised("mixed", "float8_e4m3fn", scale)
    layout, inputs = ShardLayout.of(mesh), steps.make(step, "heads_first")
    cache = inputs.cache(written=False)
    specs = cache.specs(layout)
    heads = layout.spec(None, "heads", None)

    def here(cache, query, key, value):
        plan = make_plan(
            cache, inputs.context_lens, inputs.block_tables, inputs.query_lens,
            num_heads=query.shape[1], num_queries=len(query),
        )  # fmt: skip
        cache = write_kv(cache, key, value, plan)
        return attend(query, cache, plan, return_lse=True), read_pages(cache, [3])

    of_scales = (None, None, None, "heads", None) if scale == "token" else (None, None, "heads")
    pages = QuantisedPages(layout.spec(*(None,) * 3, "heads", None, None), layout.spec(*of_scales))
    out_specs = ((heads, layout.spec(None, "heads")), pages)
    run = jax.shard_map(here, mesh=mesh, in_specs=(specs, heads, heads, heads), out_specs=out_specs)
    (out, lse), read = jax.jit(run)(cache, inputs.query, inputs.key, inputs.value)
    steps.assert_exact(inputs, np.asarray(out), np.asarray(lse))
    for actual, expected in zip(read, read_pages(inputs.cache(), [3]), strict=True):
        np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.parametrize("spec", [None, "data=2,context=2,kv=2"])
@pytest.mark.parametrize("scale", SCALES)
def test_page_attention_takes_its_scales(scale, spec):
    mesh = spec and build_mesh(spec)
    step = quantised("decoding", "int8", scale, num_queries=4 if mesh else 8)
    inputs = on(mesh, step) if mesh else steps.make(step)
    cache = inputs.cache()
    arrays = (inputs.query, cache.key, cache.value, inputs.context_lens, inputs.block_tables)
    options = {"kv_layout": cache.kv_layout, "mesh": mesh, "return_lse": True}
    for scales in (cache.scales, inputs.scales):
        out, lse = page_attention(*map(jnp.asarray, arrays), scales=scales, **options)
        steps.assert_exact(inputs, np.asarray(out), np.asarray(lse))


@kinds
def test_sequences_that_share_pages_share_their_scales(dtype, scale):
    """Forked: full pages are shared, the last one is copied with its scales; both go on."""
    allocator = PageAllocator(16, 8)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 24, 4, 64)).astype(np.float32)
    cache = make(scale, dtype=dtype)

    def write(cache, name, tokens, positions):
        tables = jnp.asarray(allocator.block_tables([name], 4))
        ids = jnp.zeros(len(positions), jnp.int32)
        return write_kv(cache, key[tokens], value[tokens], ids, jnp.asarray(positions), tables)

    def attended(cache, name, length):
        tables = allocator.block_tables([name], 4)
        plan = make_plan(cache, np.array([length], np.int32), tables, num_heads=8)
        return np.asarray(attend(query, cache, plan))

    query = jnp.asarray(rng.standard_normal((1, 8, 64)).astype(np.float32))
    positions = np.arange(20, dtype=np.int32)
    allocator.allocate("parent", 20)
    cache = write(cache, "parent", positions, positions)
    copy = allocator.fork("parent", "child")
    cache = write_pages(cache, [copy.target], read_pages(cache, [copy.source]))
    np.testing.assert_array_equal(attended(cache, "child", 20), attended(cache, "parent", 20))
    for name, token in (("parent", 21), ("child", 22)):
        allocator.extend(name, 1)
        cache = write(cache, name, np.array([token]), np.array([20], np.int32))
    for name, token in (("parent", 21), ("child", 22)):
        alone = PageAllocator(16, 8)
        alone.allocate("between", 40)
        pages = alone.allocate(name, 21)
        fresh, tokens = make(scale, dtype=dtype), np.array([*range(20), token])
        tables = jnp.asarray(np.array([[*pages, -1]], np.int32))
        ids, at = jnp.zeros(21, jnp.int32), jnp.arange(21, dtype=jnp.int32)
        fresh = write_kv(fresh, key[tokens], value[tokens], ids, at, tables)
        plan = make_plan(fresh, np.array([21], np.int32), tables, num_heads=8)
        expected = np.asarray(attend(query, fresh, plan))
        np.testing.assert_array_equal(attended(cache, name, 21), expected)


# Memory


@pytest.mark.parametrize(
    ("dtype", "scale", "kv_layout", "num_layers"),
    [
        (*kind, kv_layout, num_layers)
        for kind, kv_layout, num_layers in zip(
            itertools.product(DTYPES, SCALES),
            (*KV_LAYOUTS, *TOKEN_LAYOUTS),
            (None, 2, 2, 2, None, 2),
            strict=True,
        )
    ],
)
@pytest.mark.parametrize("num_queries", [8, 256])
def test_attending_widens_no_cache(dtype, scale, kv_layout, num_layers, num_queries):
    """Compiled: of 16 times the pages, elements and scales, not a byte more is temporary."""
    temps = []
    for num_pages in (256, 4096):
        sizes = (num_pages, 8, 16, 128)
        options = {"dtype": dtype, "scales": scale, "kv_layout": kv_layout}
        cache = PagedKVCache.abstract(*sizes, **options, num_layers=num_layers)

        def plan_and_attend(query, cache, lens, query_lens, tables):
            sizes = {"num_heads": 16, "num_queries": num_queries}
            plan = make_plan(cache, lens, tables, query_lens, **sizes)
            return attend(query, cache, plan, layer=None if num_layers is None else 1)

        ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        query = jax.ShapeDtypeStruct((num_queries, 16, 128), jnp.bfloat16)
        lowered = jax.jit(plan_and_attend).lower(query, cache, ids(8), ids(8), ids(8, 16))
        temps.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert temps[1] <= temps[0] + 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_and_attending_in_one_program_copies_no_cache(dtype):
    """A scan over layers of a mesh's parts, as a model's step has it."""
    temps = []
    for num_layers in (2, 12):
        cache = PagedKVCache.abstract(256, 8, 16, 64, dtype=dtype, num_layers=num_layers)

        def step(cache, tokens, lens, tables):
            plan = make_plan(cache, lens, tables, num_heads=8)

            def layer(cache, number):
                cache = write_kv(cache, tokens, tokens, plan, layer=number)
                return cache, attend(tokens, cache, plan, layer=number)

            return jax.lax.scan(layer, cache, jnp.arange(cache.num_layers, dtype=jnp.int32))

        ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        tokens = jax.ShapeDtypeStruct((8, 8, 64), jnp.bfloat16)
        compiled = (
            jax.jit(step, donate_argnums=0).lower(cache, tokens, ids(8), ids(8, 16)).compile()
        )
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == nbytes(cache)
        temps.append(memory.temp_size_in_bytes)
    assert temps[1] - temps[0] < nbytes(cache) // 12  # of ten layers more


# Errors

ARRAYS = np.zeros((16, 4, 8, 64), np.int8), np.zeros((16, 4, 8, 64), np.int8)
TOKEN_SCALES = np.ones((16, 4, 1, 16), np.float32)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, r"a cache of int8 has scales; pass scales=, an array \(16, 4, 1, 16\) .* or a pair"),
        (TOKEN_SCALES[:, :, 0], r"scales are float32\[16, 4, 16\]; .* \(16, 4, 1, 16\), of each"),
        (TOKEN_SCALES.astype(np.float16), r"scales are float16\[16, 4, 1, 16\]; .* takes float32"),
        ((TOKEN_SCALES,) * 3, "scales must be an array; got tuple"),
        ("token", "scales must be an array; got str"),
        ((HEADS[0], HEADS[1][:3]), r"value scales are float32\[3\]; .* KV head, .*: \(4,\)"),
        ((HEADS[0].astype(np.int32), HEADS[1]), r"key scales are int32\[4\]; .* floating point"),
        ((0 * HEADS[0], HEADS[1]), "key scales must be at least 1.18e-38, .* and finite; got"),
        ((HEADS[0], -HEADS[1]), "value scales must be at least"),
        ((HEADS[0] * np.float32(np.inf), HEADS[1]), "key scales must be at least"),
        ((HEADS[0].astype(np.float64) * 1e-60, HEADS[1]), "key scales must be at least"),
    ],
)
def test_scales_of_ones_own_must_fit(scales, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache.of(*ARRAYS, kv_layout="blocks_first", head_dim=64, scales=scales)


@pytest.mark.parametrize("scales", [HEADS, (TOKEN_SCALES,), TOKEN_SCALES])
def test_scales_of_a_cache_that_has_none_are_refused(scales):
    arrays = (x.astype(np.float32) for x in ARRAYS)
    with pytest.raises(
        ValueError, match="scales of a cache of float32, which has none; leave them"
    ):
        PagedKVCache.of(*arrays, kv_layout="blocks_first", head_dim=64, scales=scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16", "scales": "token"}, "scales='token' of a cache of bfloat16, which"),
        (
            {"dtype": "float32", "scales": HEADS},
            "of a cache of float32, which has none; leave them",
        ),
        ({"scales": "head"}, r"pass them: scales=\(key_scales, value_scales\), arrays"),
        ({"scales": "page"}, "scales='page' must be 'token', 'head' or, of zeros, a pair"),
        ({"scales": HEADS[0]}, r"scales=.* must be a pair of arrays \(4,\): of keys and of values"),
        ({"scales": HEADS, "num_layers": 2}, r"key scales are float32\[4\]; .* \(2, 4\)"),
        (
            {"dtype": "int16"},
            r"dtype=int16 is no cache's; choose one of \(.*'int8', 'float8_e4m3fn'",
        ),
        ({"dtype": "float8_e4m3b11fnuz"}, "dtype=float8_e4m3b11fnuz is no cache's"),
        ({"kv_layout": "interleaved_words", "num_kv_heads": 3}, "of int8 do not fill words of 4"),
    ],
)
def test_impossible_quantised_caches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache.zeros(**SIZES | {"dtype": "int8"} | changes)


def test_a_pair_of_scales_is_for_zeros():
    with pytest.raises(ValueError, match="must be 'token', 'head' or, of zeros, a pair"):
        PagedKVCache.abstract(**SIZES, dtype="int8", scales=HEADS)


def test_calls_refuse_a_cache_without_its_scales_and_one_with_anothers():
    inputs = steps.make(quantised("decoding", "int8", "token"))
    cache = inputs.cache()
    plan = steps.planned(inputs, "xla", None, cache)
    bare = cache.replace(cache.arrays, ())
    wide = cache.replace([x.astype(jnp.float32) for x in cache.arrays])
    for broken, message in (
        (bare, r"a cache of int8 needs scales; make it with PagedKVCache.zeros\(dtype=\)"),
        (wide, "a cache of float32 has no scales"),
    ):
        for call in (
            lambda cache: attend(inputs.query, cache, plan),
            lambda cache: write_kv(cache, inputs.key, inputs.value, plan),
            lambda cache: steps.planned(inputs, "xla", None, cache),
            lambda cache: read_pages(cache, [0]),
        ):
            with pytest.raises(ValueError, match=message):
                call(broken)
    by_head = steps.make(quantised("decoding", "int8", "head")).cache()
    with pytest.raises(ValueError, match=r"the plan was made for .* make a plan for each kind"):
        attend(inputs.query, by_head, plan)


@kinds
def test_gradients_are_refused_by_name(dtype, scale):
    inputs = steps.make(quantised("decoding", dtype, scale))
    cache = inputs.cache()
    plan = steps.planned(inputs, "xla", None, cache)
    message = f"gradients through a cache of {dtype}: rounding has none; use a cache of float32"

    def of_query(query):
        return jnp.sum(attend(query, cache, plan))

    def of_tokens(key, which):
        tokens = {"key": inputs.key, "value": inputs.value} | {which: key}
        new = write_kv(cache, **tokens, plan=plan)
        return jnp.sum(attend(inputs.query, new, plan))

    with pytest.raises(NotImplementedError, match=message):
        jax.grad(of_query)(jnp.asarray(inputs.query))
    for which in ("key", "value"):
        with pytest.raises(NotImplementedError, match=message):
            jax.grad(functools.partial(of_tokens, which=which))(jnp.asarray(inputs.key))
