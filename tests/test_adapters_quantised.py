"""Other libraries' float8 caches, whose scales are one number of the keys and one of the values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardpage.adapters import ejkernel, jax_pallas, tpu_inference

from . import quantised, reference, test_adapters, test_adapters_sharded
from .cases import build_mesh
from .peers_batch import Batch, assert_written, batch, laid_out
from .test_adapters import SMALL, small
from .tolerance import assert_close

FP8 = quantised.DTYPES[1:]
GIVEN = {"k_scale": 0.02, "v_scale": 0.03}


def float8(step, dtype, k_scale=None, v_scale=None, **how) -> tuple[Batch, Batch]:
    """A batch as it is stored, and what that stands for."""
    made = batch(step, **how)
    names = ("key", "value", "key_cache", "value_cache", "key_cache_before", "value_cache_before")
    stored, exact = {}, {}
    for name in names:
        scale = np.float32((k_scale if name.startswith("key") else v_scale) or 1.0)
        stored[name] = quantised.rounded(getattr(made.inputs, name) / scale, dtype)
        exact[name] = stored[name].astype(np.float64) * scale
    remade = (dataclasses.replace(made.inputs, **arrays) for arrays in (stored, exact))
    return tuple(dataclasses.replace(made, inputs=inputs) for inputs in remade)


def assert_attends(exact: Batch, out, dtype="float32", **options):
    """Within what rounding the operands of matmuls to bfloat16 costs the oracle."""
    inputs = exact.inputs
    arrays = (inputs.context_lens, inputs.block_tables, inputs.query_lens)
    options = {"window": inputs.step.window, "sinks": inputs.sinks} | options
    options |= {"kv_layout": "tokens_first", "num_seq_shards": inputs.num_seq_shards}
    key, value = inputs.key_cache, inputs.value_cache
    expected, _ = reference.step_attention(inputs.query, key, value, *arrays, **options)
    folded = np.append(value, np.ones_like(value[..., :1]), axis=-1)
    how = options | {"attend_token": quantised.plain_token}
    plain, _ = reference.step_attention(inputs.query, key, folded, *arrays, **how)
    assert out.dtype == dtype
    assert_close("out", out, expected, plain.astype(out.dtype))


@pytest.mark.parametrize("scales", [{}, GIVEN], ids=["scale_of_1", "scales"])
@pytest.mark.parametrize("dtype", FP8)
def test_tpu_inference(dtype, scales):
    stored, exact = float8(SMALL, dtype, **scales)
    (cache,) = stored.cache("", shared=False)
    call = tpu_inference.ragged_paged_attention
    with jax.numpy_rank_promotion("raise"):  # as their own tests have it
        out, new = call(*stored.tokens, cache, *stored.lists, sm_scale=0.1, q_scale=2.0, **scales)
    assert_attends(exact, out, scale=0.1)
    assert_written(stored, new, shared=False)
    assert cache.is_deleted()
    assert new.dtype == cache.dtype


def test_tpu_inference_with_heads_that_fill_words():
    stored, exact = float8(small(head_dim=64, sinks=True), FP8[0], **GIVEN)
    (cache,) = stored.cache("", shared=True)
    arrays = (*stored.tokens, cache, *stored.lists, stored.sinks)
    out, new = tpu_inference.ragged_paged_attention_hd64(*arrays, sm_scale=0.1, **GIVEN)
    assert_attends(exact, out, scale=0.1)
    assert_written(stored, new, shared=True)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_tpu_inference_on_a_mesh(axis_type):
    mesh = build_mesh("data=2,model=2", axis_type)
    step = test_adapters_sharded.STEP.replace(window=7)
    stored, exact = float8(step, FP8[0], **GIVEN, num_seq_shards=2)
    pages = stored.inputs.key_cache_before, stored.inputs.value_cache_before
    (cache,) = laid_out(*pages, False, shards=2)
    where = PartitionSpec("data", None, "model", None, None)
    cache = jax.device_put(cache, NamedSharding(mesh, where))
    lists = test_adapters_sharded.lists(stored, 2, len(cache))
    out, new = tpu_inference.sharded_ragged_paged_attention(
        mesh, *stored.tokens, cache, *lists, None, 0.1, attention_chunk_size=7, **GIVEN
    )
    assert_attends(exact, out, scale=0.1)
    assert_written(stored, new, False, shards=2)


def test_sglang_jax():
    stored, exact = float8(SMALL, FP8[1], **GIVEN)
    (cache,) = stored.cache("", shared=False)
    out, new = test_adapters.TestSglangJax.call(stored, cache, sm_scale=0.1, **GIVEN)
    assert_attends(exact, out, scale=0.1)
    assert_written(stored, new, shared=False)


@pytest.mark.parametrize("mapped", [False, True])
def test_ejkernel(mapped):
    stored, exact = float8(small(sinks=True), FP8[0], **GIVEN)
    (cache,) = stored.cache("", shared=False)
    arrays = (*stored.tokens, cache, *stored.lists, stored.sinks)
    how = {}
    if mapped:  # what varies over the mesh's axis meets scales that do not
        none = PartitionSpec()
        heads, words = PartitionSpec(None, "model"), PartitionSpec(None, None, "model")
        how = {"mesh": build_mesh("model=1"), "out_specs": (heads, words)}
        how["in_specs"] = (heads, heads, heads, words, *(none,) * 4, PartitionSpec("model"))
    out, new = ejkernel.ragged_page_attention_v3(*arrays, softmax_scale=0.1, **GIVEN, **how)
    assert_attends(exact, out, scale=0.1)
    assert_written(stored, new, shared=False)


@pytest.mark.parametrize("dtype", FP8)
def test_jax(dtype):
    stored, exact = float8(SMALL, dtype, **GIVEN)
    (pages,) = stored.cache("interleaved", written=True)
    lists = map(jnp.asarray, (stored.kv_lens, stored.tables, stored.cu_q_lens))
    num_seqs = jnp.array([stored.num_seqs], jnp.int32)
    call = jax_pallas.ragged_paged_attention
    out = call(stored.tokens[0], pages, *lists, num_seqs, sm_scale=0.1, **GIVEN)
    assert_attends(exact, out, scale=0.1)


def test_refuses():
    stored, _ = float8(SMALL, FP8[0], **GIVEN)
    (cache,) = stored.cache("", shared=False)
    queries, keys, values = stored.tokens
    call = tpu_inference.ragged_paged_attention
    with pytest.raises(ValueError, match="keys are float32 for a cache of float8_e4m3fn; pass"):
        call(queries, keys.astype(jnp.float32), values, cache, *stored.lists)
    with pytest.raises(ValueError, match=r"v_scale=-2\.0 must be above 0, or None for 1"):
        call(queries, keys, values, cache, *stored.lists, v_scale=-2.0)
    with pytest.raises(ValueError, match="k_scale=nan must be a finite number"):
        call(queries, keys, values, cache, *stored.lists, k_scale=float("nan"))
    with pytest.raises(NotImplementedError, match="kv_cache is int8, of which -128 says"):
        call(queries, keys, values, cache.astype(jnp.int8), *stored.lists)
