"""The order of work of a prompt kernel: tiles, and for each the blocks of pages that it reads.

Laid out in XLA once per step. A tile is a run of query tokens of one row. It has at least one
block, so that every tile is visited, and every query's output written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ....plan import Reads
from ....tiles import Tiles
from ..geometry import LANES
from .config import Config


class Tile(NamedTuple):
    """What a kernel knows of a tile; int32. Tokens and pages are counted in its row."""

    first_id: jax.Array  # of its row, in rows of whole windows of page ids
    first_query: jax.Array
    num_queries: jax.Array
    begin: jax.Array  # first page that any of its queries reads
    end: jax.Array  # one past the last
    all_from: jax.Array  # tokens [all_from, all_to) are seen by every query
    all_to: jax.Array
    num_blocks: jax.Array  # at least one


NUM_FIELDS = len(Tile._fields)


class Schedule(NamedTuple):
    """The walks of all cores."""

    tiles: Int[Array, " num_tiles*fields"]
    bounds: Int[Array, " num_cores+1"]  # core `i` has the tiles [bounds[i], bounds[i + 1])
    num_blocks: Int[Array, " num_cores"]
    spans: Int[Array, "num_tiles tile_tokens lanes"]  # lane 0: each query's start; lane 1: its stop


def schedule(reads: Reads, tiles: Tiles, config: Config) -> Schedule:
    """Lays out the walk over some tiles: those that have queries come first."""
    page_size, pages = config.format.page_size, config.block_pages
    index = jnp.arange(config.tile_tokens, dtype=jnp.int32)
    count = tiles.num_queries
    # What lies behind a tile's queries sees what the last of them does.
    query = tiles.first_query[:, None] + jnp.minimum(index, jnp.maximum(count[:, None] - 1, 0))
    of_query = lambda values: values.at[query].get(mode="clip")
    start, stop = of_query(reads.start), of_query(reads.stop)
    row = jnp.zeros_like(count) if reads.row is None else of_query(reads.row)[:, 0]
    row = jnp.minimum(row, reads.ids.shape[0] - 1)
    begin, end = tiles.start // page_size, -(-tiles.stop // page_size)
    num_blocks = jnp.where(tiles.stop > tiles.start, -(-end // pages) - begin // pages, 1)
    num_blocks = jnp.where(count > 0, num_blocks, 0)
    fields = Tile(
        first_id=row * (config.windows * LANES),
        first_query=tiles.first_query,
        num_queries=count,
        begin=begin,
        end=jnp.where(tiles.stop > tiles.start, end, begin),
        all_from=start[:, -1],
        all_to=stop[:, 0],
        num_blocks=num_blocks,
    )
    bounds = _bounds(num_blocks, jnp.sum(count > 0, dtype=jnp.int32), config)
    after = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_blocks, dtype=jnp.int32)])
    totals = after[bounds[1:]] - after[bounds[:-1]]
    spans = jnp.stack([start, stop], axis=-1)
    spans = jnp.pad(spans, ((0, 0), (0, 0), (0, LANES - 2)))
    flat = jnp.pad(jnp.stack(fields, axis=-1), ((0, 1), (0, 0))).reshape(-1)
    return Schedule(flat, bounds, totals, spans)


def _bounds(num_blocks: jax.Array, num_tiles: jax.Array, config: Config) -> jax.Array:
    """Cuts the tiles into runs of about equally many blocks."""
    cores = 1 if config.cores.by_heads else config.cores.count
    after = jnp.cumsum(num_blocks, dtype=jnp.int32)
    share = -(-after[-1] // cores)
    cuts = [jnp.sum(after < share * core, dtype=jnp.int32) for core in range(1, cores)]
    zero = jnp.zeros((), jnp.int32)
    return jnp.stack([zero, *(jnp.minimum(cut, num_tiles) for cut in cuts), num_tiles])
