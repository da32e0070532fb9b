"""Other libraries' calls on the TPU kernels, interpreted: their pages as they lie."""

import jax.numpy as jnp
import pytest

from shardpage.adapters import ejkernel, jax_pallas, tpu_inference

from .backends import needs_kernels
from .peers_batch import assert_attends, assert_written, batch
from .test_adapters import SMALL, small

pytestmark = needs_kernels


def test_jax():
    made = batch(small(dtype="bfloat16", window=7))
    (pages,) = made.cache("interleaved", written=True)
    lists = (*map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens)),)
    options = {"sm_scale": 0.1, "sliding_window": 7, "backend": "pallas_tpu"}
    out = jax_pallas.ragged_paged_attention(
        made.tokens[0], pages, *lists, jnp.array([made.num_seqs]), **options
    )
    assert_attends(made, out, scale=0.1)


@pytest.mark.parametrize("head_dim", [80, 64])
def test_tpu_inference(head_dim):
    """One KV head of two that fill a word; padded, and key and value in one row."""
    made = batch(small(head_dim=head_dim, num_kv_heads=1, dtype="bfloat16"))
    (cache,) = made.cache("", shared=head_dim == 64)
    call = tpu_inference.ragged_paged_attention
    call = tpu_inference.ragged_paged_attention_hd64 if head_dim == 64 else call
    out, new = call(*made.tokens, cache, *made.lists, sm_scale=0.1, backend="pallas_tpu")
    assert_attends(made, out, scale=0.1)
    assert_written(made, new, shared=head_dim == 64)
    assert cache.is_deleted()


def test_float16_is_refused():
    made = batch(small(dtype="float16"))
    (cache,) = made.cache("", shared=False)
    arrays = (*made.tokens, cache, *made.lists)
    with pytest.raises(NotImplementedError, match="no matmul for caches of float16; use bf"):
        tpu_inference.ragged_paged_attention(*arrays, backend="pallas_tpu")


def test_ejkernel():
    made = batch(SMALL)
    arrays = (made.tokens[0], *made.cache("tokens_first", written=True))
    real = made.num_seqs
    lists = map(jnp.asarray, (made.kv_lens[:real], made.tables[:real], made.cu_q_lens[: real + 1]))
    out = ejkernel.unified_attention(*arrays, *lists, platform="pallas")
    assert_attends(made, out, scale=None)


def test_other_rows_are_refused():
    made = batch(small(head_dim=64))
    arrays = (made.tokens[0], *made.cache("tokens_first", written=True))
    lists = map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens))
    with pytest.raises(NotImplementedError, match="rows of 64 elements of kv_layout='tokens_f"):
        ejkernel.unified_attention(*arrays, *lists, platform="pallas")
