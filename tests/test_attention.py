"""page_attention on one device, every backend against the oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import shardpage
from shardpage.options import Tuning

from . import reference, tolerance
from .backends import attend, attend_as, backends, oracle_matrix, refusal
from .cases import CASES, KV_LAYOUTS, TOKEN_LAYOUTS, Case, build_mesh, cache_shape, make, named

SEPARATE = ("blocks_first", "heads_first", "tokens_first")  # keys and values
kv_layouts = pytest.mark.parametrize("kv_layout", KV_LAYOUTS)


@pytest.mark.parametrize(("backend", "case", "kv_layout"), oracle_matrix(CASES))
def test_matches_the_oracle(backend, case, kv_layout):
    inputs = make(case, kv_layout)
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


@pytest.mark.parametrize(
    ("queries", "dtype"),
    [
        (2, "bfloat16"),
        (4, "float32"),
        (1, "float32"),
        (9, "bfloat16"),
    ],
)
def test_as_formulated_for_gpus(queries, dtype):
    """Keys, and values, summed as they are read, where few queries share them; and a page of 1."""
    for page_size, pages in ((1, 1), (8, None)):
        name = f"gpu_{queries}_{page_size}"
        case = Case(name, num_heads=2 * queries, num_kv_heads=2, page_size=page_size, dtype=dtype,
                    head_dim=32, pages_per_compute_block=pages)  # fmt: skip
        inputs = make(case)
        tolerance.assert_within_rounding(inputs, *attend_as(inputs, Tuning(platform="gpu")))


@backends
@pytest.mark.parametrize(
    ("kv_layout", "dtype", "head_dim"),
    [("blocks_first", "bfloat16", 64), ("heads_first", "float32", 32), ("fused", "bfloat16", 8)],
)
def test_packed_rows(backend, kv_layout, dtype, head_dim):
    """Rows of 128 elements that hold 2, 4 and 16 tokens."""
    packed = Case(f"packed_{kv_layout}", head_dim=head_dim, dtype=dtype, sliding_window=37)
    inputs = make(packed, kv_layout, packed=True)
    assert inputs.key_cache.shape[-1] == 128
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


@backends
def test_large_logits_do_not_overflow(backend):
    """Logits of several hundred: exp of any of them, without the running peak, is inf."""
    inputs = make(Case("large_logits", attn_scale=40.0, num_seqs=4))
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


@backends
def test_the_seeds_example(backend):
    """As documented there, in all but the name of the layout: both fit these shapes."""
    num_seqs, num_heads, head_dim = 2, 8, 64
    num_kv_heads = 8
    num_blocks, block_size = 10, 16
    query = jnp.ones((num_seqs, num_heads, head_dim))
    key_cache = jnp.ones((num_blocks, num_kv_heads, block_size, head_dim))
    value_cache = jnp.ones((num_blocks, num_kv_heads, block_size, head_dim))
    context_lens = jnp.array([48, 32])
    block_tables = jnp.array([[0, 1, 2, -1], [3, 4, -1, -1]])
    output = shardpage.page_attention(
        query, key_cache, value_cache, context_lens, block_tables, backend=backend
    )
    chex.assert_trees_all_close(output, np.ones((2, 8, 64)), rtol=1e-6)


class TestInvalidSequences:
    """NaN for the sequence that is wrong; the others do not notice."""

    CASE = Case("invalid", num_seqs=4, lens=(60, 33, 16, 64))

    @backends
    @pytest.mark.parametrize("kv_layout", ["blocks_first", "heads_first"])
    @pytest.mark.parametrize(
        ("array", "entry", "value"),
        [
            pytest.param("block_tables", (1, 0), -1, id="negative id"),
            pytest.param("block_tables", (1, 1), -(2**31), id="smallest id"),
            pytest.param("block_tables", (1, 2), 99, id="id past the pages"),
            pytest.param("block_tables", (1, 2), 2**31 - 1, id="largest id"),
            pytest.param("context_lens", 1, 65, id="context past the table"),
            pytest.param("context_lens", 1, 2**31 - 1, id="longest context"),
            pytest.param("context_lens", 1, -1, id="negative context"),
            pytest.param("context_lens", 1, -(2**31), id="smallest context"),
        ],
    )
    def test_only_theirs_is_nan(self, backend, kv_layout, array, entry, value):
        inputs = make(self.CASE, kv_layout)
        before = attend(inputs, backend)
        inputs.context_lens = inputs.context_lens.copy()
        getattr(inputs, array)[entry] = value
        assert np.isnan(tolerance.exact(inputs)[0][1]).all()
        others = [0, 2, 3]
        for actual, was in zip(attend(inputs, backend), before, strict=True):
            assert np.isnan(actual[1]).all()
            np.testing.assert_array_equal(actual[others], was[others])

    @backends
    def test_context_past_max_context_len(self, backend):
        inputs = make(self.CASE.replace(lens=(60, 61, 16, 64)))
        out, lse = attend(inputs, backend, max_context_len=60)
        for seq, length in enumerate(inputs.context_lens):
            assert np.isnan(out[seq]).all() == np.isnan(lse[seq]).all() == (length > 60)

    @backends
    def test_sinks_do_not_hide_them(self, backend):
        inputs = make(self.CASE.replace(sinks=True))
        inputs.block_tables[1, 0] = -1
        out, lse = attend(inputs, backend)
        assert np.isnan(out[1]).all()
        assert np.isnan(lse[1]).all()

    @backends
    def test_an_empty_sequence_needs_no_table(self, backend):
        inputs = make(self.CASE.replace(lens=(60, 0, 16, 64)))
        inputs.block_tables[1] = 2**31 - 1
        out, lse = attend(inputs, backend)
        assert not out[1].any()
        assert (lse[1] == -np.inf).all()


@backends
class TestOptionsThatChangeNothing:
    """Knobs of speed: the answers stay, up to rounding."""

    def check(self, backend, **options):
        inputs = make(named("three_splits"))
        tolerance.assert_within_rounding(inputs, *attend(inputs, backend, **options))

    def test_mask_value_and_ways_to_walk(self, backend):
        inline = backend != "xla"  # pallas_tpu refuses False, in test_pallas_tpu.py
        self.check(backend, mask_value=-1e30, inline_seq_dim=inline, megacore_mode="auto")

    @pytest.mark.parametrize(("num_splits", "pages"), [(2, 2), (0, 2)])
    def test_splits_and_blocks(self, backend, num_splits, pages):
        self.check(backend, num_splits=num_splits, pages_per_compute_block=pages)


@backends
class TestArguments:
    def test_numpy_and_other_integers(self, backend):
        inputs = make(named("plain"))
        for dtype in (np.int16, np.uint32, np.int64):
            used = np.where(inputs.block_tables < 0, 0, inputs.block_tables) % inputs.num_pages
            out = shardpage.page_attention(
                inputs.query,
                inputs.key_cache,
                inputs.value_cache,
                inputs.context_lens.astype(dtype),
                used.astype(dtype),
                kv_layout="blocks_first",
                backend=backend,
            )
            tolerance.assert_within_rounding(inputs, out)

    def test_ids_that_only_their_lower_half_makes_valid(self, backend):
        inputs = make(named("plain"))
        inputs.block_tables = inputs.block_tables.astype(np.int64)
        inputs.block_tables[0, 0] += 2**32
        out = shardpage.page_attention(*inputs.arrays, kv_layout="blocks_first", backend=backend)
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1:]).all()

    @pytest.mark.parametrize("kv_layout", ["blocks_first", "heads_first"])
    def test_deduces_the_only_legal_layout(self, backend, kv_layout):
        """15 pages cannot be the KV heads of 8 query heads."""
        inputs = make(Case("deduced", num_seqs=4, max_blocks=4, lens=(64, 64, 64, 16)), kv_layout)
        assert inputs.num_pages == 15
        tolerance.assert_within_rounding(inputs, *attend(inputs, backend, kv_layout=None))

    def test_lse_comes_on_request(self, backend):
        inputs = make(named("plain"))
        out = shardpage.page_attention(*inputs.arrays, kv_layout="blocks_first", backend=backend)
        np.testing.assert_array_equal(out, attend(inputs, backend)[0])

    def test_inside_jit_and_scan(self, backend):
        """As in a model: layers are scanned over, their caches are slices of one array."""
        layers = [make(named("plain"), seed=seed) for seed in range(2)]
        query, keys, values = (jnp.stack([layer.arrays[n] for layer in layers]) for n in range(3))
        tables = layers[0].block_tables
        np.testing.assert_array_equal(layers[0].block_tables >= 0, tables >= 0)

        @jax.jit
        def model(query, keys, values, lens, tables):
            def layer(_, arrays):
                return None, shardpage.page_attention(
                    *arrays, kv_layout="blocks_first", backend=backend, return_lse=True
                )

            return jax.lax.scan(layer, None, (query, keys, values, lens, tables))[1]

        lens, tables = (jnp.stack([layer.arrays[n] for layer in layers]) for n in (3, 4))
        outs, lses = model(query, keys, values, lens, tables)
        for layer, out, lse in zip(layers, outs, lses, strict=True):
            tolerance.assert_within_rounding(layer, out, lse)


@backends
def test_two_calls_merge_to_the_call_over_all_pages(backend):
    """Each sequence is cut after some page; both parts are attended on their own."""
    inputs = make(named("one_page_blocks"))
    page_size, max_blocks = inputs.case.page_size, inputs.case.max_blocks
    lens = inputs.context_lens
    cut = np.minimum(lens, page_size * (np.arange(len(lens)) % (max_blocks + 1)))
    cut = (cut // page_size * page_size).astype(np.int32)
    shifted = np.full_like(inputs.block_tables, -1)
    for seq, pages in enumerate(cut // page_size):
        shifted[seq, : max_blocks - pages] = inputs.block_tables[seq, pages:]
    merged = shardpage.merge_partials(
        *attend(inputs, backend, context_lens=cut),
        *attend(inputs, backend, context_lens=lens - cut, block_tables=shifted),
    )
    tolerance.assert_within_rounding(inputs, *merged)


@backends
class TestAnyInput:
    """What no one thought of: drawn shapes, lengths, tables."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_lengths_and_tables(self, backend, data):
        """One compilation; lengths and entries valid and not."""
        inputs = make(Case("fuzzed", num_seqs=3, num_heads=4, num_kv_heads=2, head_dim=8,
                           page_size=4, lens=(16, 16, 16)))  # fmt: skip
        pages = inputs.num_pages
        lens = st.integers(0, 16) | st.sampled_from([-1, 17])
        ids = st.integers(0, pages - 1) | st.sampled_from([-1, pages])
        inputs.context_lens = np.array(data.draw(st.tuples(*[lens] * 3)), np.int32)
        table = data.draw(st.lists(ids, min_size=12, max_size=12))
        inputs.block_tables = np.array(table, np.int32).reshape(3, 4)
        # Any page may be read now.
        inputs.key_cache, inputs.value_cache = (
            np.nan_to_num(cache, nan=0.5) for cache in (inputs.key_cache, inputs.value_cache)
        )
        out, lse = attend(inputs, backend)
        exact_out, exact_lse = tolerance.exact(inputs)
        tolerance.assert_close("out", out, exact_out)
        tolerance.assert_close("lse", lse, exact_lse)

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(data=st.data())
    def test_shapes_and_options(self, backend, data):
        """A compilation each."""
        draw = data.draw
        page_size = draw(st.sampled_from([1, 2, 8, 16, 24]), "page_size")
        max_blocks = draw(st.integers(1, 9), "max_blocks")
        num_seqs = draw(st.integers(1, 5), "num_seqs")
        num_kv_heads = draw(st.integers(1, 4), "num_kv_heads")
        full = page_size * max_blocks
        lens = st.lists(st.integers(0, full), min_size=num_seqs, max_size=num_seqs)

        def maybe(strategy):
            return st.none() | strategy

        inputs = make(
            Case(
                "drawn",
                num_seqs=num_seqs,
                num_heads=num_kv_heads * draw(st.integers(1, 5), "queries_per_kv_head"),
                num_kv_heads=num_kv_heads,
                head_dim=draw(st.sampled_from([8, 24, 64, 80, 128]), "head_dim"),
                page_size=page_size,
                max_blocks=max_blocks,
                lens=tuple(draw(lens, "lens")),
                dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"]), "dtype"),
                query_dtype=draw(maybe(st.sampled_from(["float32", "bfloat16"])), "query_dtype"),
                sinks=draw(st.booleans(), "sinks"),
                num_splits=draw(st.integers(0, 4), "num_splits"),
                attn_logits_soft_cap=draw(maybe(st.floats(0.5, 30.0)), "soft_cap"),
                pages_per_compute_block=draw(maybe(st.integers(1, 5)), "pages_per_compute_block"),
                sliding_window=draw(maybe(st.integers(1, full + 3)), "sliding_window"),
            ),
            draw(st.sampled_from(KV_LAYOUTS), "kv_layout"),
            seed=draw(st.integers(0, 1000), "seed"),
        )
        assume(not refusal(backend, inputs))
        tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


class TestGradients:
    """Reverse mode of the XLA backend, against finite differences of the oracle in float64."""

    @kv_layouts
    def test_along_a_direction(self, kv_layout):
        inputs = make(
            Case(
                "gradient",
                num_seqs=5,
                head_dim=16,
                page_size=4,
                max_blocks=5,
                sinks=True,
                attn_logits_soft_cap=2.0,
                sliding_window=11,
                num_splits=2,
            ),
            kv_layout,
            poison=False,
        )
        names = ("query", "key_cache", "value_cache", "context_lens", "block_tables", "sinks")
        arrays = {name: getattr(inputs, name) for name in names}
        moving = {
            name: array
            for name, array in arrays.items()
            if array is not None and array.dtype == np.float32
        }
        rng = np.random.default_rng(0)
        weight_out = rng.standard_normal(inputs.query.shape, np.float32)
        weight_lse = rng.standard_normal(inputs.query.shape[:2], np.float32)

        def loss(moved):
            out, lse = shardpage.page_attention(
                **{**arrays, **moved},
                **inputs.case.options,
                kv_layout=kv_layout,
                backend="xla",
                return_lse=True,
            )
            return jnp.sum(out * weight_out) + jnp.sum(lse * weight_lse)

        def exact_loss(moved):
            out, lse = reference.page_attention(
                **{**arrays, **moved}, kv_layout=kv_layout, **inputs.case.reference_options
            )
            return np.sum(out * weight_out) + np.sum(lse * weight_lse)

        gradients = jax.grad(loss)({name: jnp.asarray(array) for name, array in moving.items()})
        for name, array in moving.items():
            step = 1e-4 * rng.standard_normal(array.shape)
            expected = exact_loss({name: array + step}) - exact_loss({name: array - step})
            actual = 2 * np.sum(np.float64(gradients[name]) * step)
            assert actual == pytest.approx(expected, rel=1e-4, abs=1e-8), name

    def test_poison_does_not_reach_them(self):
        """A NaN that is masked forwards must not come back as 0 * NaN."""
        inputs = make(named("plain").replace(name="poisoned_gradient"))

        def loss(query, key_cache, value_cache):
            out = shardpage.page_attention(
                query, key_cache, value_cache, inputs.context_lens, inputs.block_tables,
                kv_layout="blocks_first", backend="xla",
            )  # fmt: skip
            return jnp.sum(jnp.sin(out))

        gradients = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, inputs.arrays[:3]))
        unread = np.isnan(inputs.key_cache)
        chex.assert_tree_all_finite(gradients)
        chex.assert_trees_all_equal_shapes(gradients, inputs.arrays[:3])
        for gradient in gradients[1:]:
            assert not np.asarray(gradient)[unread].any()


class TestMemory:
    """Read from the compiled call, which is never run: no data is made."""

    @staticmethod
    def temp_bytes(case: Case, kv_layout: str, num_pages: int | None = None, mesh=None) -> int:
        num_pages = num_pages or case.num_seqs * case.max_blocks
        cache = jax.ShapeDtypeStruct(cache_shape(case, num_pages, kv_layout), case.dtype)
        query = (case.num_seqs, case.num_heads, case.head_dim)
        compiled = (
            jax.jit(
                lambda *arrays: shardpage.page_attention(
                    *arrays, **case.options, kv_layout=kv_layout, backend="xla", mesh=mesh
                )
            )
            .lower(
                jax.ShapeDtypeStruct(query, case.dtype),
                cache,
                cache if kv_layout in SEPARATE else None,
                jax.ShapeDtypeStruct((case.num_seqs,), jnp.int32),
                jax.ShapeDtypeStruct((case.num_seqs, case.max_blocks), jnp.int32),
            )
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    @pytest.mark.parametrize("spec", [None, "context=2"])
    @pytest.mark.parametrize(
        ("name", "changes", "megabytes"),
        [
            ("a table far wider than its contexts", {"max_blocks": 100_000}, 5),
            ("a window in it", {"max_blocks": 100_000, "sliding_window": 50}, 2),
            ("many sequences", {"num_seqs": 16384, "max_blocks": 1}, 130),
            ("many splits", {"max_blocks": 128, "num_splits": 512}, 20),
        ],
    )
    def test_follows_the_work(self, name, changes, megabytes, spec):
        """8 sequences of 8 / 2 heads of 64, but for the changes; in float32, on each device."""
        del name
        case = Case("cliff", num_kv_heads=2).replace(**changes)
        mesh = spec and build_mesh(spec)
        if mesh:  # a second table: of the pages of this device alone
            megabytes += 4e-6 * case.num_seqs * case.max_blocks
        temp_bytes = self.temp_bytes(case, "blocks_first", num_pages=16384, mesh=mesh)
        if jax.default_backend() == "gpu":  # takes larger steps
            megabytes += 256
        assert temp_bytes < megabytes * 1e6

    @pytest.mark.parametrize("kv_layout", KV_LAYOUTS + TOKEN_LAYOUTS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_of_a_serving_batch_fits_96_mb(self, kv_layout, dtype):
        """64 x 8192 tokens, 2 GB of KV in bfloat16: no copy, transpose or cast of it is hidden."""
        most = 192e6 if jax.default_backend() == "gpu" else 96e6  # a GPU takes larger steps
        assert self.temp_bytes(named("64 x 1..8192").replace(dtype=dtype), kv_layout) < most
