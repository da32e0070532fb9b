"""The plan of a step: what each query token reads and each new token's slot, on this device.

Causal order, windows, chunks, bad tables and the split of pages over devices end here: a backend
knows intervals of pages, and nothing of where they come from.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .cache import PagedKVCache
from .options import Mask, Tuning
from .page_format import PageFormat
from .shard_layout import Split
from .tables import PageRange, Tokens, from_column, look_up, within

# Up to this many ordered entries are searched by looking at all of them.
_FEW = 1024


class Reads(NamedTuple):
    """The tokens that each query reads: an interval of one row's pages that this device holds.

    Tokens are numbered through a row's pages: token 0 is the first slot of `ids[row, 0]`. A query
    reads the tokens `[start, stop)`, none where `start == stop`. Rows never fall from one query to
    the next, nor do `start` and `stop` among those of a row. Entries of `ids` whose tokens no query
    reads are arbitrary and are never looked up.
    """

    ids: Int[Array, "rows pages"]  # local, those that this device holds moved to the left
    row: Int[Array, " queries"] | None  # None where query `i` reads row `i`, as in decoding
    start: Int[Array, " queries"]
    stop: Int[Array, " queries"]
    invalid: Bool[Array, " queries"] | None = None  # they read nothing, and NaN comes out of them

    def ids_by_query(self) -> Int[Array, "queries pages"]:
        """The page ids of each query."""
        return self.ids if self.row is None else self.ids.at[self.row].get(mode="clip")

    def invalid_in(self, cache: PagedKVCache) -> Bool[Array, " queries"] | None:
        """The invalid queries; all, where the cache's layer is none that there is."""
        if cache.layer is None:
            return self.invalid
        missing = jnp.broadcast_to(cache.first_page < 0, self.start.shape)
        return missing if self.invalid is None else self.invalid | missing


class Writes(NamedTuple):
    """Where each new token goes; `page == num_pages` drops it."""

    page: Int[Array, " tokens"]
    slot: Int[Array, " tokens"]


class Queries(NamedTuple):
    """Whose each query token is, and where: the last tokens of each sequence, one after another."""

    row: Int[Array, " queries"] | None  # `num_seqs` of padding
    position: Int[Array, " queries"]  # -1 of padding, and of an empty sequence
    invalid: Bool[Array, " queries"]  # whose sequence has a bad table or length


@dataclasses.dataclass(frozen=True)
class MadeFor:
    """What a plan holds for. Hashable: static under `jax.jit`."""

    page_format: PageFormat
    num_pages: int
    num_heads: int
    tuning: Tuning
    split: Split | None

    @property
    def here(self) -> "MadeFor":
        """The same of one device's part."""
        if self.split is None:
            return self
        shards = self.split.shards
        num_kv_heads = self.page_format.num_kv_heads // shards.heads
        return dataclasses.replace(
            self,
            page_format=dataclasses.replace(self.page_format, num_kv_heads=num_kv_heads),
            num_pages=self.num_pages // shards.pages,
            num_heads=self.num_heads // shards.heads,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from a step's lengths and tables alone, once for all layers. A pytree.

    Made by `make_plan`. On a mesh, what only one device knows stands one device's after the other's
    along first axes, split as pages are, so a plan never moves.

    Attributes:
      positions: `[num_queries]` int32, each query token's position in its sequence, from 0; -1 of
        padding. What rotary embeddings need.
      invalid: `[num_queries]`, queries whose sequence has a bad table or length: NaN comes out.
      reads: what each query reads of a device's pages, and the backend's order of that work.
      writes: where each new token goes, likewise.
      made_for: the cache and the call that the plan holds for; static.
    """

    positions: Any
    invalid: Any
    reads: tuple[Reads, Any]
    writes: tuple[Writes, Any]
    made_for: MadeFor = dataclasses.field(metadata={"static": True})


def plan_reads(
    context_lens: Int[Array, " num_seqs"],
    query_lens: Int[Array, " num_seqs"] | None,
    num_queries: int,
    block_tables: Int[Array, "num_seqs max_blocks"],
    page_size: int,
    pages: PageRange,
    mask: Mask,
    *,
    piece: int | None = None,
    aligned: bool = False,
) -> tuple[Reads, Queries]:
    """Plans what this device's queries read.

    A sequence is invalid, and reads nothing, if its context is negative, longer than
    `max_context_len` or than its table, shorter than its queries, if these are more than there is
    room for, or if an entry that one of them needs is not a page that its `seqs` shard holds. All
    devices that share a sequence come to the same verdict, without communication.

    Args:
      query_lens: new tokens of each sequence; None for one each.
      num_queries: rows of the query array; what the sequences leave of it is padding.
      piece: wider tables are looked up that many columns at a time; None looks at all at once.
      aligned: keep a row's pages where they are in its table, also where a mask needs few of them.
    """
    limit = block_tables.shape[1] * page_size
    if mask.max_context_len is not None:
        limit = min(limit, mask.max_context_len)
        block_tables = block_tables[:, : -(-limit // page_size)]
    bad = (context_lens < 0) | (context_lens > limit)
    row, of_query, most_queries = None, lambda array: array, 1
    if query_lens is None:
        position = jnp.where(bad, -1, context_lens - 1)
        tokens = needed = _seen(position, jnp.where(bad, 0, context_lens), mask)
    else:
        row, position, fits = _locate(context_lens, query_lens, num_queries)
        bad |= ~fits
        of_query = lambda array: array.at[row].get(mode="clip")
        position = jnp.where(of_query(bad), -1, position)
        lens = jnp.where(bad | (query_lens == 0), 0, context_lens)
        tokens = _seen(position, of_query(lens), mask)
        first, last = (_seen(at, lens, mask) for at in (lens - query_lens, lens - 1))
        needed = _if_any(Tokens(first.start, last.stop))
        most_queries = num_queries
    kept = block_tables.shape[1]
    if mask.span is not None and not aligned:  # the pages that a row can need at most
        kept = -(-(mask.span + most_queries - 2) // page_size) + 1
    if kept < block_tables.shape[1]:  # from here on, tables and tokens begin with the first of them
        skipped = needed.start // page_size
        block_tables = from_column(block_tables, skipped, kept)
        tokens = _less(tokens, page_size * of_query(skipped))
        needed = _less(needed, page_size * skipped)
    piece = piece or block_tables.shape[1]
    found = look_up(needed, row, tokens, block_tables, page_size, pages, piece)
    bad |= found.bad
    invalid = bad if row is None else of_query(bad) & (row < len(bad))
    start, stop = (jnp.where(invalid, 0, x) for x in found.tokens)
    position = jnp.where(invalid, -1, position)
    return Reads(found.ids, row, start, stop, invalid), Queries(row, position, invalid)


def _locate(
    context_lens: jax.Array, query_lens: jax.Array, num_queries: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each query's row and position, and which rows' lengths are possible and have room."""
    end = jnp.cumsum(jnp.clip(query_lens, 0, num_queries + 1), dtype=jnp.int32)
    index = jnp.arange(num_queries, dtype=jnp.int32)
    row = rank(end, index, "right")
    at = lambda array: array.at[row].get(mode="clip")
    position = jnp.where(row < len(end), at(context_lens) - at(end) + index, -1)
    fits = (query_lens >= 0) & (query_lens <= context_lens) & (end <= num_queries)
    return row, position, fits


def _seen(position: jax.Array, context_len: jax.Array, mask: Mask) -> Tokens:
    """What a token at this position sees of its sequence."""
    start = jnp.zeros_like(position)
    stop = position + 1 if mask.causal else context_len
    if mask.window is not None:
        start = jnp.maximum(start, position + 1 - mask.window)
    if mask.chunk is not None:
        chunk = position // mask.chunk * mask.chunk
        start = jnp.maximum(start, chunk)
        stop = chunk + jnp.minimum(mask.chunk, stop - chunk)
    return _if_any(Tokens(start, jnp.where(position < 0, 0, stop)))


def _if_any(tokens: Tokens) -> Tokens:
    """Empty intervals as `[0, 0)`."""
    some = tokens.start < tokens.stop
    return Tokens(*(jnp.where(some, x, 0) for x in tokens))


def _less(tokens: Tokens, first: jax.Array) -> Tokens:
    return _if_any(Tokens(tokens.start - first, tokens.stop - first))


def rank(
    ordered: Int[Array, " entries"], values: Int[Array, "..."], side: Literal["left", "right"]
) -> Int[Array, "..."]:
    """How many entries of an ordered array are below each value ("right": or equal to it)."""
    if ordered.shape[0] > _FEW:
        return jnp.searchsorted(ordered, values, side=side, method="scan_unrolled")
    # One fused reduction, where a search is many small steps.
    below = ordered <= values[..., None] if side == "right" else ordered < values[..., None]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)


def plan_writes(
    row: Int[Array, " tokens"],
    positions: Int[Array, " tokens"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    page_size: int,
    pages: PageRange,
) -> Writes:
    """Finds each new token's slot among the pages of this device; the others are dropped."""
    num_rows, max_blocks = block_tables.shape
    block, slot = positions // page_size, positions % page_size
    inside = (row >= 0) & (row < num_rows) & (block >= 0) & (block < max_blocks)
    page = block_tables.at[row, block].get(mode="clip") - pages.first
    held = inside & within(page, 0, pages.num_pages)
    return Writes(jnp.where(held, page, pages.num_pages), slot)
