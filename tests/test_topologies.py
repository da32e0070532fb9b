"""Named slices, meshes over TPU slices that are not there, and what compiled programs send."""

import itertools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import meshes
from meshes import PodSlice

pytest.importorskip("libtpu", reason="compiling for TPU slices needs libtpu: shardpage[tpu]")


class TestPodSlice:
    @pytest.mark.parametrize(
        ("name", "canonical", "num_chips", "num_devices"),
        [
            ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
            ("v5p-128", "v5p:4x4x4", 64, 64),  # counts cores
            ("v4-8", "v4:2x2x1", 4, 4),
            ("v5litepod-16", "v5e:4x4", 16, 16),  # counts chips
            ("v5e-4", "v5e:2x2", 4, 4),
            ("v6e-256", "v6e:16x16", 256, 256),
            ("tpu7x-8", "tpu7x:2x2x1", 4, 8),  # counts devices
            ("tpu7x:16x16x36", "tpu7x:16x16x36", 9216, 18432),
            ("v5p:12x12x24", "v5p:12x12x24", 3456, 3456),  # whole cubes, in no table
            ("v5p:16x16x24", "v5p:16x16x24", 6144, 6144),
        ],
    )
    def test_names(self, name, canonical, num_chips, num_devices):
        pod = PodSlice.parse(name)
        assert (str(pod), pod.num_chips, pod.num_devices) == (canonical, num_chips, num_devices)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("v9:2x2", "unknown slice 'v9:2x2'.*v4, v5e, v5p, v6e, tpu7x"),
            ("v5p", "unknown slice 'v5p'; write GENERATION:SHAPE"),
            ("v5e:3x3", "no slice of shape 3x3.*2x2, 2x4, 4x4"),
            ("v6e:32x32", "up to 256 chips"),
            ("v5p:16x20x28", "up to 6144 chips.*or 3 multiples of 4"),
            ("v5p-100", "counts cores, 2 per chip; known are v5p-2, v5p-8, v5p-16"),
            ("tpu7x-12", "counts devices"),
        ],
    )
    def test_unknown_names_say_what_is_known(self, name, message):
        with pytest.raises(ValueError, match=message):
            PodSlice.parse(name)

    def test_facts_have_sources_and_plausible_units(self):
        for chip in meshes.chips().values():
            assert chip.source.startswith("https://")
            assert 16 <= chip.hbm_gib <= 192
            assert 800 <= chip.hbm_gbps <= 7400
            assert 400 <= chip.ici_gbps <= 1200
            assert max(math.prod(map(int, s.split("x"))) for s in chip.shapes) == chip.max_chips

    def test_rings_close_where_the_links_are(self):
        assert PodSlice.parse("v5p:4x4x8").wraps == (True, True, True)
        assert PodSlice.parse("v5p:2x4x4").wraps == (False, False, False)
        assert PodSlice.parse("v5e:8x16").wraps == (False, True)


class TestTopology:
    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x1",
                                      "v5e:1x1", "v5p:1x1x1", "v5p:16x16x24"])  # fmt: skip
    def test_has_the_devices_that_the_data_say(self, name):
        pod = PodSlice.parse(name)
        mesh = meshes.topology(name)
        assert mesh.size == pod.num_devices
        assert {device.device_kind for device in mesh.devices.flat} == {pod.chip.device_kind}
        assert meshes.Chip.of_kind(mesh.devices.flat[0].device_kind) == pod.chip
        per_host = min(math.prod(pod.chip.host), pod.num_chips) * pod.chip.devices
        hosts = {device.process_index for device in mesh.devices.flat}
        assert len(hosts) == pod.num_devices // per_host

    def test_follows_spec_and_axis_types(self):
        mesh = meshes.topology("v5p-128", "data=2,kv=-1", axis_types=AxisType.Explicit)
        assert dict(mesh.shape) == {"data": 2, "kv": 32}
        assert mesh.axis_types == (AxisType.Explicit,) * 2

    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1"])
    def test_megacore_or_separate_cores(self, name):
        assert meshes.topology(name, megacore=True).size == 4
        mesh = meshes.topology(name, "data=4,context=2", megacore=False)
        assert all(a.coords == b.coords for a, b in mesh.devices)  # the two cores of each chip

    def test_two_devices_of_a_chip_are_the_nearest_neighbours(self):
        mesh = meshes.topology("tpu7x:2x2x1", "context=2,data=4")
        assert all(a.coords == b.coords for a, b in mesh.devices.T)

    def test_refuses(self):
        with pytest.raises(ValueError, match="v5e has no megacore to switch: always 1 device"):
            meshes.topology("v5e:2x2", megacore=True)
        with pytest.raises(ValueError, match="num_slices=0 must be a positive integer"):
            meshes.topology("v5e:2x2", num_slices=0)
        with pytest.raises(ValueError, match="there are 4 devices"):
            meshes.topology("v5e:2x2", "data=8")
        with pytest.raises(ValueError, match=r"8 devices in 2 slices of 4.*kv=8"):
            meshes.topology("v5e:2x2", "kv=8", num_slices=2)

    def test_says_how_to_get_libtpu(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"pip install 'shardpage\[tpu\]'"):
            meshes.topology("v5e:2x2")

    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
    def test_usable_memory_is_what_the_compiler_says(self, name):
        mesh = meshes.topology(name)
        split = NamedSharding(mesh, P("data"))
        x = jax.ShapeDtypeStruct((mesh.size, 2**30, 128), jnp.int8, sharding=split)
        with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as caught:
            jax.jit(lambda x: x + 1).lower(x).compile()
        said = re.search(r"available HBM \(([\d.]+)G\)", str(caught.value))
        assert said
        assert float(said[1]) == pytest.approx(PodSlice.parse(name).chip.usable_gib, abs=0.011)

    def test_leaves_the_environment_as_it_was(self):
        before = dict(os.environ)
        meshes.topology("v5e:2x2")
        assert dict(os.environ) == before


def is_connected(group, pod: PodSlice) -> bool:
    """Whether chips reach each other over links between members of the group alone."""
    shape = (*pod.shape, 1)[:3]
    wraps = (*pod.wraps, False)[:3]
    members = {tuple(device.coords) for device in group}
    todo = [next(iter(members))]
    reached = set(todo)
    while todo:
        chip = todo.pop()
        for axis, step in itertools.product(range(3), (1, -1)):
            there = list(chip)
            there[axis] += step
            if wraps[axis]:
                there[axis] %= shape[axis]
            neighbour = tuple(there)
            if neighbour in members and neighbour not in reached:
                reached.add(neighbour)
                todo.append(neighbour)
    return reached == members


SLICES = [(chip, shape, megacore) for chip in meshes.chips().values() for shape in chip.shapes
          for megacore in ((None, False) if chip.megacore_config else (None,))]  # fmt: skip


class TestPlacement:
    @pytest.mark.parametrize("chip", list(meshes.chips()))
    def test_context_lies_on_neighbouring_chips(self, chip):
        """In every mesh of three axes on every slice to 64 chips, by device coordinates."""
        for shape, megacore in [(s, m) for c, s, m in SLICES if c.name == chip]:
            pod = PodSlice.parse(f"{chip}:{shape}")
            if pod.num_chips > 64:
                continue
            num_devices = meshes.topology(pod, megacore=megacore).size
            for sizes in meshes.factorings(num_devices, 3):
                spec = "context={},data={},kv={}".format(*sizes)
                mesh = meshes.topology(pod, spec, megacore=megacore)
                groups = mesh.devices.reshape(sizes[0], -1).T
                assert all(is_connected(group, pod) for group in groups), (pod, megacore, spec)

    @pytest.mark.parametrize("spec", ["data=96,context=8,kv=8", "kv=8,context=48,data=16"])
    def test_context_lies_on_neighbouring_chips_of_a_pod(self, spec):
        pod = PodSlice.parse("v5p:16x16x24")
        mesh = meshes.topology(pod, spec)
        axis = mesh.axis_names.index("context")
        groups = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.shape["context"])
        assert all(is_connected(group, pod) for group in groups)

    def test_slices_are_joined_as_jax_joins_them(self):
        mesh = meshes.topology("v5p:2x2x1", "dcn.data=2,data=2,context=2", num_slices=2)
        reference = mesh_utils.create_hybrid_device_mesh(
            (2, 2), (2, 1), list(mesh.devices.flat), allow_split_physical_axes=True
        )
        assert (mesh.devices == reference).all()

    @pytest.mark.parametrize(
        "spec",
        ["data=4,context=4", "dcn.data=2,data=2,context=4", "context=4,data=-1",
         "dcn.data=-1,data=2,context=4"],
    )  # fmt: skip
    def test_slices_go_under_sequences(self, spec):
        mesh = meshes.topology("v5e:2x4", spec, num_slices=2)
        by_data = np.moveaxis(mesh.devices, mesh.axis_names.index("data"), 0)
        slice_of = np.vectorize(lambda device: device.slice_index)(by_data)
        assert (slice_of == slice_of[:, :1]).all()  # no context group spans slices
        assert slice_of[:, 0].tolist() == [0, 0, 1, 1]

    def test_slices_go_elsewhere_only_when_asked(self):
        with pytest.raises(ValueError, match=r"dcn\.context=2,context=4"):
            meshes.topology("v5e:2x2", "context=8", num_slices=2)
        mesh = meshes.topology("v5e:2x2", "dcn.context=2,context=4", num_slices=2)
        assert [device.slice_index for device in mesh.devices] == [0] * 4 + [1] * 4


def compile_collectives(mesh: Mesh) -> list[meshes.Collective]:
    """A program with one all-reduce over context and one over data and context."""

    def body(x):
        merged = jax.lax.psum(x * 2, "context")
        return merged + jax.lax.psum(x.sum(), ("data", "context"))

    split = P("data", "context")
    f = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=P("data"))
    shape = (8 * mesh.shape["data"], 128 * mesh.shape["context"])
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, split))
    return meshes.collectives(jax.jit(f).lower(x).compile().as_text(), mesh)


class TestCollectives:
    @pytest.mark.parametrize(
        "make",
        [
            lambda spec: meshes.simulate(8, spec),
            lambda spec: meshes.topology("v5e:2x4", spec),
            lambda spec: meshes.topology("v5p:2x2x2", spec),
        ],
        ids=["simulated", "v5e", "v5p"],
    )
    @pytest.mark.parametrize("spec", ["data=2,context=4,kv=1", "kv=2,context=2,data=2"])
    def test_names_axes_and_bytes(self, make, spec):
        mesh = make(spec)
        merge, total = sorted(compile_collectives(mesh), key=lambda c: len(c.axes))
        assert (merge.kind, merge.axes, merge.num_bytes) == ("all-reduce", ("context",), 4096)
        assert merge.group_size == mesh.shape["context"]
        assert set(total.axes) == {"data", "context"}
        assert total.num_bytes in (4, 512)  # a scalar, perhaps padded to a row
        assert not merge.crosses_slices

    def test_tells_hosts_apart(self):
        merge, total = compile_collectives(meshes.topology("v5e:2x4", "data=2,context=4,kv=1"))
        assert not min(merge, total, key=lambda c: len(c.axes)).crosses_hosts
        assert max(merge, total, key=lambda c: len(c.axes)).crosses_hosts

    def test_groups_of_a_pod_are_neighbours_in_the_compiled_program(self):
        mesh = meshes.topology("v5p:4x4x8", "data=8,context=8,kv=2")
        for collective in compile_collectives(mesh):
            if collective.axes == ("context",):
                assert collective.group_size == 8
                groups = np.moveaxis(mesh.devices, 1, -1).reshape(-1, 8)
                assert all(is_connected(group, PodSlice.parse("v5p:4x4x8")) for group in groups)
                break
        else:
            pytest.fail("no collective over context alone")

    def test_nothing_but_the_sum_over_data_crosses_slices(self):
        mesh = meshes.topology("v5e:2x2", "data=2,context=4", num_slices=2)
        found = compile_collectives(mesh)
        crossing = [c for c in found if c.crosses_slices]
        assert [(c.kind, c.axes, c.group_size) for c in crossing] == [
            ("dcn-all-reduce", ("data",), 2)
        ]
        assert {c.axes for c in found if not c.crosses_slices} == {("context",)}

    def test_context_crosses_slices_where_the_spec_asks_for_it(self):
        mesh = meshes.topology("v5e:2x2", "data=2,dcn.context=2,context=2", num_slices=2)
        assert any(c.crosses_slices and "context" in c.axes for c in compile_collectives(mesh))

    @pytest.mark.parametrize(
        "groups",
        [
            "{{0,2},{1,3},{4,6},{5,7}}",
            "[4,2]<=[2,2,2]T(0,2,1)",
            "mesh['data'=2,'context'=2,'kv'=2] {'context'}",
            "mesh['data'=2,'rest'=4] {'rest':(1)2}",
        ],
    )
    def test_reads_every_notation_of_groups(self, groups):
        mesh = meshes.simulate(8, "data=2,context=2,kv=2")
        hlo = f"  %x = f32[4,8]{{1,0}} all-reduce(%y), replica_groups={groups}, to_apply=%add"
        (found,) = meshes.collectives(hlo, mesh)
        assert (found.axes, found.group_size, found.num_bytes) == (("context",), 2, 128)

    def test_reads_asynchronous_and_scattering_forms(self):
        mesh = meshes.simulate(8, "data=2,context=4")
        hlo = """
          %g = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
          %h = bf16[16]{0} all-gather-done(%g)
          %s = f32[4]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}
          %p = (s8[16]{0}, s8[16]{0}, u32[], u32[]) collective-permute-start(%a),
          %r = (f32[2]{0}, pred[3]{0}) all-reduce-start(%a, %b), replica_groups={}
        """.replace("start(%a),\n", "start(%a), source_target_pairs={{0,4},{4,0}}\n")
        found = [(c.kind, c.num_bytes, c.axes) for c in meshes.collectives(hlo, mesh)]
        assert found == [
            ("all-gather", 32, ("context",)),
            ("reduce-scatter", 64, ("context",)),
            ("collective-permute", 16, ("data",)),
            ("all-reduce", 11, ("data", "context")),
        ]
