"""What the Hopper kernels are made of: sizes, shares of the work, tiles of queries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage.backends import default_for
from shardpage.backends.pallas_gpu import attend_kernel, config, share, tiles
from shardpage.page_format import KVLayout
from shardpage.plan import Reads

from .test_pallas_gpu import COMPILED, page_format, reads_of


class TestConfig:
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 160, 192, 256])
    def test_everything_fits_shared_memory(self, head_dim):
        for group in (1, 3, 4, 8, 12, 32, 64, 100, 128):
            for page_size in (8, 24, 64, 256):
                form = page_format(head_dim, page_size, heads=2)
                for reads in (reads_of(7), reads_of(40, 9), reads_of(4096, 2)):
                    got = config.configure(form, 2 * group, reads, COMPILED)
                    assert got.rows <= got.consumers * 64 <= 128
                    assert got.block_tokens % got.piece_tokens == page_size % got.piece_tokens == 0
                    assert head_dim % got.store_chunk == 0
                    assert got.out_rows * head_dim % got.merge_width == 0
                    assert got.num_units % got.fold == 0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": np.dtype(np.float32)}, "no matmul for caches of float32.*backend='xla'"),
            ({"head_dim": 8}, "head_dim=8 of bfloat16 is no multiple of 16"),
            ({"head_dim": 272}, "head_dim=272 of bfloat16 is no multiple of 16 up to 256"),
            ({"page_size": 20}, "page_size=20 does not fill tiles.*use page_size=24"),
        ],
    )
    def test_what_it_has_not_is_refused_by_name(self, changes, message):
        form = page_format(**changes)
        with pytest.raises(NotImplementedError, match=message):
            config.configure(form, 8, reads_of(4), COMPILED)
        assert default_for("gpu", "NVIDIA H100 80GB HBM3", form) == "xla"

    @pytest.mark.parametrize("warpgroups", attend_kernel.REGISTERS)
    def test_registers_are_what_a_cta_begins_with(self, warpgroups):
        """Else a warpgroup waits for ever for more: no interpreter shows it."""
        attending, widening = warpgroups
        registers = attend_kernel.REGISTERS[warpgroups]
        used = registers.fetch + attending * registers.attend + widening * registers.widen
        threads = 128 * (1 + attending + widening)
        assert 128 * used <= 65536 // threads // 8 * 8 * threads
        assert max(registers) <= 255
        assert not any(count % 8 for count in registers)

    def test_many_tiles_a_row_are_in_place(self):
        of = lambda *shape: config.configure(page_format(), 32, reads_of(*shape), COMPILED).in_place
        of_rows = [of(4096, rows) for rows in (1, 8, 9)]  # in tiles of 32 queries
        assert of_rows == [True, True, False]
        assert not of(4095, 1)
        assert not of(64)

    def test_options_of_others_are_refused(self):
        tuning = dataclasses.replace(COMPILED, cores="batch")
        with pytest.raises(NotImplementedError, match=r"cores='batch'.*pallas_tpu"):
            config.configure(page_format(), 8, reads_of(4), tuning)
        with pytest.raises(NotImplementedError, match="129 query heads per KV head"):
            config.configure(page_format(heads=1), 129, reads_of(4), COMPILED)

    @pytest.mark.parametrize(
        ("platform", "kind", "expected"),
        [
            ("gpu", "NVIDIA H100 80GB HBM3", "pallas_gpu"),
            ("gpu", "NVIDIA H200", "pallas_gpu"),
            ("gpu", "NVIDIA GH200 480GB", "pallas_gpu"),
            ("gpu", "NVIDIA A100-SXM4-80GB", "xla"),
            ("gpu", "NVIDIA B200", "xla"),
            ("cpu", "cpu", "xla"),
            ("tpu", "TPU v5e", "pallas_tpu"),
        ],
    )
    def test_default(self, platform, kind, expected):
        assert default_for(platform, kind, page_format()) == expected

    @pytest.mark.parametrize("layout", list(KVLayout))
    def test_layouts(self, layout):
        form = page_format(layout=layout)
        assert default_for("gpu", "NVIDIA H200", form) == "pallas_gpu"
        assert default_for("tpu", "TPU v6e", form) == "pallas_tpu"


class TestShares:
    """The shares of all CTAs are the flat list, in order, and none is much larger than another."""

    @staticmethod
    def shares(num_tiles, num_ctas, num_splits, seed):
        form = page_format(heads=3)
        tuning = dataclasses.replace(COMPILED, chip=num_ctas, num_splits=num_splits)
        made = config.configure(form, 12, reads_of(num_tiles), tuning)
        rng = np.random.default_rng(seed)
        stop = rng.choice([0, 1, 128, 129, 700, 5000], num_tiles).astype(np.int32)
        start = np.where(stop > 0, np.minimum(rng.integers(0, 300, num_tiles), stop - 1), 0)
        spans = (jnp.asarray(x, jnp.int32) for x in (start, stop))
        of = jax.vmap(functools.partial(share.share_of, made), in_axes=(None, None, 0))
        got = jax.jit(of)(*spans, jnp.arange(num_ctas))
        blocks = -(-stop // 128) - np.where(stop > 0, start // 128, 0)
        return jax.tree.map(np.asarray, got), np.repeat(blocks, 3)

    @pytest.mark.parametrize("num_splits", [0, 1, 2, 5])
    @pytest.mark.parametrize(("num_tiles", "num_ctas"), [(1, 5), (40, 7), (70, 132)])
    def test_cover_the_list(self, num_tiles, num_ctas, num_splits, monkeypatch):
        monkeypatch.setattr(share, "_AT_ONCE", 3)  # compiles sooner
        for seed in range(3):
            got, blocks = self.shares(num_tiles, num_ctas, num_splits, seed)
            firsts = np.cumsum(blocks) - blocks
            items = got.begin.item
            assert items[0] == 0
            np.testing.assert_array_equal(items[1:], (items + got.length)[:-1])
            assert items[-1] + got.length[-1] == blocks.sum() == got.total[0]
            if not num_splits:
                assert np.ptp(got.length) <= 1
            for cta in np.flatnonzero(got.length):
                unit = got.begin.tile[cta] * 3 + got.begin.head[cta]
                assert firsts[unit] + got.begin.block[cta] == items[cta]
                assert got.begin.block[cta] < blocks[unit]
                if num_splits:  # cut between its parts only
                    part = -(-blocks[unit] // num_splits)
                    assert got.begin.block[cta] % part == 0


class TestTiles:
    """Queries by the tile, against a loop."""

    @pytest.mark.parametrize("seed", range(4))
    def test_hold_each_query_once(self, seed):
        rng = np.random.default_rng(seed)
        lens = rng.choice([0, 1, 2, 9, 40], 6)
        row = np.repeat(np.arange(6), lens)
        padding = int(rng.integers(0, 4)) + (not len(row))
        stop = rng.integers(0, 500, len(row) + padding)
        stop[len(row) :] = 0
        start = np.where(stop > 0, rng.integers(0, 500, len(stop)) % np.maximum(stop, 1), 0)
        start = np.where(rng.random(len(stop)) < 0.2, stop, start)  # nothing, somewhere
        row = np.concatenate([row, np.full(padding, 6)])
        arrays = [jnp.asarray(x, jnp.int32) for x in (row, start, stop)]
        reads = Reads(jnp.zeros((6, 40), jnp.int32), *arrays)
        made = config.configure(page_format(heads=2), 8, reads, COMPILED)
        work = jax.tree.map(np.asarray, tiles.tile(reads, made))
        count = made.tile_queries
        assert len(set(work.place)) == len(row)
        for query, place in enumerate(work.place):
            tile, at = divmod(place, count)
            assert work.query[tile, at] == query
            assert work.tiles.row[tile] == min(row[query], 5)
            rows = at + count * np.arange(4)  # head by head
            assert (work.tiles.starts[tile, rows] == start[query]).all()
            assert (work.tiles.stops[tile, rows] == stop[query]).all()
        for tile in range(made.num_tiles):
            mine = [q for q, place in enumerate(work.place) if place // count == tile]
            some = [q for q in mine if stop[q] > start[q]]
            assert len({row[q] for q in mine}) <= 1
            assert work.tiles.start[tile] == min((start[q] for q in some), default=0)
            assert work.tiles.stop[tile] == max((stop[q] for q in some), default=0)
            if some:
                assert work.tiles.all_start[tile] == max(start[q] for q in some)
                assert work.tiles.all_stop[tile] == min(stop[q] for q in some)

    @pytest.mark.usefixtures("soon_in_place")
    @pytest.mark.parametrize("num_queries", [144, 200])
    def test_windows(self, num_queries):
        """Each query is one tile's own, and copies find whole windows."""
        rng = np.random.default_rng(num_queries)
        row = np.sort(rng.integers(0, 2, num_queries))
        number = jnp.arange(num_queries, dtype=jnp.int32)
        reads = Reads(jnp.zeros((2, 40), jnp.int32), jnp.asarray(row), 0 * number, number + 1)
        made = config.configure(page_format(heads=2), 8, reads, COMPILED)
        assert made.in_place
        work = jax.tree.map(np.asarray, tiles.tile(reads, made))
        start, begin, end = work.tiles.windows
        own = [np.arange(*span) for span in zip(begin, end, strict=True)]
        np.testing.assert_array_equal(np.concatenate(own), number)
        for tile, queries in enumerate(own):
            assert (work.place[queries] == tile * 32 + queries - start[tile]).all()
            assert (work.query[tile] == start[tile] + np.arange(32)).all()
            assert len(set(row[queries])) <= 1
            assert start[tile] % 8 == 0 <= start[tile] <= num_queries - 32
