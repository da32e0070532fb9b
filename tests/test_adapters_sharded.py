"""Other libraries' calls on a mesh: their conventions of a shard's own lists, ours of pages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshes
from shardpage import ShardLayout
from shardpage.adapters import ejkernel, sglang_jax, tpu_inference

from .cases import build_mesh
from .peers_batch import Batch, assert_attends, assert_written, batch, laid_out
from .steps import Step

P = PartitionSpec
# Two sequences a shard of `data`; heads enough for four of `model`.
STEP = Step("shards", ((3, 3), (21, 1), (30, 3), (9, 0)), 5, num_heads=8, num_kv_heads=4)
STEP = STEP.replace(head_dim=128, max_blocks=4)


def lists(made: Batch, num_shards: int, num_pages: int):
    """Of each shard, one after another: its lengths, ids from its first page, sums from 0."""
    inputs, per_shard = made.inputs, len(made.inputs.context_lens) // num_shards
    tables = inputs.block_tables.reshape(num_shards, -1)
    first = np.arange(num_shards)[:, None] * (num_pages // num_shards)
    there = (tables >= first) & (tables < first + num_pages // num_shards)
    tables = np.where(there, tables - first, -1).astype(np.int32)
    lens = inputs.query_lens.reshape(num_shards, per_shard)
    sums = np.pad(np.cumsum(lens, axis=1), ((0, 0), (1, 0))).astype(np.int32)
    distribution = np.tile(np.array([0, 0, per_shard], np.int32), num_shards)
    return tuple(
        jnp.asarray(x.reshape(-1)) for x in (inputs.context_lens, tables, sums, distribution)
    )


@pytest.mark.parametrize(
    ("spec", "axis_type", "changes", "context"),
    [
        ("data=2,model=2", "Explicit", {"window": 7}, None),
        ("data=2,model=4", "Auto", {"num_kv_heads": 2, "soft_cap": 1.5}, None),
        ("data=1,model=4", "Auto", {"head_dim": 64, "dtype": "bfloat16", "sinks": True}, None),
        ("data=2,model=2,context=2", "Auto", {"sinks": True}, "context"),
    ],
    ids=["explicit", "repeated_heads", "heads_that_fill_words", "context"],
)
def test_tpu_inference(spec, axis_type, changes, context):
    step, mesh = STEP.replace(**changes), build_mesh(spec, axis_type)
    data, model = mesh.shape["data"], mesh.shape["model"]
    step = step.replace(num_queries=10 // data)
    made = batch(step, num_seq_shards=data, num_context_shards=mesh.shape.get(context, 1))
    inputs, shared = made.inputs, step.head_dim == 64
    repeats = max(model // step.num_kv_heads, 1)
    pages = [
        np.repeat(x, repeats, axis=2) for x in (inputs.key_cache_before, inputs.value_cache_before)
    ]
    (cache,) = laid_out(*pages, shared, shards=model)
    layout = context and ShardLayout("data", "model", context)
    held = layout.pages if layout else "data"
    cache = jax.device_put(cache, NamedSharding(mesh, P(held, None, "model", None, None)))
    out, new = tpu_inference.sharded_ragged_paged_attention(
        mesh, *made.tokens, cache, *lists(made, data, len(cache)), made.sinks, 0.1,
        attention_chunk_size=step.window, attn_logits_soft_cap=step.soft_cap, layout=layout,
    )  # fmt: skip
    assert_attends(made, out, scale=0.1, soft_cap=step.soft_cap)
    assert cache.is_deleted()
    assert new.sharding.is_equivalent_to(cache.sharding, 5)
    inputs.key_cache, inputs.value_cache = (
        np.repeat(x, repeats, axis=2) for x in (inputs.key_cache, inputs.value_cache)
    )
    assert_written(made, new, shared, shards=model)


@pytest.mark.parametrize("name", [None, "v5e:2x2", "v6e:2x2"])
def test_nothing_is_sent_and_no_cache_copied(name):
    """Compiled for CPUs; ahead of time for TPUs, whose kernels read and write it as it lies."""
    if name:
        pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")
    mesh = meshes.topology(name, "data=2,model=2") if name else build_mesh("data=2,model=2")
    made = batch(STEP, num_seq_shards=2)
    wide = P("data", None, "model", None, None)
    shape = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    tokens = [shape(x.shape, x.dtype, P("data", "model")) for x in made.tokens]
    cache = shape((4096, 8, 8, 1, 128), jnp.float32, wide)
    arrays = [shape(x.shape, x.dtype, P("data")) for x in lists(made, 2, 4096)]
    call = functools.partial(
        tpu_inference.sharded_ragged_paged_attention, mesh, attention_sink=None, sm_scale=0.1
    )
    names = ("q", "k", "v", "kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")
    run = jax.jit(lambda *xs: call(**dict(zip(names, xs, strict=True))), donate_argnums=3)
    program = run.lower(*tokens, cache, *arrays).compile()
    text = program.as_text()
    assert not re.search(r"\b(all-\w+|collective-\w+|reduce-scatter)\(", text)
    kernels = {f"shardpage_{x}" for x in ("write_tokens", "decode", "prompt")} if name else set()
    assert set(re.findall(r"%(shardpage_\w+)\S* = .*custom-call\(", text)) == kernels
    memory, cache_bytes = program.memory_analysis(), 4096 * 8 * 8 * 128 * 4 // 4
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_meshes_that_do_not_fit_are_refused():
    made = batch(STEP, num_seq_shards=2)
    (cache,) = made.cache("", shared=False)
    rest = (cache, *lists(made, 2, len(cache)), None, 0.1)

    def call(spec, heads=4, **options):
        queries, *new = made.tokens
        new = [x[:, :heads] for x in new]
        mesh = build_mesh(spec)
        tpu_inference.sharded_ragged_paged_attention(mesh, queries, *new, *rest, **options)

    with pytest.raises(ValueError, match=r"axes \{'tensor': 2\} that split neither tokens"):
        call("data=2,tensor=2")
    layout = ShardLayout("data", "tensor", None)
    with pytest.raises(ValueError, match="2 KV heads of head_dim=128, over 2 shards, take"):
        call("data=2,tensor=2", 2, layout=layout)
    with pytest.raises(ValueError, match="3 KV heads over 4 head shards; these must be a multiple"):
        call("data=2,tensor=4", 3, layout=layout)


@pytest.mark.parametrize("which", ["v2", "v3", "unified"])
def test_ejkernel_maps_over_a_mesh(which):
    """Heads over an axis, the rest everywhere."""
    mesh, made = build_mesh("tp=2"), batch(STEP.replace(num_queries=8, sinks=True))
    tokens, lens = P(None, "tp"), made.lists
    real = made.num_seqs
    if which == "v3":
        (cache,) = made.cache("", shared=False)
        arrays = (*made.tokens, cache, *lens, made.sinks)
        wide = P(None, None, "tp")
        specs = {
            "in_specs": (*[tokens] * 3, wide, *[P()] * 4, P("tp")),
            "out_specs": (tokens, wide),
        }
        call = functools.partial(ejkernel.ragged_page_attention_v3, softmax_scale=0.1)
    elif which == "v2":
        cache = made.cache("interleaved", written=True)
        num_seqs = jnp.array([real], jnp.int32)
        arrays = (made.tokens[0], *cache, lens[0], made.tables, lens[2], num_seqs, made.sinks)
        in_specs = (tokens, P(None, None, "tp"), *[P()] * 4, P("tp"))
        specs = {"in_specs": in_specs, "out_specs": tokens}
        call = functools.partial(ejkernel.ragged_page_attention_v2, softmax_scale=0.1)
    else:
        cache = made.cache("tokens_first", written=True)
        lists = (lens[0][:real], jnp.asarray(made.tables[:real]), lens[2][: real + 1])
        arrays = (made.tokens[0], *cache, *lists, None, None, made.sinks)
        in_specs = (tokens, *[P(None, None, "tp")] * 2, *[P()] * 3, None, None, P("tp"))
        specs = {"in_specs": in_specs, "out_specs": tokens}
        call = functools.partial(ejkernel.unified_attention, softmax_scale=0.1)
    out = call(*arrays, mesh=mesh, **specs)
    if which == "v3":
        out, new = out
        assert_written(made, new, shared=False)
    assert_attends(made, out, scale=0.1)


@pytest.mark.parametrize(
    ("spec", "seqs", "options"),
    [
        ("data=4,tensor=2", (*[(0, 0)] * 2, (21, 1), (30, 1), *[(0, 0)] * 2, (9, 1), (1, 1)), {}),
        (
            "data=2,tensor=2",
            ((30, 30), (13, 13), (10, 10), (32, 32)),
            {"sliding_window": 7, "soft_cap": 1.5},
        ),
    ],
    ids=["shards_without_sequences", "prompts"],
)
def test_sglang_jax_maps_over_a_mesh(spec, seqs, options):
    """As its attention layer calls it: in a shard_map of its own, each shard with lists from 0."""
    mesh = build_mesh(spec)
    data, tensor = mesh.shape["data"], mesh.shape["tensor"]
    per_shard = np.array([new for _, new in seqs]).reshape(data, -1).sum(axis=1).max()
    step = STEP.replace(seqs=seqs, num_queries=int(per_shard), sinks=True, dtype="bfloat16")
    step = step.replace(window=options.get("sliding_window"), soft_cap=options.get("soft_cap"))
    made = batch(step, num_seq_shards=data)
    inputs = made.inputs
    (cache,) = laid_out(inputs.key_cache_before, inputs.value_cache_before, False, shards=tensor)
    cache = jax.device_put(cache, NamedSharding(mesh, P("data", None, "tensor")))
    kv_lens, tables, cu_q_lens, _ = (np.asarray(x) for x in lists(made, data, len(cache)))
    pages = -(-kv_lens.reshape(data, -1) // step.page_size)
    starts = np.pad(np.cumsum(pages, axis=1), ((0, 0), (1, 0))) * step.page_size
    rows = tables.reshape(data, pages.shape[1], -1)
    flat = [[*np.concatenate([r[:n] for r, n in zip(*x, strict=True)]), *[-7] * 16][:16] for x in
            zip(rows, pages, strict=True)]  # fmt: skip
    real = (kv_lens.reshape(data, -1) > 0).sum(axis=1)
    tokens, metadata = P("data", "tensor"), P("data")
    call = functools.partial(sglang_jax.ragged_paged_attention, sm_scale=0.1, **options)
    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(*[tokens] * 3, P("data", None, "tensor"), *[metadata] * 5, None, P("tensor")),
        out_specs=(tokens, P("data", None, "tensor")),
    )
    arrays = (kv_lens, np.array(flat), cu_q_lens, starts, np.repeat(real, 3))
    arrays = [jnp.asarray(x.reshape(-1), jnp.int32) for x in arrays]
    out, new = jax.jit(mapped)(*made.tokens, cache, *arrays, None, made.sinks)
    assert_attends(made, out, scale=0.1, soft_cap=step.soft_cap)
    assert_written(made, new, shared=False, shards=tensor)
