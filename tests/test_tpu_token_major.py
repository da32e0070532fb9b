"""Token-major pages in the TPU kernels, interpreted: as other libraries keep them, read as they lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, ShardLayout, Tuning, attend, backends, make_plan, write_kv
from shardpage.backends.pallas_tpu import token_major
from shardpage.backends.pallas_tpu.chip import MIB, Chip
from shardpage.backends.pallas_tpu.config import check_format, choose_cores, configure
from shardpage.page_format import KVLayout, PageFormat

from . import steps
from .backends import LOOK_FOR_RACES
from .cases import build_mesh

V4 = Chip("v4", 2, 16 * MIB, MIB, 614e3)


def made(name, kv_layout, **changes) -> steps.StepInputs:
    """A step of two queries per KV head; what nobody reads, and what pads rows, is NaN."""
    if "num_kv_heads" in changes:
        changes["num_heads"] = 2 * changes["num_kv_heads"]
    return steps.make(steps.named(name).replace(**({"page_size": 16, "max_blocks": 6} | changes)), kv_layout)


def run(inputs, **tuning):
    return steps.run_as(inputs, Tuning("pallas_tpu", interpret=LOOK_FOR_RACES, **tuning))


# KV heads of which rows, or several words, are far from each other; of 8 words, a multiple of banks.
@pytest.mark.parametrize(
    ("kv_layout", "name", "changes"),
    [
        ("interleaved_words", "mixed", {"num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}),
        ("interleaved_words", "window", {"num_kv_heads": 1, "head_dim": 128, "dtype": "bfloat16"}),
        ("interleaved_words", "chunk", {"num_kv_heads": 4, "head_dim": 256}),
        ("interleaved_words", "capped_with_sinks", {"num_kv_heads": 3, "head_dim": 80}),
        ("interleaved_words", "guesses", {"num_kv_heads": 4, "head_dim": 64, "dtype": "bfloat16"}),
        ("interleaved_words", "not_causal", {"num_kv_heads": 3, "head_dim": 64}),
        ("interleaved", "mixed", {"num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}),
        ("interleaved", "window_of_one", {"num_kv_heads": 2, "head_dim": 128, "page_size": 8}),
        ("tokens_first", "chunk_and_window", {"num_kv_heads": 8, "head_dim": 128}),
        ("tokens_first", "bf16", {"num_kv_heads": 2, "head_dim": 128}),
    ],
)
def test_written_and_attended_to(kv_layout, name, changes):
    inputs = made(name, kv_layout, **changes)
    steps.assert_exact(inputs, *run(inputs))


@pytest.mark.parametrize(
    ("kv_layout", "changes"),
    [
        ("interleaved_words", {"dtype": "int8", "scale": "token", "num_kv_heads": 2}),
        ("interleaved_words", {"dtype": "float8_e4m3fn", "scale": "head", "num_kv_heads": 4}),
        ("interleaved_words", {"dtype": "float8_e5m2", "scale": "token", "head_dim": 64}),
        ("interleaved_words", {"dtype": "int8", "scale": "head", "head_dim": 80}),
        ("tokens_first", {"dtype": "int8", "scale": "token", "num_kv_heads": 4}),
    ],
)
def test_quantised(kv_layout, changes):
    inputs = made("mixed", kv_layout, **({"head_dim": 128} | changes))
    steps.assert_exact(inputs, *run(inputs))


@pytest.mark.parametrize(
    "tuning",
    [
        {"chip": V4, "cores": "batch"},
        {"chip": V4, "num_splits": 3},
        {"chip": dataclasses.replace(V4, cores=1), "pages_per_block": 2},
    ],
)
def test_cores_and_splits(tuning):
    shape = {"num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    inputs = made("decoding", "interleaved_words", **shape)
    steps.assert_exact(inputs, *run(inputs, **tuning))


def test_large_blocks_in_passes():
    """Some heads of a block after the others, whose words still lie together."""
    sizes = {"num_kv_heads": 32, "head_dim": 128, "page_size": 256, "max_blocks": 1}
    inputs = made("decoding", "interleaved_words", dtype="bfloat16", **sizes)
    form = inputs.cache().format
    config = configure(form, 64, 8, 1, Tuning(chip=dataclasses.replace(V4, cores=1)))
    assert config.heads_per_pass < 32
    tuning = {"chip": dataclasses.replace(V4, cores=1)}
    steps.assert_exact(inputs, *run(inputs, **tuning))


@pytest.mark.parametrize("kv_layout", ["interleaved_words", "tokens_first"])
def test_on_a_mesh(kv_layout):
    """Heads, pages and sequences split: what a shard has of a token is fewer words."""
    mesh = build_mesh("data=2,context=2,kv=2")
    counts = ShardLayout.of(mesh).shards(mesh)
    step = steps.named("capped_with_sinks").replace(head_dim=128, num_kv_heads=4, page_size=8)
    split = {"num_seq_shards": counts.seqs, "num_context_shards": counts.context}
    inputs = steps.make(step, kv_layout, **split, placement="random")
    cache, how = inputs.cache(written=False), {"backend": "pallas_tpu", "mesh": mesh}
    sharded = steps.on_mesh(inputs, cache, mesh) if hasattr(steps, "on_mesh") else cache
    plan = steps.planned(inputs, "pallas_tpu", mesh, sharded)
    sharded = write_kv(sharded, jnp.asarray(inputs.key), jnp.asarray(inputs.value), plan)
    how = {"soft_cap": step.soft_cap, "sinks": jnp.asarray(inputs.sinks), "return_lse": True}
    out, lse = attend(jnp.asarray(inputs.query), sharded, plan, **how)
    steps.assert_exact(inputs, np.asarray(out), np.asarray(lse))
