"""The XLA backend's list of work: what its lanes do, step after step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpage.backends.xla.walk import make_walk, prepare, walk_blocks
from shardpage.options import Tuning
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Reads
from shardpage.tiles import tiles_of

PAGE_SIZE = 16


def walk_over(lens, block_pages, num_lanes, num_splits=0):
    stop = jnp.asarray(lens, jnp.int32)
    reads = Reads(jnp.zeros((len(lens), 4096), jnp.int32), None, jnp.zeros_like(stop), stop)
    (tiles,) = tiles_of(reads, (1,))
    return make_walk(tiles, block_pages, PAGE_SIZE, num_lanes, num_splits, shared=True), reads


@pytest.mark.parametrize(
    ("lens", "num_lanes", "steps"),
    [
        ((256, 256, 256, 256), 1, 4),  # of blocks of 256 tokens, in a table of 65536
        ((65536, 0, 0, 0), 1, 256),
        ((1, 257, 0, 65536), 1, 1 + 2 + 256),
        ((512, 512, 512, 65536 - 1536), 8, 32),  # a long sequence is spread over all lanes
        ((0, 0, 0, 0), 8, 0),
    ],
)
@pytest.mark.parametrize("peel_last", [False, True])
def test_work_follows_the_contexts_not_the_table_nor_the_longest(lens, num_lanes, steps, peel_last):
    """Counted, not timed: the steps that the loop makes, as many as the longest lane has blocks."""
    walk, reads = walk_over(lens, 16, num_lanes)
    count = walk_blocks(
        walk, reads, PAGE_SIZE, lambda items, steps: steps + 1, jnp.int32(0), peel_last=peel_last
    )
    assert count == max(steps, int(peel_last))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([0, 1, 3]),
)
def test_each_block_is_worked_on_once_and_its_part_knows_its_query(
    num_blocks, num_lanes, num_splits
):
    walk, part_query, steps = walked(jnp.array(num_blocks, jnp.int32), num_lanes, num_splits)
    steps = jax.tree.map(np.asarray, steps)
    done, lanes_of = np.zeros((4, 20), int), {}
    live = steps.part[..., 0] < walk.num_parts(4)
    for step, lane in zip(*np.nonzero(live), strict=True):
        query = int(steps.query[step, lane, 0])
        assert part_query[steps.part[step, lane, 0]] == query
        done[query, walk.cuts[lane] + step - walk.first[query]] += 1
        lanes_of.setdefault(query, set()).add(lane)
    assert (done == (np.arange(20) < np.array(num_blocks)[:, None])).all()
    for alive, parts in zip(live, steps.part, strict=True):
        assert len(set(parts[alive, 0])) == alive.sum()
    if num_splits:
        assert all(len(lanes) <= num_splits for lanes in lanes_of.values())


@functools.partial(jax.jit, static_argnums=(1, 2))
def walked(num_blocks, num_lanes, num_splits):
    """A walk over blocks of one page, and the items of its steps and of some past the last."""
    walk, reads = walk_over(num_blocks * PAGE_SIZE, 1, num_lanes, num_splits)
    steps = jax.vmap(lambda step: walk.items(step, reads, PAGE_SIZE))(
        jnp.arange(80, dtype=jnp.int32)
    )
    return walk, walk.part_query if walk.shared else jnp.arange(4), steps


@pytest.mark.parametrize(
    ("num_seqs", "length", "max_pages", "most"),
    [
        (4096, 16, 1, 1.1),
        (4096, 16, 64, 5),  # of a block of 64 pages one would be read
        (256, 1000, 64, 1.1),
        (64, 4096, 256, 1.1),
        (8, 60, 128, 2.1),
        (8, 150, 128, 1.7),
        (64, 300, 128, 1.4),
    ],
)
def test_pages_fetched_follow_the_pages_in_use(num_seqs, length, max_pages, most):
    """Counted over all steps and lanes of a CPU's walks, for 2 KV heads of 64 in float32."""
    page_format = PageFormat(KVLayout.BLOCKS_FIRST, 2, PAGE_SIZE, 64, 64, np.dtype(np.float32))
    stop = jnp.full(num_seqs, length, jnp.int32)
    reads = Reads(jnp.zeros((num_seqs, max_pages), jnp.int32), None, jnp.zeros_like(stop), stop)
    walks = prepare(reads, 8, page_format, Tuning(platform="cpu"))
    steps = [int(jnp.max(walk.cuts[1:] - walk.cuts[:-1])) for walk in walks]
    fetched = sum(
        count * walk.num_lanes * walk.block_pages for count, walk in zip(steps, walks, strict=True)
    )
    assert fetched <= most * num_seqs * -(-length // PAGE_SIZE)


def test_short_and_long_queries_are_walked_over_apart_and_none_twice():
    page_format = PageFormat(KVLayout.BLOCKS_FIRST, 2, PAGE_SIZE, 64, 64, np.dtype(np.float32))
    stop = jnp.where(jnp.arange(100) % 3 == 0, 1000, jnp.arange(100)).astype(jnp.int32)
    reads = Reads(jnp.zeros((100, 64), jnp.int32), None, jnp.zeros_like(stop), stop)
    few, many = prepare(reads, 8, page_format, Tuning(platform="cpu"))
    blocks = [walk.last - walk.first for walk in (few, many)]
    assert few.block_pages < many.block_pages
    assert not np.any((blocks[0] > 0) & (blocks[1] > 0))
    assert np.array_equal((blocks[0] > 0) | (blocks[1] > 0), stop > 0)


@pytest.mark.parametrize(("num_rows", "num_new"), [(1, 2048), (1, 65536), (64, 128), (512, 32)])
def test_a_gpu_holds_as_many_logits_however_many_prompts_there_are(num_rows, num_new):
    """32 query heads over 8 KV heads of 128 in bfloat16: 64 MiB in float32 for any batch."""
    page_format = PageFormat(KVLayout.BLOCKS_FIRST, 8, PAGE_SIZE, 128, 128, np.dtype(jnp.bfloat16))
    stop = jnp.tile(jnp.arange(1, num_new + 1, dtype=jnp.int32), num_rows)
    row = jnp.repeat(jnp.arange(num_rows, dtype=jnp.int32), num_new)
    ids = jnp.zeros((num_rows, 4096), jnp.int32)
    walks = prepare(
        Reads(ids, row, jnp.zeros_like(stop), stop), 32, page_format, Tuning("xla", "gpu")
    )
    logits = [walk.num_lanes * walk.tiles.size * walk.block_pages * PAGE_SIZE for walk in walks]
    assert 4 * 32 * max(logits) <= 64 << 20


@pytest.mark.parametrize(("num_new", "most"), [(5, 1.7), (8, 1.1), (24, 1.1), (100, 1.4)])
def test_a_chunk_beside_answers_computes_little_for_nothing(num_new, most):
    """Pairs of a query and a token of the chunk on a CPU, over all steps and lanes."""
    page_format = PageFormat(KVLayout.BLOCKS_FIRST, 3, PAGE_SIZE, 64, 64, np.dtype(np.float32))
    stop = np.array([60] * 8 + list(range(1500 - num_new + 1, 1501)), np.int32)
    row = np.array([*range(8), *[8] * num_new], np.int32)
    reads = Reads(jnp.zeros((9, 400), jnp.int32), row, jnp.zeros(len(stop), jnp.int32), stop)
    walks = prepare(jax.tree.map(jnp.asarray, reads), 9, page_format, Tuning(platform="cpu"))
    pairs = [
        int(jnp.max(walk.cuts[1:] - walk.cuts[:-1]))
        * (walk.num_lanes * walk.tiles.size * walk.block_pages * PAGE_SIZE)
        for walk in walks
        if walk.tiles.size > 1
    ]
    needed = stop[8:].sum()
    assert needed <= sum(pairs) <= most * needed
