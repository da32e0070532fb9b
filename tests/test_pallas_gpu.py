"""The Hopper kernels: that they lower for CUDA anywhere, numbers in the interpreter where JAX has
one (a few small cases), and on a Hopper GPU the cases of all backends."""

import dataclasses
import functools
import os

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, page_attention
from shardpage.backends import pallas_gpu, xla
from shardpage.backends.pallas_gpu import config
from shardpage.options import Attention, Tuning
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Reads, Writes
from shardpage.quantise import Stored

from . import tolerance
from .cases import CASES, KV_LAYOUTS, TOKEN_LAYOUTS, Case, build_mesh, make

ON_GPU = "cuda" in os.environ.get("JAX_PLATFORMS", "")
BFLOAT16 = np.dtype(jnp.bfloat16)

on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU: JAX_PLATFORMS=cuda,cpu")
in_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 has no interpreter of Mosaic GPU kernels"
)

COMPILED = Tuning(backend="pallas_gpu", platform="gpu", interpret=False)
INTERPRETED = Tuning(backend="pallas_gpu", platform="gpu", interpret=True, chip=3)


def page_format(head_dim=128, page_size=16, heads=8, dtype=BFLOAT16, layout=KVLayout.BLOCKS_FIRST):
    form = PageFormat(layout, heads, page_size, head_dim, head_dim, dtype)
    return form.packed(None, on_tpu=False)


def reads_of(num_queries, num_rows=None, pages=8):
    """Shapes of reads; with `num_rows`, of several queries a row."""
    tokens = jax.ShapeDtypeStruct((num_queries,), jnp.int32)
    ids = jax.ShapeDtypeStruct((num_rows or num_queries, pages), jnp.int32)
    return Reads(ids, None if num_rows is None else tokens, tokens, tokens)


def abstract_cache(head_dim=128, heads=8, page_size=16, layout="blocks_first"):
    cache = PagedKVCache.abstract(64, heads, page_size, head_dim, kv_layout=layout)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)  # on any device


def attend(num_heads, attention, tuning, query, cache, reads, *, final=False):
    work = pallas_gpu.prepare(reads, num_heads, cache.format, tuning)
    return pallas_gpu.attend(query, cache, reads, work, attention, tuning, final=final)


class TestLowersForCuda:
    """On any machine, in all JAX versions: the kernels' modules are made by JAX, not by the GPU."""

    @pytest.mark.parametrize(
        ("name", "num_heads", "rows", "changes", "options"),
        [
            ("decode", 32, None, {}, {}),
            ("prompt", 32, 1, {}, {}),
            ("long_prompt", 32, 1, {"head_dim": 256}, {}),
            ("guesses", 64, 100, {"page_size": 64}, {}),
            ("dim64", 32, None, {"head_dim": 64, "page_size": 256}, {}),
            ("dim80", 24, None, {"head_dim": 80, "page_size": 8, "layout": "heads_first"}, {}),
            ("dim256", 8, None, {"head_dim": 256, "page_size": 256, "layout": "fused"}, {}),
            ("soft_cap", 8, None, {"page_size": 24}, {"soft_cap": 5.0, "scale": -0.1}),
            ("tokens", 32, None, {"layout": "tokens_first"}, {}),
            ("words80", 32, None, {"head_dim": 80, "layout": "interleaved_words"}, {}),
            ("words64", 64, 100, {"head_dim": 64, "layout": "interleaved_words"}, {}),
            ("interleaved", 8, 1, {"page_size": 256, "layout": "interleaved"}, {}),
        ],
    )
    def test_attend(self, name, num_heads, rows, changes, options):
        cache = abstract_cache(**changes)
        num_queries = 4000 if name == "long_prompt" else 400
        query = jax.ShapeDtypeStruct((num_queries, num_heads, cache.head_dim), jnp.bfloat16)
        call = functools.partial(attend, num_heads, Attention(**options), COMPILED, final=True)
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])
        text = exported(query, cache, reads_of(num_queries, rows)).mlir_module()
        assert text.count("mosaic_gpu_v2") == 2  # attend, merge
        assert ("optimization_barrier" in text) == (rows is not None)  # tiles are made once

    @pytest.mark.parametrize("layout", KV_LAYOUTS + TOKEN_LAYOUTS)
    def test_write(self, layout):
        cache = abstract_cache(layout=layout)
        tokens = jax.ShapeDtypeStruct((65, 8, 128), jnp.bfloat16)
        writes = Writes(*[jax.ShapeDtypeStruct((65,), jnp.int32)] * 2)
        write = functools.partial(pallas_gpu.write, work=None, tuning=COMPILED)
        call = jax.jit(write, donate_argnums=0)
        stored = Stored(tokens, tokens)
        exported = jax.export.export(call, platforms=["cuda"])(cache, stored, writes)
        assert exported.mlir_module().count("mosaic_gpu_v2") == 1

    def test_on_a_mesh(self):
        """Inside a `shard_map` that checks what varies over what."""
        mesh = build_mesh("data=2,kv=2,context=2")
        cache, lens = abstract_cache(), jax.ShapeDtypeStruct((8,), jnp.int32)
        query = jax.ShapeDtypeStruct((8, 32, 128), jnp.bfloat16)
        tables = jax.ShapeDtypeStruct((8, 4), jnp.int32)

        def call(query, key, value, lens, tables):
            return page_attention(
                query, key, value, lens, tables, kv_layout="blocks_first", mesh=mesh,
                backend="pallas_gpu", interpret=False,
            )  # fmt: skip

        traced = jax.jit(call).trace(query, *cache.arrays, lens, tables)
        assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()

    def test_there_are_no_gradients(self):
        call = functools.partial(attend, 32, Attention(), COMPILED)
        query = jnp.zeros((4, 32, 128), jnp.bfloat16)
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_cache())
        reads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), reads_of(4))
        with pytest.raises(NotImplementedError, match="pallas_gpu has no gradients"):
            jax.grad(lambda query: call(query, cache, reads).out.sum())(query)


def drawn_reads(starts, stops, row, inputs_seed=0, **changes):
    """A cache of these reads, with NaN in every slot that none of them reads; and the queries."""
    form = page_format(**{"head_dim": 64, "heads": 2, **changes})
    rng = np.random.default_rng(inputs_seed)
    rows = np.arange(len(stops)) if row is None else np.asarray(row)
    columns = -(-max(stops) // form.page_size) + 1
    num_pages = (rows.max() + 1) * columns + 2
    ids = rng.permutation(num_pages)[: num_pages - 2].reshape(-1, columns)
    tokens = np.full((2, num_pages, form.page_size, form.num_kv_heads, form.key_dim), np.nan)
    table = np.full(ids.shape, -7)
    for query, at in enumerate(rows):
        for token in range(starts[query], stops[query]):
            page, slot = divmod(token, form.page_size)
            table[at, page] = ids[at, page]
            if np.isnan(tokens[0, ids[at, page], slot, 0, 0]):
                tokens[:, ids[at, page], slot] = rng.standard_normal(tokens.shape[3:])[None]
    if form.layout.token_major:
        arrays = form.join_tokens(*jnp.asarray(tokens, form.dtype))
    else:
        order = (0, 3, 1, 2, 4) if form.layout is KVLayout.HEADS_FIRST else (0, 1, 3, 2, 4)
        both = jnp.asarray(tokens.transpose(order), form.dtype)
        arrays = form.to_arrays(*both, stack=functools.partial(jnp.stack, axis=1))
    cache = PagedKVCache(tuple(arrays), (), form.layout, form.key_dim, padding=form.padding)
    as_int32 = lambda x: jnp.asarray(x, jnp.int32)
    query = jnp.asarray(rng.standard_normal((len(stops), 8, form.key_dim)), form.dtype)
    reads = Reads(
        as_int32(table), None if row is None else as_int32(row), as_int32(starts), as_int32(stops)
    )
    return query, cache, reads, tokens, ids, rows


def expected_of(query, reads, tokens, ids, rows, page_size):
    """In float64, by a loop."""
    query = np.asarray(query.astype(jnp.float32), np.float64)
    tokens = np.asarray(jnp.asarray(tokens, jnp.bfloat16).astype(jnp.float32), np.float64)
    out, lse = np.zeros(query.shape), np.full(query.shape[:2], -np.inf)
    group = query.shape[1] // tokens.shape[3]
    for i, row in enumerate(rows):
        span = np.arange(int(reads.start[i]), int(reads.stop[i]))
        if not len(span):
            continue
        key, value = tokens[:, ids[row, span // page_size], span % page_size]
        for head in range(query.shape[1]):
            logits = key[:, head // group] @ query[i, head] * query.shape[2] ** -0.5
            weights = np.exp(logits - logits.max())
            lse[i, head] = logits.max() + np.log(weights.sum())
            out[i, head] = weights @ value[:, head // group] / weights.sum()
    return out, lse


READS = {
    "decode": ([0, 0, 0, 3], [100, 0, 17, 200], None),
    "one_long": ([5], [900], None),
    "guesses": ([0, 0, 0, 0, 0, 10, 0], [50, 51, 52, 200, 0, 130, 131], [0, 0, 0, 1, 2, 3, 3]),
    "prompt": ([0] * 33, list(range(110, 143)), [0] * 33),
    # More blocks of each share than there are in shared memory, for two warpgroups.
    "long_prompt": ([0] * 33, list(range(610, 643)), [0] * 33),
    # Where they lie, of rows that begin and end within eight; some read nothing.
    "windows": (
        [*[0] * 42, 241, *[0] * 65, *[164] * 20],
        [0, *range(201, 242), 241, 0, *range(101, 165), *[164] * 20],
        [0] * 43 + [1] * 85,
    ),
}


def check_reads(name, tuning, **changes):
    query, cache, reads, *rest = drawn_reads(*READS[name], **changes)
    got = attend(8, Attention(), tuning, query, cache, reads)
    out, lse = expected_of(query, reads, *rest, cache.format.page_size)
    # Weights are rounded to bfloat16, half of 2**-8 each, and values are at most some 4.
    np.testing.assert_allclose(got.out, out, atol=4 * 2**-9)
    np.testing.assert_allclose(got.lse, lse, rtol=2e-6, atol=2e-6)
    if reads.row is not None:  # in the queries' dtype where nothing is merged any more, cut or not
        final = attend(8, Attention(), tuning, query, cache, reads, final=True)
        assert final.out.dtype == query.dtype
        np.testing.assert_array_equal(final.out, got.out.astype(query.dtype))
        np.testing.assert_array_equal(final.lse, got.lse)


def check_in_place(tuning, **changes):
    """Results at the caller's places: what no tile tells of, too; and NaN of what is invalid."""
    query, cache, reads, *_ = drawn_reads(*READS["windows"], **changes)
    assert config.configure(cache.format, 8, reads, tuning, query.dtype).out_in_place
    nothing = np.asarray(reads.stop == reads.start)
    invalid = nothing & np.isin(np.arange(128), [0, 42, 127])
    nothing = nothing & ~invalid
    query = query.at[nothing].set(jnp.nan)
    marked = reads._replace(invalid=jnp.asarray(invalid))
    before = attend(8, Attention(), tuning, query, cache, reads, final=True)
    after = attend(8, Attention(), tuning, query, cache, marked, final=True)
    for actual, was, none in ((after.out, before.out, 0.0), (after.lse, before.lse, -np.inf)):
        actual, was = np.array(actual), np.array(was)
        assert np.isnan(actual[invalid]).all()
        assert (actual[nothing] == none).all()
        np.testing.assert_array_equal(actual[~invalid], was[~invalid])
        assert np.isfinite(actual[~invalid & ~nothing]).all()


def check_broken_in_place(which, value, tuning, **changes):
    """One element that is not finite: NaN in all heads that read it, and in no other sequence.

    A query of its tile that does not read it may be NaN too: zero weights do not silence a value.
    """
    query, cache, reads, *_ = drawn_reads(*READS["windows"], **changes)
    page, slot = int(reads.ids[1, 120 // 16]), 120 % 16
    arrays = list(cache.arrays)
    arrays[which] = arrays[which].at[page, 1, slot, 3].set(value)
    attended = lambda cache: attend(8, Attention(), tuning, query, cache, reads, final=True)
    reads_it = (reads.row == 1) & (reads.start <= 120) & (reads.stop > 120)
    for actual, was in zip(attended(cache.replace(arrays)), attended(cache), strict=True):
        actual, was = np.array(actual), np.array(was)
        assert np.isnan(actual[reads_it, 4:]).all()
        actual[reads.row == 1, 4:] = was[reads.row == 1, 4:]
        np.testing.assert_array_equal(actual, was)


@in_interpreter
@pytest.mark.usefixtures("on_a_cpu", "soon_in_place")
class TestInterpreted:
    """Numbers of the kernels' own code, with three CTAs, where JAX interprets it."""

    @pytest.mark.parametrize(
        ("name", "num_splits", "changes"),
        [
            ("decode", 0, {}),
            ("decode", 1, {"layout": KVLayout.HEADS_FIRST, "page_size": 256}),
            ("one_long", 2, {"layout": KVLayout.FUSED, "head_dim": 80, "page_size": 24}),
            ("guesses", 0, {}),
            ("prompt", 0, {"heads": 1, "head_dim": 16}),
            ("long_prompt", 0, {"heads": 1, "head_dim": 16}),
            ("windows", 0, {}),
            ("decode", 0, {"layout": KVLayout.TOKENS_FIRST}),
            ("decode", 0, {"layout": KVLayout.INTERLEAVED, "page_size": 256}),
            ("guesses", 2, {"layout": KVLayout.INTERLEAVED_WORDS}),
            ("decode", 0, {"layout": KVLayout.INTERLEAVED_WORDS, "head_dim": 80}),
        ],
    )
    def test_attend(self, name, num_splits, changes):
        check_reads(name, dataclasses.replace(INTERPRETED, num_splits=num_splits), **changes)

    def test_in_place(self):
        check_in_place(INTERPRETED)

    @pytest.mark.parametrize("layout", list(KVLayout))
    def test_write(self, layout):
        check_write(layout, 13, dataclasses.replace(INTERPRETED, chip=1))

    @pytest.mark.parametrize(("which", "value"), [(0, np.inf), (1, np.nan)])
    def test_what_is_no_number_shows_where_it_is_read(self, which, value):
        check_broken(which, 89, value, INTERPRETED)
        check_broken_in_place(which, value, INTERPRETED)


def check_write(layout, num_tokens, tuning, heads=3, head_dim=80):
    """As `xla` writes, bit for bit; every fourth token is dropped."""
    form = page_format(head_dim, 8, heads, layout=layout)
    rng = np.random.default_rng(0)
    num_pages = 3 + num_tokens // 8
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), form.dtype)
    arrays = tuple(draw(*form.array_shape(num_pages)) for _ in range(form.num_arrays))
    cache = PagedKVCache(arrays, (), layout, head_dim, padding=form.padding)
    page, slot = np.divmod(rng.permutation(num_pages * 8)[:num_tokens], 8)
    page[::4] = num_pages
    writes = Writes(jnp.asarray(page, jnp.int32), jnp.asarray(slot, jnp.int32))
    tokens = Stored(draw(num_tokens, heads, head_dim), draw(num_tokens, heads, head_dim))
    expected = xla.write(cache, tokens, writes, None, Tuning(backend="xla"))
    got = jax.jit(pallas_gpu.write, static_argnums=4)(cache, tokens, writes, None, tuning)
    for actual, array in zip(got.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(actual, array)


def check_broken(which, position, value, tuning):
    """One element that is not finite: NaN in all of the heads that read it, and nowhere else."""
    query, cache, reads, *_ = drawn_reads([0, 0, 0], [100, 700, 90], None)  # cut between CTAs
    before = attend(8, Attention(), tuning, query, cache, reads)
    page, slot = int(reads.ids[1, position // 16]), position % 16
    arrays = list(cache.arrays)
    arrays[which] = arrays[which].at[page, 1, slot, 3].set(value)
    after = attend(8, Attention(), tuning, query, cache.replace(arrays), reads)
    for actual, was in ((after.out, before.out), (after.lse, before.lse)):
        actual, was = np.array(actual), np.array(was)
        assert np.isnan(actual[1, 4:]).all()
        actual[1, 4:] = was[1, 4:]
        np.testing.assert_array_equal(actual, was)


def _in_16_bits(case: Case) -> Case:
    dtype = case.dtype if case.dtype == "float16" else "bfloat16"
    return case.replace(name=f"{case.name}_16", dtype=dtype)


@on_gpu
@pytest.mark.usefixtures("soon_in_place")
class TestOnHopper:
    """The cases of all backends, in 16 bits and every layout, and what only large ones reach."""

    @pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
    @pytest.mark.parametrize("case", [_in_16_bits(c) for c in CASES], ids=lambda case: case.name)
    def test_matches_the_oracle(self, case, kv_layout):
        if case.page_size % 8 or case.head_dim % 16:
            pytest.skip("refused by name: see TestConfig")
        inputs = make(case, kv_layout)
        out, lse = page_attention(
            *map(jnp.asarray, (inputs.query, inputs.key_cache)),
            None if inputs.value_cache is None else jnp.asarray(inputs.value_cache),
            *map(jnp.asarray, (inputs.context_lens, inputs.block_tables)),
            sinks=None if inputs.sinks is None else jnp.asarray(inputs.sinks),
            kv_layout=kv_layout, backend="pallas_gpu", return_lse=True, **case.options,
        )  # fmt: skip
        tolerance.assert_within_rounding(inputs, np.array(out), np.array(lse))

    @pytest.mark.parametrize("name", READS)
    @pytest.mark.parametrize("layout", list(KVLayout))
    def test_reads(self, name, layout):
        check_reads(name, COMPILED, layout=layout)
        check_reads(name, COMPILED, head_dim=256, layout=layout)
        check_reads(name, COMPILED, head_dim=80, page_size=8, layout=layout)

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_in_place(self, head_dim):
        check_in_place(COMPILED, head_dim=head_dim)

    @pytest.mark.parametrize("layout", list(KVLayout))
    def test_write(self, layout):
        check_write(layout, 13, COMPILED)
        check_write(layout, 3000, COMPILED, heads=8, head_dim=128)

    @pytest.mark.parametrize(
        ("which", "position", "value"),
        [(0, 0, np.nan), (0, 50, -np.inf), (0, 89, np.inf), (1, 0, -np.inf), (1, 89, np.nan)],
    )
    def test_what_is_no_number_shows_where_it_is_read(self, which, position, value):
        check_broken(which, position, value, COMPILED)
        check_broken_in_place(which, value, COMPILED)

    def test_it_is_the_default(self):
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_cache())
        lens, tables = jnp.full((4,), 30, jnp.int32), jnp.zeros((4, 2), jnp.int32)
        query = jnp.zeros((4, 32, 128), jnp.bfloat16)
        call = functools.partial(page_attention, kv_layout="blocks_first")
        for dtype, kernels in ((jnp.bfloat16, True), (jnp.float32, False)):
            arrays = (x.astype(dtype) for x in cache.arrays)
            text = jax.jit(call).lower(query, *arrays, lens, tables).as_text()
            assert ("mosaic_gpu_v2" in text) == kernels
