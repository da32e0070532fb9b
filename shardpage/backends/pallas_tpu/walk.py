"""The order of work: a flat list of blocks, laid out in XLA once per step and read by the kernel.

A *segment* is the part of one query's tokens that one output row is for: all of them, or one of
`num_splits` parts. A *block* is a fixed number of pages of one segment. Blocks of all segments
follow each other without gaps, so that what is fetched next never depends on where a query's tokens
end. Several cores share the list by cutting it into pieces of equally many blocks, wherever in a
query's tokens that falls.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .sizes import Sizes

# Up to here every value is picked by a fused reduction over all segments; beyond, looked up.
_FEW_PAIRS = 1 << 22
# Above any number of pages in a step, so that nobody who asks for a digit of it sees this one.
_IN_RUNS = 1 << 24


class Block(NamedTuple):
    """What a kernel knows of a block; int32. A block past the end of a core's list has no pages and
    no tokens, and is of the last segment that has."""

    start: jax.Array  # first token to be seen, counted from the block's first; in its first page
    stop: jax.Array  # one past the last, likewise; may lie behind the block
    num_pages: jax.Array  # that hold tokens to be seen
    row: jax.Array  # of the table
    first_page: jax.Array  # column of the table
    begins: jax.Array  # 1 if its segment begins here, on this core
    segment: jax.Array
    step_pages: jax.Array  # pages of all blocks of its step; and `_IN_RUNS`

    @property
    def in_runs(self) -> jax.Array:
        """Whether the ids of its step's pages follow each other, within each whole run of them."""
        return self.step_pages >= _IN_RUNS


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The static side of a walk."""

    page_size: int
    max_pages: int  # width of the table
    num_splits: int
    num_cores: int  # that have a walk of their own
    sizes: Sizes

    @property
    def block_tokens(self) -> int:
        return self.page_size * self.sizes.block_pages

    def num_steps(self, num_queries: int) -> int:
        """Steps that a core may have, and empty ones that a kernel fetches when at the end."""
        blocks = num_queries * -(-self.max_pages // self.sizes.block_pages)
        share = -(-blocks // self.num_cores)
        return -(-share // self.sizes.step_blocks) + 2 * self.sizes.ring_places


class Schedule(NamedTuple):
    """The walks of all cores."""

    blocks: Int[Array, "num_cores fields step_blocks steps"]  # last what there are most of: the
    # other way round a TPU's tiles pad them to sixteen times their bytes
    num_blocks: Int[Array, " num_cores"]
    vacant: Int[Array, "num_cores segments"]  # first those without blocks; see `vacancy`
    num_vacant: Int[Array, " num_cores"]


def schedule(
    row: Int[Array, " queries"],
    start: Int[Array, " queries"],
    stop: Int[Array, " queries"],
    invalid: Bool[Array, " queries"],
    ids: Int[Array, "rows max_pages"],
    lengths: Lengths,
) -> Schedule:
    """Lays out the walk.

    Args:
      row: of the table, of each query.
      start: first token of each query.
      stop: one past its last token; `start >= stop` reads nothing.
      invalid: queries that read nothing, and of which NaN comes out.
      ids: the table.
      lengths: sizes. A query's segments get equally many blocks, but for the last.
    """
    num_queries, num_splits, num_cores = start.shape[0], lengths.num_splits, lengths.num_cores
    # Blocks are counted from the page of the first token.
    skipped = start // lengths.page_size
    start, stop = (x - skipped * lengths.page_size for x in (start, stop))
    num_blocks = jnp.where(start < stop, -(-stop // lengths.block_tokens), 0)
    first, end = _segments(num_blocks, num_splits)
    after = jnp.cumsum(end - first, dtype=jnp.int32)
    before = after - (end - first)
    # Of the flat list, each core has `[low, high)`.
    share = -(-after[-1] // num_cores)
    low = jnp.minimum(share * jnp.arange(num_cores, dtype=jnp.int32), after[-1])[:, None]
    high = jnp.minimum(low + share, after[-1])
    held = jnp.maximum(before, low) < jnp.minimum(after, high)
    num_steps, step_blocks = lengths.num_steps(num_queries), lengths.sizes.step_blocks
    shape = (num_cores, step_blocks, num_steps)
    step, place = (jnp.arange(n, dtype=jnp.int32) for n in (num_steps, step_blocks))
    index = low + (step * step_blocks + place[:, None]).reshape(-1)
    pick = _picker(jnp.minimum(index, high - 1), before, after)
    segment = pick(jnp.arange(num_queries * num_splits, dtype=jnp.int32))
    block = jnp.minimum(index, high - 1) + pick(first - before)
    of_query = lambda values: pick(jnp.repeat(values, num_splits))
    start, stop = (of_query(x) - block * lengths.block_tokens for x in (start, stop))
    pages = jnp.clip(-(-stop // lengths.page_size), 0, lengths.sizes.block_pages)
    there = index < high
    num_pages = jnp.where(there, pages, 0)
    first_page = of_query(skipped) + block * lengths.sizes.block_pages
    step_pages = num_pages.reshape(shape).sum(axis=1, keepdims=True, dtype=jnp.int32)
    if lengths.sizes.run_pages > 1:
        query = jnp.arange(num_queries, dtype=jnp.int32)
        its_blocks = (of_query(query), first_page, num_pages, lengths.sizes.run_pages)
        in_runs = _in_runs(ids[row], skipped, *its_blocks).reshape(shape)
        step_pages += jnp.where(in_runs.all(axis=1, keepdims=True), _IN_RUNS, 0)
    fields = Block(
        start=jnp.where(there, jnp.maximum(start, 0), 0),
        stop=jnp.where(there, stop, 0),
        num_pages=num_pages,
        row=of_query(row),
        first_page=first_page,
        begins=(there & (index == jnp.maximum(pick(before), low))).astype(jnp.int32),
        segment=segment,
        step_pages=jnp.broadcast_to(step_pages, shape),
    )
    blocks = jnp.stack([x.reshape(shape) for x in fields], axis=1)
    return Schedule(blocks, (high - low)[:, 0], *_vacant(held, jnp.repeat(invalid, num_splits)))


def _in_runs(
    ids: jax.Array,
    skipped: jax.Array,
    query: jax.Array,
    first_page: jax.Array,
    num_pages: jax.Array,
    run_pages: int,
) -> jax.Array:
    """Whether the ids of each block's pages follow each other, within each whole run of them.

    Args:
      ids: `[queries, max_pages]`, each query's row of the table.
      skipped: `[queries]`, pages before each query's first block, with which its runs begin.
      query, first_page, num_pages: of each block.
      run_pages: pages of a run.
    """
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)
    follows = jnp.pad(ids[:, 1:] == ids[:, :-1] + 1, ((0, 0), (1, 0)))
    begins = (column - skipped[:, None]) % run_pages == 0
    breaks = jnp.cumsum(~(follows | begins), axis=1, dtype=jnp.int32)
    breaks = jnp.pad(breaks, ((0, 0), (1, 0)))  # before each column
    first = query * breaks.shape[1] + first_page
    before = lambda column: breaks.reshape(-1).at[column].get(mode="clip")
    return before(first) == before(first + (num_pages & -run_pages))


def _vacant(
    held: Bool[Array, "num_cores segments"], invalid: Bool[Array, " segments"]
) -> tuple[jax.Array, jax.Array]:
    """The segments that a core has no blocks of, moved to the left, and how many they are."""
    segment = jnp.arange(held.shape[1], dtype=jnp.int32)
    one = (~held).astype(jnp.int32)[:, None]
    after = jnp.cumsum(one, axis=-1, dtype=jnp.int32)
    pick = _picker(segment[None], after - one, after)
    return pick(jnp.where(invalid, ~segment, segment)), after[:, 0, -1]


def vacancy(entry: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The segment that an entry of `vacant` is, and whether its query is invalid."""
    return jnp.where(entry < 0, ~entry, entry), entry < 0


def _segments(num_blocks: jax.Array, num_splits: int) -> tuple[jax.Array, jax.Array]:
    """Each segment's blocks of its query, `[first, end)`."""
    most = num_blocks[:, None]
    split = jnp.arange(num_splits + 1, dtype=jnp.int32)
    bounds = jnp.minimum(split * -(-most // num_splits), most)
    return bounds[:, :-1].reshape(-1), bounds[:, 1:].reshape(-1)


def _picker(index: jax.Array, before: jax.Array, after: jax.Array):
    """A function that takes, for each place of the list, a value of the segment that it is of."""
    if index.size * before.size <= _FEW_PAIRS:
        own = (before <= index[..., None]) & (index[..., None] < after)
        return lambda values: jnp.sum(jnp.where(own, values, 0), axis=-1, dtype=jnp.int32)
    # A count and not a search, whose sort or loop takes a TPU's compiler minutes.
    segment = jnp.sum(after <= index[..., None], axis=-1, dtype=jnp.int32)
    return lambda values: values.at[segment].get(mode="clip")
