"""A mesh changes nothing but where the work is done."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import shardpage
from shardpage import PagedKVCache, ShardLayout, merge_across, page_attention, step
from shardpage.attention import attend_once
from shardpage.options import Attention, Mask, Tuning
from shardpage.shard_layout import Split

from . import cases
from .backends import BACKENDS, INTERPRETED, attend, attend_as
from .cases import PLACEMENTS, build_mesh, make
from .tolerance import assert_within_rounding

COLLECTIVE = re.compile(r"\b(all-\w+|collective-\w+|reduce-scatter|ragged-\w+)\(")


def shards(mesh, layout=None):
    return (layout or ShardLayout.of(mesh)).shards(mesh)


def on(mesh, case="plain", kv_layout="blocks_first", placement="random", layout=None, seed=0):
    """The arrays of a case, with pages placed for a mesh."""
    counts = shards(mesh, layout)
    return make(
        cases.named(case) if isinstance(case, str) else case,
        kv_layout,
        seed,
        num_seq_shards=counts.seqs,
        num_context_shards=counts.context,
        placement=placement,
    )


@pytest.mark.parametrize(
    ("axis_type", "case"),
    [
        ("Auto", "everything"),
        ("Explicit", "plain"),
    ],
)
def test_every_mesh_gives_the_oracles_numbers(mesh, case):
    inputs = on(mesh, case)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", ["plain", "window"])
def test_pages_may_lie_on_any_context_shard(placement, case):
    mesh = build_mesh("data=2,context=4")
    inputs = on(mesh, case, placement=placement)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh))


@pytest.mark.parametrize("kv_layout", cases.KV_LAYOUTS)
def test_every_layout_on_a_mesh(kv_layout):
    mesh = build_mesh("data=2,kv=2,context=2")
    inputs = on(mesh, "sinks", kv_layout)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in INTERPRETED])
@pytest.mark.parametrize("spec", ["data=2,context=2", "kv=2,context=2"])
def test_interpreted_kernels_on_a_mesh(backend, spec):
    mesh = build_mesh(spec)
    inputs = on(mesh, "plain")
    assert_within_rounding(inputs, *attend(inputs, backend, mesh=mesh))


@pytest.mark.parametrize("in_jit", [True, False])
def test_inside_and_outside_jit(in_jit, axis_type):
    mesh = build_mesh("data=2,kv=2,context=2", axis_type)
    inputs = on(mesh)
    call = functools.partial(page_attention, mesh=mesh, kv_layout="blocks_first")
    specs = (
        PartitionSpec("data", "kv"),
        *[PartitionSpec(("data", "context"), "kv")] * 2,
        PartitionSpec("data"),
        PartitionSpec("data"),
    )
    arrays = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(inputs.arrays, specs, strict=True)
    ]
    out = (jax.jit(call) if in_jit else call)(*arrays)
    assert_within_rounding(inputs, np.asarray(out))
    chex.assert_tree_is_sharded(out, devices=mesh.devices.flat)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "kv")), 3)


def test_other_axis_names_tuples_of_axes_and_axes_left_out():
    mesh = build_mesh("expert=2,x=2,y=2")
    layout = ShardLayout(seqs=None, heads=None, context=("x", "y"))
    inputs = on(mesh, layout=layout)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh, layout=layout))
    layout = ShardLayout(seqs=("expert", "x"), heads="y", context=None)
    inputs = on(mesh, layout=layout)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh, layout=layout))


def test_one_sequences_bad_table_is_nan_for_that_sequence_only():
    mesh = build_mesh("data=2,context=4")
    inputs = on(mesh, cases.named("plain").replace(lens="full"))
    other_shard = inputs.num_pages // 2
    inputs.block_tables[1, 0] += other_shard  # sequence 1 is of shard 0, the page of shard 1
    inputs.block_tables[2, 1] = -1
    inputs.block_tables[6, 0] = inputs.num_pages
    out, lse = attend(inputs, mesh=mesh)
    bad = np.isnan(out).all(axis=(1, 2))
    np.testing.assert_array_equal(bad, np.isin(np.arange(8), [1, 2, 6]))
    np.testing.assert_array_equal(np.isnan(lse).all(axis=1), bad)
    assert np.isfinite(out[~bad]).all()


@pytest.mark.parametrize("spec", ["data=1", "data=2,context=2"])
@pytest.mark.parametrize("window", [None, 40])
def test_tables_that_are_looked_up_in_pieces(spec, window, monkeypatch):
    monkeypatch.setitem(step._PIECES, jax.default_backend(), 3)
    mesh = build_mesh(spec)
    case = cases.Case("in_pieces", max_blocks=11, sliding_window=window)
    inputs = on(mesh, case)
    assert_within_rounding(inputs, *attend(inputs, mesh=mesh))


@pytest.mark.parametrize("which", ["key_cache", "value_cache"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_that_one_device_reads_is_seen(backend, which):
    """The other devices of the context axis have finite partials, which must not hide it."""
    mesh = build_mesh("data=2,context=2")
    inputs = on(
        mesh,
        cases.Case("nan_on_a_mesh", num_seqs=4, lens=(60, 64, 50, 33)),
        placement="round_robin",
    )
    before = attend(inputs, backend, mesh=mesh)
    for block in (0, 1):
        changed = dataclasses.replace(inputs, **{which: getattr(inputs, which).copy()})
        getattr(changed, which)[inputs.block_tables[2, block], 1, 0, 5] = np.nan
        for actual, was in zip(attend(changed, backend, mesh=mesh), before, strict=True):
            assert np.isnan(actual[2, 2:4]).all()
            actual[2, 2:4] = was[2, 2:4]
            np.testing.assert_array_equal(actual, was)


def test_mesh_none_inside_a_shard_map_of_ones_own(axis_type):
    """What the README promises: the per-device function plus `merge_across`."""
    mesh = build_mesh("context=8", axis_type)
    inputs = on(mesh, "plain", placement="contiguous")
    pages_per_shard = inputs.num_pages // 8
    blocks_per_shard = -(-inputs.block_tables.shape[1] // 8)

    def attend_shard(query, keys, values, lens, tables):
        # Contiguous placement: shard n holds blocks [n, n + 1) * blocks_per_shard of each sequence.
        shard = jax.lax.axis_index("context")
        first = shard * blocks_per_shard
        tables = jax.lax.dynamic_slice_in_dim(
            jnp.pad(tables, ((0, 0), (0, 8 * blocks_per_shard))), first, blocks_per_shard, axis=1
        )
        room = blocks_per_shard * inputs.case.page_size
        lens = jnp.clip(lens - first * inputs.case.page_size, 0, room)
        out, lse = page_attention(
            query,
            keys,
            values,
            lens,
            tables - shard * pages_per_shard,
            kv_layout="blocks_first",
            return_lse=True,
        )
        return merge_across(out, lse, "context")

    everywhere, by_page = PartitionSpec(), PartitionSpec("context")
    specs = (everywhere, by_page, by_page, everywhere, everywhere)
    arrays = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(inputs.arrays, specs, strict=True)
    ]
    run = jax.shard_map(attend_shard, mesh=mesh, in_specs=specs, out_specs=(everywhere,) * 2)
    out, lse = jax.jit(run)(*arrays)
    assert_within_rounding(inputs, np.asarray(out), np.asarray(lse))


def test_gradients_do_not_depend_on_the_mesh():
    mesh = build_mesh("data=2,kv=2,context=2")
    inputs = on(mesh)
    one = on(build_mesh("data=1"))

    def loss(query, inputs, mesh):
        out, lse = page_attention(
            query,
            *map(jnp.asarray, inputs.arrays[1:]),
            kv_layout="blocks_first",
            mesh=mesh,
            return_lse=True,
        )
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    sharded = jax.grad(loss)(jnp.asarray(inputs.query), inputs, mesh)
    single = jax.grad(loss)(jnp.asarray(one.query), one, None)
    chex.assert_trees_all_close(sharded, single, atol=1e-5)


# Compiled programs


def compiled(spec, *, context_len=512, page_size=16, num_seqs=8, platform=None):
    mesh = build_mesh(spec)
    counts, layout = shards(mesh), ShardLayout.of(mesh)
    max_blocks = context_len // page_size
    num_pages = num_seqs * max_blocks
    cache = PagedKVCache.abstract(num_pages, 8, page_size, 64, dtype=jnp.float32, mesh=mesh)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def call(query, cache, lens, tables):
        split, tuning = Split.of(mesh, None), Tuning(platform=platform)
        return attend_once(query, cache, lens, tables, None, Mask(), Attention(), tuning, split)[0]

    assert counts.seqs * counts.heads * counts.context == 8
    return (
        jax.jit(call)
        .lower(
            array((num_seqs, 16, 64), jnp.float32, layout.spec("seqs", "heads", None)),
            cache,
            array((num_seqs,), jnp.int32, layout.spec("seqs")),
            array((num_seqs, max_blocks), jnp.int32, layout.spec("seqs", None)),
        )
        .compile()
    )


@pytest.mark.parametrize("spec", ["data=8", "kv=8", "data=2,kv=4"])
def test_sequence_and_head_split_send_nothing(spec):
    assert not COLLECTIVE.findall(compiled(spec).as_text())


@pytest.mark.parametrize("spec", ["context=8", "data=2,kv=2,context=2"])
def test_context_split_sends_the_merge_and_its_size_does_not_grow_with_context(spec):
    def collectives(context_len):
        text = compiled(spec, context_len=context_len).as_text()
        return [line.split("=")[1].split("(")[0].strip() for line in text.splitlines()
                if COLLECTIVE.search(line)]  # fmt: skip

    short, long = collectives(512), collectives(8192)
    assert short == long
    # pmax of lse [seqs, heads], psum of the weighted outputs and the weights [seqs, heads, 64 + 1]
    mesh = build_mesh(spec)
    num_seqs, num_heads = 8 // shards(mesh).seqs, 16 // shards(mesh).heads
    expected = [f"f32[{num_seqs},{num_heads}]", f"f32[{num_seqs},{num_heads},65]"]
    assert [re.match(r"[^{]*", line)[0] for line in sorted(short)] == sorted(expected)
    assert all("all-reduce" in line for line in short)


@pytest.mark.parametrize("spec", ["context=8", "data=2,kv=2,context=2"])
def test_small_partials_merge_in_one_collective_on_gpus(spec):
    """As formulated for GPUs, and run on simulated devices."""
    assert len(COLLECTIVE.findall(compiled(spec, platform="gpu").as_text())) == 1
    mesh = build_mesh(spec)
    inputs = on(mesh, "everything")
    assert_within_rounding(inputs, *attend_as(inputs, Tuning(platform="gpu"), mesh))


def test_large_partials_merge_in_two_on_gpus():
    """1 MiB and more, of all devices together."""
    program = compiled("context=8", num_seqs=2048, platform="gpu")
    assert len(COLLECTIVE.findall(program.as_text())) == 2


def test_temporaries_on_a_mesh_do_not_grow_with_context():
    """The plan's few integers per page do; keys and values do not."""
    short, long = (
        compiled("data=2,context=4", context_len=n).memory_analysis().temp_size_in_bytes
        for n in (2048, 16384)
    )
    cache_growth = (16384 - 2048) * 8 * 64 * 4 * 2  # one sequence's keys and values, per device
    assert long - short < cache_growth / 8


# Placement


def test_unplaced_arrays_are_placed_and_small_ones_resharded():
    mesh = build_mesh("data=2,kv=2,context=2")
    inputs = on(mesh)
    arrays = [jnp.asarray(array) for array in inputs.arrays]
    arrays[0] = jax.device_put(arrays[0], NamedSharding(mesh, PartitionSpec(None, "data")))
    out = page_attention(*arrays, mesh=mesh, kv_layout="blocks_first")
    assert_within_rounding(inputs, np.asarray(out))


def test_a_cache_spread_otherwise_is_refused(axis_type):
    mesh = build_mesh("data=2,kv=2,context=2", axis_type)
    inputs = on(mesh)
    query, keys, values, *rest = map(jnp.asarray, inputs.arrays)
    values = jax.device_put(values, NamedSharding(mesh, PartitionSpec("kv")))
    with pytest.raises(ValueError, match=r"the cache is spread .* needs .*PagedKVCache.zeros"):
        page_attention(query, keys, values, *rest, mesh=mesh, kv_layout="blocks_first")


def test_a_traced_cache_spread_otherwise_is_refused_on_explicit_axes():
    mesh = build_mesh("data=2,kv=2,context=2", "Explicit")
    inputs = on(mesh)
    query, keys, values, *rest = map(jnp.asarray, inputs.arrays)
    keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("kv")))
    call = jax.jit(functools.partial(page_attention, mesh=mesh, kv_layout="blocks_first"))
    with pytest.raises(ValueError, match=r"the cache is spread"):
        call(query, keys, values, *rest)


def test_an_abstract_mesh_serves_under_jit():
    mesh = build_mesh("data=2,context=4")
    inputs = on(mesh)
    layout = ShardLayout.of(mesh)
    dims = ("seqs", "heads", None), ("pages",), ("pages",), ("seqs",), ("seqs", None)
    specs = [layout.spec(*each) for each in dims]
    arrays = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(inputs.arrays, specs, strict=True)
    ]
    call = functools.partial(page_attention, mesh=mesh.abstract_mesh, kv_layout="blocks_first")
    assert_within_rounding(inputs, np.asarray(jax.jit(call)(*arrays)))


# Refusals


def test_kv_heads_that_do_not_divide_name_what_works():
    mesh = build_mesh("kv=8")
    inputs = make(cases.named("plain").replace(num_heads=12, num_kv_heads=4))
    with pytest.raises(ValueError, match=r"num_kv_heads=4 .* 8 shards.*4 x 2, 2 x 4, 1 x 8.*no"):
        attend(inputs, mesh=mesh)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("data=8", {"num_seqs": 6}, r"num_seqs=6 .* 8 shards .*'data'; pad to 8"),
        ("context=8", {}, r"num_pages=\d+ must be divisible by the 8 page shards"),
    ],
)
def test_uneven_splits_are_refused(spec, change, message):
    inputs = make(cases.named("plain").replace(**change))
    keys = inputs.key_cache[: len(inputs.key_cache) // 8 * 8 - 3]
    with pytest.raises(ValueError, match=message):
        attend(inputs, mesh=build_mesh(spec), key_cache=keys, value_cache=keys)


def test_layouts_that_contradict_the_mesh_are_refused():
    inputs, mesh = make(cases.named("plain")), build_mesh("data=2,context=4")
    with pytest.raises(ValueError, match=r"names 'kv'; the mesh has the axes"):
        attend(inputs, mesh=mesh, layout=ShardLayout())
    with pytest.raises(ValueError, match="uses mesh axis 'data' twice"):
        attend(inputs, mesh=mesh, layout=ShardLayout("data", None, "data"))
    with pytest.raises(ValueError, match="pass mesh= as well"):
        attend(inputs, layout=ShardLayout())


def test_the_layout_of_a_cache_is_not_deduced_from_a_shards_shape():
    mesh = build_mesh("data=2")
    inputs = on(mesh)
    call = jax.shard_map(
        page_attention, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    with pytest.raises(ValueError, match="cannot be deduced inside a shard_map"):
        call(*map(jnp.asarray, inputs.arrays))


def test_default_layout_takes_the_axes_that_the_mesh_has():
    assert ShardLayout.of(build_mesh("data=2,other=4")) == ShardLayout("data", None, None)
    assert ShardLayout.of(build_mesh("kv=2,context=4")) == ShardLayout(None, "kv", "context")
    assert ShardLayout("a", None, ("b", "c")).pages == ("a", "b", "c")
    assert AxisType.Auto in build_mesh("data=2").axis_types
    assert shardpage.ShardLayout is ShardLayout
