"""Writes of new tokens: `write_kv` beside a plain scatter, both into a donated cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shardpage import PagedKVCache, write_kv

from . import timing
from .report import OURS, Row
from .shapes import Tokens

REPEATS = 8


def _scatter(cache, key, value, seq_ids, positions, tables):
    """One XLA scatter each for keys and values, without checks of any id."""
    page_size = cache.key.shape[2]
    at = (tables[seq_ids, positions // page_size], slice(None), positions % page_size)
    return cache.replace((cache.key.at[at].set(key), cache.value.at[at].set(value)))


IMPLEMENTATIONS: dict[str, Callable[..., PagedKVCache]] = {OURS: write_kv, "scatter": _scatter}


def rows(shapes: Sequence[Tokens], roof_gbps: float) -> Iterator[Row]:
    """Measures every implementation on every shape."""
    for shape in shapes:
        yield from measure(shape, roof_gbps)
        jax.clear_caches()


def measure(shape: Tokens, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape. A cache that then lacks the tokens is reported and not timed."""
    tables, written = _draw(shape)
    calls, temp_bytes = {}, {}
    for name, write in IMPLEMENTATIONS.items():
        cache = _empty(shape, num_pages=1 + int(tables.max()))
        program = jax.jit(_in_one_program(write), donate_argnums=0)
        compiled = program.lower(cache, *written, tables).compile()
        cache = compiled(cache, *written, tables)
        if not _holds(cache, written, tables, shape.page_size):
            yield Row("write", shape.name, name, why="wrong: tokens are not where they belong")
            continue
        calls[name] = _Chained(compiled, cache, (*written, tables))
        temp_bytes[name] = timing.temp_bytes(compiled)
    queued = 1 if jax.default_backend() == "cpu" else timing.QUEUED
    for name, timed in timing.in_turn(calls, REPEATS, queued=queued).items():
        yield Row(
            "write", shape.name, name, timed, shape.written_bytes, temp_bytes[name], roof_gbps
        )


class _Chained:
    """A compiled program whose calls each donate the cache that the last one returned."""

    def __init__(self, compiled: Any, cache: PagedKVCache, arrays: tuple[jax.Array, ...]):
        self._compiled, self._cache, self._arrays = compiled, cache, arrays

    def __call__(self) -> PagedKVCache:
        self._cache = self._compiled(self._cache, *self._arrays)
        return self._cache


def _in_one_program(write: Callable[..., PagedKVCache]) -> Callable[..., PagedKVCache]:
    """Writes one set of the stacked tokens after the other."""

    def program(cache, keys, values, seq_ids, positions, tables):
        step = lambda cache, new: (write(cache, *new, tables), None)
        return lax.scan(step, cache, (keys, values, seq_ids, positions))[0]

    return program


def _empty(shape: Tokens, num_pages: int) -> PagedKVCache:
    return PagedKVCache.zeros(
        num_pages,
        shape.num_kv_heads,
        shape.page_size,
        shape.head_dim,
        dtype=shape.dtype,
        kv_layout="blocks_first",
    )


def _draw(shape: Tokens) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Tables of permuted pages, and `REPEATS` sets of tokens at different positions."""
    rng = np.random.default_rng(0)
    max_blocks = shape.context // shape.page_size
    tables = rng.permutation(shape.num_seqs * max_blocks).reshape(shape.num_seqs, max_blocks)
    num_tokens = shape.num_seqs * shape.each
    starts = rng.integers(0, shape.context - shape.each + 1, (REPEATS, shape.num_seqs, 1))
    positions = (starts + np.arange(shape.each)).reshape(REPEATS, num_tokens)
    seq_ids = np.tile(np.repeat(np.arange(shape.num_seqs), shape.each), (REPEATS, 1))
    size = (REPEATS, num_tokens, shape.num_kv_heads, shape.head_dim)
    keys, values = (jax.random.normal(jax.random.key(i), size, shape.dtype) for i in range(2))
    ids = (jnp.asarray(x, jnp.int32) for x in (seq_ids, positions))
    return jnp.asarray(tables, jnp.int32), (keys, values, *ids)


def _holds(
    cache: PagedKVCache, written: tuple[jax.Array, ...], tables: jax.Array, page_size: int
) -> bool:
    """Whether the slots of the last set hold its tokens, bit for bit."""
    keys, values, seq_ids, positions = (x[-1] for x in written)
    pages, slots = tables[seq_ids, positions // page_size], positions % page_size
    assert cache.value is not None
    pairs = ((cache.key, keys), (cache.value, values))
    return all(bool(jnp.array_equal(stored[pages, :, slots], new)) for stored, new in pairs)
