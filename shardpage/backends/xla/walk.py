"""The flat walk of the XLA backend: which blocks of which queries each step works on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Reads, rank
from ...tiles import Tiles, tiles_of
from ...varying import vary_over, varying_axes

State = TypeVar("State")

# Bytes of keys and values that one step fetches. A CPU wants them to stay in its caches between
# the fetch and the matmuls; a GPU wants a step to outlast by far the launch of its kernels.
_STEP_BYTES = {"cpu": 2 << 20, "gpu": 256 << 20}
_STEP_BYTES_ELSEWHERE = 64 << 20
# Tokens of one lane's block, where a step holds several lanes.
_LANE_TOKENS = 512
# Sizes of tiles: a row's queries go into the smallest that holds them all, or into the largest.
# What a tile has room for besides is computed for nothing. Each size is a walk, of which a GPU
# works on one step even if it is empty.
_TILES = {"cpu": (1, 8, 24, 64), "gpu": (1, 8, 128)}
_TILES_ELSEWHERE = (1, 8, 64)
# Tokens of a block that a tile of several queries is worked on with. Each block reads and writes
# the tile's partial results and fetches its keys anew: on a GPU 512 of them for 128 queries take
# 0.8 of the time of 256 for 64.
_TILE_TOKENS = {"gpu": 512}
_TILE_TOKENS_ELSEWHERE = 256
# Where the batch must not matter: tokens of a block, and queries of a tile, one or many in use.
_INVARIANT_TOKENS = 256
_INVARIANT_TILE = 8

# Where a block for each tile makes this many tokens, those that read little are walked over apart,
# in blocks so many times smaller: queries of one each that fit a few of them, larger tiles that fit
# one. (8 x 150 tokens in 0.5 of the time, 64 x 30 as well; longer ones gain nothing.) Fewer tokens
# would save little, and a second walk has operations of its own.
_MANY_TOKENS = 8192
_SMALLER, _FEW_BLOCKS = 16, 4


class Items(NamedTuple):
    """The work items of one step: for each lane one block of pages, and a tile of its queries."""

    query: Int[Array, "lanes tile"]
    part: Int[Array, "lanes tile"]  # where the lane's partial of each query is kept
    ids: Int[Array, "lanes pages"]
    valid: Bool[Array, "lanes tile tokens"]  # tokens of the block that each query reads
    begins: Bool[Array, " lanes"]  # whether the lane was at another tile before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """A flat list of all tiles' blocks, cut into one share per lane.

    Item `i` is block `i - first[t]` of the tile `t` with `first[t] <= i < last[t]`; lane `w`
    works on items `[cuts[w], cuts[w + 1])`.
    """

    tiles: Tiles
    first: Any  # [tiles] int32
    last: Any  # [tiles] int32
    first_block: Any  # [tiles] int32: the blocks before it none of its queries reads
    cuts: Any  # [lanes + 1] int32
    block_pages: int = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(metadata={"static": True})  # several lanes may have one tile

    @property
    def num_lanes(self) -> int:
        return self.cuts.shape[0] - 1

    def num_parts(self, num_queries: int) -> int:
        """Partials that are kept: one per query, or more of tiles that lanes share.

        There `query + lane` tells any two of a walk apart: along the list neither query nor lane
        ever falls, so their sum rises with every new pair.
        """
        return num_queries + (self.num_lanes - 1 if self.shared else 0)

    @property
    def part_query(self) -> Int[Array, " parts"]:
        """The query that each part of shared tiles is of; any, where no partial is kept."""
        num_queries = self.last.shape[0]
        last_lane = rank(self.cuts[1:-1], self.last, "left")
        last_part = jnp.arange(num_queries, dtype=jnp.int32) + last_lane
        parts = jnp.arange(self.num_parts(num_queries), dtype=jnp.int32)
        return jnp.minimum(rank(last_part, parts, "left"), num_queries - 1)

    def tile_of(self, item: Int[Array, "..."]) -> Int[Array, "..."]:
        """The tile of an item; the last one past the end of the list."""
        return jnp.minimum(rank(self.last, item, "right"), self.last.shape[0] - 1)

    def items(self, step: Int[Array, ""], reads: Reads, page_size: int) -> Items:
        """What the lanes work on in a step."""
        item = self.cuts[:-1] + step
        live = item < self.cuts[1:]
        tile = self.tile_of(item)
        query, real = self.tiles.queries(tile)
        real &= live[:, None]
        first_page = (item - self.first[tile] + self.first_block[tile]) * self.block_pages
        page = first_page[:, None] + jnp.arange(self.block_pages, dtype=jnp.int32)
        row = query[:, 0] if reads.row is None else reads.row[query[:, 0]]
        ids = reads.ids.at[row[:, None], page].get(mode="clip")
        token = first_page[:, None] * page_size
        token += jnp.arange(self.block_pages * page_size, dtype=jnp.int32)
        start, stop = (x.at[query].get(mode="clip")[..., None] for x in (reads.start, reads.stop))
        valid = (token[:, None] >= start) & (token[:, None] < stop) & real[..., None]
        num_queries, lane = reads.start.shape[0], jnp.arange(self.num_lanes, dtype=jnp.int32)
        part = query + lane[:, None] if self.shared else query
        part = jnp.where(real, part, self.num_parts(num_queries))
        begins = (item == self.first[tile]) | (step == 0)
        return Items(query, part, ids, valid, begins)


def prepare(
    reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning
) -> tuple[Walk, ...]:
    """Lists the work, in steps of about `_STEP_BYTES` of keys and values.

    Queries of a row that has several share a walk of larger tiles. Where a CPU has many queries and
    large blocks, those that read little have a walk of their own, in smaller blocks: of a block all
    pages are fetched, read or not.
    """
    num_queries = reads.start.shape[0]
    sizes = _TILES.get(tuning.platform or "", _TILES_ELSEWHERE)
    fitting = tuple(size for size in sizes if size == 1 or size < 8 * num_queries)
    tiles = tiles_of(reads, (_INVARIANT_TILE,) if tuning.invariant else fitting)
    return tuple(walk for each in tiles for walk in _walks(reads, each, page_format, tuning))


def _walks(reads: Reads, tiles: Tiles, page_format: PageFormat, tuning: Tuning) -> tuple[Walk, ...]:
    num_tiles, max_pages, page_size = len(tiles.stop), reads.ids.shape[1], page_format.page_size
    if tuning.invariant:
        return (make_walk(tiles, max(_INVARIANT_TOKENS // page_size, 1), page_size),)
    step_bytes = _STEP_BYTES.get(tuning.platform or "", _STEP_BYTES_ELSEWHERE)
    step_pages = max(step_bytes // page_format.page_bytes, 1)
    lane_pages = max(_LANE_TOKENS // page_size, 1)
    if tuning.platform == "cpu":  # one lane
        lane_pages = step_pages
    num_splits = tuning.num_splits if tiles.size == 1 else 0
    splits = min(num_splits, num_tiles * max_pages)
    if splits > 1:  # more lanes, of as many bytes together
        lane_pages = min(lane_pages, max(step_pages // splits, 1))
    if tiles.size > 1:  # of a longer block, a prompt's first tokens would see less than half
        tile_tokens = _TILE_TOKENS.get(tuning.platform or "", _TILE_TOKENS_ELSEWHERE)
        lane_pages = min(lane_pages, max(tile_tokens // page_size, 1))
    pages = tuning.pages_per_block or min(step_pages, lane_pages)
    pages = max(min(pages, max_pages), 1)

    def lanes(pages: int) -> int:
        if tiles.size > 1 and tuning.platform == "cpu":
            return 1  # lanes do not share tiles: while one has a long tile, the others work in vain
        wanted = max(step_pages // pages // -(-tiles.size // 8), splits, 1)
        return max(min(wanted, num_tiles * -(-max_pages // pages)), 1)

    def walk(tiles: Tiles) -> Walk:
        shared = tiles.size == 1
        return make_walk(tiles, pages, page_size, lanes(pages), num_splits, shared=shared)

    few = max(pages // _SMALLER, 1)
    many = num_tiles * pages * page_size >= _MANY_TOKENS
    if tuning.platform != "cpu" or tuning.pages_per_block or not many or few == pages:
        return (walk(tiles),)
    few_tokens = few * page_size
    most = few_tokens * (_FEW_BLOCKS if tiles.size == 1 else 1)
    short = tiles.stop <= tiles.start // few_tokens * few_tokens + most
    in_few = make_walk(tiles.only(short), few, page_size, min(lanes(few), num_tiles))
    return in_few, walk(tiles.only(~short))


def make_walk(
    tiles: Tiles,
    block_pages: int,
    page_size: int,
    num_lanes: int = 1,
    num_splits: int = 0,
    *,
    shared: bool = False,
) -> Walk:
    """Lists the blocks of all tiles and cuts the list into shares.

    Shares are equal, up to a block, where lanes may share a tile; else up to a tile. With
    `num_splits > 0` a cut moves back to the nearest bound of the `num_splits` parts of its tile, so
    that no tile is split into more.
    """
    block_tokens, shared = block_pages * page_size, shared and num_lanes > 1
    first_block = tiles.start // block_tokens
    num_blocks = -(-tiles.stop // block_tokens) - first_block
    num_blocks = jnp.where(tiles.start < tiles.stop, num_blocks, 0)
    last = jnp.cumsum(num_blocks, dtype=jnp.int32)
    first = last - num_blocks
    share = -(-last[-1] // num_lanes)
    cuts = jnp.minimum(jnp.arange(num_lanes + 1, dtype=jnp.int32) * share, last[-1])
    walk = Walk(tiles, first, last, first_block, cuts, block_pages, shared)
    if num_splits or (num_lanes > 1 and not shared):
        tile = walk.tile_of(cuts)
        part = jnp.maximum(-(-num_blocks[tile] // (num_splits if shared else 1)), 1)
        behind = jnp.where(cuts < last[-1], (cuts - first[tile]) % part, 0)
        walk = dataclasses.replace(walk, cuts=cuts - behind)
    return walk


def walk_blocks(
    walk: Walk,
    reads: Reads,
    page_size: int,
    work: Callable[[Items, State], State],
    state: State,
    *,
    peel_last: bool = False,
) -> State:
    """Runs `work` on every step of the walk: as many as the longest share has items.

    `peel_last` runs the last step after the loop (even if empty). On a GPU the host blocks at each
    loop test and launches nothing meanwhile; with one step left it launches the following kernels
    while that step runs.
    """
    body = lambda step, state: work(walk.items(step, reads, page_size), state)
    num_steps = jnp.max(walk.cuts[1:] - walk.cuts[:-1])
    if not peel_last:
        return lax.fori_loop(0, num_steps, body, state)
    # The counter comes out of the loop, or XLA would take most of the last step before it.
    step, state = lax.while_loop(
        lambda carry: carry[0] < num_steps - 1,
        lambda carry: (carry[0] + 1, body(*carry)),
        (vary_over(jnp.int32(0), varying_axes(num_steps)), state),
    )
    return body(step, state)
