"""Steps as other libraries hand them over: running sums, flat tables, padding behind, one cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from . import cases, reference, steps
from .steps import Step, StepInputs
from .tolerance import assert_close

SPARE = 2  # sequences that are not real
ROUNDING = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-22}


@dataclasses.dataclass
class Batch:
    """A step's arrays in the words of other libraries, NumPy."""

    inputs: StepInputs  # token-major, keys and values apart
    kv_lens: np.ndarray  # [max_num_seqs]
    tables: np.ndarray  # [max_num_seqs, pages]
    cu_q_lens: np.ndarray  # [max_num_seqs + 1]
    num_seqs: int

    @property
    def tokens(self) -> tuple:
        """Queries, keys and values, as JAX's: fresh, since a call may donate them."""
        return tuple(map(jnp.asarray, (self.inputs.query, self.inputs.key, self.inputs.value)))

    @property
    def lists(self) -> tuple:
        """kv_lens, flat page_indices, cu_q_lens, distribution."""
        distribution = np.array([0, 0, self.num_seqs], np.int32)
        arrays = (self.kv_lens, self.tables.reshape(-1), self.cu_q_lens, distribution)
        return tuple(map(jnp.asarray, arrays))

    @property
    def sinks(self):
        return None if self.inputs.sinks is None else jnp.asarray(self.inputs.sinks)

    def cache(self, kv_layout: str, *, written: bool = False, shared: bool | None = None):
        """The cache in a layout, with or without the new tokens; `shared` as `laid_out` has it."""
        kept = self.inputs
        pages = (kept.key_cache, kept.value_cache)
        if not written:
            pages = (kept.key_cache_before, kept.value_cache_before)
        arrays = (
            laid_out(*pages, shared) if shared is not None else cases.lay_out(*pages, kv_layout)
        )
        return tuple(jnp.asarray(x) for x in arrays if x is not None)


def laid_out(keys: np.ndarray, values: np.ndarray, shared: bool, shards: int = 1):
    """`[pages, page, rows / n, n, row]`: keys and values in turn, padded to 128, or in one row.

    Each shard's heads fill words of their own. What pads is NaN.
    """
    per_word, nan = 4 // keys.dtype.itemsize, np.array(np.nan, keys.dtype)
    pages, page_size, num_kv_heads, head_dim = keys.shape
    heads = num_kv_heads // shards
    spare = -heads * (1 if shared else 2) % per_word
    parts = []
    for shard in range(shards):
        pad = [(0, 0), (0, 0), (0, spare), (0, 0 if shared else -head_dim % 128)]
        own = slice(shard * heads, (shard + 1) * heads)
        key, value = (np.pad(x[:, :, own], pad, constant_values=nan) for x in (keys, values))
        if shared:
            parts.append(np.concatenate([key, value], axis=-1))
        else:
            both = np.stack([key, value], axis=3)
            parts.append(both.reshape(pages, page_size, -1, key.shape[-1]))
    rows = np.concatenate(parts, axis=2)
    return (rows.reshape(pages, page_size, -1, per_word, rows.shape[-1]),)


def read_back(array, like: np.ndarray, shared: bool, shards: int = 1):
    """Keys and values `[pages, page, kv_heads, dim]` out of what `laid_out` made."""
    pages, page_size, num_kv_heads, head_dim = like.shape
    array = np.asarray(array)
    rows = array.reshape(pages, page_size, shards, -1, array.shape[-1])
    heads = num_kv_heads // shards
    if shared:
        rows = rows[:, :, :, :heads]
        both = rows[..., :head_dim], rows[..., head_dim:]
    else:
        rows = rows[:, :, :, : 2 * heads, :head_dim]
        both = rows[:, :, :, 0::2], rows[:, :, :, 1::2]
    return [x.reshape(like.shape) for x in both]


def batch(step: Step, *, num_seq_shards: int = 1, **how) -> Batch:
    """Draws a step; what is behind its sequences is garbage."""
    inputs = steps.make(step, "tokens_first", num_seq_shards=num_seq_shards, **how)
    num_seqs = len(step.seqs)
    assert num_seq_shards == 1 or num_seqs % num_seq_shards == 0
    rng = np.random.default_rng(0)
    garbage = lambda *shape: rng.integers(-9, 99, shape, np.int32)
    tables = np.concatenate([inputs.block_tables, garbage(SPARE, inputs.block_tables.shape[1])])
    ends = np.cumsum([0, *inputs.query_lens]).astype(np.int32)
    return Batch(
        inputs,
        np.concatenate([inputs.context_lens, garbage(SPARE)]),
        tables,
        np.concatenate([ends, garbage(SPARE)]),
        num_seqs,
    )


def assert_attends(made: Batch, out, *, dtype=None, v_scale=1.0, query=None, **options):
    """Compares with the oracle; `options` are its own. Behind the last token there are zeros."""
    inputs = made.inputs
    exact, _ = reference.step_attention(
        inputs.query if query is None else query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.context_lens,
        inputs.block_tables,
        inputs.query_lens,
        kv_layout="tokens_first",
        sinks=inputs.sinks,
        num_seq_shards=inputs.num_seq_shards,
        **{"window": inputs.step.window, "causal": inputs.step.causal} | options,
    )
    exact = exact * v_scale
    out = np.asarray(out)
    assert out.dtype == (dtype or inputs.query.dtype)
    # Weights are rounded to the cache's dtype before the second matmul, outputs after it.
    rounding = max(ROUNDING[inputs.step.dtype], ROUNDING[str(out.dtype)])
    assert_close("out", out, exact, exact + rounding * np.abs(exact).max())


def assert_written(made: Batch, cache, shared: bool, shards: int = 1):
    """The cache that came back has the new tokens in their slots, and no other bit changed."""
    pages = (made.inputs.key_cache, made.inputs.value_cache)
    found = read_back(cache, pages[0], shared, shards)
    for actual, wanted in zip(found, pages, strict=True):
        np.testing.assert_array_equal(actual.astype(np.float32), wanted.astype(np.float32))
