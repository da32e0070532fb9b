"""A tile's queries where they lie in the caller's arrays, and the places of their results.

Rows of matmuls go head by head, so those of one head are neighbouring queries: one copy brings
them, and one takes their results away.

    rows       0 .. T-1          | T .. 2T-1         | ..    of a tile of T queries and a KV head
    head       its first         | its second        | ..
    queries    start .. start+T-1, each time
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config
from .mosaic import MMA_ROWS, TILED_ROWS
from .tiles import Windows


@dataclasses.dataclass(frozen=True)
class Window:
    """Neighbouring queries, of which `[begin, end)` are the tile's own."""

    config: Config
    start: jax.Array
    begin: jax.Array
    end: jax.Array
    head: jax.Array  # the first of the unit's query heads

    @classmethod
    def of(cls, config: Config, windows: Windows, unit: jax.Array) -> "Window":
        num_heads = jnp.int32(config.format.num_kv_heads)
        tile, head = lax.div(unit, num_heads), lax.rem(unit, num_heads)
        start, begin, end = (x[tile] for x in windows)
        return cls(config, start, begin, end, head * config.group)

    def at(self, row: Any) -> tuple[jax.Array, jax.Array]:
        """The query and the head of a row."""
        queries = jnp.int32(self.config.tile_queries)
        return self.start + lax.rem(row, queries), self.head + lax.div(row, queries)

    def fetch(self, query_ref: Any, rows_ref: Any, first_row: jax.Array, full: Any) -> None:
        """Brings all queries, `[queries, heads, key_dim]`, as rows from the first on."""
        count = self.config.tile_queries
        queries = pl.ds(pl.multiple_of(self.start, TILED_ROWS), count)
        for i in range(self.config.group):
            rows = pl.ds(first_row + i * count, count)
            source = query_ref.at[queries, self.head + i]
            plgpu.copy_gmem_to_smem(source, rows_ref.at[rows], full)

    @property
    def whole(self) -> jax.Array:
        """Whether all of its queries are the tile's own."""
        return self.end - self.begin == self.config.tile_queries

    def store(
        self, rows_ref: Any, out_ref: Any, first_row: Any, columns: Any, *, whole: bool
    ) -> None:
        """Copies a warpgroup's rows of the tile's own queries to `[queries, heads, value_dim]`."""
        count = min(self.config.tile_queries, MMA_ROWS)
        firsts = range(0, MMA_ROWS, count)
        start, _ = self.at(first_row)

        def copy(query: jax.Array, count: int) -> None:
            for first in firsts:
                _, head = self.at(first_row + first)
                rows = rows_ref.at[pl.ds(first + query - start, count)]
                plgpu.copy_smem_to_gmem(rows, out_ref.at[pl.ds(query, count), head, columns])

        if whole:
            return copy(start, count)
        begin, end = jnp.maximum(self.begin, start), jnp.minimum(self.end, start + count)
        lax.fori_loop(begin, end, lambda query, _: copy(query, 1), None)
