"""The flat walk of the XLA backend: which blocks of which queries each step works on."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Reads
from ...varying import vary_over, varying_axes

State = TypeVar("State")

# Bytes of keys and values that one step fetches. A CPU wants them to stay in its caches between
# the fetch and the matmuls; a GPU wants a step to outlast by far the launch of its kernels.
_STEP_BYTES = {"cpu": 2 << 20, "gpu": 256 << 20}
_STEP_BYTES_ELSEWHERE = 64 << 20
# Tokens of one lane's block, where a step holds several lanes.
_LANE_TOKENS = 512


# Up to this many queries, which one an item is of is found by looking at all of them.
_FEW = 1024


# From this many queries on, those that fit a block so many times smaller are walked over apart.
_MANY = 64
_SMALLER = 16


class Items(NamedTuple):
    """The work items of one step: one block of pages for each lane."""

    query: Int[Array, " lanes"]
    part: Int[Array, " lanes"]  # where the lane's partial of this query is kept
    ids: Int[Array, "lanes pages"]
    valid: Bool[Array, "lanes tokens"]  # tokens of the block that are attended to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """A flat list of all queries' blocks, cut into one share per lane.

    Item `i` is block `i - first[q]` of the query `q` with `first[q] <= i < last[q]`; lane `w`
    works on items `[cuts[w], cuts[w + 1])`.
    """

    first: Any  # [queries] int32
    last: Any  # [queries] int32
    cuts: Any  # [lanes + 1] int32
    block_pages: int = dataclasses.field(metadata={"static": True})

    @property
    def num_lanes(self) -> int:
        return self.cuts.shape[0] - 1

    @property
    def num_parts(self) -> int:
        """Partials that are kept: `query + lane` tells any two of a walk apart.

        Along the list neither query nor lane ever falls, so their sum rises with every new pair.
        """
        return self.first.shape[0] + self.num_lanes - 1

    @property
    def part_query(self) -> Int[Array, " parts"]:
        """The query that each part is of; any, where no partial is kept."""
        last_lane = _rank(self.cuts[1:-1], self.last, "left")
        last_part = jnp.arange(self.last.shape[0], dtype=jnp.int32) + last_lane
        query = _rank(last_part, jnp.arange(self.num_parts, dtype=jnp.int32), "left")
        return jnp.minimum(query, self.last.shape[0] - 1)

    def query_of(self, item: Int[Array, "..."]) -> Int[Array, "..."]:
        """The query of an item; the last one past the end of the list."""
        return jnp.minimum(_rank(self.last, item, "right"), self.last.shape[0] - 1)

    def items(self, step: Int[Array, ""], reads: Reads, page_size: int) -> Items:
        """What the lanes work on in a step."""
        item = self.cuts[:-1] + step
        live = item < self.cuts[1:]
        query = self.query_of(item)
        first_page = (item - self.first[query]) * self.block_pages
        page = first_page[:, None] + jnp.arange(self.block_pages, dtype=jnp.int32)
        row = query if reads.row is None else reads.row[query]
        ids = reads.ids.at[row[:, None], page].get(mode="clip")
        token = first_page[:, None] * page_size
        token += jnp.arange(self.block_pages * page_size, dtype=jnp.int32)
        start, stop = reads.start[query, None], reads.stop[query, None]
        valid = (token >= start) & (token < stop) & live[:, None]
        part = query + jnp.arange(self.num_lanes, dtype=jnp.int32)
        return Items(query, jnp.where(live, part, self.num_parts), ids, valid)


def _rank(ordered: jax.Array, values: jax.Array, side: Literal["left", "right"]) -> jax.Array:
    """How many entries of an ordered array are below each value ("right": or equal to it)."""
    if ordered.shape[0] > _FEW:
        return jnp.searchsorted(ordered, values, side=side, method="scan_unrolled")
    # One fused reduction, where a search is many small steps.
    below = ordered <= values[..., None] if side == "right" else ordered < values[..., None]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)


def prepare(
    reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning
) -> tuple[Walk, ...]:
    """Lists the work, in steps of about `_STEP_BYTES` of keys and values.

    Where a CPU has many queries and large blocks, those that read little have a walk of their own,
    in smaller blocks: of a block all pages are fetched, read or not.
    """
    num_queries, max_pages = reads.start.shape[0], reads.ids.shape[1]
    step_bytes = _STEP_BYTES.get(tuning.platform or "", _STEP_BYTES_ELSEWHERE)
    step_pages = max(step_bytes // page_format.page_bytes, 1)
    lane_pages = max(_LANE_TOKENS // page_format.page_size, 1)
    if tuning.platform == "cpu":  # one lane
        lane_pages = step_pages
    splits = min(tuning.num_splits, num_queries * max_pages)
    if splits > 1:  # more lanes, of as many bytes together
        lane_pages = min(lane_pages, max(step_pages // splits, 1))
    pages = tuning.pages_per_block or min(step_pages, lane_pages)
    pages = max(min(pages, max_pages), 1)

    def walk(pages: int, stop: jax.Array) -> Walk:
        lanes = max(step_pages // pages, splits, 1)
        lanes = max(min(lanes, num_queries * -(-max_pages // pages)), 1)
        tokens = pages * page_format.page_size
        return make_walk(reads._replace(stop=stop), pages, tokens, lanes, tuning.num_splits)

    few = max(pages // _SMALLER, 1)
    if tuning.platform != "cpu" or tuning.pages_per_block or num_queries < _MANY or few == pages:
        return (walk(pages, reads.stop),)
    short = reads.stop <= few * page_format.page_size
    return walk(few, jnp.where(short, reads.stop, 0)), walk(pages, jnp.where(short, 0, reads.stop))


def make_walk(
    reads: Reads, block_pages: int, block_tokens: int, num_lanes: int, num_splits: int
) -> Walk:
    """Lists the blocks of all queries and cuts the list into shares.

    Shares are equal, up to a block. With `num_splits > 0` a cut moves back to the nearest bound
    of the `num_splits` parts of its query, so that no query is split into more.
    """
    num_blocks = -(-reads.stop // block_tokens)
    last = jnp.cumsum(num_blocks, dtype=jnp.int32)
    first = last - num_blocks
    share = -(-last[-1] // num_lanes)
    cuts = jnp.minimum(jnp.arange(num_lanes + 1, dtype=jnp.int32) * share, last[-1])
    walk = Walk(first, last, cuts, block_pages)
    if num_splits:
        query = walk.query_of(cuts)
        part = jnp.maximum(-(-num_blocks[query] // num_splits), 1)
        behind = jnp.where(cuts < last[-1], (cuts - first[query]) % part, 0)
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
