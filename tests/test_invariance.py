"""`Tuning(invariant=True)`: a sequence gets the same bits whatever else is in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, Tuning, attend, make_plan

from .cases import build_mesh

HEADS, KV_HEADS, DIM, PAGE, PAGES = 8, 4, 64, 16, 64
LENGTH, ROOM = 150, 160
RNG = np.random.default_rng(0)
TOKENS = RNG.standard_normal((2, LENGTH, KV_HEADS, DIM), np.float32)
QUERIES = RNG.standard_normal((LENGTH, HEADS, DIM), np.float32)


@functools.partial(jax.jit, static_argnames=("mesh", "window", "dtype"))
def step(query, pages, lens, query_lens, tables, *, mesh, window, dtype):
    scales, query_dtype = None, dtype
    if dtype == "int8":  # what is stored is any number, and so are the scales
        pages, query_dtype = jnp.clip(20 * pages, -127, 127), "float32"
        scales = 0.05 + jnp.abs(pages[0, ..., :2].mT).reshape(PAGES, KV_HEADS, 1, -1) / 2000
    pages = pages.astype(dtype)
    layout = {"kv_layout": "blocks_first", "head_dim": DIM}
    cache = PagedKVCache.of(*pages, **layout, scales=scales)
    plan = make_plan(
        cache,
        lens,
        tables,
        query_lens,
        num_heads=HEADS,
        num_queries=len(query),
        window=window,
        mesh=mesh,
        tuning=Tuning(backend="xla", invariant=True),
    )
    return attend(query.astype(query_dtype), cache, plan)


def answers(cuts, place, seed, mesh=None, window=None, dtype="float32"):
    """The sequence's outputs, its prompt cut into chunks, at one place of a batch of others."""
    rng, shards = np.random.default_rng(seed), 1 if mesh is None else mesh.shape.get("data", 1)
    outs, done, per_shard = [], 0, 4 // shards
    used = -(-LENGTH // PAGE)
    first = place // per_shard * (PAGES // shards)
    own = first + rng.permutation(PAGES // shards)[:used]
    pages = rng.standard_normal((2, PAGES, PAGE, KV_HEADS, DIM), np.float32)
    for position in range(LENGTH):
        pages[:, own[position // PAGE], position % PAGE] = TOKENS[:, position]
    for count in cuts:
        lens = rng.integers(1, 100, 4).astype(np.int32)
        query_lens = np.minimum(rng.integers(0, 3, 4), lens).astype(np.int32)
        lens[place], query_lens[place] = done + count, count
        tables = rng.integers(0, PAGES, (4, used)).astype(np.int32)
        tables %= PAGES // shards
        tables += (np.arange(4) // per_shard * (PAGES // shards))[:, None].astype(np.int32)
        tables[place] = own
        query = rng.standard_normal((shards * ROOM, HEADS, DIM), np.float32)
        shard = place // per_shard
        at = shard * ROOM + int(query_lens[shard * per_shard : place].sum())
        query[at : at + count] = QUERIES[done : done + count]
        arrays = query, pages.transpose(0, 1, 3, 2, 4), lens, query_lens, tables
        out = step(*arrays, mesh=mesh, window=window, dtype=dtype)
        outs.append(np.asarray(out[at : at + count].astype(jnp.float32)))
        done += count
    return np.concatenate(outs)


@pytest.mark.parametrize(("window", "dtype"), [(None, "float32"), (40, "bfloat16"), (None, "int8")])
def test_batch_place_pages_and_chunks_change_no_bit(window, dtype):
    expected = answers([LENGTH], 0, seed=1, window=window, dtype=dtype)
    assert np.isfinite(expected).all()
    for cuts, place in (([60, 89, 1], 2), ([1] * 5 + [145], 3)):
        actual = answers(cuts, place, seed=place, window=window, dtype=dtype)
        np.testing.assert_array_equal(actual, expected)


def test_what_cannot_be_had_is_refused():
    cache = PagedKVCache.zeros(4, KV_HEADS, PAGE, DIM)
    tuning = Tuning(backend="pallas_tpu", invariant=True)
    with pytest.raises(NotImplementedError, match=r"invariant=True: .* use backend='xla'"):
        make_plan(cache, np.ones(1, int), np.zeros((1, 1), int), num_heads=8, tuning=tuning)


@pytest.mark.parametrize("spec", ["data=2", "kv=4", "data=2,kv=2"])
def test_shards_of_sequences_and_heads_change_no_bit(spec):
    expected = answers([LENGTH], 0, seed=1)
    mesh = build_mesh(spec)
    np.testing.assert_array_equal(answers([60, 90], 2, seed=2, mesh=mesh), expected)
