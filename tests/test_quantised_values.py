"""What quantising does to single numbers: ties, ends, zero; what is no number, and who sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpage import PagedKVCache, attend, make_plan, write_kv

from . import steps
from .quantised import DTYPES, LARGEST, SCALES, dtype_of
from .test_quantised import bits, kinds, quantised
from .test_step import run

SMALLEST = 2.0**-126  # scale, and what float32 holds without being flushed to 0


def written(key, value=None, *, dtype, scales=None):
    """A cache of one page whose tokens are these, `[tokens, heads, dim]`."""
    key = np.asarray(key, np.float32)
    value = key if value is None else np.asarray(value, np.float32)
    count, heads, dim = key.shape
    cache = PagedKVCache.zeros(1, heads, count, dim, dtype=dtype, scales=scales)
    ids = np.zeros(count, np.int32)
    where = ids, np.arange(count, dtype=np.int32), np.zeros((1, 1), np.int32)
    return write_kv(cache, jnp.asarray(key), jnp.asarray(value), *map(jnp.asarray, where))


def read(cache, dtype):
    """Keys as they are stored, `[tokens, heads, dim]` float64, and scales `[tokens, heads]`."""
    stored = np.asarray(cache.key[0]).astype(np.float64).swapaxes(0, 1)
    scales = np.asarray(cache.scales[0])
    if cache.scale == "head":
        return stored, np.broadcast_to(scales[:, 0], stored.shape[:2])
    return stored, scales[0, :, 0, : len(stored)].T


def ones(heads):
    return (np.ones(heads, np.float32),) * 2


def numbers(dtype):
    """All finite numbers of a dtype from 0 up, and whether each is even in its last bit."""
    codes = np.arange(128, dtype=np.uint8)
    values = codes.view(dtype_of(dtype)).astype(np.float32)
    finite = np.isfinite(values)
    return values[finite], codes[finite] % 2 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tie_goes_to_the_even_neighbour_and_what_is_next_to_it_to_the_nearer(dtype):
    values, even = numbers(dtype)
    lower, upper = values[:-1], values[1:]
    middle = ((lower.astype(np.float64) + upper) / 2).astype(np.float32)
    rows = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    rows = np.stack(rows + [-x for x in rows])[:, None]
    stored, _ = read(written(rows, dtype=dtype, scales=ones(1)), dtype)
    expected = np.stack([np.where(even[:-1], lower, upper), lower, upper])
    np.testing.assert_array_equal(stored[:, 0], np.concatenate([expected, -expected]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_a_head_clips_what_is_larger(dtype):
    most = LARGEST[dtype]
    given = np.array([most, most * 1.01, most * 1e6, 3e38, -most, -most * 1.5, -3e38], np.float32)
    stored, _ = read(written(given[None, None], dtype=dtype, scales=ones(1)), dtype)
    np.testing.assert_array_equal(stored[0, 0], np.sign(given) * most)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(st.integers(-125, 127), st.integers(0, 2**32 - 1))
def test_a_read_of_a_written_token_is_exact_to_half_a_step(dtype, exponent, seed):
    rng = np.random.default_rng(seed)
    tokens = np.ldexp(rng.uniform(-1, 1, (4, 2, 16)), exponent).astype(np.float32)
    stored, scales = read(written(tokens, dtype=dtype), dtype)
    values, _ = numbers(dtype)
    values = values.astype(np.float64)
    magnitude = np.abs(tokens) / scales[..., None].astype(np.float64)
    at = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    step = (values[at] - values[at - 1]) * scales[..., None]
    error = np.abs(stored * scales[..., None] - tokens)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(tokens)  # of the scale, and of the quotient
    assert (error <= step / 2 + rounding + SMALLEST).all()
    np.testing.assert_allclose(  # and the scale is what it is said to be
        scales, np.maximum(np.abs(tokens).max(-1) / LARGEST[dtype], SMALLEST), rtol=1e-6
    )


@kinds
def test_tokens_of_zeros_are_read_as_zeros(dtype, scale):
    tokens = np.zeros((4, 2, 16), np.float32)
    cache = written(tokens, dtype=dtype, scales=ones(2) if scale == "head" else None)
    stored, scales = read(cache, dtype)
    assert not stored.any()
    assert (scales > 0).all()
    out, lse = attended(cache, np.ones((1, 2, 16), np.float32))
    assert not out.any()
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)


def attended(cache, query, scale=1.0):
    plan = make_plan(cache, np.array([4], np.int32), np.zeros((1, 1), np.int32), num_heads=2)
    out, lse = attend(jnp.asarray(query), cache, plan, scale=scale, return_lse=True)
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-36, 3e36, 8e37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_values_stay_numbers(dtype, size):
    rng = np.random.default_rng(0)
    key = rng.standard_normal((4, 2, 16)).astype(np.float32)
    value = (np.sign(rng.standard_normal(key.shape)) * size).astype(np.float32)
    cache = written(key, value, dtype=dtype)
    out, lse = attended(cache, np.zeros((1, 2, 16), np.float32))  # the mean of four values
    assert np.isfinite(lse).all()
    exact = value.astype(np.float64).mean(axis=0)
    assert (np.abs(out[0] - exact) <= 2.0**-7 * size + LARGEST[dtype] * 2 * SMALLEST).all()


@pytest.mark.parametrize(
    ("dtype", "size"),
    # As tiny as scales of their own can say: the dot product times the factor alone is infinite.
    [*zip(DTYPES, (1e-36, 1e-35, 1e-33), strict=True), *((dtype, 1e30) for dtype in DTYPES)],
)
def test_tiny_and_huge_keys_stay_numbers(dtype, size):
    rng = np.random.default_rng(0)
    key = rng.standard_normal((4, 2, 16)).astype(np.float32)
    query = rng.standard_normal((1, 2, 16)).astype(np.float32)
    usual = attended(written(key, dtype=dtype), query)
    cache = written(key * np.float32(size), key, dtype=dtype)
    scale = 1 / float(np.float32(size))
    for actual, expected in zip(attended(cache, query, scale), usual, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.02)


def poisoned(inputs, which, value, sequence, position, head):
    """The new tokens, one element of which is no number."""
    row = sum(new for _, new in inputs.step.seqs[:sequence])
    length, new = inputs.step.seqs[sequence]
    array = {"key": inputs.key, "value": inputs.value}[which]
    array[row + position - (length - new), head, 3] = value
    return row, new, position - (length - new)


def assert_nan_where(seen, out, lse, clean):
    """NaN in all of the heads `[queries, heads]` that see it, and no bit changed elsewhere."""
    np.testing.assert_array_equal(np.isnan(out).all(axis=-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)
    np.testing.assert_array_equal(out[~seen], clean[~seen])


@kinds
@pytest.mark.parametrize(
    ("which", "value"), [("key", np.nan), ("value", np.nan), ("value", -np.inf), ("key", np.inf)]
)
def test_a_new_token_that_is_no_number_is_seen_by_those_that_read_it(dtype, scale, which, value):
    """In its sequence and KV head, from its position on, in output and lse; nowhere else."""
    inputs = steps.make(quantised("mixed", dtype, scale))
    clean, _ = run(inputs, written=True)
    row, new, place = poisoned(inputs, which, value, sequence=0, position=20, head=1)
    out, lse = run(inputs, written=True)
    seen = np.zeros(lse.shape, bool)
    seen[row + place : row + new, 2:4] = True
    assert_nan_where(seen, out, lse, clean)


@kinds
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_sequence_that_decodes_sees_its_own(dtype, scale, which):
    """One query of one tile: of eight sequences the fourth, whose last token it is."""
    inputs = steps.make(quantised("decoding", dtype, scale))
    clean, _ = run(inputs, written=True)
    row, *_ = poisoned(inputs, which, np.nan, sequence=3, position=8, head=2)
    out, lse = run(inputs, written=True)
    seen = np.zeros(lse.shape, bool)
    seen[row, 4:6] = True
    assert_nan_where(seen, out, lse, clean)


@kinds
@pytest.mark.parametrize("which", ["key", "value"])
def test_a_window_that_has_passed_it_is_free_of_it(dtype, scale, which):
    inputs = steps.make(quantised("mixed", dtype, scale, window=6))
    clean, _ = run(inputs, written=True)
    row, _, place = poisoned(inputs, which, np.nan, sequence=0, position=20, head=0)
    out, lse = run(inputs, written=True)
    seen = np.zeros(lse.shape, bool)
    seen[row + place : row + place + 6, 0:2] = True
    assert_nan_where(seen, out, lse, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_of_a_callers_that_is_no_number_is_seen(dtype, which, value):
    """In one of a token's two scales alone, as no write leaves them."""
    inputs = steps.make(quantised("mixed", dtype, "token"))
    clean, _ = run(inputs)
    page, slot = inputs.block_tables[0, 20 // 8], 20 % 8
    inputs.scales[page, 1, 0, slot + 8 * which] = value
    out, lse = run(inputs)
    seen = np.zeros(lse.shape, bool)
    seen[20:37, 2:4] = True
    assert_nan_where(seen, out, lse, clean)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("which", ["key_cache", "value_cache"])
def test_a_stored_element_that_is_no_number_is_seen(dtype, scale, which):
    inputs = steps.make(quantised("mixed", dtype, scale))
    clean, _ = run(inputs)
    getattr(inputs, which)[inputs.block_tables[0, 20 // 8], 1, 20 % 8, 3] = np.nan
    out, lse = run(inputs)
    seen = np.zeros(lse.shape, bool)
    seen[20:37, 2:4] = True
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)
    np.testing.assert_array_equal(out[~seen], clean[~seen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_new_tokens_that_are_no_numbers_has_only_their_scales_nan(dtype):
    """The bits of all others are those of a write without them."""
    tokens = np.random.default_rng(0).standard_normal((4, 2, 16)).astype(np.float32)
    clean = jax.tree.map(bits, written(tokens, dtype=dtype))
    tokens[2, 1, 5] = np.nan
    cache = written(tokens, dtype=dtype)
    scales = np.asarray(cache.scales[0])
    expected = np.zeros(scales.shape, bool)
    expected[0, 1, 0, [2, 6]] = True
    np.testing.assert_array_equal(np.isnan(scales), expected)
    np.testing.assert_array_equal(bits(scales)[~expected], clean.scales[0][~expected])
    assert np.isfinite(np.asarray(cache.key).astype(np.float32)).all()
