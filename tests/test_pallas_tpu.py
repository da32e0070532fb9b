"""The Pallas TPU kernels in interpret mode: what the suites of all backends do not reach.

Copies are simulated with their semaphores, uninitialised memory is NaN, and races are looked for.
"""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from shardpage import PagedKVCache
from shardpage.backends import pallas_tpu, xla
from shardpage.backends.pallas_tpu import softmax
from shardpage.backends.pallas_tpu.chip import MIB, UNKNOWN_CHIP
from shardpage.backends.pallas_tpu.config import check_format, configure
from shardpage.backends.pallas_tpu.geometry import Geometry
from shardpage.backends.pallas_tpu.sizes import heads_per_pass
from shardpage.options import Attention, Tuning
from shardpage.page_format import QUANTISED, KVLayout, PageFormat
from shardpage.plan import Reads, Writes
from shardpage.quantise import Stored

from . import reference, tolerance
from .backends import LOOK_FOR_RACES, attend, attend_as
from .cases import KV_LAYOUTS, Case, make

# A chip with two TensorCores, which run at the same time.
TWO_CORES = Tuning(
    backend="pallas_tpu",
    chip=dataclasses.replace(UNKNOWN_CHIP, name="two cores", cores=2),
    interpret=dataclasses.replace(LOOK_FOR_RACES, num_cores_or_threads=2),
)
LITTLE_SCALAR_MEMORY = Tuning(
    backend="pallas_tpu", chip=dataclasses.replace(UNKNOWN_CHIP, smem_bytes=(64 << 10) + 9000)
)
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)


@pytest.fixture(autouse=True)
def no_races(capfd):
    """The detector prints what it finds."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def check(case: Case, kv_layout: str = "fused", *, packed: bool = False, **changes) -> None:
    inputs = make(case, kv_layout, packed=packed)
    tolerance.assert_within_rounding(inputs, *attend(inputs, "pallas_tpu", **changes))


def check_on(case: Case, tuning: Tuning, **how) -> None:
    inputs = make(case, "fused")
    out, lse = attend_as(inputs, dataclasses.replace(tuning, **how))
    tolerance.assert_within_rounding(inputs, out, lse)


def test_a_race_would_be_seen(capfd):
    """The detector works: reading a buffer before its copy arrived is a race."""

    def kernel(source, out, buffer, semaphore):
        copy = pltpu.make_async_copy(source, buffer, semaphore)
        copy.start()
        out[...] = buffer[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
    )
    said = ""
    try:
        jax.block_until_ready(call(jnp.ones((8, 128), jnp.float32)))
    except jax.errors.JaxRuntimeError as error:  # from JAX 0.11 on; before, it only prints
        said = str(error)
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in said + "".join(capfd.readouterr())


SHAPES = {
    "dim32": Case("dim32", head_dim=32),
    "dim80": Case("dim80", head_dim=80),
    "dim96_bf16": Case("dim96_bf16", head_dim=96, dtype="bfloat16"),
    "dim192": Case("dim192", head_dim=192),
    "dim256_bf16": Case("dim256_bf16", head_dim=256, dtype="bfloat16"),
    "page8_bf16": Case("page8_bf16", page_size=8, dtype="bfloat16"),
    "page24": Case("page24", page_size=24),
    "page256": Case("page256", page_size=256, max_blocks=2),
    "mha32": Case("mha32", num_heads=32, num_kv_heads=32, num_seqs=3),
    "mqa32": Case("mqa32", num_heads=32, num_kv_heads=1, num_seqs=3),
    "single_head": Case("single_head", num_heads=1, num_kv_heads=1),
    "g3k3": Case("g3k3", num_heads=9, num_kv_heads=3),
    "g5k2": Case("g5k2", num_heads=10, num_kv_heads=2),
    "g12k2": Case("g12k2", num_heads=24, num_kv_heads=2),
    "g2k6": Case("g2k6", num_heads=12, num_kv_heads=6),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    layouts = itertools.cycle(KV_LAYOUTS)
    layout = dict(zip(SHAPES, layouts, strict=False))[name]
    check(SHAPES[name], layout)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_layout"),
    [
        (64, 16, "fused"),
        (64, 32, "heads_first"),
        (32, 32, "blocks_first"),
        (16, 64, "fused"),
    ],
)
def test_packed_rows_see_no_token_of_another(head_dim, page_size, kv_layout):
    """Tokens share a row with poisoned ones, at both ends of a window."""
    case = Case(
        f"packed{head_dim}_{page_size}",
        head_dim=head_dim,
        page_size=page_size,
        sliding_window=page_size + 5,
        dtype="bfloat16",
    )
    check(case, kv_layout, packed=True)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64])
def test_masks_of_any_number_of_queries(head_dim):
    """Each row of a head sees its own token of a cache row, for all packings and query counts."""
    pack = 128 // head_dim
    page_format = PageFormat(KVLayout.FUSED, 3, 8 * pack, head_dim, head_dim, FLOAT32, pack)
    geometries = [Geometry(page_format, queries) for queries in range(1, 129)]
    start, stop = 2, 8 * pack - 3
    span = softmax.Span(jnp.int32(start), jnp.int32(stop))
    masks = jax.jit(lambda: [softmax._seen_logits(each, 8, span) for each in geometries])()
    token = np.arange(8) * pack + np.arange(pack)[:, None, None]
    for geometry, seen in zip(geometries, masks, strict=True):
        queries, per_head = geometry.queries_per_kv_head, geometry.rows_per_head
        for head in range(geometry.rows_per_group // per_head):
            rows = np.asarray(seen)[head * per_head :][: pack * queries].reshape(pack, queries, 8)
            expected = np.broadcast_to((token >= start) & (token < stop), rows.shape)
            np.testing.assert_array_equal(rows, expected, err_msg=f"{queries=}")


def test_rows_are_taken_from_their_own_head():
    for pack, queries in itertools.product((1, 2, 4, 8, 16), range(1, 129)):
        dim = 128 // pack
        page_format = PageFormat(KVLayout.FUSED, 5, 8 * pack, dim, dim, FLOAT32, pack)
        geometry = Geometry(page_format, queries)
        heads = geometry.heads_of(0)
        results = [jnp.full((geometry.rows_per_group, 2), head) for head in heads]
        taken = np.asarray(softmax._own_rows(geometry, results))[:, 0]
        used = len(heads) * geometry.rows_per_head
        np.testing.assert_array_equal(taken[:used], np.repeat(heads, geometry.rows_per_head))


@pytest.mark.parametrize(
    ("head_dim", "queries"),
    [(64, 12), (64, 9), (64, 71), (32, 5), (16, 3)],
)
def test_packed_rows_with_any_number_of_queries(head_dim, queries):
    """Counts that are no power of two, Falcon-7B's 71 among them."""
    pack = 128 // head_dim
    case = Case(f"g{queries}_dim{head_dim}", num_seqs=3, num_heads=2 * queries, num_kv_heads=2,
                head_dim=head_dim, page_size=8 * pack, sliding_window=11 * pack)  # fmt: skip
    check(case, packed=True)


@pytest.mark.parametrize(
    ("heads", "queries", "head_dim", "page"), [(64, 1, 128, 64), (48, 3, 64, 256)]
)
def test_large_pages_are_worked_on_some_heads_after_the_others(heads, queries, head_dim, page):
    """Blocks of 4 and 6 MiB, in two and three passes; NaN in one head of one value."""
    lens = (page + 3, 0, 2 * page)
    case = Case("large", num_seqs=3, lens=lens, num_heads=heads * queries, num_kv_heads=heads,
                head_dim=head_dim, page_size=page, max_blocks=2)  # fmt: skip
    inputs = make(case, "fused", packed=True)
    rows = PageFormat(KVLayout.FUSED, heads, page, head_dim, head_dim, FLOAT32, 128 // head_dim)
    assert heads_per_pass(Geometry(rows, queries), 1) == {64: 32, 48: 16}[heads]
    tuning = Tuning(
        backend="pallas_tpu", chip=dataclasses.replace(UNKNOWN_CHIP, vmem_bytes=64 * MIB)
    )
    clean = attend_as(inputs, tuning)
    tolerance.assert_within_rounding(inputs, *clean)
    inputs.key_cache = inputs.key_cache.copy()
    inputs.key_cache[inputs.block_tables[2, 1], 1, 5, 9, 7] = np.nan
    seen = np.zeros(clean[1].shape, bool)
    seen[2, 5 * queries : 6 * queries] = True
    for one, other in zip(clean, attend_as(inputs, tuning), strict=True):
        assert np.isnan(other[seen]).all()
        np.testing.assert_array_equal(other[~seen], one[~seen])


@pytest.mark.parametrize("pages", [1, 3])
def test_many_blocks_of_a_sequence(pages):
    """Long sequences next to short and empty ones: blocks without a mask, across their ends."""
    lens = (512, 0, 33, 0, 0, 400, 512, 1)
    case = Case("plain", lens=lens, max_blocks=32, pages_per_compute_block=pages)
    check(case)


@pytest.mark.parametrize(
    ("where", "what"),
    [(np.s_[:, :, 2], np.nan), (np.s_[1, 0, 2, 5], np.nan), (np.s_[1, 0, 2, 5], -np.inf)],
)
def test_sequences_that_share_a_step_share_no_nan(where, what):
    """Eight blocks at once, of sequences of which one has read a NaN; be it in one value alone."""
    lens = (40, 0, 16, 33, 7, 64, 1, 20)
    inputs = make(Case("shared_step", num_seqs=8, lens=lens, num_heads=2, num_kv_heads=1), "fused")
    chip = dataclasses.replace(UNKNOWN_CHIP, step_blocks=8)
    tuning = Tuning(backend="pallas_tpu", chip=chip)
    clean = attend_as(inputs, tuning)
    tolerance.assert_within_rounding(inputs, *clean)
    cache = inputs.key_cache.copy()
    cache[inputs.block_tables[3, 0]][where] = what
    broken = attend_as(dataclasses.replace(inputs, key_cache=cache), tuning)
    for one, other in zip(clean, broken, strict=True):
        assert np.isnan(other[3]).all()
        np.testing.assert_array_equal(np.delete(other, 3, 0), np.delete(one, 3, 0))


class TestPagedTables:
    """Page ids that do not fit scalar memory come in windows."""

    CASE = Case("paged", num_seqs=8, max_blocks=300, page_size=8, lens=(2400, 0, 9, 1030, *[8] * 4))

    @pytest.mark.parametrize("pages", [7, None])
    def test_matches_the_oracle(self, pages):
        check_on(self.CASE.replace(pages_per_compute_block=pages), LITTLE_SCALAR_MEMORY)

    def test_windows_refuse_long_blocks(self):
        with pytest.raises(NotImplementedError, match="use at most 128, or None"):
            check_on(self.CASE.replace(pages_per_compute_block=129), LITTLE_SCALAR_MEMORY)


RUNS: dict[str, dict] = {
    "separate": {},
    "window": {"sliding_window": 77},
    "splits": {"num_splits": 3},
    "bf16": {"dtype": "bfloat16", "page_size": 16},
    "packed": {"head_dim": 64, "page_size": 16},
    "ragged": {"lens": "ragged", "num_seqs": 16},
}


class TestRuns:
    """Small pages whose ids follow each other come in one copy; others in the same call do not."""

    CASE = Case(
        "runs", num_seqs=6, num_heads=4, num_kv_heads=1, head_dim=128, page_size=8, max_blocks=40,
        lens=(251, 7, 100, 0, 64, 320), pages_per_compute_block=8,
    )  # fmt: skip

    @staticmethod
    def with_short_rings(tuning: Tuning) -> Tuning:
        """What is fetched before the loop has no runs: most steps should be fetched in it."""
        chip = dataclasses.replace(tuning.chip, hbm_bytes_per_us=1e4)
        return dataclasses.replace(tuning, chip=chip)

    @staticmethod
    def inputs(case: Case, layout: str, broken: bool):
        """Pages in order; but one of the longest sequence, near its end, which is page 0."""
        inputs = make(case, layout, in_order=True, packed=case.head_dim < 128)
        if broken:
            longest = np.argmax(inputs.context_lens)
            column = inputs.context_lens[longest] // case.page_size - 5
            page = inputs.block_tables[longest, column]
            inputs.block_tables[longest, column] = 0
            for array in (inputs.key_cache, inputs.value_cache):
                if array is not None:
                    array[[0, page]] = array[[page, 0]]  # which nobody may read now
        return inputs

    @pytest.mark.parametrize("broken", [False, True])
    @pytest.mark.parametrize("name", RUNS)
    def test_match_the_oracle(self, name, broken):
        case = self.CASE.replace(**RUNS[name])
        inputs = self.inputs(case, "blocks_first" if name == "separate" else "fused", broken)
        tuning = self.with_short_rings(Tuning(backend="pallas_tpu", chip=UNKNOWN_CHIP))
        tolerance.assert_within_rounding(inputs, *attend_as(inputs, tuning))

    @pytest.mark.parametrize("tuning", [LITTLE_SCALAR_MEMORY, TWO_CORES])
    def test_with_tables_that_are_paged_in_and_on_two_cores(self, tuning):
        case = self.CASE.replace(max_blocks=300, lens=(1030, 0, 9, 250, 8, 2400))
        inputs = self.inputs(case, "fused", broken=True)
        outputs = attend_as(inputs, self.with_short_rings(tuning))
        tolerance.assert_within_rounding(inputs, *outputs)

    def test_ids_that_are_read_and_not_used_are_there(self):
        """A block of all that two windows of ids hold, up to the last of them."""
        case = self.CASE.replace(
            max_blocks=300, lens=(0, 9, 0, 8, 8, 2400), pages_per_compute_block=128,
            sliding_window=2400 - 127 * 8,
        )  # fmt: skip
        outputs = attend_as(inputs := self.inputs(case, "fused", False), LITTLE_SCALAR_MEMORY)
        tolerance.assert_within_rounding(inputs, *outputs)

    @pytest.mark.parametrize(
        ("page_format", "pages"),
        [
            (PageFormat(KVLayout.FUSED, 1, 16, 128, 128, BFLOAT16), 4),
            (PageFormat(KVLayout.BLOCKS_FIRST, 1, 16, 128, 128, BFLOAT16), 4),
            (PageFormat(KVLayout.HEADS_FIRST, 1, 16, 128, 128, BFLOAT16), 1),
            (PageFormat(KVLayout.FUSED, 1, 24, 128, 128, BFLOAT16), 2),
            (PageFormat(KVLayout.FUSED, 2, 16, 128, 128, BFLOAT16), 2),
            (PageFormat(KVLayout.FUSED, 8, 16, 128, 128, BFLOAT16), 1),
            (PageFormat(KVLayout.FUSED, 1, 64, 128, 128, BFLOAT16), 1),
        ],
    )
    def test_make_copies_large_but_no_larger(self, page_format, pages):
        config = configure(page_format, 8 * page_format.num_kv_heads, 64, 256, TWO_CORES)
        assert config.sizes.run_pages == pages


class TestMegacore:
    LENS = (500, 3, 0, 17, 40, 1, 0, 9)

    @pytest.mark.parametrize("mode", ["batch", "kv_head", None])
    def test_two_cores(self, mode):
        case = Case("megacore", lens=self.LENS, max_blocks=32, pages_per_compute_block=2)
        check_on(case, TWO_CORES, cores=mode)

    @pytest.mark.parametrize(("mode", "count"), [(None, 2), ("auto", 2), ("off", 1)])
    def test_both_cores_work_unless_told_otherwise(self, mode, count):
        page_format = PageFormat(KVLayout.FUSED, 4, 16, 128, 128, FLOAT32)
        tuning = dataclasses.replace(TWO_CORES, cores=mode)
        assert configure(page_format, 8, 8, 32, tuning).cores.count == count

    def test_one_sequence_is_split_by_context(self):
        case = Case("alone", num_seqs=1, lens=(512,), max_blocks=32, pages_per_compute_block=2)
        check_on(case.replace(num_heads=3, num_kv_heads=1), TWO_CORES, cores="batch")

    def test_splits_and_cores_together(self):
        case = Case("both", lens=self.LENS, max_blocks=32, pages_per_compute_block=1, num_splits=3)
        check_on(case, TWO_CORES, cores="batch")

    def test_odd_heads_are_refused(self):
        case = Case("odd", num_heads=3, num_kv_heads=3)
        with pytest.raises(ValueError, match="use 'batch', which cuts the work at any block of pa"):
            check_on(case, TWO_CORES, cores="kv_head")

    @pytest.mark.parametrize("mode", ["kv_head", "batch"])
    def test_one_core_is_refused(self, mode):
        with pytest.raises(NotImplementedError, match=r"mode=.* is one core: use None or 'auto'"):
            check(Case("one_core"), megacore_mode=mode)

    @pytest.mark.parametrize("mode", ["auto", "off"])
    def test_nothing_to_choose_on_one_core(self, mode):
        check(Case("one_core", num_seqs=2), megacore_mode=mode)


class TestRefusals:
    """Before anything is compiled, and with what would work."""

    def test_page_sizes(self):
        with pytest.raises(NotImplementedError, match="use page_size=16"):
            check_format(PageFormat(KVLayout.FUSED, 1, 12, 128, 128, FLOAT32))

    def test_packed_pages(self):
        with pytest.raises(NotImplementedError, match="use page_size=16"):
            check_format(PageFormat(KVLayout.FUSED, 1, 8, 64, 64, FLOAT32, 2))

    def test_inline_seq_dim(self):
        with pytest.raises(NotImplementedError, match="use inline_seq_dim=True"):
            check(Case("inline"), inline_seq_dim=False)

    def test_pages_too_large_for_fast_memory(self):
        case = Case("huge", num_seqs=1, num_heads=32, num_kv_heads=32, page_size=1024, head_dim=256)
        with pytest.raises(NotImplementedError, match=r"take .* B of VMEM, a kernel has .* B"):
            check(case.replace(max_blocks=1, lens=(1,)))


WRITES = [
    # dtype, head_dim, tokens a row, page_size, KV heads
    ("bfloat16", 128, 1, 16, 2),
    ("float32", 128, 1, 8, 3),
    ("bfloat16", 64, 2, 32, 2),
    ("bfloat16", 80, 1, 8, 1),
    ("bfloat16", 256, 1, 16, 1),
    ("float32", 192, 1, 8, 1),
    ("int8", 128, 1, 32, 2),
    ("float8_e4m3fn", 64, 2, 64, 1),
    ("float8_e5m2", 128, 1, 64, 1),
]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "pack", "page_size", "num_kv_heads", "kv_layout", "order"),
    [  # each shape, and each layout, in each order
        (*write, kv_layout, ("random", "prompt", "swapped")[(i + j) % 3])
        for i, write in enumerate(WRITES)
        for j, kv_layout in enumerate(KV_LAYOUTS)
    ],
)
def test_write_puts_what_xla_puts(kv_layout, dtype, head_dim, pack, page_size, num_kv_heads, order):
    """Single tokens, whole tiles and dropped tokens at once; a prompt's fill tiles in order."""
    rng = np.random.default_rng(0)
    num_pages, num_tokens = 6, 80 if page_size >= 32 and dtype in QUANTISED else 40
    normal = lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    draw = lambda shape: (30 * normal(shape)).astype(dtype)
    cache = jax.tree.map(
        lambda array: (30 * normal(array.shape)).astype(array.dtype),
        PagedKVCache.abstract(
            num_pages, num_kv_heads, page_size, head_dim,
            dtype=dtype, kv_layout=kv_layout, packed=pack > 1,
        ),
    )  # fmt: skip
    key, value = (draw((num_tokens, num_kv_heads, head_dim)) for _ in range(2))
    place = rng.choice(num_pages * page_size, num_tokens, replace=False).astype(np.int32)
    dropped = rng.random(num_tokens) < 0.2
    if order != "random":
        place = np.arange(3, 3 + num_tokens, dtype=np.int32)  # all slots of some tiles
        dropped = place >= num_pages * page_size
    if order == "swapped":
        place[[14, 16]], place[[20, 21]] = place[[16, 14]], place[[21, 20]]
    pages = np.where(dropped, num_pages, place // page_size).astype(np.int32)
    writes = Writes(jnp.asarray(pages), jnp.asarray(place % page_size))
    scales = normal((num_tokens, num_kv_heads, 2)) if cache.scale == "token" else None
    tokens = Stored(key, value, scales)
    wanted = xla.write(cache, tokens, writes, None, Tuning())
    tuning = Tuning(interpret=LOOK_FOR_RACES)
    work = pallas_tpu.prepare_writes(writes, num_pages, cache.format, tuning)
    write = jax.jit(lambda *arrays: pallas_tpu.write(*arrays, tuning))
    actual = write(cache, tokens, writes, work)
    chex.assert_trees_all_equal(actual, wanted)


def test_write_of_nothing():
    cache = PagedKVCache.of(
        *[jnp.ones((2, 1, 8, 128), jnp.float32)] * 2, kv_layout="blocks_first", head_dim=128
    )
    token = jnp.zeros((3, 1, 128), jnp.float32)
    dropped = Writes(jnp.array([2, -1, 2], jnp.int32), jnp.zeros(3, jnp.int32))
    tuning = Tuning(interpret=LOOK_FOR_RACES)
    work = pallas_tpu.prepare_writes(dropped, 2, cache.format, tuning)
    written = pallas_tpu.write(cache, Stored(token, token), dropped, work, tuning)
    chex.assert_trees_all_equal(written, cache)


@pytest.mark.parametrize("backend", [xla, pallas_tpu])
def test_queries_may_share_a_row_of_pages(backend):
    """The contract of the backends: any interval of any row's pages, once per query."""
    inputs = make(Case("shared_row", num_seqs=2, lens=(40, 64)), "fused")
    cache = PagedKVCache.of(
        jnp.asarray(inputs.key_cache), kv_layout="fused", head_dim=inputs.case.head_dim
    )
    queries = np.stack([inputs.query[0], inputs.query[0], inputs.query[1], inputs.query[1]])
    row, start, stop = [0, 0, 1, 1], [0, 0, 0, 35], [0, 40, 50, 64]
    ids = jnp.asarray(inputs.block_tables)
    reads = Reads(ids, *(jnp.array(x, jnp.int32) for x in (row, start, stop)))
    interpret = LOOK_FOR_RACES if backend is pallas_tpu else False
    tuning = Tuning(platform="cpu", interpret=interpret)
    work = backend.prepare(reads, queries.shape[1], cache.format, tuning)
    out, lse = backend.attend(jnp.asarray(queries), cache, reads, work, Attention(), tuning)
    for query, (r, first, last) in enumerate(zip(row, start, stop, strict=True)):
        exact = reference.page_attention(
            queries[None, query], inputs.key_cache, None, [last], inputs.block_tables[None, r],
            kv_layout="fused", sliding_window=max(last - first, 1),
        )  # fmt: skip
        for actual, expected in zip((out[query], lse[query]), exact, strict=True):
            np.testing.assert_allclose(actual, expected[0], atol=2e-5)
