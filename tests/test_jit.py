"""With `jax.jit` or without, from the host or the device: the same answers, and traced once."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import monitoring
from jax.sharding import NamedSharding, PartitionSpec

from shardpage import PagedKVCache, ShardLayout, merge_partials, page_attention, write_kv

from .cases import KV_LAYOUTS, Case, build_mesh, make, named
from .tolerance import assert_within_rounding

everywhere = chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
in_every_layout = parameterized.named_parameters((name, name) for name in KV_LAYOUTS)


def write_inputs(num_tokens=8, seed=0):
    """key, value, seq_ids, positions, block_tables: one token per sequence, one page each."""
    rng = np.random.default_rng(seed)
    key, value = rng.standard_normal((2, num_tokens, 4, 64), np.float32)
    positions = rng.integers(0, 8, num_tokens).astype(np.int32)
    seqs = np.arange(num_tokens, dtype=np.int32)
    return key, value, seqs, positions, seqs[:, None]


class TestVariants(chex.TestCase):
    """`self.variant` jits, or leaves it; puts the arguments on the device, or takes them off it."""

    @everywhere
    @in_every_layout
    def test_page_attention(self, kv_layout):
        inputs = make(named("plain"), kv_layout)
        attend = functools.partial(
            page_attention, kv_layout=kv_layout, backend="xla", return_lse=True
        )
        out, lse = self.variant(attend)(*inputs.arrays)
        chex.assert_tree_is_on_device((out, lse), device=jax.devices()[0])
        chex.assert_shape([out, lse], [inputs.query.shape, inputs.query.shape[:2]])
        chex.assert_type([out, lse], [inputs.query.dtype, jnp.float32])
        assert_within_rounding(inputs, out, lse)

    @everywhere
    @in_every_layout
    def test_write_kv(self, kv_layout):
        key, value, seqs, positions, tables = write_inputs()
        cache = PagedKVCache.zeros(8, 4, 8, 64, dtype=jnp.float32, kv_layout=kv_layout)
        written = self.variant(functools.partial(write_kv, backend="xla"))(
            cache, key, value, seqs, positions, tables
        )
        chex.assert_tree_is_on_device(written, device=jax.devices()[0])
        keys, values = np.zeros((2, 8, 8, 4, 64), np.float32)  # page, slot, head, dim
        keys[seqs, positions], values[seqs, positions] = key, value
        pages = [pages.transpose(0, 2, 1, 3) for pages in (keys, values)]
        if kv_layout == "heads_first":
            pages = [pages.swapaxes(0, 1) for pages in pages]
        expected = [np.stack(pages, axis=1)] if kv_layout == "fused" else pages
        chex.assert_trees_all_equal(jax.tree.leaves(written), expected)

    @everywhere
    def test_merge_partials(self):
        rng = np.random.default_rng(0)
        outs = rng.standard_normal((2, 3, 4, 8), np.float32)
        lses = rng.standard_normal((2, 3, 4), np.float32)
        weight = np.exp(lses) / np.exp(lses).sum(0)
        expected = (weight[..., None] * outs).sum(0), np.log(np.exp(lses).sum(0))
        merged = self.variant(merge_partials)(outs[0], lses[0], outs[1], lses[1])
        chex.assert_trees_all_close(merged, expected, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(("auto", "Auto"), ("explicit", "Explicit"))
    def test_on_a_mesh(self, axis_type):
        """The cache stays where it was made; the output is split as the query."""
        mesh = build_mesh("data=2,kv=2,context=2", axis_type)
        key, value, seqs, positions, tables = write_inputs()
        cache = PagedKVCache.zeros(8, 4, 8, 64, dtype=jnp.float32, mesh=mesh)

        @self.variant
        def step(cache, query, key, value, seqs, positions, lens, tables):
            cache = write_kv(cache, key, value, seqs, positions, tables, mesh=mesh)
            return cache, page_attention(
                query, cache.key, cache.value, lens, tables, kv_layout=cache.kv_layout, mesh=mesh
            )

        shardings = jax.tree.map(lambda array: array.sharding, cache)
        first = np.zeros_like(positions)
        query = np.repeat(key, 2, axis=1)
        cache, out = step(cache, query, key, value, seqs, first, first + 1, tables)
        chex.assert_tree_is_sharded((cache, out), devices=mesh.devices.flat)
        split = NamedSharding(mesh, PartitionSpec("data", "kv"))
        same = lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, (cache, out), (shardings, split))))
        chex.assert_trees_all_close(out, np.repeat(value, 2, axis=1), rtol=1e-6)  # one token each


# Traces


@contextlib.contextmanager
def compilations():
    """What JAX traces, lowers and compiles meanwhile, as a list of events."""
    events = []

    def listen(event: str, seconds: float, **about) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append((event.rpartition("/")[-1], about.get("fun_name")))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listen)


# What is called, and the arguments of three calls: the same shapes, other values, lengths, pages.


def attends(mesh):
    def attend(query, key_cache, value_cache, context_lens, block_tables):
        return page_attention(
            query, key_cache, value_cache, context_lens, block_tables,
            kv_layout="blocks_first", mesh=mesh, return_lse=True,
        )  # fmt: skip

    counts = mesh and ShardLayout.of(mesh).shards(mesh)
    split = (
        {}
        if mesh is None
        else {"num_seq_shards": counts.seqs, "num_context_shards": counts.context}
    )

    def arrays(seed):
        inputs = make(Case("traced", lens="full"), seed=seed, placement="round_robin", **split)
        lens = np.random.default_rng(seed).integers(0, 65, 8).astype(np.int32)
        return *inputs.arrays[:3], lens, inputs.block_tables

    return attend, [arrays(seed) for seed in range(3)]


def writes(mesh):
    def write(cache, key, value, seq_ids, positions, block_tables):
        return write_kv(cache, key, value, seq_ids, positions, block_tables, mesh=mesh)

    caches = [PagedKVCache.zeros(8, 4, 8, 64, dtype=jnp.float32, mesh=mesh) for _ in range(3)]
    return write, [(cache, *write_inputs(seed=seed)) for seed, cache in enumerate(caches)]


def merges(mesh):
    def merge(out_a, lse_a, out_b, lse_b):
        return merge_partials(out_a, lse_a, out_b, lse_b)

    def draw(*shape):
        array = rng.standard_normal(shape, np.float32)
        split = mesh and NamedSharding(mesh, PartitionSpec("data", "kv"))
        return jax.device_put(array, split)

    rng = np.random.default_rng(0)
    partial = lambda: (draw(8, 4, 16), draw(8, 4))
    return merge, [(*partial(), *partial()) for _ in range(3)]


def decodes(mesh):
    """Steps that hand their cache on: what `write_kv` returns is nothing new to it."""
    cache = [PagedKVCache.zeros(8, 4, 8, 64, dtype=jnp.float32, mesh=mesh)]

    def decode(query, key, value, seq_ids, positions, lens, block_tables):
        cache[0] = write_kv(cache[0], key, value, seq_ids, positions, block_tables, mesh=mesh)
        return page_attention(
            query, cache[0].key, cache[0].value, lens, block_tables, kv_layout="blocks_first",
            mesh=mesh,
        )  # fmt: skip

    steps = []
    for seed in range(3):
        key, value, seqs, _, tables = write_inputs(seed=seed)
        position = np.full_like(seqs, seed)
        steps.append((np.repeat(key, 2, 1), key, value, seqs, position, position + 1, tables))
    return decode, steps


on_meshes = pytest.mark.parametrize("spec", [None, "data=2,kv=2,context=2"])


@on_meshes
@pytest.mark.parametrize("calls", [attends, writes, merges, decodes])
def test_a_second_eager_call_traces_and_compiles_nothing(calls, spec):
    call, arguments = calls(spec and build_mesh(spec))
    jax.clear_caches()
    with compilations() as first:
        jax.block_until_ready(call(*arguments[0]))
    assert first  # they would be seen
    with compilations() as again:
        for others in arguments[1:]:
            jax.block_until_ready(call(*others))
    assert not again


@on_meshes
@pytest.mark.parametrize("calls", [attends, writes, merges])
def test_a_function_that_is_jitted_is_traced_once(calls, spec):
    call, arguments = calls(spec and build_mesh(spec))
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(call, n=1))
    for each in arguments:
        jax.block_until_ready(jitted(*each))
    with pytest.raises(AssertionError, match="is traced > 1 times"):  # other dtypes are traced anew
        jitted(*(jax.tree.map(lambda x: x.astype(jnp.bfloat16), a) for a in arguments[0]))


@pytest.mark.parametrize("spec", [None, "data=1,kv=2"])
@pytest.mark.parametrize(
    ("calls", "programs"), [(attends, 1), (writes, 1), (merges, 1), (decodes, 2)]
)
def test_an_eager_call_is_one_program_and_moves_nothing(calls, programs, spec):
    """Of arrays that are where the call needs them: a cast or a move would be another dispatch."""
    mesh = spec and build_mesh(spec)
    call, arguments = calls(mesh)
    first, second = (placed(each, mesh) for each in arguments[:2])
    jax.clear_caches()
    with compilations() as events:
        jax.block_until_ready(call(*first))
    assert [event for event, _ in events].count("backend_compile_duration") == programs
    with jax.transfer_guard("disallow_explicit"):
        jax.block_until_ready(call(*second))


def placed(arguments, mesh):
    """The arrays of a call on a mesh of `kv` alone: what has heads, split over them."""

    def put(array):
        spec = {3: (None, "kv"), 4: (None, "kv")}.get(array.ndim, ())
        return jax.device_put(array, mesh and NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, arguments)


@pytest.mark.parametrize("spec", [None, "data=2,kv=2,context=2"])
def test_zeros_compiles_once_for_all_layers(spec):
    mesh = spec and build_mesh(spec)
    make_cache = lambda: PagedKVCache.zeros(16, 2, 16, 64, kv_layout="heads_first", mesh=mesh)
    make_cache()
    with compilations() as events:
        make_cache()
    assert not events
