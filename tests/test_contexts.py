"""Whatever surrounds a call: transformations, settings of JAX, meshes around it, small machines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshes
from shardpage import PagedKVCache, merge_partials, page_attention, write_kv
from shardpage.backends.pallas_tpu import chip
from shardpage.options import Tuning
from shardpage.shard_layout import Split
from shardpage.sharded import _place, as_int32, platform_of

from . import tolerance
from .backends import INTERPRETED, attend, backends, interpret
from .cases import Case, build_mesh, make, named

CASE = Case("context", num_seqs=2, lens=(40, 64))


def written(backend, mesh=None):
    cache = PagedKVCache.zeros(8, 2, 16, 64, dtype=jnp.float32, mesh=mesh)
    tokens = jnp.ones((3, 2, 64), jnp.float32)
    where = jnp.array([0, 1, 1]), jnp.array([3, 20, 70]), jnp.arange(8).reshape(2, 4)
    how = {"backend": backend, "interpret": interpret(backend), "mesh": mesh}
    return write_kv(cache, tokens, tokens, *where, **how)


@backends
class TestSettings:
    @pytest.mark.parametrize("spec", [None, "kv=2,context=2"])
    @pytest.mark.parametrize("name", ["jax_numpy_rank_promotion", "jax_enable_x64"])
    def test_that_concern_types(self, backend, name, spec):
        mesh = spec and build_mesh(spec)
        inputs = make(CASE, num_context_shards=2 if mesh else 1)
        settings = {
            "jax_numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
            "jax_enable_x64": lambda: jax.enable_x64(True),
        }
        with settings[name]():
            out, lse = attend(inputs, backend, mesh=mesh)
            cache = written(backend, mesh)
            merged, _ = merge_partials(*map(jnp.asarray, (out, lse, out, lse)))
        tolerance.assert_within_rounding(inputs, out, lse)
        np.testing.assert_allclose(merged, out, rtol=1e-6)
        assert cache.key.sum() == 2 * 2 * 64

    def test_no_implicit_transfers(self, backend):
        inputs = make(CASE)
        arrays = [jnp.asarray(array) for array in inputs.arrays]
        call = {"kv_layout": "blocks_first", "backend": backend, "interpret": interpret(backend)}
        if backend in INTERPRETED:  # whose interpreter in JAX itself moves scalars as it runs
            with jax.transfer_guard("disallow"):
                jax.jit(lambda *arrays: page_attention(*arrays, **call)).lower(*arrays)
            return
        expected = page_attention(*arrays, **call)
        with jax.transfer_guard("disallow"):
            out = page_attention(*arrays, **call)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"num_splits": np.int64(3), "sliding_window": np.int64(20)}),
        ({}, {"attn_scale": np.float64(0.5), "attn_logits_soft_cap": np.float32(3)}),
        ({"head_dim": 128, "dtype": "bfloat16"}, {"pages_per_compute_block": 1}),
        ({"num_heads": 71, "num_kv_heads": 1}, {"max_context_len": np.int32(30)}),
        ({"max_blocks": 4000}, {"num_splits": 600}),
    ],
    ids=["splits and window", "logits", "one page a block", "mqa", "wide table in many splits"],
)
def test_kernels_are_traced_in_64_bits(shape, options):
    """Each mode has index arithmetic of its own, in which int32 must not meet int64."""
    inputs = make(CASE.replace(**shape))
    with jax.enable_x64(True):
        call = lambda *arrays: page_attention(
            *arrays, kv_layout="blocks_first", backend="pallas_tpu", return_lse=True, **options
        )
        out, lse = jax.eval_shape(call, *map(jnp.asarray, inputs.arrays))
    assert (out.dtype, lse.dtype) == (inputs.query.dtype, jnp.float32)


@backends
class TestVmap:
    def test_over_queries_and_caches(self, backend):
        layers = [make(CASE, seed=seed) for seed in range(2)]
        query, key, value = (jnp.stack([layer.arrays[n] for layer in layers]) for n in range(3))
        lens, tables = (jnp.stack([layer.arrays[n] for layer in layers]) for n in (3, 4))
        call = lambda *arrays: page_attention(
            *arrays, kv_layout="blocks_first", backend=backend, interpret=interpret(backend)
        )
        for layer, out in zip(layers, jax.vmap(call)(query, key, value, lens, tables), strict=True):
            tolerance.assert_within_rounding(layer, np.asarray(out))

    def test_over_a_mesh(self, backend):
        inputs, mesh = make(CASE), build_mesh("kv=2")
        query = jnp.stack([inputs.query, 2 * inputs.query])
        call = lambda query: page_attention(
            query, *inputs.arrays[1:], kv_layout="blocks_first", backend=backend, mesh=mesh,
            interpret=interpret(backend),
        )  # fmt: skip
        tolerance.assert_within_rounding(inputs, np.asarray(jax.vmap(call)(query)[0]))


def test_a_gradient_of_a_kernel_is_refused():
    inputs = make(CASE)
    with pytest.raises(NotImplementedError, match="no gradients; differentiate through backend='x"):
        jax.grad(lambda query: page_attention(
            query, *inputs.arrays[1:], kv_layout="blocks_first", backend="pallas_tpu"
        ).sum())(inputs.query)  # fmt: skip


class TestInterpretedOnMeshes:
    """Kernels on a mesh wait for each other, each in a thread of XLA's."""

    def test_refused_where_they_would_wait_for_ever(self, monkeypatch):
        monkeypatch.setenv("NPROC", "2")  # XLA has a thread per device at least: eight
        inputs = make(named("plain"), num_seq_shards=8)
        with pytest.raises(NotImplementedError, match=r"8 CPU devices .* with NPROC=16"):
            attend(inputs, "pallas_tpu", mesh=build_mesh("data=8"))

    @pytest.mark.parametrize(("nproc", "threads"), [("3", 8), ("20", 20)])
    def test_threads(self, monkeypatch, nproc, threads):
        monkeypatch.setenv("NPROC", nproc)
        assert chip._num_threads() == threads


class TestPlatform:
    def test_of_a_traced_array_is_the_surrounding_meshs(self):
        pytest.importorskip("libtpu", reason="TPU topologies need libtpu")
        mesh = meshes.topology("v5e:2x2", "data=4").abstract_mesh
        seen = []
        jax.make_jaxpr(lambda x: seen.append(platform_of(None, x)))(1.0)
        with jax.sharding.use_abstract_mesh(mesh):
            jax.make_jaxpr(lambda x: seen.append(platform_of(None, x)))(1.0)
        assert seen == [None, "tpu"]

    def test_a_kernel_that_is_named_is_compiled_for_a_tpu_that_is_not_there(self):
        """Nothing but the lowering knows the platform; on CPUs the same function is interpreted."""
        pytest.importorskip("libtpu", reason="TPU topologies need libtpu")
        device = meshes.topology("v5e:2x2").devices.flat[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        inputs = make(CASE.replace(head_dim=128, dtype="bfloat16"))
        call = jax.jit(lambda *arrays: page_attention(
            *arrays, kv_layout="blocks_first", backend="pallas_tpu"))  # fmt: skip
        abstract = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in inputs.arrays
        ]
        assert "shardpage_decode" in call.lower(*abstract).compile().as_text()
        tolerance.assert_within_rounding(inputs, np.asarray(call(*inputs.arrays)))

    def test_a_kernel_in_a_shard_map_of_a_tpu_mesh_is_compiled_not_interpreted(self):
        pytest.importorskip("libtpu", reason="TPU topologies need libtpu")
        mesh = meshes.topology("v5e:2x2", "data=4")
        specs = [jax.sharding.PartitionSpec("data")] * 5
        shapes = [((4, 8, 128), jnp.bfloat16), *[((8, 2, 16, 128), jnp.bfloat16)] * 2,
                  ((4,), jnp.int32), ((4, 2), jnp.int32)]  # fmt: skip
        arrays = [
            jax.ShapeDtypeStruct(*shape, sharding=jax.sharding.NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        call = lambda *arrays: page_attention(*arrays, kv_layout="blocks_first")
        mapped = jax.shard_map(call, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0])
        assert "shardpage_decode" in jax.jit(mapped).lower(*arrays).compile().as_text()


def test_tuning_knows_what_a_chip_is():
    assert chip.chip_of(Tuning(chip=chip.UNKNOWN_CHIP)) is chip.UNKNOWN_CHIP
    assert chip.chip_of(Tuning()) is chip.UNKNOWN_CHIP


def test_what_needs_no_cast_and_no_move_is_taken_as_it_is():
    """Either is a program of its own, and was most of an eager call on a mesh."""
    lens = jnp.full(8, 100)
    assert as_int32(lens) is lens
    split = Split.of(build_mesh("data=2"), None)
    placed = jax.device_put(lens, jax.NamedSharding(split.mesh, jax.P("data")))
    assert _place(placed, spec=jax.P(("data",)), split=split, movable=True) is placed
