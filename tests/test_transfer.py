"""Pages move between caches of unlike meshes and layouts, bit by bit; a description finds them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from shardpage import (
    PageAllocator,
    PagedKVCache,
    QuantisedPages,
    ShardLayout,
    attend,
    make_plan,
    page_ranges,
    read_pages,
    write_pages,
)

from . import steps
from .cases import TOKEN_LAYOUTS, build_mesh
from .quantised import DTYPES, SCALES

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def make_cache(spec=None, axis_type="Auto", num_pages=16, num_kv_heads=4, **options):
    """A cache whose every bit is drawn: NaN, -0 and infinity among its values, and its scales."""
    mesh = None if spec is None else build_mesh(spec, axis_type)
    options = {"dtype": jnp.float32, "kv_layout": "blocks_first"} | options
    if options.get("scales") == "head":
        options["scales"] = head_scales(num_kv_heads, options.get("num_layers"))
    cache = PagedKVCache.zeros(num_pages, num_kv_heads, 8, 64, mesh=mesh, **options)
    rng = np.random.default_rng(num_pages)

    def draw(array):
        kind = BITS[array.dtype.itemsize]
        bits = rng.integers(0, np.iinfo(kind).max, array.shape, kind, endpoint=True)
        return jax.device_put(bits.view(array.dtype), array.sharding)

    drawn = jax.tree.map(draw, cache)
    return drawn if cache.scale != "head" else drawn.replace(drawn.arrays, cache.scales), mesh


def head_scales(num_kv_heads, num_layers=None):
    """Of keys and of values, each another number."""
    shape = (num_kv_heads,) if num_layers is None else (num_layers, num_kv_heads)
    numbers = np.arange(1, 1 + 2 * np.prod(shape), dtype=np.float32) / 7
    return tuple(numbers.reshape(2, *shape))


def scales_of(cache):
    """[layers, pages, 2, heads, page_size] of tokens, or [layers, 2, heads], by NumPy alone."""
    (array,) = map(np.asarray, cache.scales)
    array = array if cache.num_layers is not None else array[None]
    if cache.scale == "head":
        return array.swapaxes(1, 2)
    both = array.reshape(*array.shape[:3], 2, cache.format.pack, -1)  # tokens row by row
    in_order = both.swapaxes(-1, -2).reshape(*both.shape[:4], -1)
    return in_order.transpose(0, 1, 3, 2, 4)


def content(cache):
    """[layers, pages, 2, heads, page_size, head_dim] as integers, by NumPy alone."""
    arrays = [np.asarray(x) for x in cache.arrays]
    arrays = [x.view(BITS[x.dtype.itemsize]) for x in arrays]
    if cache.num_layers is None:
        arrays = [np.expand_dims(x, cache.layout.value.pages) for x in arrays]
    if cache.kv_layout == "heads_first":  # [heads, layers, pages, rows, row]
        arrays = [x.transpose(1, 2, 0, 3, 4) for x in arrays]
    if cache.kv_layout in TOKEN_LAYOUTS:
        if len(arrays) == 1:  # k0 v0 k1 v1 ...
            rows = arrays[0].reshape(*arrays[0].shape[:3], -1, cache.head_dim + cache.padding)
            arrays = [rows[..., 0::2, :], rows[..., 1::2, :]]
        return np.stack(arrays, axis=2)[..., : cache.head_dim].swapaxes(-2, -3)
    both = arrays[0] if cache.kv_layout == "fused" else np.stack(arrays, axis=2)
    return both.reshape(*both.shape[:4], -1, cache.head_dim)


def bits(pages):
    pages = np.asarray(pages)
    return pages.view(BITS[pages.dtype.itemsize])


# From and to: mesh, and what the cache is.
MOVES = {
    "one_device": ((None, {}), (None, {})),
    "layouts": ((None, {"kv_layout": "heads_first"}), (None, {"kv_layout": "fused"})),
    "packed": ((None, {"packed": True}), (None, {"kv_layout": "heads_first"})),
    "into_packed": ((None, {"kv_layout": "fused"}), (None, {"kv_layout": "fused", "packed": True})),
    "meshes": (("data=2,context=4", {}), ("kv=4", {"kv_layout": "heads_first"})),
    "three_heads": (
        ("data=2,context=4", {"num_kv_heads": 3}),
        ("kv=3", {"num_kv_heads": 3, "kv_layout": "fused"}),
    ),
    "explicit_axes": (
        ("data=2,context=4", {"axis_type": "Explicit"}),
        ("context=2,kv=4", {"axis_type": "Explicit"}),
    ),
    "layers": (
        ("data=2,kv=2,context=2", {"num_layers": 3, "kv_layout": "heads_first"}),
        ("context=8", {"num_layers": 3, "kv_layout": "fused"}),
    ),
    "bfloat16": (
        ("kv=2,context=4", {"dtype": jnp.bfloat16, "num_layers": 2}),
        ("data=8", {"dtype": jnp.bfloat16, "num_layers": 2, "kv_layout": "heads_first"}),
    ),
    "token_major": (
        (None, {"kv_layout": "tokens_first"}),
        ("kv=2,context=4", {"kv_layout": "interleaved"}),
    ),
    "words": (
        (None, {"kv_layout": "interleaved_words", "num_layers": 2, "packed": False}),
        ("kv=2,context=4", {"kv_layout": "interleaved_words", "num_layers": 2}),
    ),
    "float16": ((None, {"dtype": jnp.float16}), ("kv=4,data=2", {"dtype": jnp.float16})),
}

# The same of quantised caches: what a scale covers, and what is stored.
_INT8, _E4M3, _E5M2 = ({"dtype": name} for name in DTYPES)
_HEAD = {"scales": "head"}
QUANTISED_MOVES = {
    "layouts": (
        (None, _INT8 | {"kv_layout": "heads_first"}),
        (None, _INT8 | {"kv_layout": "fused"}),
    ),
    "packed": ((None, _E4M3 | {"packed": True}), (None, _E4M3 | {"kv_layout": "heads_first"})),
    "into_packed": ((None, _E5M2), (None, _E5M2 | {"kv_layout": "fused", "packed": True})),
    "meshes": (
        ("data=2,context=4", _E4M3 | {"num_layers": 2, "packed": True}),
        ("kv=4", _E4M3 | {"num_layers": 2, "kv_layout": "heads_first"}),
    ),
    "explicit_axes": (
        ("data=2,context=4", _INT8 | {"axis_type": "Explicit"}),
        ("context=2,kv=4", _INT8 | {"axis_type": "Explicit"}),
    ),
    "token_major": (
        (None, _E5M2 | {"kv_layout": "tokens_first"}),
        ("kv=2,context=4", _E5M2 | {"kv_layout": "interleaved"}),
    ),
    "words": (
        (None, _INT8 | {"kv_layout": "interleaved_words", "num_layers": 2, "packed": False}),
        ("context=4", _INT8 | {"kv_layout": "interleaved_words", "num_layers": 2}),
    ),
    "heads": ((None, _INT8 | _HEAD), (None, _INT8 | _HEAD | {"kv_layout": "fused"})),
    "heads_of_meshes": (
        ("data=2,context=4", _E4M3 | _HEAD | {"num_layers": 3}),
        ("kv=4,data=2", _E4M3 | _HEAD | {"num_layers": 3, "kv_layout": "heads_first"}),
    ),
    "heads_packed": (
        ("context=8", _E5M2 | _HEAD | {"packed": True}),
        ("kv=2,context=4", _E5M2 | _HEAD | {"kv_layout": "tokens_first"}),
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_bit_arrives_and_no_other_changes(move):
    (spec, options), (to_spec, to_options) = MOVES[move]
    source, mesh = make_cache(spec, num_pages=16, **options)
    target, to_mesh = make_cache(to_spec, num_pages=24, **to_options)
    ids, to_ids = [3, 15, 0, 9, 6], [11, 2, 23, -1, 17]
    expected = content(target).copy()
    expected[:, [11, 2, 23, 17]] = content(source)[:, [3, 15, 0, 6]]
    before = content(source)
    pages = read_pages(source, ids, mesh=mesh)
    np.testing.assert_array_equal(bits(pages), before[:, ids])
    written = write_pages(target, to_ids, pages, mesh=to_mesh)
    assert target.key.is_deleted()  # donated
    np.testing.assert_array_equal(content(written), expected)
    np.testing.assert_array_equal(content(source), before)


@pytest.mark.parametrize("move", QUANTISED_MOVES)
def test_every_bit_and_its_scale_arrives_and_no_other_changes(move):
    (spec, options), (to_spec, to_options) = QUANTISED_MOVES[move]
    source, mesh = make_cache(spec, num_pages=16, **options)
    target, to_mesh = make_cache(to_spec, num_pages=24, **to_options)
    ids, to_ids = [3, -1, 15, 0, 9, 6], [11, 5, 2, 23, -1, 17]
    expected, scales = content(target).copy(), scales_of(target).copy()
    expected[:, [11, 2, 23, 17]] = content(source)[:, [3, 15, 0, 6]]
    expected[:, 5] = 0
    if source.scale == "token":
        scales[:, [11, 2, 23, 17]] = scales_of(source)[:, [3, 15, 0, 6]]
        scales[:, 5] = 0
    before = content(source), scales_of(source)
    pages = read_pages(source, ids, mesh=mesh)
    assert isinstance(pages, QuantisedPages)
    there = [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(bits(pages.elements)[:, there], before[0][:, [3, 15, 0, 9, 6]])
    assert not bits(pages.elements)[:, 1].any()
    if source.scale == "token":
        expected_scales = before[1][:, [3, 15, 0, 9, 6]]
        np.testing.assert_array_equal(bits(pages.scales)[:, there], bits(expected_scales))
        assert not bits(pages.scales)[:, 1].any()
    else:
        np.testing.assert_array_equal(np.asarray(pages.scales), before[1])
    written = write_pages(target, to_ids, jax.device_get(pages), mesh=to_mesh)
    assert all(x.is_deleted() for x in jax.tree.leaves(target))  # donated
    np.testing.assert_array_equal(content(written), expected)
    np.testing.assert_array_equal(bits(scales_of(written)), bits(scales))
    np.testing.assert_array_equal(content(source), before[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_of_other_scales_of_heads_are_nan_where_values_cannot_be_seen(dtype):
    """Compiled: those of the heads whose scale differs, in keys and, but for int8, in values."""
    source, _ = make_cache(dtype=dtype, scales="head")
    source = source.replace([jnp.ones_like(x) for x in source.arrays])
    scales = source.scales[0].at[2].multiply(2)
    target = source.replace([jnp.zeros_like(x) for x in source.arrays], [scales])
    write = jax.jit(lambda cache, pages: write_pages(cache, [7], pages))
    cache = write(target, read_pages(source, [3]))
    tables, lens = np.array([[7]], np.int32), np.array([8], np.int32)
    plan = make_plan(cache, lens, tables, num_heads=4)
    out, lse = attend(np.ones((1, 4, 64), np.float32), cache, plan, return_lse=True)
    seen = np.arange(4) == 2
    np.testing.assert_array_equal(np.isnan(np.asarray(lse))[0], seen)
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).all(-1)[0], seen)


def test_by_way_of_the_host():
    source, mesh = make_cache("kv=2,context=4", dtype=jnp.bfloat16)
    target, _ = make_cache(None, dtype=jnp.bfloat16, kv_layout="fused")
    expected = content(target).copy()
    expected[:, [8, 1]] = content(source)[:, [4, 5]]
    pages = np.asarray(read_pages(source, [4, 5], mesh=mesh))
    np.testing.assert_array_equal(content(write_pages(target, [8, 1], pages)), expected)


def test_in_a_shard_map_of_ones_own_ids_are_local():
    cache, mesh = make_cache("kv=4")
    layout = ShardLayout.of(mesh)
    expected = content(cache)[:, [5]]
    read = jax.shard_map(
        lambda cache: read_pages(cache, [5]),
        mesh=mesh,
        in_specs=cache.spec(layout),
        out_specs=layout.spec(None, None, None, "heads", None, None),
    )
    np.testing.assert_array_equal(bits(jax.jit(read)(cache)), expected)


def test_padding_is_read_as_zeros_on_every_mesh():
    source, mesh = make_cache("data=2,context=4")
    assert not bits(read_pages(source, [-1, 5, -1], mesh=mesh))[:, [0, 2]].any()
    assert read_pages(source, [], mesh=mesh).shape == (1, 0, 2, 4, 8, 64)


@pytest.mark.parametrize(
    ("name", "spec", "kv_layout"),
    [
        ("decoding", "kv=4", "heads_first"),
        ("mixed", "kv=4", "heads_first"),
        ("mixed", "kv=2,context=2,data=2", "fused"),
    ],
)
def test_running_sequences_go_on_elsewhere(name, spec, kv_layout):
    """From data=2,context=4 to another mesh and layout, other page ids: the same attention."""
    mesh, to_mesh = build_mesh("data=2,context=4"), build_mesh(spec)
    inputs = steps.make(steps.named(name), num_seq_shards=2, num_context_shards=4)
    source = place(
        PagedKVCache.of(
            inputs.key_cache, inputs.value_cache, kv_layout="blocks_first", head_dim=64
        ),
        mesh,
    )
    step, shards = inputs.step, ShardLayout.of(to_mesh).shards(to_mesh)
    target = PagedKVCache.zeros(160, 4, 8, 64, dtype=jnp.float32, kv_layout=kv_layout, mesh=to_mesh)
    target = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), target)
    allocator = PageAllocator(160, 8, num_seq_shards=shards.seqs, num_context_shards=shards.context)
    num_seqs, source_ids, target_ids = len(step.seqs), [], []
    for seq, length in enumerate(inputs.context_lens.tolist()):
        shard = seq * shards.seqs // num_seqs
        allocator.allocate(("between", seq), 8 * seq, shard)  # so that ids are not those of before
        target_ids += allocator.allocate(seq, length, shard)
        source_ids += inputs.block_tables[seq, : -(-length // 8)].tolist()
    pages = read_pages(source, source_ids, mesh=mesh)
    target = write_pages(target, target_ids, pages, mesh=to_mesh)
    tables = allocator.block_tables(range(num_seqs), max_blocks=12)
    arrays = (inputs.context_lens, tables, None if name == "decoding" else inputs.query_lens)
    sizes = {"num_heads": step.num_heads, "num_queries": step.num_queries * shards.seqs}
    plan = make_plan(target, *arrays, mesh=to_mesh, **sizes)
    rows = query_rows(inputs, shards.seqs)
    query = np.zeros((sizes["num_queries"], *inputs.query.shape[1:]), np.float32)
    query[rows] = inputs.query[query_rows(inputs, 2)]
    out, lse = attend(jnp.asarray(query), target, plan, return_lse=True)
    exact_out, exact_lse = steps.exact(inputs)
    for actual, exact in ((out, exact_out), (lse, exact_lse)):
        exact = exact[query_rows(inputs, 2)]
        assert np.isfinite(exact).all()
        np.testing.assert_allclose(np.asarray(actual)[rows], exact, rtol=2e-5, atol=2e-6)


def place(cache, mesh):
    sharding = jax.NamedSharding(mesh, cache.spec(ShardLayout.of(mesh)))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), cache)


def query_rows(inputs, num_seq_shards):
    """The rows that hold tokens, sequence by sequence, for so many shards."""
    counts = inputs.query_lens.reshape(num_seq_shards, -1).sum(axis=1)
    first = inputs.step.num_queries * np.arange(num_seq_shards)
    return np.concatenate([np.arange(a, a + n) for a, n in zip(first, counts, strict=True)])


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (jnp.float32, None),
        (jnp.bfloat16, None),
        *((dtype, scales) for dtype in DTYPES for scales in SCALES),
    ],
)
@pytest.mark.parametrize("spec", [None, "data=2,kv=2,context=2"])
def test_memory_is_that_of_the_pages_and_not_of_the_cache(spec, dtype, scales):
    """Compiled: a cache of sixteen times the pages needs no more, and writing is in place."""
    mesh = build_mesh(spec) if spec else None
    ids, temps = [3, 60, 5], []
    for num_pages in (64, 1024):
        cache = PagedKVCache.abstract(
            num_pages, 4, 16, 64, dtype=dtype, num_layers=2, kv_layout="heads_first", mesh=mesh,
            scales=scales,
        )  # fmt: skip
        elements = pages = jax.ShapeDtypeStruct((2, len(ids), 2, 4, 16, 64), dtype)
        if scales is not None:
            shape = (2, 2, 4) if scales == "head" else elements.shape[:-1]
            pages = QuantisedPages(elements, jax.ShapeDtypeStruct(shape, jnp.float32))
        read = jax.jit(lambda cache: read_pages(cache, ids, mesh=mesh))
        write = jax.jit(lambda cache, x: write_pages(cache, ids, x, mesh=mesh), donate_argnums=0)
        memory = [
            lowered.compile().memory_analysis()
            for lowered in (read.lower(cache), write.lower(cache, pages))
        ]
        assert memory[1].alias_size_in_bytes == cache.bytes_per_device()
        temps.append([each.temp_size_in_bytes for each in memory])
    moved = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pages))
    assert max(temps[1]) < 2 * moved
    assert np.subtract(*temps[::-1]).max() < 8 * 1024  # an int per page of the cache, at most


def test_writing_on_a_tpu_is_in_place():
    """Compiled for v6e: rows packed to 128 elements, layers, two ways of splitting."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")
    devices = np.array(meshes.topology("v6e:2x2").devices.flat[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "kv"))
    cache = PagedKVCache.abstract(512, 8, 16, 64, num_layers=2, mesh=mesh)
    pages = jax.ShapeDtypeStruct((2, 6, 2, 8, 16, 64), jnp.bfloat16)
    write = jax.jit(
        lambda cache, pages: write_pages(cache, range(6), pages, mesh=mesh),
        donate_argnums=0,
        out_shardings=cache.array_formats,
    )
    memory = write.lower(cache, pages).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.bytes_per_device()
    assert memory.temp_size_in_bytes < np.prod(pages.shape) * 2


DESCRIBED = {
    "plain": (None, {}),
    "fused_of_layers": ("data=2,kv=2,context=2", {"kv_layout": "fused", "num_layers": 3}),
    "packed": ("context=8", {"packed": True}),
    "heads_first_of_layers": ("kv=2,context=4", {"kv_layout": "heads_first", "num_layers": 2}),
    "bfloat16": ("data=8", {"dtype": jnp.bfloat16, "kv_layout": "fused", "packed": True}),
    "heads_first": ("data=2,kv=4", {"kv_layout": "heads_first", "dtype": jnp.float16}),
    "tokens_first": ("data=2,kv=4", {"kv_layout": "tokens_first", "dtype": jnp.float16}),
    "interleaved": ("kv=2,context=4", {"kv_layout": "interleaved", "num_layers": 2}),
    "words": ("context=4,kv=2", {"kv_layout": "interleaved_words", "dtype": jnp.bfloat16}),
    "padded": (None, {"kv_layout": "interleaved_words", "packed": False}),
    "int8": ("data=2,kv=2,context=2", {"dtype": jnp.int8, "num_layers": 3}),
    "e4m3": (None, _E4M3 | {"packed": True, "kv_layout": "fused", "num_layers": 2}),
    "e5m2": ("kv=4,data=2", _E5M2 | {"kv_layout": "heads_first", "packed": True}),
    "scales_of_heads": ("kv=2,context=4", _INT8 | _HEAD | {"num_layers": 2}),
    "scales_of_heads_in_words": (None, _E4M3 | _HEAD | {"kv_layout": "interleaved_words"}),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_description_leads_to_the_bytes_of_each_page(name):
    spec, options = DESCRIBED[name]
    cache, _ = make_cache(spec, num_pages=16, **options)
    description = json.loads(json.dumps(cache.describe()))
    assert description["version"] == (1 if cache.scale == "none" else 2)
    assert ("scales" in description) == (cache.scale != "none")
    buffers = buffers_of(cache.arrays)
    assert sum(shard["nbytes"] for shard in description["shards"]) == sum(
        map(len, buffers.values())
    )
    exact = content(cache)
    if cache.scale != "none":
        scale_buffers, scales = buffers_of(cache.scales), scales_of(cache)
        held = sum(shard["nbytes"] for shard in description["scales"]["shards"])
        assert held == sum(map(len, scale_buffers.values()))
        assert description["scales"]["of"] == cache.scale
    for layer in range(cache.num_layers or 1):
        for page in range(16):
            heads_found = []
            for piece in page_ranges(description, page, layer):
                first, stop = piece["kv_heads"]
                found = joined(buffers, piece, "ranges")
                assert found == exact[layer, page, :, first:stop].tobytes()
                assert piece["replica"] == 0
                heads_found += range(first, stop)
                if cache.scale != "none":
                    of_page = scales[layer] if cache.scale == "head" else scales[layer, page]
                    found = joined(scale_buffers, piece, "scale_ranges")
                    assert found == of_page[:, first:stop].tobytes()
            assert sorted(heads_found) == list(range(4))


def buffers_of(arrays):
    """The bytes of each array on each device."""
    return {
        (number, shard.device.id): np.asarray(shard.data).tobytes()
        for number, array in enumerate(arrays)
        for shard in array.addressable_shards
    }


def joined(buffers, piece, name):
    """The bytes of a device's ranges."""
    return b"".join(
        buffers[at["array"], piece["device"]["id"]][at["offset"] :][: at["length"]]
        for at in piece[name]
    )


def test_the_descriptions_formula_leads_to_each_scale():
    cache, _ = make_cache("kv=2,context=4", num_layers=2, packed=True, dtype="int8")
    scales, exact = cache.describe()["scales"], scales_of(cache)
    page, layer, head, kv = 9, 1, 3, 1
    for shard in scales["shards"]:
        (first, stop), (first_head, stop_head) = shard["pages"], shard["kv_heads"]
        if not (first <= page < stop and first_head <= head < stop_head):
            continue
        strides, pack = shard["strides"], scales["pack"]
        data = buffers_of(cache.scales)[shard["array"], shard["device"]["id"]]
        for t in range(8):
            at = layer * strides["layer"] + (page - first) * strides["page"] + kv * strides["kv"]
            at += (head - first_head) * strides["kv_head"]
            at += t % pack * strides["token"] + t // pack * strides["row"]
            assert data[at:][:4] == exact[layer, page, kv, head, t].tobytes()
        break
    else:
        pytest.fail("no shard has the page")


def test_the_descriptions_formula_leads_to_each_token():
    cache, _ = make_cache("kv=2,context=4", num_layers=2, kv_layout="heads_first", packed=True)
    description, exact = cache.describe(), content(cache)
    page, layer, head, token, kv = 9, 1, 3, 5, 1
    for shard in description["shards"]:
        (first, stop), (first_head, stop_head) = shard["pages"], shard["kv_heads"]
        if shard["holds"] == ["value"] and first <= page < stop and first_head <= head < stop_head:
            strides = shard["strides"]
            at = layer * strides["layer"] + (page - first) * strides["page"]
            at += (head - first_head) * strides["kv_head"] + token * strides["token"]
            (data,) = (
                np.asarray(each.data).tobytes()
                for each in cache.arrays[shard["array"]].addressable_shards
                if each.device.id == shard["device"]["id"]
            )
            assert data[at:][: 64 * 4] == exact[layer, page, kv, head, token].tobytes()
            break
    else:
        pytest.fail("no shard has the page")


def test_replicas_are_numbered():
    layout = ShardLayout(seqs=None, heads="kv", context=None)
    cache = PagedKVCache.abstract(
        4, 4, 8, 64, kv_layout="fused", mesh=build_mesh("data=2,kv=4"), layout=layout
    )
    pieces = page_ranges(cache.describe(), 2)
    assert [(p["replica"], p["kv_heads"]) for p in sorted(pieces, key=lambda p: p["replica"])] == [
        (replica, [head, head + 1]) for replica in range(2) for head in range(4)
    ]


PAGES = np.zeros((1, 2, 2, 4, 8, 64), np.float32)


@pytest.mark.parametrize(
    ("ids", "pages", "message"),
    [
        ([3, 16], PAGES, "page_ids holds 16; the cache has pages 0 to 15, and -1 is padding"),
        ([3, -2], PAGES, "page_ids holds -2"),
        ([3, 3], PAGES, "page_ids names page 3 twice; name each page once"),
        ([3, 1.5], PAGES, "page_ids must hold integers"),
        ([[3, 4]], PAGES, r"page_ids must be \[num_pages\]"),
        ([3], PAGES, r"pages has shape .*; this cache takes \(1, 1, .*len\(page_ids\)=1"),
        ([3, 4], np.zeros((2, 2, 2, 4, 8, 64), np.float32), "takes .*: num_layers=1, "),
        ([3, 4], np.zeros((1, 2, 2, 4, 8, 80), np.float32), "takes .* head_dim=64"),
        ([3, 4], PAGES.astype(np.float16), r"dtype float16, .* pages.astype\('float32'\)"),
        ([3, 4], None, "pages must be an array; got NoneType"),
    ],
)
def test_refuses(ids, pages, message):
    cache, _ = make_cache()
    with pytest.raises(ValueError, match=message):
        write_pages(cache, ids, pages)


BYTES, OF_TOKENS = PAGES.astype(np.int8), PAGES[..., 0]
OF_HEADS = np.stack(head_scales(4))[None]


@pytest.mark.parametrize(
    ("scales", "pages", "message"),
    [
        (None, BYTES, "pages are an array, and this cache of int8 has a scale of each token; pass"),
        ("head", BYTES, r"has a scale of each KV head; pass QuantisedPages\(elements, scales\)"),
        (None, (BYTES, OF_HEADS), r"float32\[1, 2, 4\]; .* of each token, .* \(1, 2, 2, 4, 8\): "),
        ("head", (BYTES, OF_TOKENS), r"scale of each KV head, .* \(1, 2, 4\): make both caches"),
        (None, (BYTES, OF_TOKENS.astype(np.float16)), r"pages.scales are float16.* takes float32"),
        (None, (BYTES, None), "pages are an array, and this cache of int8"),
        (None, (PAGES, OF_TOKENS), "pages has dtype float32, the cache int8; write_kv quantises"),
        (None, (BYTES[:, :1], OF_TOKENS), r"pages has shape .*; this cache takes \(1, 2, "),
        ("head", (BYTES, 2 * OF_HEADS), "of the keys of KV head 0 in layer 0 are 0.28.*'s 0.14"),
        ("head", (BYTES, OF_HEADS + np.eye(4, dtype=np.float32)[None, 2:]), "keys of KV head 2"),
    ],
)
def test_refuses_pages_of_other_scales(scales, pages, message):
    cache, _ = make_cache(dtype="int8", scales=scales)
    with pytest.raises(ValueError, match=message):
        write_pages(cache, [3, 4], QuantisedPages(*pages) if isinstance(pages, tuple) else pages)


def test_refuses_scales_for_a_cache_that_has_none():
    cache, _ = make_cache()
    pages = QuantisedPages(PAGES, OF_TOKENS)
    with pytest.raises(ValueError, match="a cache of float32 has no scales; multiply them: pages"):
        write_pages(cache, [3, 4], pages)


def test_refuses_what_is_no_such_cache():
    cache, mesh = make_cache("kv=4")
    with pytest.raises(ValueError, match=r"the cache is spread over .*; pass mesh= as well"):
        read_pages(cache, [1])
    with pytest.raises(ValueError, match="cache must be a PagedKVCache"):
        read_pages(cache.key, [1], mesh=mesh)
    with pytest.raises(ValueError, match="page_ids is traced; it is looked at on the host"):
        jax.jit(lambda ids: read_pages(cache, ids, mesh=mesh))(jnp.arange(2))
    with pytest.raises(ValueError, match="page=16 is none of the cache's, 0 to 15"):
        page_ranges(cache.describe(), 16)
    host = PagedKVCache.of(PAGES[0], kv_layout="fused", head_dim=64)
    with pytest.raises(ValueError, match="the cache is on no devices that could be described"):
        host.describe()
    with pytest.raises(ValueError, match=r"describe it outside of jax.jit"):
        jax.jit(lambda cache: cache.describe())(cache)
