"""Random arrays of the shapes, made on the devices that use them."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from shardpage import ShardLayout

from ..verify import oracle
from ..verify.checks import FLOOR, MULTIPLE
from .shapes import Shape

_AXES = {"blocks_first": (0, 1, 2, 3), "heads_first": (1, 0, 2, 3)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of `repeats` calls on one pair of caches.

    Attributes:
      queries: [repeats, num_seqs, num_heads, head_dim].
      key, value: [num_pages, num_kv_heads, page_size, head_dim].
      lens: [num_seqs].
      tables: [repeats, num_seqs, max_blocks], other pages in each repeat.
    """

    shape: Shape
    queries: jax.Array
    key: jax.Array
    value: jax.Array
    lens: jax.Array
    tables: jax.Array

    @property
    def repeats(self) -> int:
        return self.queries.shape[0]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """All arrays, the caches blocks first."""
        return self.queries, self.key, self.value, self.lens, self.tables

    def calls(self, kv_layout: str = "blocks_first") -> tuple[Any, ...]:
        """What `decode.in_one_program` takes: per call a query, lengths and tables of its own.

        Lengths that all calls shared would let XLA compute for all what each must.
        """
        lens = tuple(self.lens + 0 for _ in range(self.repeats))
        return tuple(self.queries), *self.caches(kv_layout), lens, tuple(self.tables)

    def caches(self, kv_layout: str) -> tuple[jax.Array, jax.Array]:
        """Both caches in the named layout."""
        key, value = (jnp.transpose(x, _AXES[kv_layout]) for x in (self.key, self.value))
        return key, value


def make(shape: Shape, repeats: int, mesh: Mesh | None = None) -> Inputs:
    """Draws the arrays of a shape; on a mesh, split as `ShardLayout.of(mesh)` says.

    Consecutive pages of a sequence are on successive context shards, anywhere in the shard's pool.
    Table entries past the context name the first page.
    """
    if mesh is None:
        num_seq_shards = num_context_shards = 1
        place = lambda spec: SingleDeviceSharding(jax.devices()[0])
        layout = ShardLayout()
    else:
        layout = ShardLayout.of(mesh)
        num_seq_shards, _, num_context_shards = dataclasses.astuple(layout.shards(mesh))
        place = lambda spec: NamedSharding(mesh, spec)

    tables, num_pages = _tables(shape, repeats, num_seq_shards, num_context_shards)
    stacked = lambda spec: place(PartitionSpec(None, *spec))
    caches = place(layout.spec("pages", "heads", None, None))
    cache = (num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
    query = (repeats, shape.num_seqs, shape.num_heads, shape.head_dim)
    return Inputs(
        shape,
        _draw(0, query, shape.dtype, stacked(layout.spec("seqs", "heads", None))),
        _draw(1, cache, shape.dtype, caches),
        _draw(2, cache, shape.dtype, caches),
        jax.device_put(shape.context_lens, place(layout.spec("seqs"))),
        jax.device_put(tables, stacked(layout.spec("seqs", None))),
    )


def _draw(seed: int, size: tuple[int, ...], dtype: str, sharding: Sharding) -> jax.Array:
    """Normally distributed elements, each device's part made on that device."""
    normal = lambda: jax.random.normal(jax.random.key(seed), size, dtype)
    return jax.jit(normal, out_shardings=sharding)()


def _tables(
    shape: Shape, repeats: int, num_seq_shards: int, num_context_shards: int
) -> tuple[np.ndarray, int]:
    """Page ids [repeats, num_seqs, max_blocks], and the number of pages."""
    rng = np.random.default_rng(0)
    seq = np.arange(shape.num_seqs)[:, None]
    block = np.arange(shape.max_blocks)[None]
    needed = block * shape.page_size < shape.context_lens[:, None]
    pool = seq // (shape.num_seqs // num_seq_shards) * num_context_shards
    pool = np.where(needed, pool + block % num_context_shards, -1)
    num_pools = num_seq_shards * num_context_shards
    pool_pages = 1 + max(int(np.sum(pool == each)) for each in range(num_pools))
    tables = np.zeros((repeats, *pool.shape), np.int32)
    for repeat, each in itertools.product(range(repeats), range(num_pools)):
        mine = pool == each
        tables[repeat, mine] = each * pool_pages + rng.permutation(pool_pages)[: mine.sum()]
    return tables, num_pools * pool_pages


@dataclasses.dataclass(frozen=True)
class Expected:
    """The oracle's outputs of some sequences in one call, and the error that rounding excuses.

    Attributes:
      outs: [num_heads, head_dim] float64 of each, by the sequence's number.
    """

    outs: dict[int, np.ndarray]
    limit: float

    def error_of(self, out: jax.Array) -> float:
        """The largest error of a call's output [num_seqs, num_heads, head_dim]; NaN is infinite."""
        errors = [np.asarray(out[seq], np.float64) - exact for seq, exact in self.outs.items()]
        largest = float(np.max(np.abs(errors)))
        return largest if np.isfinite(largest) else np.inf


def expected(inputs: Inputs, repeat: int = -1) -> Expected:
    """What the call `repeat` must give for the longest, shortest, first and last sequence."""
    lens, tables = np.asarray(inputs.lens), np.asarray(inputs.tables[repeat])
    queries = np.asarray(inputs.queries[repeat])
    outs, rounding = {}, 0.0
    for seq in sorted({0, len(lens) - 1, int(lens.argmax()), int(lens.argmin())}):
        pages = tables[seq, : -(-lens[seq] // inputs.shape.page_size)]
        keys, values = (_tokens(cache, pages)[: lens[seq]] for cache in (inputs.key, inputs.value))
        outs[seq], _ = oracle.attend(queries[seq], keys, values)
        low = {"precision": np.float32, "weights_dtype": queries.dtype}
        plain, _ = oracle.attend(queries[seq], keys, values, **low)
        rounding = max(rounding, float(np.abs(plain - outs[seq]).max()))
    return Expected(outs, MULTIPLE * rounding + FLOOR)


def _tokens(cache: jax.Array, pages: np.ndarray) -> np.ndarray:
    """The tokens of some pages [num_tokens, num_kv_heads, head_dim]."""
    found = np.asarray(jnp.take(cache, pages, axis=0))
    return found.swapaxes(1, 2).reshape(-1, found.shape[1], found.shape[3])
