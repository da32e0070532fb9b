"""Tiles: some queries of one row each, whose keys and values are fetched once for all of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ...plan import Reads
from .config import Config
from .mosaic import MMA_ROWS


class Tiles(NamedTuple):
    """What the queries of each tile read: the tokens `[start, stop)` of a row, together.

    The rest is None where a tile is one query, of the row of its number.
    """

    start: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]
    row: Int[Array, " tiles"] | None = None
    all_start: Int[Array, " tiles"] | None = None  # what each of its queries reads
    all_stop: Int[Array, " tiles"] | None = None
    starts: Int[Array, "tiles rows"] | None = None  # what each row of its matmuls reads
    stops: Int[Array, "tiles rows"] | None = None


class Work(NamedTuple):
    """What `prepare` makes of reads with several queries a row."""

    tiles: Tiles
    query: Int[Array, "tiles tile_queries"]  # which query is where; any, where there is none
    place: Int[Array, " queries"]  # where each is, counted over all tiles


def tile(reads: Reads, config: Config) -> Work:
    """Cuts each row's queries, which are neighbours, into tiles."""
    assert reads.row is not None
    num_queries = reads.start.shape[0]
    number = jnp.arange(num_queries, dtype=jnp.int32)
    new_row = jnp.concatenate([jnp.ones(1, bool), reads.row[1:] != reads.row[:-1]])
    in_row = number - lax.cummax(jnp.where(new_row, number, 0))
    begins = in_row % config.tile_queries == 0
    tile_of = jnp.cumsum(begins, dtype=jnp.int32) - 1
    first = jnp.full(config.num_tiles, num_queries, jnp.int32)
    first = first.at[jnp.where(begins, tile_of, config.num_tiles)].set(number, mode="drop")

    query = first[:, None] + jnp.arange(config.tile_queries, dtype=jnp.int32)
    tile_number = jnp.arange(config.num_tiles, dtype=jnp.int32)[:, None]
    mine = (query < num_queries) & (tile_of.at[query].get(mode="clip") == tile_number)
    start, stop = (
        jnp.where(mine, x.at[query].get(mode="clip"), 0) for x in (reads.start, reads.stop)
    )
    reads_some = stop > start
    most = jnp.iinfo(jnp.int32).max
    first_start = jnp.min(jnp.where(reads_some, start, most), axis=1)
    last_stop = jnp.max(stop, axis=1)
    tiles = Tiles(
        start=jnp.minimum(first_start, last_stop),
        stop=last_stop,
        row=jnp.clip(reads.row.at[first].get(mode="clip"), 0, reads.ids.shape[0] - 1),
        all_start=jnp.max(start, axis=1),
        all_stop=jnp.min(jnp.where(reads_some, stop, most), axis=1),
        starts=_by_row(start, config),
        stops=_by_row(stop, config),
    )
    return Work(tiles, query, number - first[tile_of] + tile_of * config.tile_queries)


def _by_row(tokens: Int[Array, "tiles tile_queries"], config: Config) -> Int[Array, "tiles rows"]:
    rows = jnp.repeat(tokens, config.group, axis=1)
    return jnp.pad(rows, ((0, 0), (0, config.consumers * MMA_ROWS - rows.shape[1])))
