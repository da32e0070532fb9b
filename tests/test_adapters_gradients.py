"""Other libraries' calls, differentiated: through the write, too, and past what must not be read.

Of their own functions only ejkernel's `page_attention` can be, whose gradients `test_attention.py`
has; ours all can, on XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage.adapters import ejkernel, jax_pallas, sglang_jax, tpu_inference

from . import reference
from .peers_batch import Batch, batch
from .steps import Step

STEP = Step("gradients", ((3, 3), (21, 1), (30, 3), (9, 0)), 8, window=11, num_heads=4)
STEP = STEP.replace(num_kv_heads=2, head_dim=128, max_blocks=4, sinks=True, soft_cap=2.0)
HOW = {"sm_scale": 0.1, "sliding_window": 11, "soft_cap": 2.0}
EJKERNEL = {"softmax_scale": 0.1, "sliding_window": 11, "logits_soft_cap": 2.0}


def interleaved(keys, values):
    """`[pages, page, kv_heads, dim]` twice as k0 v0 k1 v1 ..."""
    return jnp.stack([keys, values], axis=3).reshape(*keys.shape[:2], -1, keys.shape[3])


def call_that_reads(name, made: Batch, query, keys, values, sinks):
    """A call whose pages hold the new tokens already."""
    lists = tuple(map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens)))
    pages, num_seqs = interleaved(keys, values), jnp.array([made.num_seqs], jnp.int32)
    if name == "jax":
        return jax_pallas.ragged_paged_attention(query, pages, *lists, num_seqs, **HOW)
    if name == "ejkernel_v2":
        return ejkernel.ragged_page_attention_v2(query, pages, *lists, num_seqs, sinks, **EJKERNEL)
    real = [x[: made.num_seqs + (x is lists[2])] for x in lists]  # there is no word for padding
    return ejkernel.unified_attention(query, keys, values, *real, None, None, sinks, **EJKERNEL)


def call_that_writes(name, made: Batch, query, keys, values, sinks):
    """A call that gets the new tokens, and pages without them."""
    page, slot = where_new(made)
    row = np.arange(len(page))
    new = [jnp.zeros((len(query), *x.shape[2:])).at[row].set(x[page, slot]) for x in (keys, values)]
    keys, values = (x.at[page, slot].set(jnp.nan) for x in (keys, values))
    if name == "hd64":
        cache = jnp.concatenate([keys, values], axis=-1)[:, :, :, None]
        call = tpu_inference.ragged_paged_attention_hd64
        return call(query, *new, cache, *made.lists, sinks, **HOW)[0]
    cache = interleaved(keys, values)[:, :, :, None]
    if name == "ejkernel_v3":
        call = ejkernel.ragged_page_attention_v3
        return call(query, *new, cache, *made.lists, sinks, **EJKERNEL)[0]
    if name == "sglang":
        kv_lens, tables, cu_q_lens, distribution = made.lists
        cu_kv_lens = made.tables.shape[1] * STEP.page_size * jnp.arange(len(cu_q_lens))
        lists = (kv_lens, tables, cu_q_lens, cu_kv_lens.astype(jnp.int32), distribution)
        return sglang_jax.ragged_paged_attention(query, *new, cache, *lists, None, sinks, **HOW)[0]
    return tpu_inference.ragged_paged_attention(query, *new, cache, *made.lists, **HOW)[0]


def where_new(made: Batch):
    """The pages and slots of the new tokens, in their order."""
    step, tables = made.inputs.step, made.inputs.block_tables
    at = [(seq, n) for seq, (lens, new) in enumerate(step.seqs) for n in range(lens - new, lens)]
    seq, position = np.array(at).T
    return tables[seq, position // step.page_size], position % step.page_size


CALLS = {
    **dict.fromkeys(("jax", "ejkernel_v2", "ejkernel_unified"), call_that_reads),
    **dict.fromkeys(("tpu_inference", "hd64", "sglang", "ejkernel_v3"), call_that_writes),
}


@pytest.mark.parametrize("name", CALLS)
def test_are_those_of_the_oracle(name):
    has_sinks = name not in ("jax", "tpu_inference")
    made = batch(STEP.replace(head_dim=64 if name == "hd64" else 128, sinks=has_sinks))
    inputs = made.inputs
    names = ("query", "keys", "values", "sinks")
    arrays = (inputs.query, inputs.key_cache, inputs.value_cache, inputs.sinks)
    moving = {n: x for n, x in zip(names, arrays, strict=True) if x is not None}
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(inputs.query.shape, np.float32)

    @jax.jit
    def loss(moved):
        return jnp.sum(CALLS[name](name, made, *(moved.get(n) for n in names)) * weights)

    def exact_loss(moved):
        moved = moving | moved
        lists = (inputs.context_lens, inputs.block_tables, inputs.query_lens)
        arrays = (moved["query"], moved["keys"], moved["values"], *lists)
        how = {"scale": 0.1, "soft_cap": 2.0, "window": 11, "sinks": moved.get("sinks")}
        out, _ = reference.step_attention(*arrays, kv_layout="tokens_first", **how)
        return np.sum(out * weights)

    gradients = jax.grad(loss)({n: jnp.asarray(x) for n, x in moving.items()})
    for moved, array in moving.items():
        gradient = np.float64(gradients[moved])
        assert not gradient[np.isnan(array)].any()
        step = 1e-4 * rng.standard_normal(array.shape)
        expected = exact_loss({moved: array + step}) - exact_loss({moved: array - step})
        assert 2 * np.sum(gradient * step) == pytest.approx(expected, rel=1e-4, abs=1e-8), moved
