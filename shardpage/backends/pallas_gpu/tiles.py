"""Tiles: some queries of one row each, whose keys and values are fetched once for all of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ...plan import Reads
from .config import Config
from .mosaic import MMA_ROWS, TILED_ROWS

NOTHING, READS, INVALID = range(3)  # what is to be said of a query


class Windows(NamedTuple):
    """Where the queries of each tile lie: `tile_queries` from `start`, its own in `[begin, end)`.

    `start` is a multiple of 8: copies into shared memory bring whole tiles of it.
    """

    start: Int[Array, " tiles"]
    begin: Int[Array, " tiles"]
    end: Int[Array, " tiles"]


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
    windows: Windows | None = None  # where queries lie as the caller has them


def states(reads: Reads, invalid: Bool[Array, " queries"] | None) -> Int[Array, " queries"]:
    """Of queries: whether they read something, or are invalid."""
    state = jnp.where(reads.stop > reads.start, READS, NOTHING).astype(jnp.int32)
    return state if invalid is None else jnp.where(invalid, INVALID, state)


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
    row_begin = lax.cummax(jnp.where(new_row, number, 0))
    if config.in_place:
        row_begin -= row_begin % TILED_ROWS
    begins = new_row | ((number - row_begin) % config.tile_queries == 0)
    tile_of = jnp.cumsum(begins, dtype=jnp.int32) - 1
    begin = jnp.full(config.num_tiles, num_queries, jnp.int32)
    begin = begin.at[jnp.where(begins, tile_of, config.num_tiles)].set(number, mode="drop")
    first = begin
    if config.in_place:  # aligned, and all of a window in the array
        first = jnp.minimum(begin - begin % TILED_ROWS, num_queries - config.tile_queries)

    query = first[:, None] + jnp.arange(config.tile_queries, dtype=jnp.int32)
    tile_number = jnp.arange(config.num_tiles, dtype=jnp.int32)[:, None]
    mine = (query < num_queries) & (tile_of.at[query].get(mode="clip") == tile_number)
    end = begin + jnp.sum(mine, axis=1, dtype=jnp.int32)
    start, stop = (
        jnp.where(mine, x.at[query].get(mode="clip"), 0) for x in (reads.start, reads.stop)
    )
    reads_some = stop > start  # an empty interval may begin and end where nobody reads
    most = jnp.iinfo(jnp.int32).max
    first_start = jnp.min(jnp.where(reads_some, start, most), axis=1)
    last_stop = jnp.max(jnp.where(reads_some, stop, 0), axis=1)
    tiles = Tiles(
        start=jnp.minimum(first_start, last_stop),
        stop=last_stop,
        row=jnp.clip(reads.row.at[begin].get(mode="clip"), 0, reads.ids.shape[0] - 1),
        all_start=jnp.max(jnp.where(reads_some, start, 0), axis=1),
        all_stop=jnp.min(jnp.where(reads_some, stop, most), axis=1),
        starts=_by_row(start, config),
        stops=_by_row(stop, config),
        windows=Windows(first, begin, end) if config.in_place else None,
    )
    return Work(tiles, query, number - first[tile_of] + tile_of * config.tile_queries)


def _by_row(tokens: Int[Array, "tiles tile_queries"], config: Config) -> Int[Array, "tiles rows"]:
    """Head by head, the queries of each."""
    rows = jnp.tile(tokens, (1, config.group))
    return jnp.pad(rows, ((0, 0), (0, config.consumers * MMA_ROWS - rows.shape[1])))
