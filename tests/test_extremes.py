"""At the edge: values that are not finite, options near what a float32 holds, many sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardpage
from shardpage.backends import load
from shardpage.options import Tuning
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Reads

from . import tolerance
from .backends import attend, backends
from .cases import Case, build_mesh, make, named


@backends
class TestWhatIsReadAndIsNoNumber:
    """It shows, in all heads that read it and in lse; and in no other sequence."""

    CASE = Case("live_poison", num_seqs=3, lens=(100, 90, 128), max_blocks=8, head_dim=16,
                pages_per_compute_block=2, num_splits=2)  # fmt: skip

    def check(self, backend, inputs, change):
        before = attend(inputs, backend)
        change(inputs)
        for actual, was in zip(attend(inputs, backend), before, strict=True):
            assert np.isnan(actual[1, 2:4]).all()  # the two query heads of KV head 1
            actual[1, 2:4] = was[1, 2:4]
            np.testing.assert_array_equal(actual, was)

    @pytest.mark.parametrize(
        ("which", "position", "value"),
        [
            ("key_cache", 0, np.nan),
            ("key_cache", 50, -np.inf),
            ("key_cache", 89, np.inf),
            ("value_cache", 0, -np.inf),
            ("value_cache", 89, np.nan),
        ],
    )
    def test_in_a_token(self, backend, which, position, value):
        """In a first, a middle and a last block, in one element of one KV head."""
        inputs = make(self.CASE)
        page, slot = inputs.block_tables[1, position // 16], position % 16

        def change(inputs):
            getattr(inputs, which)[page, 1, slot, 3] = value

        self.check(backend, inputs, change)

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_in_a_query(self, backend, value):
        def change(inputs):
            inputs.query[1, 2:4, 0] = value

        self.check(backend, make(self.CASE), change)

    @pytest.mark.parametrize("value", [np.inf])
    def test_in_keys_that_a_soft_cap_bounds(self, backend, value):
        inputs = make(self.CASE.replace(attn_logits_soft_cap=5.0))
        page = inputs.block_tables[1, 0]

        def change(inputs):
            inputs.key_cache[page, 1, :, :] = value

        self.check(backend, inputs, change)


@backends
class TestSinks:
    @pytest.mark.parametrize("lens", [(60, 0, 16, 64), (0, 0, 0, 0)])
    def test_of_minus_infinity_is_no_sink(self, backend, lens):
        inputs = make(Case("no_sink", num_seqs=4, lens=lens))
        without = attend(inputs, backend)
        inputs.sinks = np.full(8, -np.inf, np.float32)
        for actual, was in zip(attend(inputs, backend), without, strict=True):
            np.testing.assert_array_equal(actual, was)


def test_sinks_of_minus_infinity_have_gradients():
    inputs = make(Case("no_sink", num_seqs=4, lens=(60, 0, 16, 64)))

    def loss(sinks):
        out, lse = shardpage.page_attention(
            *inputs.arrays, kv_layout="blocks_first", sinks=sinks, return_lse=True
        )
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    gradient = jax.grad(loss)(jnp.array([-jnp.inf] * 4 + [0.5] * 4))
    np.testing.assert_array_equal(gradient[:4], 0)
    assert (gradient[4:] != 0).all()


def on(spec, case: Case):
    """The inputs of a case, and where a call takes them."""
    mesh = spec and build_mesh(spec)
    return make(case, num_context_shards=2 if mesh else 1), {"mesh": mesh}


@backends
@pytest.mark.parametrize("spec", [None, "kv=2,context=2"])
class TestExtremeOptions:
    """Exact for whatever a float32 and an int32 hold."""

    @pytest.mark.parametrize("cap", [2.0**126, 1e15])
    def test_a_soft_cap_far_above_the_logits_changes_nothing(self, backend, cap, spec):
        inputs, where = on(spec, named("plain"))
        out_lse = attend(inputs, backend, attn_logits_soft_cap=cap, **where)
        tolerance.assert_within_rounding(inputs, *out_lse)

    def test_a_scale_that_only_its_cap_makes_too_small_counts(self, backend, spec):
        """Their quotient is 2**-133, which is flushed to 0; the logits are as usual."""
        case = named("plain").replace(attn_scale=0.125, attn_logits_soft_cap=2.0**30)
        inputs, where = on(spec, case)
        inputs.query = inputs.query * np.float32(2.0**100)
        out_lse = attend(inputs, backend, attn_scale=2.0**-103, **where)
        tolerance.assert_within_rounding(inputs, *out_lse)

    def test_a_window_past_any_context_changes_nothing(self, backend, spec):
        (inputs, where), window = on(spec, named("plain")), np.int64(2**31 - 1)
        out_lse = attend(inputs, backend, sliding_window=window, **where)
        tolerance.assert_within_rounding(inputs, *out_lse)

    def test_logits_near_the_end_of_float32_are_not_taken_for_masked(self, backend, spec):
        """All of them around -3e37, which is finite, and below most stand-ins for -inf."""
        inputs, where = on(spec, Case("low", num_seqs=2, lens=(33, 64), attn_scale=1e36))
        inputs.query[...], size = -1.0, inputs.key_cache.shape
        inputs.key_cache = np.where(np.isnan(inputs.key_cache), np.nan, np.ones(size, np.float32))
        out, lse = attend(inputs, backend, **where)
        assert (lse < -6e37).all()
        if (
            spec
        ):  # no lse of -6e37 can say how many keys it is of: parts merge as if of equally many
            assert (out != 0).all(axis=-1).all()
            assert np.isfinite(out).all()
            return
        inputs.query[...] = 0.0  # all logits are equal, too
        exact_out, _ = tolerance.exact(inputs)
        tolerance.assert_close("out", out, exact_out)


class TestManySequences:
    """Found by binary search, and on a CPU walked over in two sizes of blocks."""

    LENS = tuple(int(n) for n in np.random.default_rng(0).integers(0, 25, 1100) ** 2 // 24)
    CASE = Case("many", num_seqs=1100, num_heads=2, num_kv_heads=1, head_dim=8, page_size=4,
                max_blocks=6, lens=LENS)  # fmt: skip

    @pytest.mark.parametrize("num_splits", [0, 3])
    def test_match_the_oracle(self, num_splits):
        inputs = make(self.CASE.replace(num_splits=num_splits))
        tolerance.assert_within_rounding(inputs, *attend(inputs))

    def test_have_the_gradients_of_one_walk(self):
        inputs = make(self.CASE, poison=False)

        def gradients(**options):
            loss = lambda *arrays: jnp.sum(jnp.sin(shardpage.page_attention(
                *arrays, *inputs.arrays[3:], kv_layout="blocks_first", **options)))  # fmt: skip
            return jax.grad(loss, argnums=(0, 1, 2))(*inputs.arrays[:3])

        for two, one in zip(gradients(), gradients(pages_per_compute_block=6), strict=True):
            np.testing.assert_allclose(two, one, atol=1e-5)


class TestWhatGrows:
    """Counted: neither the width of a table nor the number of sequences costs more than it must."""

    @pytest.mark.parametrize("spec", [None, "context=2"])
    def test_columns_past_the_longest_context_are_not_looked_at(self, spec, monkeypatch):
        """Of 5 pieces of 2048 columns the one and the two that are in use, on each device."""
        if jax.default_backend() == "gpu":
            pytest.skip("pieces have 65536 columns there")
        pieces, loop = [], jax.lax.fori_loop

        def counted(first, last, body, state):
            def count(piece, state):
                if not body.__module__.startswith("shardpage.backends"):
                    jax.debug.callback(lambda piece: pieces.append(int(piece)), piece)
                return body(piece, state)

            return loop(first, last, count, state)

        monkeypatch.setattr(jax.lax, "fori_loop", counted)
        mesh = spec and build_mesh(spec)
        cache = jnp.ones((8, 1, 8, 8))
        query, tables = jnp.ones((2, 1, 8)), jnp.zeros((2, 5 * 2048), jnp.int32)
        call = lambda lens: shardpage.page_attention(
            query, cache, cache, lens, tables, kv_layout="blocks_first", backend="xla", mesh=mesh
        )
        for longest, expected in ((2048, [0]), (2049, [0, 1])):
            pieces.clear()
            np.testing.assert_allclose(call(jnp.array([8 * longest, 5])), 1.0, rtol=1e-6)
            jax.effects_barrier()
            assert sorted(pieces) == sorted(expected * (2 if mesh else 1))

    @pytest.mark.parametrize("backend", ["xla", "pallas_tpu"])
    def test_laying_out_the_work_is_linear_in_the_sequences(self, backend):
        """Operations, bytes and temporaries of the index arithmetic, compiled."""
        page_format = PageFormat(KVLayout.BLOCKS_FIRST, 2, 16, 128, 128, jnp.dtype(jnp.bfloat16))
        tuning = Tuning(backend, platform="cpu", interpret=backend != "xla")

        def cost(num_seqs: int) -> np.ndarray:
            ids, stop = (jax.ShapeDtypeStruct((num_seqs, *x), jnp.int32) for x in ((1,), ()))
            prepare = lambda ids, stop: load(tuning).prepare(
                Reads(ids, None, jnp.zeros_like(stop), stop), 8, page_format, tuning
            )
            compiled = jax.jit(prepare).lower(ids, stop).compile()
            counts, memory = compiled.cost_analysis(), compiled.memory_analysis()
            return np.array([
                counts["flops"], counts["bytes accessed"], memory.temp_size_in_bytes
            ])  # fmt: skip

        assert (cost(16384) <= 4.5 * cost(4096)).all()
