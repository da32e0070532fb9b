"""The walk of the TPU decode kernel: the order of its work, followed on the host."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage.backends.pallas_tpu import walk
from shardpage.backends.pallas_tpu.sizes import Sizes


class TestWalk:
    """The order of work, followed on the host."""

    SIZES = Sizes(block_pages=4, step_blocks=2, ring_places=2)  # of pages of 8 tokens

    @classmethod
    def follow(cls, start, stop, num_splits=1, num_cores=1, invalid=()):
        """[(core, block)] in order, of blocks with pages; and for each core and segment -1 if it is
        vacant, -2 if it is and its query is invalid, else 0."""
        lengths = walk.Lengths(8, 32, num_splits, num_cores, cls.SIZES)
        spans = (jnp.asarray(x, jnp.int32) for x in (range(len(start)), start, stop))
        is_invalid = np.isin(range(len(start)), invalid)
        ids = jnp.zeros((len(start), 32), jnp.int32)
        schedule = walk.schedule(*spans, jnp.asarray(is_invalid), ids, lengths)
        fields = np.transpose(schedule.blocks, (0, 3, 2, 1))  # by core, step and block
        fields = fields.reshape(num_cores, -1, len(walk.Block._fields))
        steps = []
        for core, blocks in enumerate(map(lambda x: [walk.Block(*y) for y in x], fields.tolist())):
            count = int(schedule.num_blocks[core])
            assert all(block.num_pages > 0 for block in blocks[:count])
            past = [
                (block.start, block.stop, block.num_pages, block.begins) for block in blocks[count:]
            ]
            assert len(past) >= 2 * cls.SIZES.ring_places * cls.SIZES.step_blocks
            assert set(past) == {(0, 0, 0, 0)}
            for first in range(0, len(blocks), 2):
                pages = {block.step_pages for block in blocks[first : first + 2]}
                assert pages == {sum(block.num_pages for block in blocks[first : first + 2])}
            steps += [(core, block) for block in blocks[:count]]
        vacant = np.zeros((num_cores, len(start) * num_splits), int)
        for core, entries in enumerate(schedule.vacant):
            entries = entries[: schedule.num_vacant[core]]
            for segment, wrong in zip(*walk.vacancy(entries), strict=True):
                assert vacant[core, int(segment)] == 0
                vacant[core, int(segment)] = -1 - int(wrong)
        return steps, vacant

    @pytest.mark.parametrize("num_cores", [1, 2])
    @pytest.mark.parametrize("num_splits", [1, 3])
    def test_every_token_once_and_cores_even(self, num_splits, num_cores):
        rng = np.random.default_rng(num_splits)
        for _ in range(10):
            stop = rng.integers(0, 200, size=7) * rng.integers(0, 2, size=7)
            start = np.minimum(rng.integers(0, 60, size=7), stop)
            steps, vacant = self.follow(start, stop, num_splits, num_cores)
            tokens, begun = [[] for _ in stop], np.zeros(vacant.shape, int)
            for core, block in steps:
                query = block.row
                assert block.segment // num_splits == query
                begun[core, block.segment] += block.begins
                first = block.first_page * 8
                assert block.start < 8
                assert block.num_pages == min(4, -(-block.stop // 8))
                tokens[query] += range(first + block.start, first + min(block.stop, 32))
            assert tokens == [list(range(*span)) for span in zip(start, stop, strict=True)]
            np.testing.assert_array_equal(begun, 1 + vacant)
            shares = np.bincount([core for core, _ in steps], minlength=num_cores)
            assert shares.max() - shares.min() <= num_cores - 1

    def test_many_segments_are_looked_up(self, monkeypatch):
        stop = [0, 0, 200, 7, 0, 33, 0]
        compared = self.follow([0] * 7, stop, 2, 2)
        monkeypatch.setattr(walk, "_FEW_PAIRS", 0)
        chex.assert_trees_all_equal(self.follow([0] * 7, stop, 2, 2), compared)

    def test_a_long_sequence_does_not_leave_a_core_idle(self):
        steps, _ = self.follow([0, 0, 0], [256, 32, 32], num_cores=2)
        assert [core for core, _ in steps].count(0) == 5
        assert {block.segment for core, block in steps if core == 1} == {0, 1, 2}

    @pytest.mark.parametrize("num_cores", [1, 2])
    @pytest.mark.parametrize("num_splits", [1, 3])
    def test_steps_in_runs_are_known(self, num_splits, num_cores):
        rng = np.random.default_rng(num_splits)
        sizes = dataclasses.replace(self.SIZES, run_pages=2)
        lengths, seen = walk.Lengths(8, 32, num_splits, num_cores, sizes), set()
        for _ in range(10):
            stop = rng.integers(0, 257, size=7) * rng.integers(0, 2, size=7)
            start = np.minimum(rng.integers(0, 60, size=7), stop)
            ids = np.arange(7 * 32).reshape(7, 32)
            ids[rng.integers(0, 7, size=2), rng.integers(0, 32, size=2)] = 500
            arrays = [jnp.asarray(x, jnp.int32) for x in (range(7), start, stop)]
            table = jnp.asarray(ids, jnp.int32)
            schedule = walk.schedule(*arrays, jnp.zeros(7, bool), table, lengths)
            blocks = walk.Block(*jnp.moveaxis(schedule.blocks, 1, 0))
            blocks, said = jax.tree.map(np.asarray, (blocks, blocks.in_runs))
            for core, step in itertools.product(range(num_cores), range(said.shape[-1])):
                here = [x[core, :, step] for x in (blocks.row, blocks.first_page, blocks.num_pages)]
                runs = [
                    ids[row, column : column + 2]
                    for row, first, count in zip(*here, strict=True)
                    for column in range(first, first + count - 1, 2)
                ]
                in_runs = all(second == first + 1 for first, second in runs)
                assert said[core, :, step].tolist() == [in_runs] * 2
                assert (blocks.step_pages[core, :, step] % (1 << 24) == here[2].sum()).all()
                seen |= {in_runs} if runs else set()
        assert seen == {False, True}

    def test_no_work_at_all(self):
        steps, vacant = self.follow([0, 0], [0, 0], 2, 2)
        assert steps == []
        assert (vacant == -1).all()

    def test_invalid_queries_are_known(self):
        _, vacant = self.follow([0, 0, 0], [0, 60, 0], 2, invalid=(2,))
        assert vacant.tolist() == [[-1, -1, 0, 0, -2, -2]]
