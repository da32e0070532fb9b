"""Tiles: neighbouring queries of one row, worked on together so that keys are read once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .plan import Reads, rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Runs of at most `size` queries of one row, and the tokens that each reads together."""

    start: Any  # [tiles] int32
    stop: Any  # [tiles] int32
    first_query: Any  # [tiles] int32; None where tile `i` is query `i`
    num_queries: Any  # [tiles] int32; None likewise
    size: int = dataclasses.field(metadata={"static": True})

    def queries(
        self, tile: Int[Array, " lanes"]
    ) -> tuple[Int[Array, "lanes size"], Bool[Array, "lanes size"]]:
        """The queries of some tiles, and which of them there are."""
        if self.first_query is None:
            return tile[:, None], jnp.ones((tile.shape[0], 1), bool)
        number = jnp.arange(self.size, dtype=jnp.int32)
        return self.first_query[tile, None] + number, number < self.num_queries[tile, None]

    def only(self, kept: Bool[Array, " tiles"]) -> "Tiles":
        """The same, of which the others read nothing."""
        start, stop = (jnp.where(kept, x, 0) for x in (self.start, self.stop))
        return dataclasses.replace(self, start=start, stop=stop)


def tiles_of(reads: Reads, sizes: tuple[int, ...], *, compact: bool = False) -> list[Tiles]:
    """All queries in tiles, those of a row in the smallest size that holds them, or the largest.

    Tiles of one are all queries, of which the others' rows read nothing; or `compact`, those alone.
    """
    num_queries, num_rows = reads.start.shape[0], reads.ids.shape[0]
    single = Tiles(reads.start, reads.stop, None, None, 1)
    if sizes == (1,) or (reads.row is None and sizes[0] == 1):
        return [single]
    index = jnp.arange(num_queries, dtype=jnp.int32)
    row = index if reads.row is None else reads.row
    first = rank(row, row, "left")  # query of each one's row
    count = rank(row, row, "right") - first
    tiles, below = [], 0
    for size in sizes:
        ours = (count > below) & ((count <= size) | (size == sizes[-1]))
        if size == 1 and not compact:
            tiles.append(single.only(ours))
        else:
            head = ours & ((index - first) % size == 0)
            most = min(num_rows + 1, num_queries // (below + 1))  # one per row, of padding too
            if size == sizes[-1]:
                most += num_queries // size
            tiles.append(_tiles_at(reads, head, first + count, size, max(most, 1)))
        below = size
    return tiles


def _tiles_at(reads: Reads, head: jax.Array, row_end: jax.Array, size: int, most: int) -> Tiles:
    """Tiles that begin at the queries of `head`, `most` of them."""
    num_queries = head.shape[0]
    before = jnp.cumsum(head, dtype=jnp.int32)
    number = jnp.arange(most, dtype=jnp.int32)
    first = rank(before, number, "right")  # past the last tile: num_queries
    at = lambda array, query: array.at[query].get(mode="clip")
    count = jnp.where(first < num_queries, jnp.minimum(size, at(row_end, first) - first), 0)
    start, stop = at(reads.start, first), at(reads.stop, first + count - 1)
    return Tiles(start, stop, first, count, size).only(count > 0)
