"""The merge is algebra: its laws, and that it is what makes every split exact."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpage import merge_partials
from shardpage.partial import Partial, add_sinks, spread_nan

# Flushed to 0 by XLA, smaller ones would not come back as they were.
finite = st.floats(-50, 50, width=32, allow_subnormal=False)
lse_values = st.one_of(finite, st.just(-np.inf))


@st.composite
def partials(draw) -> Partial:
    lse = np.array(draw(st.lists(lse_values, min_size=3, max_size=3)), np.float32)
    out = np.array(draw(st.lists(finite, min_size=6, max_size=6)), np.float32).reshape(3, 2)
    return Partial(np.where(np.isinf(lse)[:, None], 0, out), lse)


def close(a, b):
    chex.assert_trees_all_close(tuple(a), tuple(b), rtol=1e-4, atol=1e-4)


def merged(*parts):
    return functools.reduce(lambda a, b: merge_partials(*a, *b), parts)


@given(partials())
def test_no_keys_is_the_identity(a):
    nothing = Partial(np.zeros_like(a.out), np.full_like(a.lse, -np.inf))
    close(merged(a, nothing), a)
    close(merged(nothing, a), a)


@given(partials(), partials(), partials())
def test_merging_is_associative_and_commutative(a, b, c):
    close(merged(merged(a, b), c), merged(a, merged(b, c)))
    close(merged(a, b), merged(b, a))


@given(partials(), partials())
def test_merging_is_the_softmax_over_the_union(a, b):
    weights = np.exp(np.stack([a.lse, b.lse]).astype(np.float64))
    total = weights.sum(0)
    with np.errstate(all="ignore"):
        out = (weights[..., None] * np.stack([a.out, b.out])).sum(0) / total[:, None]
        expected = np.where(total[:, None] > 0, out, 0), np.log(total)
    close(merged(a, b), expected)


def test_empty_with_empty_stays_empty_and_so_do_its_gradients():
    nothing = Partial(jnp.zeros((2, 4)), jnp.full(2, -jnp.inf))
    out, lse = merge_partials(*nothing, *nothing)
    chex.assert_trees_all_equal((out, lse), tuple(nothing))
    grad = jax.grad(lambda out: merge_partials(out, nothing.lse, *nothing)[0].sum())(nothing.out)
    np.testing.assert_array_equal(grad, 0)


@given(partials(), st.sampled_from([(np.nan, np.nan), (np.nan, 0.0), (np.inf, 1.0)]))
def test_what_is_no_number_stays(a, broken):
    """It is never taken for "no keys", whatever it is merged with and on which side."""
    out, lse = broken
    b = Partial(np.full((3, 2), out, np.float32), np.full(3, lse, np.float32))
    for got in (merged(a, b), merged(b, a), merged(a, merged(b, a))):
        got = spread_nan(Partial(*got))
        assert np.isnan(got.out).all()
        assert np.isnan(got.lse).all()


@given(partials())
def test_spreading_nan_changes_no_number(a):
    for actual, was in zip(spread_nan(a), a, strict=True):
        np.testing.assert_array_equal(actual, was)


def test_one_element_that_is_no_number_spreads_over_its_head_only():
    out = jnp.zeros((2, 3)).at[0, 1].set(jnp.inf)
    out, lse = spread_nan(Partial(out, jnp.zeros(2)))
    np.testing.assert_array_equal(np.isnan(out), [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(np.isnan(lse), [True, False])


@given(partials())
def test_a_sink_of_minus_infinity_is_none(a):
    for actual, was in zip(add_sinks(a, jnp.full(3, -jnp.inf)), a, strict=True):
        np.testing.assert_array_equal(actual, was)


def test_huge_logits_do_not_overflow():
    out = jnp.ones((1, 2))
    merged_out, lse = merge_partials(out, jnp.array([3e4]), 3 * out, jnp.array([-3e4]))
    np.testing.assert_allclose(merged_out, 1)
    np.testing.assert_allclose(lse, 3e4)


def test_output_dtype_is_the_first_partials():
    out, lse = jnp.ones((1, 2), jnp.bfloat16), jnp.zeros(1)
    merged = merge_partials(out, lse, out, lse)
    chex.assert_type(merged, [jnp.bfloat16, jnp.float32])
    chex.assert_trees_all_equal_shapes(merged, (out, lse))


def test_shapes_must_match():
    out, lse = jnp.ones((2, 4)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"merge_partials needs out .* got out \(2, 4\)"):
        merge_partials(out, lse, out, jnp.zeros(3))


@given(partials(), finite)
def test_a_sink_takes_weight_and_adds_no_value(a, sink):
    out, lse = add_sinks(a, jnp.full(3, sink))
    share = np.exp(a.lse.astype(np.float64)) / (np.exp(a.lse.astype(np.float64)) + np.exp(sink))
    close((out, lse), (a.out * share[:, None], np.logaddexp(a.lse, np.float32(sink))))
