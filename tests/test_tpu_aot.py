"""The TPU kernels compiled ahead of time for every generation: do they fit, and copy nothing?"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import meshes
import shardpage
from launch.generate.smollm2.model import Batch, Config, Layers, Model, Weights
from shardpage import PagedKVCache
from shardpage.page_format import KVLayout, PageFormat

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LAYOUTS = tuple(kv for kv in KVLayout if not kv.token_major)
MIB = 1 << 20

# queries per KV head, KV heads, head_dim, page_size, dtype
SHAPES = {
    "g8k1": (8, 1, 128, 16, jnp.bfloat16),
    "g4k8": (4, 8, 128, 64, jnp.bfloat16),
    "g1k32": (1, 32, 128, 32, jnp.bfloat16),
    "g32k1_page256": (32, 1, 128, 256, jnp.bfloat16),
    "g3k3_page24": (3, 3, 128, 24, jnp.bfloat16),
    "page8": (4, 2, 128, 8, jnp.bfloat16),
    "dim64": (8, 1, 64, 32, jnp.bfloat16),
    "dim32": (4, 2, 32, 32, jnp.bfloat16),
    "dim80": (4, 8, 80, 16, jnp.bfloat16),
    "dim96": (2, 2, 96, 16, jnp.bfloat16),
    "dim192": (8, 1, 192, 32, jnp.bfloat16),
    "dim256": (8, 1, 256, 32, jnp.bfloat16),
    "float32": (4, 2, 128, 16, jnp.float32),
}
MORE_SHAPES = {"dim64k8": (4, 8, 64, 16, jnp.bfloat16)}  # of token-major pages


def one_device(topology: str) -> Mesh:
    device = meshes.topology(topology).devices.flat[0]
    return Mesh(np.array([device]), ("data",))


def caches_of(mesh, kv: KVLayout, num_pages, num_kv_heads, page_size, head_dim, dtype) -> tuple:
    """Abstract caches as `PagedKVCache.zeros` makes them: packed where that fills the lanes, and
    otherwise row after row, which is not what XLA would choose for rows that it has to pad."""
    page_format = PageFormat(kv, num_kv_heads, page_size, head_dim, head_dim, np.dtype(dtype))
    shape = page_format.packed(None, on_tpu=True).array_shape(num_pages)
    rows = Layout(major_to_minor=tuple(range(len(shape))))
    sharding = NamedSharding(mesh, PartitionSpec())
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=Format(rows, sharding))
    return (array,) * page_format.num_arrays


def cache_like(kv: KVLayout, head_dim: int, arrays: tuple) -> PagedKVCache:
    """A cache of arrays of `caches_of`."""
    words = kv is KVLayout.INTERLEAVED_WORDS
    padding = -head_dim % 128 if words and head_dim != 64 else 0
    return PagedKVCache.of(*arrays, kv_layout=kv.label, head_dim=head_dim, padding=padding)


def lower_attention(topology, kv, shape, *, num_seqs=16, context=1024, num_pages=4096, **options):
    """page_attention of one device, lowered; and the bytes of its caches."""
    queries, num_kv_heads, head_dim, page_size, dtype = shape
    mesh = one_device(topology)
    sharding = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    caches = caches_of(mesh, kv, num_pages, num_kv_heads, page_size, head_dim, dtype)

    def attend(query, caches, lens, tables):
        if kv.token_major:
            cache = cache_like(kv, head_dim, caches)
            how = {"num_heads": query.shape[1], "mesh": mesh}
            return shardpage.attend(query, cache, shardpage.make_plan(cache, lens, tables, **how))
        return shardpage.page_attention(
            query,
            *(*caches, None)[:2],
            lens,
            tables,
            kv_layout=kv.label,
            mesh=mesh,
            **options,
        )

    lowered = jax.jit(attend).lower(
        array((num_seqs, queries * num_kv_heads, head_dim), dtype),
        caches,
        array((num_seqs,), jnp.int32),
        array((num_seqs, context // page_size), jnp.int32),
    )
    return lowered, sum(cache.size * jnp.dtype(dtype).itemsize for cache in caches)


def in_turn(names) -> list:
    """(name, topology, kv): each name on one or two generations, each of them in each layout."""
    every_third = list(itertools.product(names, TOPOLOGIES))[::3]
    return [(*pair, LAYOUTS[i % len(LAYOUTS)]) for i, pair in enumerate(every_third)]


# Pages as other libraries keep them, where the kernels read them.
TOKEN_MAJOR = [
    ("g4k8", "v6e:2x2", KVLayout.INTERLEAVED_WORDS),
    ("dim256", "v4:2x2x1", KVLayout.INTERLEAVED_WORDS),
    ("dim64k8", "v5e:2x2", KVLayout.INTERLEAVED_WORDS),
    ("dim80", "v5p:2x2x1", KVLayout.INTERLEAVED_WORDS),
    ("float32", "tpu7x:2x2x1", KVLayout.INTERLEAVED_WORDS),
    ("g8k1", "tpu7x:2x2x1", KVLayout.INTERLEAVED),
    ("g4k8", "v5e:2x2", KVLayout.TOKENS_FIRST),
]


@pytest.mark.parametrize(("name", "topology", "kv"), [*in_turn(SHAPES), *TOKEN_MAJOR])
def test_attention_compiles_without_a_copy_of_the_cache(name, topology, kv):
    lowered, cache_bytes = lower_attention(topology, kv, (SHAPES | MORE_SHAPES)[name])
    compiled = lowered.compile()
    assert "shardpage_decode" in compiled.as_text()
    assert cache_bytes >= 8 * MIB
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * MIB


@pytest.mark.parametrize(
    ("name", "topology", "kv"),
    [
        ("g8k1", "v6e:2x2", KVLayout.FUSED),
        ("page8", "v5p:2x2x1", KVLayout.FUSED),
        ("dim80", "v4:2x2x1", KVLayout.FUSED),
        ("g3k3_page24", "v6e:2x2", KVLayout.FUSED),
        ("float32", "tpu7x:2x2x1", KVLayout.FUSED),
        *(each for each in TOKEN_MAJOR if each[0] not in ("dim80", "dim256")),
    ],
)
def test_prompts_compile_without_a_copy_of_the_cache(name, topology, kv):
    """A chunk of 1024 tokens, guesses or running sequences: all kernels of a step."""
    queries, num_kv_heads, head_dim, page_size, dtype = (SHAPES | MORE_SHAPES)[name]
    mesh, num_queries = one_device(topology), 1024
    sharding = NamedSharding(mesh, PartitionSpec())
    given = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    cache = caches_of(mesh, kv, 4096, num_kv_heads, page_size, head_dim, dtype)

    def step(query, arrays, lens, query_lens, tables):
        paged = cache_like(kv, head_dim, arrays)
        how = {"num_heads": queries * num_kv_heads, "num_queries": num_queries, "mesh": mesh}
        plan = shardpage.make_plan(paged, lens, tables, query_lens=query_lens, **how)
        return shardpage.attend(query, paged, plan)

    query = given((num_queries, queries * num_kv_heads, head_dim), dtype)
    lens = given((8,), jnp.int32)
    tables = given((8, -(-8192 // page_size)), jnp.int32)
    compiled = jax.jit(step).lower(query, cache, lens, lens, tables).compile()
    assert "shardpage_prompt" in compiled.as_text()
    rows = num_queries * max(queries * num_kv_heads, 8) * max(head_dim, 128) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * rows + 4 * MIB


@pytest.mark.parametrize(("num_seqs", "context"), [(8, 1 << 20), (1024, 128 << 10)])
def test_tables_that_do_not_fit_scalar_memory(num_seqs, context):
    lowered, _ = lower_attention(
        "v6e:2x2", KVLayout.FUSED, SHAPES["g8k1"], num_seqs=num_seqs, context=context
    )
    table_bytes = 4 * num_seqs * context // 16
    assert table_bytes > MIB
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temp < 2 * table_bytes + 64 * MIB


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1"])
@pytest.mark.parametrize("mode", ["kv_head", "batch", "auto"])
def test_megacore_compiles(topology, mode):
    lowered, _ = lower_attention(topology, KVLayout.FUSED, SHAPES["g4k8"], megacore_mode=mode)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * MIB


def test_megacore_is_refused_on_one_core():
    with pytest.raises(NotImplementedError, match=r"a device of this kind .* is one core"):
        lower_attention("v5e:2x2", KVLayout.FUSED, SHAPES["g4k8"], megacore_mode="batch")


@pytest.mark.parametrize(
    ("name", "topology", "kv"),
    [
        *in_turn(["g4k8", "page8", "dim64", "dim80", "dim192", "dim256", "float32"]),
        *TOKEN_MAJOR,
    ],
)
def test_write_updates_the_cache_in_place(name, topology, kv):
    _, num_kv_heads, head_dim, page_size, dtype = (SHAPES | MORE_SHAPES)[name]
    mesh = one_device(topology)
    sharding = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    caches = caches_of(mesh, kv, 2048, num_kv_heads, page_size, head_dim, dtype)
    cache = cache_like(kv, head_dim, caches)
    tokens = array((64, num_kv_heads, head_dim), dtype)
    ids = array((64,), jnp.int32)

    def write(cache, key, value, seq_ids, positions, tables):
        return shardpage.write_kv(cache, key, value, seq_ids, positions, tables, mesh=mesh)

    formats = jax.tree.map(lambda x: x.sharding if x.format is None else x.format, cache)
    compiled = (
        jax.jit(write, donate_argnums=0, out_shardings=formats)
        .lower(cache, tokens, tokens, ids, ids, array((64, 16), jnp.int32))
        .compile()
    )
    assert "shardpage_write" in compiled.as_text()
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * jnp.dtype(dtype).itemsize for x in caches)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 2 * MIB


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v4:2x2x1", {"data": 4}),
        ("v5e:2x2", {"data": 2, "context": 2}),
        ("v6e:2x2", {"data": 1}),
        ("tpu7x:2x2x1", {"context": 4}),
    ],
)
def test_a_step_of_generate_has_all_kernels_and_one_cache(topology, axes):
    """SmolLM2's shapes, in four layers: prompts and answers in one step."""
    config = Config(4, 576, 9, 3, 64, 1536, 49152, 1e4, 1e-5, 2048)
    devices = meshes.topology(topology).devices.flat[: math.prod(axes.values())]
    mesh = Mesh(np.reshape(devices, tuple(axes.values())), tuple(axes))
    model = Model(config, mesh)

    def array(split_axis: int | None, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = model.split.sharding(shape, split_axis)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    every = lambda *of_one: [array(*of_one)] * config.num_layers
    norms, heads = array(None, config.num_layers, 576), config.num_heads + 2 * config.num_kv_heads
    layers = Layers(
        norms, every(0, heads * 64, 576), every(1, 576, 576),
        norms, every(1, 2, 1536, 576), every(1, 576, 1536),
    )  # fmt: skip
    weights = Weights(array(0, config.vocab_size, 576), layers, array(None, 576))
    cache = PagedKVCache.abstract(
        1024, config.num_kv_heads, 16, 64, dtype="float32", num_layers=config.num_layers, mesh=mesh
    )
    batch = Batch.empty(num_tokens=128, num_rows=8, max_blocks=128)
    compiled = Model.step.lower(model, weights, cache, batch).compile()
    kernels = set(re.findall(r"shardpage_[a-z]+", compiled.as_text()))
    assert kernels == {"shardpage_decode", "shardpage_prompt", "shardpage_write"}
    memory, cache_bytes = compiled.memory_analysis(), cache.bytes_per_device()
    assert memory.alias_size_in_bytes >= cache_bytes
    # What is left is the model's: XLA copies the embedding into another layout.
    embedding_bytes = 4 * config.vocab_size * 576 // len(devices)
    assert memory.temp_size_in_bytes < 2 * embedding_bytes + 16 * MIB
