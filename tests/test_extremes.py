"""At the edge: values that are not finite, options near what a float32 holds, many sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardpage

from . import tolerance
from .backends import attend, backends
from .cases import Case, make, named


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


@backends
class TestExtremeOptions:
    """Exact for whatever a float32 and an int32 hold."""

    @pytest.mark.parametrize("cap", [2.0**126, 1e15])
    def test_a_soft_cap_far_above_the_logits_changes_nothing(self, backend, cap):
        inputs = make(named("plain"))
        tolerance.assert_within_rounding(inputs, *attend(inputs, backend, attn_logits_soft_cap=cap))

    def test_a_window_past_any_context_changes_nothing(self, backend):
        inputs, window = make(named("plain")), np.int64(2**31 - 1)
        tolerance.assert_within_rounding(inputs, *attend(inputs, backend, sliding_window=window))

    def test_logits_near_the_end_of_float32_are_not_taken_for_masked(self, backend):
        """All of them around -3e37, which is finite, and below most stand-ins for -inf."""
        inputs = make(Case("low", num_seqs=2, lens=(33, 64), attn_scale=1e36))
        inputs.query[...], size = -1.0, inputs.key_cache.shape
        inputs.key_cache = np.where(np.isnan(inputs.key_cache), np.nan, np.ones(size, np.float32))
        out, lse = attend(inputs, backend)
        assert (lse < -6e37).all()
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
