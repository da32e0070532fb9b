"""Random arrays of a step, in the forms that its implementations take, and its oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..verify import oracle
from ..verify.checks import FLOOR, MULTIPLE
from .shapes import Step


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The arrays of one step; the new tokens are in the cache already.

    Attributes:
      query: [num_queries, num_heads, head_dim], packed.
      key, value: [num_pages, num_kv_heads, page_size, head_dim].
      lengths: context lengths [num_seqs], tables [num_seqs, max_blocks], query lengths [num_seqs].
    """

    shape: Step
    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: tuple[jax.Array, jax.Array, jax.Array]

    @property
    def bounds(self) -> jax.Array:
        """[num_seqs + 1]: where each sequence's queries begin, and where the last one's end."""
        return jnp.asarray(np.cumsum([0, *self.shape.query_lens]), jnp.int32)

    @property
    def num_seqs(self) -> jax.Array:
        """[1]."""
        return jnp.array([len(self.shape.seqs)], jnp.int32)

    def token_major(self) -> jax.Array:
        """[num_pages, page_size, 2 * num_kv_heads, head_dim]: keys and values in turn."""
        both = jnp.stack([self.key, self.value], axis=2).transpose(0, 3, 1, 2, 4)
        return both.reshape(*both.shape[:2], -1, self.shape.head_dim)

    def new_tokens(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the step's own tokens [num_queries, num_kv_heads, head_dim]."""
        found = [
            self._tokens(seq, context - queries, context)
            for seq, (context, queries) in enumerate(self.shape.seqs)
        ]
        key, value = (jnp.asarray(np.concatenate(arrays)) for arrays in zip(*found, strict=True))
        return key, value

    def error_of(self, out: jax.Array) -> tuple[float, float]:
        """The error of an output against the oracle, and the error that rounding excuses.

        Compares the first and the last query of the first, the longest and the last sequence.
        """
        shape, bounds = self.shape, np.asarray(self.bounds)
        query, found = np.asarray(self.query), np.asarray(out, np.float64)
        error = rounding = 0.0
        for seq in sorted({0, int(shape.context_lens.argmax()), len(shape.seqs) - 1}):
            context, queries = shape.seqs[seq]
            keys, values = self._tokens(seq, 0, context)
            for number in {0, queries - 1}:
                seen, row = context - queries + number + 1, bounds[seq] + number
                exact, _ = oracle.attend(query[row], keys[:seen], values[:seen])
                plain, _ = oracle.attend(
                    query[row], keys[:seen], values[:seen], precision=np.float32
                )
                error = float(np.maximum(error, np.abs(found[row] - exact).max()))  # NaN stays
                rounding = max(rounding, float(np.abs(plain - exact).max()))
        return (error if np.isfinite(error) else np.inf), MULTIPLE * rounding + FLOOR

    def _tokens(self, seq: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Some keys and values of a sequence [stop - start, num_kv_heads, head_dim]."""
        at = np.arange(start, stop)
        pages = np.asarray(self.lengths[1])[seq, at // self.shape.page_size]
        slots = at % self.shape.page_size
        key, value = (np.asarray(cache[pages, :, slots]) for cache in (self.key, self.value))
        return key, value


def make(shape: Step) -> StepInputs:
    """Draws the arrays of a step; pages lie in random order, the first is nobody's."""
    num_blocks = -(-shape.context_lens // shape.page_size)
    ids = 1 + np.random.default_rng(0).permutation(num_blocks.sum())
    tables = np.zeros((len(shape.seqs), num_blocks.max()), np.int32)
    tables[np.arange(num_blocks.max()) < num_blocks[:, None]] = ids
    cache = (1 + len(ids), shape.num_kv_heads, shape.page_size, shape.head_dim)
    query = (shape.num_queries, shape.num_heads, shape.head_dim)
    new, key, value = (
        jax.random.normal(jax.random.key(seed), size, shape.dtype)
        for seed, size in enumerate((query, cache, cache))
    )
    lengths = tuple(jnp.asarray(x) for x in (shape.context_lens, tables, shape.query_lens))
    return StepInputs(shape, new, key, value, lengths)
