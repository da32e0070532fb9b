"""The XLA backend's list of work: what its lanes do, step after step."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpage.backends.xla_walk import make_walk, walk_blocks
from shardpage.pages import LocalPages

PAGE_SIZE = 16


def walk_over(lens, block_pages, num_lanes, num_splits=0):
    stop = jnp.array(lens, jnp.int32)
    pages = LocalPages(jnp.zeros((len(lens), 4096), jnp.int32), jnp.zeros_like(stop), stop)
    return make_walk(pages, block_pages * PAGE_SIZE, num_lanes, num_splits)


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
    walk = walk_over(lens, 16, num_lanes)
    count = walk_blocks(
        walk, 16, PAGE_SIZE, lambda items, steps: steps + 1, jnp.int32(0), peel_last=peel_last
    )
    assert count == max(steps, int(peel_last))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 4)
)  # fmt: skip
def test_each_block_is_worked_on_once_and_its_slot_knows_its_sequence(
    num_blocks, num_lanes, num_splits
):
    walk = walk_over([n * PAGE_SIZE for n in num_blocks], 1, num_lanes, num_splits)
    slot_seq = np.asarray(walk.slot_seq)
    done, lanes_of = np.zeros((len(num_blocks), 40), int), {}
    for step in range(sum(num_blocks)):
        items = walk.items(jnp.int32(step), 1, PAGE_SIZE)
        live = np.asarray(items.live)
        slots, seqs = np.asarray(items.slot)[live], np.asarray(items.seq)[live]
        assert len(set(slots)) == len(slots)
        assert (slot_seq[slots] == seqs).all()
        blocks = (np.asarray(walk.cuts[:-1]) + step)[live] - np.asarray(walk.first)[seqs]
        np.add.at(done, (seqs, blocks), 1)
        for lane, seq in zip(np.flatnonzero(live), seqs, strict=True):
            lanes_of.setdefault(int(seq), set()).add(int(lane))
    assert (done == (np.arange(40) < np.array(num_blocks)[:, None])).all()
    if num_splits:
        assert all(len(lanes) <= num_splits for lanes in lanes_of.values())
