"""Queries in tiles on the TPU backend: which there are, in what order, and in how much memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, Tuning, attend, make_plan, write_kv
from shardpage.backends.pallas_tpu.chip import MIB, Chip
from shardpage.backends.pallas_tpu.config import Cores
from shardpage.backends.pallas_tpu.prompt.config import Config, configure
from shardpage.backends.pallas_tpu.prompt.walk import NUM_FIELDS, Tile, schedule
from shardpage.backends.pallas_tpu.sizes import vmem_page_bytes
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Reads
from shardpage.tiles import tiles_of

from .backends import LOOK_FOR_RACES

CHIPS = {
    "v4": Chip("v4", 2, 16 * MIB, MIB, 614e3),
    "v5e": Chip("v5e", 1, 64 * MIB, MIB, 819e3),
    "tpu7x": Chip("7x", 1, 32 * MIB, MIB, 3690e3),
}


def page_format(num_kv_heads=8, page_size=16, head_dim=128, dtype="bfloat16", pack=1):
    dims = (num_kv_heads, page_size, head_dim, head_dim, np.dtype(jnp.dtype(dtype)), pack)
    return PageFormat(KVLayout.FUSED, *dims)


def a_config(cores=1, tile_tokens=8, block_pages=4, **shape) -> Config:
    return Config(
        page_format(**shape), 2, Cores(cores), num_queries=64, max_pages=40,
        tile_tokens=tile_tokens, block_pages=block_pages, places=2,
    )  # fmt: skip


def reads(spans: list[list[tuple[int, int]]], num_queries: int, columns: int) -> Reads:
    """What each query of each row reads; padding behind them."""
    flat = [(row, *span) for row, queries in enumerate(spans) for span in queries]
    flat += [(len(spans), 0, 0)] * (num_queries - len(flat))
    row, start, stop = (jnp.asarray(x, jnp.int32) for x in zip(*flat, strict=True))
    return Reads(jnp.zeros((len(spans), columns), jnp.int32), row, start, stop)


PROMPT = [(0, n + 1) for n in range(30, 50)]
WINDOW = [(n - 20, n + 1) for n in range(100, 113)]
ROWS = [PROMPT, [], [(0, 300)], WINDOW, [(0, 5)] * 3]


class TestWalk:
    @pytest.mark.parametrize("cores", [1, 2])
    def test_visits_every_query_and_every_page_that_it_reads(self, cores):
        config = a_config(cores)
        given = reads(ROWS, config.num_queries, config.max_pages)

        @jax.jit
        def lay_out():
            (tiles,) = tiles_of(given, (config.tile_tokens,))
            return schedule(given, tiles, config)

        walk = lay_out()
        fields = np.asarray(walk.tiles).reshape(-1, NUM_FIELDS)
        bounds = np.asarray(walk.bounds)
        assert bounds[0] == 0
        assert np.all(np.diff(bounds) >= 0)
        seen = []
        for core in range(cores):
            mine = [Tile(*f) for f in fields[bounds[core] : bounds[core + 1]]]
            assert sum(tile.num_blocks for tile in mine) == walk.num_blocks[core]
            for number, tile in enumerate(mine, bounds[core]):
                queries = range(tile.first_query, tile.first_query + tile.num_queries)
                spans = [(int(given.start[i]), int(given.stop[i])) for i in queries]
                assert np.asarray(walk.spans)[number, : len(spans), :2].tolist() == [
                    *map(list, spans)
                ]
                read = [span for span in spans if span[0] < span[1]]
                begin, end = tile.begin * 16, tile.end * 16
                assert all(begin <= start and stop <= end for start, stop in read)
                all_see = range(tile.all_from, tile.all_to)
                assert all(
                    a <= t < b for t in (all_see[:1], all_see[-1:]) for t in t for a, b in spans
                )
                blocks = max(1, -(-tile.end // 4) - tile.begin // 4)
                assert tile.num_blocks == (blocks if read else 1)
                seen += queries
        assert sorted(seen) == list(range(config.num_queries))

    def test_cores_share_blocks_as_evenly_as_tiles_allow(self):
        config = a_config(2)
        prompt = [[(0, n + 1) for n in range(400, 464)]]
        given = reads(prompt, 64, config.max_pages)
        walk = jax.jit(lambda: schedule(given, tiles_of(given, (8,))[0], config))()
        assert np.diff(np.asarray(walk.bounds)).tolist() == [4, 4]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(64, 8), (8, 1), (32, 32), (128, 4)])
@pytest.mark.parametrize("page_size", [8, 64, 512])
def test_any_chunk_fits(chip, head_dim, num_heads, num_kv_heads, page_size):
    """No number of queries is too much for fast memory, if a few pages are not."""
    tuning = Tuning(chip=CHIPS[chip])
    shape = page_format(num_kv_heads, page_size, head_dim)
    if 2 * vmem_page_bytes(shape) >= CHIPS[chip].cores * CHIPS[chip].vmem_bytes:
        with pytest.raises(NotImplementedError, match="a smaller page_size"):
            configure(shape, num_heads, 8192, 1 << 20, tuning)
        return
    config = configure(shape, num_heads, 8192, 1 << 20, tuning)
    assert config.vmem_bytes < CHIPS[chip].vmem_bytes
    assert config.rows >= 32  # of a matmul
    assert config.block_tokens >= 64


def test_what_does_not_fit_is_refused_with_what_would():
    tuning = Tuning(chip=CHIPS["v4"], pages_per_block=64)
    with pytest.raises(NotImplementedError, match=r"16 query tokens .* Use fewer pages per block"):
        configure(page_format(page_size=512), 64, 8192, 1 << 20, tuning)


@pytest.mark.parametrize("head_dim", [64, 32])
def test_packed_rows_are_those_of_other_backends(head_dim):
    """Several tokens in a cache row, several queries in a tile: a step by two backends."""
    lens, query_lens = jnp.array([40, 70, 9]), jnp.array([13, 2, 1])
    tables = jnp.arange(15, dtype=jnp.int32).reshape(3, 5)
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    new = draw(16, 2, head_dim), draw(16, 2, head_dim)
    queries = random.standard_normal((16, 4, head_dim))
    results = []
    for backend in ("xla", "pallas_tpu"):
        interpret = LOOK_FOR_RACES if backend == "pallas_tpu" else None
        cache = PagedKVCache.zeros(15, 2, 32, head_dim, dtype=jnp.float32, packed=True)
        tuning = Tuning(backend=backend, interpret=interpret)
        how = {"num_heads": 4, "query_lens": query_lens, "num_queries": 16, "tuning": tuning}
        plan = make_plan(cache, lens, tables, **how)
        cache = write_kv(cache, *new, plan)
        query = jnp.asarray(queries, jnp.float32)
        results.append(attend(query, cache, plan, return_lse=True))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_step_has_two_kernels_more_than_decoding():
    """Tiles of few queries, and of many where there are many; and rows of one, which decode."""

    def kernels(num_queries):
        cache = PagedKVCache.abstract(16, 2, 16, 128, dtype=jnp.bfloat16)
        tuning = Tuning(backend="pallas_tpu", interpret=True)
        lens = jnp.array([40, 64])

        def step(query, cache):
            how = {"num_heads": 4, "query_lens": lens // 8, "num_queries": num_queries}
            plan = make_plan(cache, lens, jnp.zeros((2, 4), jnp.int32), tuning=tuning, **how)
            return attend(query, cache, plan)

        query = jax.ShapeDtypeStruct((num_queries, 4, 128), jnp.bfloat16)
        return str(jax.make_jaxpr(step)(query, cache)).count("name=shardpage_prompt")

    assert (kernels(16), kernels(24)) == (1, 2)


class TestMaxima:
    """A row's maximum is that of its first tokens, for as long as it serves."""

    HEADS, DIM = 4, 128
    # Queries, pages and their size. In tiles of many rows, queries, keys and values are looked at
    # for an overflow, and not logits and results.
    FEW, MANY = (24, 10, 16), (256, 16, 128)

    def results(self, change, shape):
        """Of the backend, and of another one.

        Whole blocks of 4 pages, then one of which the queries see more and more.
        """
        random = np.random.default_rng(0)
        draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
        num_queries, num_pages, page = shape
        num_tokens = num_pages * page
        shapes = (num_queries, self.HEADS), (num_tokens, 2), (num_tokens, 2)
        query, *kv = (draw(*shape, self.DIM) for shape in shapes)
        change(query, *kv)
        found = []
        for backend in ("pallas_tpu", "xla"):
            interpret = LOOK_FOR_RACES if backend == "pallas_tpu" else None
            tuning = Tuning(backend=backend, interpret=interpret, pages_per_block=4)
            cache = PagedKVCache.zeros(num_pages, 2, page, self.DIM, dtype=np.float32)
            pages = np.random.default_rng(1).permutation(num_pages)[None]
            tokens = np.arange(num_tokens)
            lens = jnp.array([num_tokens - 6])
            cache = write_kv(cache, *kv, 0 * tokens, tokens, pages)
            how = {"query_lens": jnp.array([num_queries]), "num_queries": num_queries}
            plan = make_plan(cache, lens, pages, num_heads=self.HEADS, tuning=tuning, **how)
            found.append(attend(jnp.asarray(query), cache, plan, return_lse=True))
        return found

    def check(self, change=lambda query, key, value: None, shape=FEW):
        (out, lse), (expected, expected_lse) = self.results(change, shape)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-5, atol=2e-5)
        return np.asarray(out)

    @pytest.fixture(scope="class")
    @classmethod
    def clean(cls):
        return cls().check()

    @pytest.mark.parametrize("times", [6, 30, 1e4])
    @pytest.mark.parametrize("token", [5, 40, 100, 140])
    def test_grow_by_little_or_by_much(self, token, times):
        """From what a weight of 1 has room for, past what any could be."""

        def change(query, key, value):
            key[token] = query[7, ::2] * (times / np.sqrt(self.DIM))

        self.check(change)

    def test_of_the_first_tokens_may_be_far_below(self):
        def change(query, key, value):
            key[:64] = -100 * query[:, ::2].mean(0)

        self.check(change)

    @pytest.mark.parametrize(("shape", "token"), [(FEW, 100), (MANY, 600)])
    def test_values_that_only_a_large_weight_makes_overflow(self, shape, token):
        """Weights of 2**13, which the maximum of the first tokens serves, times 1e36."""

        def change(query, key, value):
            query[:], key[:] = query[:1] / 16, key / 16
            own = query[0, ::2]
            key[token] = own * 9 * np.sqrt(self.DIM) / np.square(own).sum(-1, keepdims=True)
            value[token] *= 1e36

        assert np.isfinite(self.check(change, shape)).all()

    @pytest.mark.parametrize("which", [0, 1, 2])
    @pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("token", [3, 100])
    def test_what_is_not_finite_is_nan_in_what_reads_it(self, clean, which, what, token):
        def change(*arrays):
            arrays[which][token % len(arrays[which]), 1, 9] = what

        out = self.check(change)
        bad = np.isnan(out).any(-1)
        heads = slice(1, 2) if which == 0 else slice(2, 4)
        queries = token % len(out) if which == 0 else slice(None)
        assert bad[queries, heads].all()
        bad[queries, heads] = False
        assert not bad.any()
        kept = ~np.isnan(out)
        np.testing.assert_allclose(out[kept], clean[kept], rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize(("shape", "token"), [(FEW, 3), (FEW, 100), (MANY, 3), (MANY, 600)])
    def test_a_product_that_overflows_is_nan(self, shape, token):
        """To -inf, and no other logit is large."""

        def change(query, key, value):
            query[:, :2, 9], key[:, 0, 9], key[token, 0] = 0, 0, 0
            query[5, 1, 9], key[token, 0, 9] = 1e25, -1e25

        out = self.check(change, shape)
        assert np.isnan(out[5, 1]).all()
        assert np.isfinite(np.delete(out.reshape(-1, self.DIM), 5 * self.HEADS + 1, 0)).all()

    @pytest.mark.parametrize(("shape", "token"), [(FEW, 100), (MANY, 600)])
    def test_large_elements_whose_products_are_finite(self, shape, token):
        def change(query, key, value):
            query[:, 1], key[token, 0] = 1e-20 * query[:, 1], 1e20 * key[token, 0]

        assert np.isfinite(self.check(change, shape)).all()
