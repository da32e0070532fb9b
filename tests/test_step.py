"""One plan and one call for all that a serving step attends to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardpage
from shardpage import PagedKVCache, ShardLayout, Tuning

from . import steps
from .backends import BACKENDS, INTERPRETED, interpret
from .cases import KV_LAYOUTS, PLACEMENTS, build_mesh
from .steps import STEPS, assert_exact

SPECS = ("data=2,context=2,kv=2", "context=8", "data=8", "kv=4,data=2", "data=2,context=4")


def run(inputs, backend="xla", mesh=None, written=False, **options):
    """Plans, writes the new tokens if the cache is without them, and attends."""
    arrays = (inputs.key_cache, inputs.value_cache)
    if written:
        arrays = (inputs.key_cache_before, inputs.value_cache_before)
    arrays = [None if x is None else jnp.asarray(x) for x in arrays]
    cache = PagedKVCache.of(
        *arrays, kv_layout=inputs.kv_layout, head_dim=inputs.step.head_dim
    )
    plan = shardpage.make_plan(
        cache,
        inputs.context_lens,
        inputs.block_tables,
        inputs.query_lens,
        num_heads=inputs.step.num_heads,
        num_queries=inputs.num_queries,
        mesh=mesh,
        tuning=Tuning(backend=backend, interpret=interpret(backend), **options),
        **inputs.step.mask,
    )
    if written:
        cache = shardpage.write_kv(cache, jnp.asarray(inputs.key), jnp.asarray(inputs.value), plan)
    sinks = None if inputs.sinks is None else jnp.asarray(inputs.sinks)
    options = {"soft_cap": inputs.step.soft_cap, "sinks": sinks}
    out, lse = shardpage.attend(jnp.asarray(inputs.query), cache, plan, return_lse=True, **options)
    return np.array(out), np.array(lse)


def on(mesh, step, kv_layout="blocks_first", placement="random"):
    counts = ShardLayout.of(mesh).shards(mesh)
    return steps.make(
        step,
        kv_layout,
        num_seq_shards=counts.seqs,
        num_context_shards=counts.context,
        placement=placement,
    )


@pytest.mark.parametrize("written", [False, True], ids=["attend", "write_and_attend"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_agrees_with_the_oracle(step, written):
    inputs = steps.make(step, KV_LAYOUTS[len(step.name) % 3])
    assert_exact(inputs, *run(inputs, written=written))


@pytest.mark.parametrize("step", ["mixed", "chunk_and_window", "capped_with_sinks"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_mesh_gives_the_oracles_numbers(spec, step):
    mesh = build_mesh(spec)
    inputs = on(mesh, steps.named(step))
    assert_exact(inputs, *run(inputs, mesh=mesh, written=True))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("step", ["mixed", "window", "chunk", "not_causal_in_chunks"])
def test_pages_may_lie_on_any_context_shard(placement, step):
    mesh = build_mesh("data=2,context=4")
    inputs = on(mesh, steps.named(step), placement=placement)
    assert_exact(inputs, *run(inputs, mesh=mesh))
