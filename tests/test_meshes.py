"""Mesh specs, meshes and simulated devices."""

import json
import math
import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import meshes
from meshes import MeshAxis, MeshSpec
from meshes.make import split_slices
from shardpage import PagedKVCache, ShardLayout, page_attention, write_kv

from .cases import Case, make
from .tolerance import assert_within_rounding


@pytest.fixture
def devices():
    meshes.simulate(8)
    return jax.devices("cpu")[:8]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, where JAX has not started."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
        | {"JAX_PLATFORMS": "cpu"}
        | env,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def exponents(number: int) -> list[int]:
    """The exponents of the prime factors: 12 -> [2, 1]."""
    counts = []
    for prime in range(2, number + 1):
        count = 0
        while number % prime == 0:
            number, count = number // prime, count + 1
        counts.append(count)
    return counts


class TestSpec:
    @pytest.mark.parametrize(
        ("text", "axes"),
        [
            ("data=2,kv=4", [("data", 2, 1), ("kv", 4, 1)]),
            (" data = 2 , kv=-1 ", [("data", 2, 1), ("kv", -1, 1)]),
            ("dcn.data=2,data=4,kv=8", [("data", 4, 2), ("kv", 8, 1)]),
            ("kv=8,dcn.data=2", [("kv", 8, 1), ("data", 1, 2)]),
            ("dcn.data=-1,kv=8", [("data", 1, -1), ("kv", 8, 1)]),
        ],
    )
    def test_parses(self, text, axes):
        assert MeshSpec.parse(text).axes == tuple(MeshAxis(*axis) for axis in axes)

    @pytest.mark.parametrize(
        "text", ["", "data", "data=", "=2", "data=0", "data=-2", "data=two", "2=2", "data=2,,kv=2",
                 "dcn.=2", "data:2", "data=2;kv=2"],
    )  # fmt: skip
    def test_refuses_bad_grammar_and_shows_the_right_one(self, text):
        with pytest.raises(ValueError, match=r"write NAME=SIZE or dcn\.NAME=SIZE"):
            MeshSpec.parse(text)

    def test_refuses_an_axis_twice(self):
        with pytest.raises(ValueError, match=r"sizes the axis 'dcn\.data' twice"):
            MeshSpec.parse("dcn.data=2,kv=2,dcn.data=2")

    def test_refuses_two_open_sizes(self):
        with pytest.raises(ValueError, match="more than one size open"):
            MeshSpec.parse("dcn.data=-1,kv=-1")

    @given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 4)), min_size=1, max_size=4))
    @settings(deadline=None)
    def test_text_form_round_trips(self, sizes):
        names = ("data", "context", "kv", "expert")
        spec = MeshSpec(tuple(MeshAxis(n, *s) for n, s in zip(names, sizes, strict=False)))
        assert MeshSpec.parse(str(spec)) == spec
        assert spec.resolve(math.prod(spec.shape), spec.num_slices) == spec

    @given(st.integers(1, 96), st.integers(1, 4))
    @settings(deadline=None)
    def test_factorings_are_all_and_each_once(self, total, num_axes):
        found = list(meshes.factorings(total, num_axes))
        assert len(set(found)) == len(found)
        assert all(math.prod(shape) == total for shape in found)
        prime_powers = [math.comb(k + num_axes - 1, k) for k in exponents(total)]
        assert len(found) == math.prod(prime_powers)


class TestMake:
    @pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
    def test_follows_the_spec(self, devices, axis_types):
        mesh = meshes.make("data=2,kv=1,context=4", devices, axis_types=axis_types)
        assert dict(mesh.shape) == {"data": 2, "kv": 1, "context": 4}
        assert mesh.axis_types == (axis_types,) * 3
        assert list(mesh.devices.flat) == devices

    def test_axes_are_auto_by_default(self, devices):
        assert meshes.make("data=8", devices).axis_types == (AxisType.Auto,)

    def test_axis_types_may_differ(self, devices):
        types = (AxisType.Explicit, AxisType.Auto)
        assert meshes.make("data=2,kv=4", devices, axis_types=types).axis_types == types
        with pytest.raises(ValueError, match="2 axis types for the 1 axes"):
            meshes.make("data=8", devices, axis_types=types)

    def test_fills_an_open_size(self, devices):
        assert dict(meshes.make("data=2,kv=-1", devices).shape) == {"data": 2, "kv": 4}

    def test_default_is_all_devices(self, devices):
        mesh = meshes.make("data=-1")
        assert set(mesh.devices.flat) == set(jax.devices())

    @pytest.mark.parametrize("spec", ["data=2,kv=3", "data=4,kv=1", "data=4,kv=4", "data=3,kv=-1"])
    def test_never_leaves_devices_over(self, devices, spec):
        with pytest.raises(ValueError, match=r"8 devices.*Axes data, kv fit as .*data=2,kv=4"):
            meshes.make(spec, devices)

    def test_suggests_the_nearest_factoring_first(self, devices):
        with pytest.raises(ValueError, match=r"fit as data=2,context=2,kv=2 \|.*\(2 more\)"):
            meshes.make("data=2,context=2,kv=3", devices)

    def test_refuses_repeated_or_no_devices(self, devices):
        with pytest.raises(ValueError, match="distinct devices"):
            meshes.make("data=2", [devices[0], devices[0]])
        with pytest.raises(ValueError, match="at least one"):
            meshes.make("data=-1", [])

    def test_context_gets_the_nearest_devices_wherever_it_stands(self, devices):
        mesh = meshes.make("context=4,data=2", devices)
        assert [d.id for d in mesh.devices[:, 0]] == [d.id for d in devices[:4]]

    def test_simulated_slices_are_outermost_on_their_axis(self, devices):
        mesh = meshes.make("dcn.data=2,data=2,kv=2", devices)
        assert dict(mesh.shape) == {"data": 4, "kv": 2}
        assert list(mesh.devices[:2].flat) == devices[:4]
        middle = meshes.make("kv=2,dcn.data=2,data=2", devices)
        assert set(middle.devices[:, :2].flat) == set(devices[:4])

    def test_slices_must_divide(self, devices):
        with pytest.raises(ValueError, match="slices must have equally many devices"):
            meshes.make("dcn.data=3,data=2", devices)
        with pytest.raises(ValueError, match=r"8 devices in 2 slices of 4.*fit as dcn.data=2"):
            meshes.make("dcn.data=2,data=3", devices)


class FakeDevice:
    """Like a TPU device of a job on several slices, with ids that are not contiguous."""

    platform, device_kind, process_index = "cpu", "cpu", 0

    def __init__(self, id: int, slice_index: int):
        self.id, self.slice_index = id, slice_index


class TestSlices:
    def test_grouped_by_index_whatever_the_order(self):
        fakes = [FakeDevice(100_000 * i + j, i) for j in range(3) for i in (1, 0)]
        groups = split_slices(fakes)  # pyright: ignore[reportArgumentType]
        assert [[d.id for d in g] for g in groups] == [[0, 1, 2], [100_000, 100_001, 100_002]]

    def test_unequal_slices_are_refused_with_their_counts(self):
        fakes = [FakeDevice(0, 0), FakeDevice(1, 0), FakeDevice(2, 1)]
        with pytest.raises(ValueError, match=r"\{0: 2, 1: 1\}"):
            split_slices(fakes)  # pyright: ignore[reportArgumentType]


class TestSimulate:
    def test_is_fine_with_what_is_there(self, devices):
        meshes.simulate(len(devices))
        meshes.simulate(1)

    def test_makes_a_mesh_of_exactly_this_many(self, devices):
        mesh = meshes.simulate(4, "data=2,context=2")
        assert list(mesh.devices.flat) == devices[:4]

    @pytest.mark.parametrize(
        ("name", "spec", "num_slices", "shape"),
        [
            ("v5e:2x4", "data=2,context=-1", 1, {"data": 2, "context": 4}),
            ("v5e:2x4", None, 1, {"data": 8}),
            ("tpu7x:2x2x1", "kv=8", 1, {"kv": 8}),
            ("v5e:2x2", "data=2,context=4", 2, {"data": 2, "context": 4}),
            ("v5e:2x2", "dcn.data=2,data=2,kv=2", 2, {"data": 4, "kv": 2}),
        ],
    )
    def test_stands_in_for_a_named_slice(self, devices, name, spec, num_slices, shape):
        mesh = meshes.simulate(name, spec, num_slices=num_slices)
        assert dict(mesh.shape) == shape
        assert list(mesh.devices.flat) == devices

    def test_named_slices_must_fit_the_spec(self, devices):
        with pytest.raises(ValueError, match=r"8 devices in 2 slices of 4, and mesh 'kv=8'"):
            meshes.simulate("v5e:2x2", "kv=8", num_slices=2)
        with pytest.raises(ValueError, match="unknown slice 'v5e'"):
            meshes.simulate("v5e", "kv=8")

    def test_says_that_it_is_too_late(self, devices):
        present = jax.local_device_count()
        with pytest.raises(RuntimeError, match=rf"started with {present} CPU.*simulate\(4096\)"):
            meshes.simulate(4096)

    def test_refuses_no_devices(self):
        with pytest.raises(ValueError, match="what=0 must be a positive integer: CPU devices"):
            meshes.simulate(0)

    def test_import_and_request_do_not_start_jax(self):
        result = run_python("""
            import jax, meshes
            meshes.simulate(3)
            meshes.simulate(2)                                # never fewer than asked before
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize("localhost:0", 1, 0, cluster_detection_method="deactivate")
            print(len(jax.devices()), jax.devices()[0].platform)
        """.replace("localhost:0", f"localhost:{free_port()}"), JAX_PLATFORMS="")  # fmt: skip
        assert result.stdout.split() == ["3", "cpu"], result.stderr

    def test_says_when_the_cpu_is_shut_out(self):
        result = run_python("import meshes; meshes.simulate(2)", JAX_PLATFORMS="tpu")
        assert "limited to the platforms 'tpu'" in result.stderr


def test_processes_with_gaps_between_their_device_ids():
    """Two processes of two devices each: ids 0, 1, 2048, 2049; `context` stays inside a process."""
    code = f"""
        import json, sys, jax, meshes
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        meshes.simulate(2)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize("localhost:{free_port()}", 2, int(sys.argv[1]),
                                   cluster_detection_method="deactivate")
        mesh = meshes.make("context=-1,data=2")
        assert [[d.process_index for d in row] for row in mesh.devices.T] == [[0, 0], [1, 1]]
        shards = jax.make_array_from_callback(
            (4,), NamedSharding(mesh, P(("data", "context"))), lambda i: np.arange(4.0)[i])
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(shards)
        print(json.dumps([float(total), *sorted(d.id for d in mesh.devices.flat)]))
    """
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [6.0, 0, 1, 2048, 2049]


class TestPlanHeads:
    @pytest.mark.parametrize(
        ("heads", "spec", "shape", "layout"),
        [
            ((32, 8), "data=2,kv=4", {"data": 2, "kv": 4}, ShardLayout("data", "kv", None)),
            ((6, 3), "kv=8", {"kv": 1, "kv_rest": 8}, ShardLayout(None, "kv", ("kv_rest",))),
            ((4, 1), "data=2,kv=4", {"data": 2, "kv": 1, "kv_rest": 4},
             ShardLayout("data", "kv", ("kv_rest",))),
            ((64, 8), "kv=16,context=2", {"kv": 8, "kv_rest": 2, "context": 2},
             ShardLayout(None, "kv", ("context", "kv_rest"))),
            ((12, 6), "kv=4", {"kv": 2, "kv_rest": 2}, ShardLayout(None, "kv", ("kv_rest",))),
            ((8, 8), "data=8", {"data": 8}, ShardLayout("data", None, None)),
        ],
    )  # fmt: skip
    def test_from_sizes_alone(self, heads, spec, shape, layout):
        plan = meshes.plan_heads(*heads, spec)
        assert isinstance(plan.mesh, AbstractMesh)
        assert dict(plan.mesh.shape) == shape
        assert plan.layout == layout
        assert (plan.copies, plan.extra_bytes) == (1, 0)
        assert plan.head_shards == shape.get("kv", 1)

    def test_keeps_devices_in_order_and_axis_types(self, devices):
        mesh = meshes.make("data=2,kv=4", devices, axis_types=AxisType.Explicit)
        plan = meshes.plan_heads(4, 2, mesh)
        assert list(plan.mesh.devices.flat) == devices
        assert plan.mesh.axis_types == (AxisType.Explicit,) * 3
        assert meshes.plan_heads(8, 4, mesh).mesh is mesh

    def test_replicating_says_what_it_costs(self):
        plan = meshes.plan_heads(6, 3, "kv=8", surplus="replicate", cache_bytes=2**30)
        assert (plan.copies, plan.extra_bytes, plan.context) == (8, 7 * 2**30, None)
        assert "8 times the cache, 7 GiB more over all devices" in plan.reason
        assert meshes.plan_heads(6, 3, "kv=8", surplus="replicate").extra_bytes is None

    def test_refusing_names_the_nearest_sizes(self):
        with pytest.raises(ValueError, match=r"12 KV heads.*kv=8.*kv=4, kv=6, kv=12.*no copies"):
            meshes.plan_heads(24, 12, "kv=8", surplus="refuse")
        assert meshes.plan_heads(24, 12, "kv=4", surplus="refuse").head_shards == 4

    def test_refuses_uneven_groups_and_open_sizes(self):
        with pytest.raises(ValueError, match="num_q_heads=8 must be a multiple of num_kv_heads=3"):
            meshes.plan_heads(8, 3, "kv=8")
        with pytest.raises(ValueError, match="sizes must be known here"):
            meshes.plan_heads(6, 3, "kv=-1")

    @pytest.mark.parametrize(
        ("heads", "spec", "surplus"),
        [
            ((6, 3), "kv=8", "context"),
            ((4, 1), "data=2,kv=4", "context"),
            ((4, 2), "kv=4,context=2", "context"),
            ((4, 2), "kv=4,context=2", "replicate"),
        ],
    )
    def test_works_end_to_end(self, devices, heads, spec, surplus):
        plan = meshes.plan_heads(*heads, meshes.make(spec, devices), surplus=surplus)
        check_end_to_end(plan, *heads)

    def test_eight_heads_on_sixteen_devices(self):
        result = run_python("""
            import meshes
            mesh = meshes.simulate(16, "kv=16")
            from tests.test_meshes import check_end_to_end
            check_end_to_end(meshes.plan_heads(16, 8, mesh), 16, 8)
            print("checked")
        """)
        assert result.stdout.endswith("checked\n"), result.stderr

    def test_works_in_one_jit_with_arrays_on_the_uncut_mesh(self, devices):
        mesh = meshes.make("data=2,kv=4", devices)
        plan = meshes.plan_heads(2, 1, mesh)
        weight = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P("kv")))
        cache = jax.device_put(np.ones(8, np.float32), NamedSharding(plan.mesh, P("kv_rest")))
        assert float(jax.jit(lambda w, c: w.sum() + c.sum())(weight, cache)) == 12.0


def check_end_to_end(plan: meshes.HeadPlan, num_heads: int, num_kv_heads: int):
    """Attention on a plan's mesh is right, and it keeps as many copies of the cache as it says."""
    case = Case(f"plan{num_kv_heads}", num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16)
    counts = plan.layout.shards(plan.mesh)
    assert (counts.heads, counts.context) == (plan.head_shards, plan.context_shards)
    inputs = make(case, num_seq_shards=counts.seqs, num_context_shards=counts.context)
    on_mesh = {"mesh": plan.mesh, "layout": plan.layout}
    out, lse = page_attention(*inputs.arrays, **on_mesh, kv_layout="blocks_first", return_lse=True)
    assert_within_rounding(inputs, out, lse)

    cache = PagedKVCache.zeros(inputs.num_pages, num_kv_heads, 16, 16, **on_mesh)
    whole = sum(array.nbytes for array in jax.tree.leaves(cache))
    assert cache.bytes_per_device() * plan.mesh.size == plan.copies * whole
    token = np.ones((counts.seqs, num_kv_heads, 16), jax.numpy.bfloat16)
    rows = np.arange(counts.seqs, dtype=np.int32) * (case.num_seqs // counts.seqs)
    cache = write_kv(cache, token, token, rows, 0 * rows, inputs.block_tables, **on_mesh)
    assert float(cache.key.astype(np.float32).sum()) == token.size
