"""One cache for all layers of a model: a scan carries it in place, and the plan stays outside."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from shardpage import PagedKVCache, ShardLayout, attend, make_plan, write_kv

from . import steps
from .cases import KV_LAYOUTS, build_mesh


@functools.partial(jax.jit, static_argnames="model", donate_argnums=1)
def layered(model, cache, query, key, value):
    """A layer after the other on its own tokens: `[layers, num_queries, heads, head_dim]`."""
    plan = model(cache)

    def layer(cache, tokens):
        number, query, key, value = tokens
        cache = write_kv(cache, key, value, plan, layer=number)
        return cache, attend(query, cache, plan, layer=number)

    numbers = jnp.arange(len(query), dtype=jnp.int32)
    return jax.lax.scan(layer, cache, (numbers, query, key, value))


def on(spec, kv_layout, num_layers, backend="xla", step="mixed", dtype="float32"):
    """A model's plan, its empty cache, and tokens for each layer."""
    mesh = None if spec is None else build_mesh(spec)
    counts = ShardLayout.of(mesh).shards(mesh) if mesh else None
    split = {"num_seq_shards": counts.seqs, "num_context_shards": counts.context} if counts else {}
    inputs = steps.make(steps.named(step), kv_layout, **split)
    case = inputs.step
    cache = PagedKVCache.zeros(
        inputs.key_cache.shape[1 if kv_layout == "heads_first" else 0],
        case.num_kv_heads,
        case.page_size,
        case.head_dim,
        dtype=dtype,
        kv_layout=kv_layout,
        num_layers=num_layers,
        mesh=mesh,
    )
    rng = np.random.default_rng(0)
    shape = (num_layers, inputs.num_queries)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    tokens = [rng.standard_normal((*shape, n, case.head_dim), np.float32) for n in heads]
    return functools.partial(steps.planned, inputs, backend, mesh), cache, tokens


@pytest.mark.parametrize(
    ("spec", "kv_layout"),
    [
        *((None, kv_layout) for kv_layout in KV_LAYOUTS),
        ("data=2,context=2,kv=2", "heads_first"),
        ("data=2,context=2,kv=2", "interleaved_words"),
    ],
)
def test_layers_of_a_scan_are_caches_of_their_own(spec, kv_layout):
    model, cache, tokens = on(spec, kv_layout, 3)
    _, out = layered(model, cache, *tokens)
    axis = cache.layout.value.pages
    for number in range(3):
        arrays = [jnp.zeros(np.delete(x.shape, axis), x.dtype) for x in cache.arrays]
        one = PagedKVCache.of(*arrays, kv_layout=kv_layout, head_dim=cache.head_dim)
        plan = model(one)
        query, key, value = (x[number] for x in tokens)
        one = write_kv(one, key, value, plan)
        np.testing.assert_array_equal(np.asarray(attend(query, one, plan)), np.asarray(out[number]))


@pytest.mark.parametrize(
    ("spec", "step", "kv_layout", "dtype"),
    [
        (None, "mixed", "blocks_first", "float32"),
        (None, "one_token", "blocks_first", "float32"),
        ("data=2,context=2,kv=2", "mixed", "blocks_first", "float32"),
        (None, "one_token", "interleaved", "float32"),
        (None, "one_token", "interleaved_words", "float16"),
        (None, "mixed", "heads_first", "bfloat16"),
        ("data=2,context=2,kv=2", "mixed", "fused", "bfloat16"),
    ],
)
def test_a_scan_copies_no_cache_and_plans_nothing(spec, step, kv_layout, dtype):
    temps = []
    for num_layers in (2, 12):
        model, cache, tokens = on(spec, kv_layout, num_layers, step=step, dtype=dtype)
        compiled = layered.lower(model, cache, *tokens).compile()
        memory, size = compiled.memory_analysis(), sum(x.nbytes for x in cache.arrays)
        assert memory.alias_size_in_bytes == size // (8 if spec else 1)
        temps.append(memory.temp_size_in_bytes)
    layer_bytes = size // 12 // (8 if spec else 1)
    assert temps[1] - temps[0] < layer_bytes  # of ten layers more
    text = compiled.as_text()
    in_loops = re.findall(r'op_name="[^"]*while/body[^"]*"', text)
    assert in_loops
    assert re.search(r'op_name="[^"]*/plan/', text)  # before the loop
    assert not [name for name in in_loops if re.search(r"while/body.*/plan/", name)]


def test_a_layer_is_named_where_there_are_several_and_only_there():
    model, cache, tokens = on(None, "fused", 2)
    plan = model(cache)
    query, key, value = (x[0] for x in tokens)
    with pytest.raises(ValueError, match="holds 2 layers; pass layer="):
        attend(query, cache, plan)
    with pytest.raises(ValueError, match="holds 2 layers; pass layer="):
        write_kv(cache, key, value, plan)
    with pytest.raises(ValueError, match="layer=2 must be at most 1"):
        attend(query, cache, plan, layer=2)
    with pytest.raises(ValueError, match="layer must hold integers"):
        attend(query, cache, plan, layer=jnp.float32(1))
    single = PagedKVCache.of(cache.key[0], kv_layout="fused", head_dim=cache.head_dim)
    with pytest.raises(ValueError, match="layer=0 of a cache of one layer"):
        attend(query, single, plan, layer=0)


@pytest.mark.parametrize("kv_layout", ["blocks_first", "fused", "interleaved_words"])
def test_interpreted_kernels_know_layers(kv_layout):
    model, cache, tokens = on(None, kv_layout, 2, backend="pallas_tpu", step="decoding")
    expected = layered(on(None, kv_layout, 2, step="decoding")[0], cache, *tokens)
    cache = jax.tree.map(jnp.zeros_like, expected[0])
    written, out = layered(model, cache, *tokens)
    for actual, wanted in zip(written.arrays, expected[0].arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected[1]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["v5e:2x2", "tpu7x:2x2x1"])
def test_on_tpus_a_scan_copies_no_cache_and_plans_nothing(name):
    """Compiled ahead of time: the kernels, what is truly a layer's, and no sort."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")
    mesh = meshes.topology(name, "data=4" if name == "v5e:2x2" else "data=8")
    num_seqs, num_layers, num_pages = 8 * mesh.size, 4, 64 * mesh.size
    cache = PagedKVCache.abstract(num_pages, 4, 16, 128, num_layers=num_layers, mesh=mesh)
    layout = ShardLayout.of(mesh)

    def array(dtype, *shape, dims):
        sharding = jax.NamedSharding(mesh, layout.spec(*dims))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    token = lambda heads: array(
        jnp.bfloat16, num_layers, num_seqs, heads, 128, dims=(None, "seqs", None, None)
    )
    lens = array(jnp.int32, num_seqs, dims=("seqs",))
    tables = array(jnp.int32, num_seqs, 32, dims=("seqs", None))

    def step(cache, query, key, value, lens, tables):
        plan = make_plan(cache, lens, tables, num_heads=16, mesh=mesh)
        return layered.__wrapped__(lambda _: plan, cache, query, key, value)

    compiled = (
        jax.jit(step, donate_argnums=0, out_shardings=(cache.array_formats, None))
        .lower(cache, token(16), token(4), token(4), lens, tables)
        .compile()
    )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    size = sum(np.prod(x.shape) * 2 for x in cache.arrays) // mesh.size
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // num_layers
    in_loop = [line for line in text.splitlines() if "while/body" in line]
    assert sum("custom-call(" in line and "shardpage" in line for line in in_loop) == 2
    assert not [line for line in in_loop if re.search(r" sort\(|/plan/", line)]


@pytest.mark.parametrize(
    ("backend", "kv_layout"),
    [("xla", "fused"), ("pallas_tpu", "fused"), ("pallas_tpu", "interleaved_words")],
)
@pytest.mark.parametrize("number", [-1, 2, 2**31 - 1])
def test_a_traced_layer_that_there_is_not(number, backend, kv_layout):
    """What Python refuses, a compiled program answers: NaN, and nothing is written."""
    model, cache, tokens = on(None, kv_layout, 2, backend, step="one_token")
    plan = model(cache)
    query, key, value = (x[0] for x in tokens)
    number = jnp.int32(number)
    before = jax.tree.map(np.asarray, cache.arrays)
    assert np.isnan(np.asarray(attend(query, cache, plan, layer=number))).all()
    written = write_kv(cache, key, value, plan, layer=number)
    for actual, expected in zip(written.arrays, before, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), expected)
