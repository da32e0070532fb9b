"""Checks of values, on the host: what compiled code can only answer with NaN or a dropped token."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from .arguments import instance, integer, shown
from .array_checks import rank
from .options import Mask


def validate_step(
    context_lens: Int[np.ndarray, " num_seqs"] | Any,
    block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
    query_lens: Int[np.ndarray, " num_seqs"] | Any | None = None,
    *,
    num_pages: int,
    page_size: int,
    num_queries: int | None = None,
    num_seq_shards: int = 1,
    window: int | None = None,
    chunk: int | None = None,
    causal: bool = True,
    max_context_len: int | None = None,
    allow_shared: bool = False,
) -> None:
    """Checks on the host what the plan of a step can only answer with NaN, and who shares pages.

    Only the entries of the tables that a query of the step sees are looked at. Of these, a page
    that the step writes to must be no other sequence's: one request's tokens would be another's.
    What a page of the allocator's is, `PageAllocator.validate_tables` knows.

    Args:
      context_lens: `[num_seqs]` integers, tokens of each sequence, the step's own included.
      block_tables: `[num_seqs, max_blocks]` integers, global page ids.
      query_lens: `[num_seqs]` integers, new tokens of each sequence; None for one each, or none
        where `context_len` is 0.
      num_pages: pages of the whole cache, over all devices.
      page_size: tokens per page.
      num_queries: rows of the query array, over all shards; None does not ask whether there is
        room.
      num_seq_shards: shards of the mesh axis that splits sequences; sequence and pages must
        belong to the same one.
      window, chunk, causal, max_context_len: as passed to `make_plan`.
      allow_shared: sequences may read one page, as after `PageAllocator.fork`.

    Raises:
      ValueError: naming the sequence, the value, the rule that it breaks and the way out.
    """
    mask = Mask(window, chunk, causal, max_context_len)
    instance("allow_shared", allow_shared, bool, "True or False")
    shards = _Shards(num_pages, num_seq_shards)
    needed = _needed(context_lens, block_tables, query_lens, mask, page_size, shards, num_queries)
    _check_sharing(needed, page_size, allow_shared)


def validate_tables(
    context_lens: Int[np.ndarray, " num_seqs"] | Any,
    block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
    *,
    num_pages: int,
    page_size: int,
    num_seq_shards: int = 1,
    max_context_len: int | None = None,
    sliding_window: int | None = None,
) -> None:
    """Checks on the host what `page_attention` can only answer with NaN.

    `validate_step` is the same for steps of `make_plan`, and also sees pages of two sequences.

    Args:
      context_lens: tokens per sequence, `[num_seqs]`, integers.
      block_tables: global page ids, `[num_seqs, max_blocks]`, integers. Only the entries that
        `page_attention` would look up with the same options are checked.
      num_pages: pages of the whole cache, over all devices.
      page_size: tokens per page.
      num_seq_shards: shards of the mesh axis that splits sequences; sequence and pages must
        belong to the same one.
      max_context_len, sliding_window: as passed to `page_attention`.

    Raises:
      ValueError: naming the sequence, the entry, its value and the rule that it breaks.
    """
    if sliding_window is not None:
        integer("sliding_window", sliding_window, "tokens, or None")
    mask = Mask(sliding_window, max_context_len=max_context_len)
    shards = _Shards(num_pages, num_seq_shards)
    _needed(context_lens, block_tables, None, mask, page_size, shards)


def validate_writes(
    seq_ids: Int[np.ndarray, " num_tokens"] | Any,
    positions: Int[np.ndarray, " num_tokens"] | Any,
    block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
    *,
    num_pages: int,
    page_size: int,
    num_seq_shards: int = 1,
) -> None:
    """Finds on the host the tokens that `write_kv` would drop, other than those with -1.

    Args:
      seq_ids, positions: `[num_tokens]` integers, as passed to `write_kv`; -1 is skipped.
      block_tables: `[num_seqs, max_blocks]` integers, global page ids.
      num_pages: pages of the whole cache, over all devices.
      page_size: tokens per page.
      num_seq_shards: shards of the mesh axis that splits sequences.

    Raises:
      ValueError: naming the token, its sequence and position, and the rule that it breaks.
    """
    seq_ids = integers("seq_ids", seq_ids, "[num_tokens]")
    positions = integers("positions", positions, "[num_tokens]")
    tables = integers("block_tables", block_tables, "[num_seqs, max_blocks]")
    (num_tokens,), (num_seqs, max_blocks) = seq_ids.shape, tables.shape
    if len(positions) != num_tokens:
        raise ValueError(f"positions has {len(positions)} entries, seq_ids {num_tokens}")
    integer("page_size", page_size)
    shards = _Shards(num_pages, num_seq_shards)
    shards.check_divides(num_seqs=num_seqs, num_tokens=num_tokens)
    for token, (seq, position) in enumerate(zip(seq_ids.tolist(), positions.tolist(), strict=True)):
        if seq == -1:
            continue
        where = f"token {token} (sequence {seq}, position {position})"
        if not 0 <= seq < num_seqs:
            raise ValueError(f"{where}: seq_ids must be -1 or in [0, {num_seqs})")
        if not 0 <= position < max_blocks * page_size:
            raise ValueError(
                f"{where}: the table holds positions in [0, {max_blocks * page_size}), "
                f"{max_blocks} blocks of {page_size} tokens"
            )
        shard = seq // (num_seqs // num_seq_shards)
        part = token // (num_tokens // num_seq_shards)
        if shard != part:
            raise ValueError(
                f"{where}: the token lies in part {part} of {num_seq_shards}, its sequence in "
                f"{shard}; tokens are split over devices like sequences: move it there"
            )
        shards.check_page(where, int(tables[seq, position // page_size]), shard)


class _Needed(NamedTuple):
    """The entries of a row that a step's queries see."""

    seq: int
    first_entry: int
    first_written: int  # the entry from which on the step writes
    pages: np.ndarray


def _needed(
    context_lens: Any,
    block_tables: Any,
    query_lens: Any,
    mask: Mask,
    page_size: int,
    shards: "_Shards",
    num_queries: int | None = None,
) -> list[_Needed]:
    """Finds what each row's queries see, and checks lengths, room and page ids."""
    lens = integers("context_lens", context_lens, "[num_seqs]")
    tables = integers("block_tables", block_tables, "[num_seqs, max_blocks]")
    num_seqs, max_blocks = tables.shape
    new = np.minimum(lens, 1)
    if query_lens is not None:
        new = integers("query_lens", query_lens, "[num_seqs]")
    for name, array in (("context_lens", lens), ("query_lens", new)):
        if array.shape != (num_seqs,):
            raise ValueError(f"{name} has {array.shape[0]} entries, block_tables {num_seqs} rows")
    integer("page_size", page_size)
    shards.check_divides(num_seqs=num_seqs)
    if query_lens is not None and num_queries is not None:
        shards.check_divides(num_queries=num_queries)
        shards.check_room(new, num_queries)
    capacity = max_blocks * page_size
    limit = min(capacity, mask.max_context_len or capacity)
    bound = "max_context_len" if limit < capacity else "its table's capacity"
    found = []
    for seq, (length, count) in enumerate(zip(lens.tolist(), new.tolist(), strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(
                f"sequence {seq}: context_len {length} must be in [0, {limit}], {bound} "
                f"({max_blocks} blocks of {page_size} tokens)"
            )
        if not 0 <= count <= length:
            raise ValueError(
                f"sequence {seq}: query_len {count} must be in [0, {length}], its context_len, "
                "which counts the new tokens: add them to it"
            )
        if not count:
            continue
        first_new = length - count
        first = max(0, first_new + 1 - (mask.window or length))
        if mask.chunk is not None:
            first = max(first, first_new // mask.chunk * mask.chunk)
        first_entry = first // page_size
        pages = tables[seq, first_entry : -(-length // page_size)]
        shards.check_pages(seq, first_entry, pages, num_seqs)
        found.append(_Needed(seq, first_entry, first_new // page_size, pages))
    return found


def _check_sharing(needed: list[_Needed], page_size: int, allow_shared: bool) -> None:
    """Checks that no page is twice in a row, and none that is written in two."""
    if not needed:
        return
    page = np.concatenate([row.pages for row in needed])
    seq = np.concatenate([np.full(len(row.pages), row.seq) for row in needed])
    entry = np.concatenate([row.first_entry + np.arange(len(row.pages)) for row in needed])
    written = entry >= np.repeat([r.first_written for r in needed], [len(r.pages) for r in needed])
    # Uses of one page side by side; each use that is wrong makes a pair with one beside it.
    order = np.argsort(page, kind="stable")
    pairs = np.flatnonzero(page[order][1:] == page[order][:-1])
    one, other = order[pairs], order[pairs + 1]
    in_one_row, is_written = seq[one] == seq[other], written[one] | written[other]
    wrong = np.flatnonzero(in_one_row | is_written | (not allow_shared))
    if not wrong.size:
        return
    one, other = int(one[wrong[0]]), int(other[wrong[0]])
    if seq[one] == seq[other]:
        raise ValueError(
            f"sequence {seq[one]}: page id {page[one]} stands in entries {entry[one]} and "
            f"{entry[other]}; a page holds {page_size} consecutive tokens: give each entry its own"
        )
    where = (
        f"page id {page[one]} is of two sequences: {seq[one]}, entry {entry[one]}, and "
        f"{seq[other]}, entry {entry[other]}"
    )
    if is_written[wrong[0]]:
        writer = seq[one] if written[one] else seq[other]
        raise ValueError(
            f"{where}; sequence {writer} writes to it, and the other would read that: give each a "
            "page of its own and copy what they share (PageAllocator.fork says which page)"
        )
    raise ValueError(
        f"{where}; give each its own, or pass allow_shared=True if one was forked from the other"
    )


@dataclasses.dataclass(frozen=True)
class _Shards:
    """How sequences, and the pages that they may use, split."""

    num_pages: int
    num_seq_shards: int

    def __post_init__(self):
        integer("num_seq_shards", self.num_seq_shards)

    def check_divides(self, **counts: int) -> None:
        """Checks that each of these, and the pages, split evenly over the shards."""
        for name, count in (counts | {"num_pages": self.num_pages}).items():
            if integer(name, count, least=0) % self.num_seq_shards:
                raise ValueError(
                    f"{name}={count} must be divisible by num_seq_shards={self.num_seq_shards}"
                )

    def check_room(self, query_lens: np.ndarray, num_queries: int) -> None:
        """Checks that the new tokens of each shard's sequences fit its part of the queries."""
        room = num_queries // self.num_seq_shards
        # As the plan counts: a length that is impossible takes no more room than there is.
        counts = np.clip(query_lens, 0, room + 1).astype(np.int64)
        ends = counts.reshape(self.num_seq_shards, -1).cumsum(axis=1)
        if (ends > room).any():
            shard, row = (int(x[0]) for x in np.nonzero(ends > room))
            seq, most = shard * ends.shape[1] + row, int(ends.max()) * self.num_seq_shards
            raise ValueError(
                f"sequence {seq}: its {query_lens[seq]} new tokens end at row {ends[shard, row]} "
                f"of the {room} of shard {shard} of {self.num_seq_shards}; {num_queries=} must be "
                f"at least {most}, or some tokens wait for the next step"
            )

    def check_pages(self, seq: int, first_entry: int, pages: np.ndarray, num_seqs: int) -> None:
        """Checks the entries of a row from `first_entry` on."""
        shard = seq // (num_seqs // self.num_seq_shards)
        first, stop = self._pages_of(shard)
        bad = np.flatnonzero((pages < first) | (pages >= stop))
        if bad.size:
            where = f"sequence {seq}, entry {first_entry + int(bad[0])}"
            self.check_page(where, int(pages[bad[0]]), shard, "its ")

    def check_page(self, where: str, page: int, shard: int, whose: str = "") -> None:
        """Checks that a page is one of a shard's."""
        first, stop = self._pages_of(shard)
        if not first <= page < stop:
            raise ValueError(
                f"{where}: page id {page} must be in [{first}, {stop}), the pages of {whose}shard "
                f"{shard} of {self.num_seq_shards}; num_pages={self.num_pages}"
            )

    def _pages_of(self, shard: int) -> tuple[int, int]:
        count = self.num_pages // self.num_seq_shards
        return shard * count, (shard + 1) * count


def integers(name: str, values: Any, dims: str) -> np.ndarray:
    """The values, of an array or of lists, as an array of integers with these axes."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} must be {dims}; got {shown(values)}: {error}") from None
    rank(name, array, dims)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers; got {array.dtype}")
    return array
