"""`PageAllocator`: who owns which page of the cache. Host side, plain Python, deterministic."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from .arguments import INT32_MAX, choice, hashable, instance, integer
from .page_pool import PagePool
from .table_checks import integers

_RUN_TOKENS = 64

Placement = Literal["round_robin", "contiguous"]


class OutOfPages(RuntimeError):
    """A request needs `asked` more pages, and only `free` are free on its `seq_shard`.

    The allocator is as it was before the request.
    """

    def __init__(self, asked: int, free: int, total: int, seq_shard: int, seq_id: Hashable):
        super().__init__(
            f"sequence {seq_id!r} needs {asked} more pages, and {free} of the {total} pages of "
            f"seqs shard {seq_shard} are free; free other sequences of that shard, allocate in "
            "another seq_shard, or make the cache with more pages"
        )
        self.asked, self.free, self.seq_shard = asked, free, seq_shard


@dataclass(frozen=True)
class CopyPage:
    """A page whose content the caller must copy, in every layer, before writing to `target`."""

    source: int
    target: int


class PageAllocator:
    """Hands out the pages of a cache to sequences, and takes them back.

    Page ids are global. A cache of `num_pages` pages is split into one contiguous range per page
    shard, `seq_shard * num_context_shards + context_shard`, as `ShardLayout` splits the cache over
    a mesh. A sequence has pages of one seqs shard only, and that must be the one that its row of
    the block table is on: row `r` of `n` is on shard `r // (n / num_seq_shards)`.

    Within it, `placement` says on which context shard each block (page of the sequence) should
    be, so that all devices have their share of the work:

    - "round_robin": the shard after that of the block before; the first block is on the shard
      with the most free pages. Work is even at every length.
    - "contiguous": block `j` on shard `j // ceil(max_blocks / num_context_shards)`.

    Placement is a preference. Where the preferred pool is empty, the one with the most free pages
    takes its turn, so requests fail only when their whole seqs shard is out of pages. Attention
    is exact for any placement.

    A page with room left belongs to one sequence; full pages can be shared by `fork`, and return
    to their pool when the last owner is freed. A sequence's pages of a pool follow each other in
    runs of 64 tokens, so that small pages of few KV heads arrive on a TPU in fewer, larger copies.
    A run begins in the lowest place that is wholly free; where there is none, the lowest free page
    goes, so that no page is kept back, and runs break in a pool that is nearly full. The same
    calls give the same pages. Every operation costs O(log num_pages) per page, and one that
    raises changes nothing. Not thread-safe.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_seq_shards: int = 1,
        num_context_shards: int = 1,
        placement: Placement = "round_robin",
        max_blocks: int | None = None,
    ):
        """Makes an allocator of a cache whose pages are all free.

        Args:
          num_pages: pages of the whole cache, over all shards.
          page_size: tokens per page.
          num_seq_shards: size of the mesh axes that split sequences.
          num_context_shards: size of the mesh axes that split the context.
          placement: "round_robin" or "contiguous", see above.
          max_blocks: the most pages a sequence may have: the width of `block_tables`. Needed by
            "contiguous"; None is no limit.

        Raises:
          ValueError: if a number is not positive, `num_pages` does not divide over the shards,
            or `placement` is unknown or lacks `max_blocks`.
        """
        self.num_pages = integer("num_pages", num_pages)
        self.page_size = integer("page_size", page_size)
        self.num_seq_shards = integer("num_seq_shards", num_seq_shards)
        self.num_context_shards = integer("num_context_shards", num_context_shards)
        self.max_blocks = None if max_blocks is None else self._check_width(max_blocks)
        self.placement = placement
        choice("placement", placement, get_args(Placement))
        if placement == "contiguous" and num_context_shards > 1 and max_blocks is None:
            raise ValueError(
                "placement='contiguous' gives each context shard a range of "
                "ceil(max_blocks / num_context_shards) blocks: say max_blocks, or use "
                "placement='round_robin'"
            )
        num_page_shards = num_seq_shards * num_context_shards
        if num_pages % num_page_shards:
            raise ValueError(
                f"{num_pages=} must be divisible by the {num_page_shards} page shards "
                f"({num_seq_shards=} times {num_context_shards=}); use "
                f"{-(-num_pages // num_page_shards) * num_page_shards}"
            )
        self._pages_per_shard = num_pages // num_page_shards
        firsts = range(0, num_pages, self._pages_per_shard)
        run = max(1, _RUN_TOKENS // self.page_size)
        self._pools = [PagePool(first, self._pages_per_shard, run) for first in firsts]
        self._refcounts: dict[int, int] = {}
        self._sequences: dict[Hashable, _Sequence] = {}

    def allocate(self, seq_id: Hashable, num_tokens: int, seq_shard: int = 0) -> list[int]:
        """Starts a sequence with pages for `num_tokens` tokens (0: none yet).

        Args:
          seq_id: any hashable name except None, which `block_tables` keeps for empty rows.
          num_tokens: how many it will hold.
          seq_shard: the shard of sequences whose pages it gets.

        Returns:
          Its pages, global ids in the order of its tokens.

        Raises:
          OutOfPages: if too few pages are free.
          ValueError: if the sequence exists, or an argument is out of range.
        """
        self._check_new("seq_id", seq_id)
        num_tokens = integer("num_tokens", num_tokens, least=0)
        seq_shard = self._check_index("seq_shard", seq_shard, self.num_seq_shards)
        free = [len(pool) for pool in self._pools_of(seq_shard)]
        sequence = _Sequence(seq_shard, free.index(max(free)))
        self._grow(seq_id, sequence, num_tokens)
        self._sequences[seq_id] = sequence
        return list(sequence.pages)

    def extend(self, seq_id: Hashable, num_tokens: int) -> list[int]:
        """Grows a sequence to hold `num_tokens` more tokens.

        Returns:
          The pages that it got for them: often none, as its last page has room.

        Raises:
          OutOfPages: if too few pages are free.
          ValueError: if the sequence is unknown, `num_tokens` is negative, or the sequence would
            have more than `max_blocks` pages.
        """
        return self._grow(seq_id, self._get(seq_id), integer("num_tokens", num_tokens, least=0))

    def free(self, seq_id: Hashable) -> None:
        """Ends a sequence; pages that no other sequence shares are free again.

        Raises:
          ValueError: if the sequence is unknown, e.g. freed before.
        """
        for page in self._get(seq_id).pages:
            self._refcounts[page] -= 1
            if not self._refcounts[page]:
                del self._refcounts[page]
                self._pools[page // self._pages_per_shard].give(page)
        del self._sequences[seq_id]

    def fork(
        self, parent: Hashable, child: Hashable, num_tokens: int | None = None
    ) -> CopyPage | None:
        """Starts a sequence that holds the first tokens of another, sharing its full pages.

        For sampling several continuations of a prompt, beams, or a common prefix.

        Args:
          parent: the sequence to share with; it stays as it is, and may be freed at any time.
          child: the new sequence, on the same seqs shard.
          num_tokens: how many of the parent's tokens; None is all of them.

        Returns:
          None if the tokens end with a page. Otherwise the child has a page of its own for the
          last of them: copy `source` to `target` before either sequence goes on.

        Raises:
          OutOfPages: if a page for that is needed and none is free.
          ValueError: if the parent is unknown or shorter, or the child exists.
        """
        original = self._get(parent, "parent")
        self._check_new("child", child)
        if num_tokens is None:
            num_tokens = original.num_tokens
        elif integer("num_tokens", num_tokens, least=0) > original.num_tokens:
            raise ValueError(
                f"cannot fork the first {num_tokens=} of sequence {parent!r}, which has "
                f"{original.num_tokens}; use at most that"
            )
        num_shared, num_tail = divmod(num_tokens, self.page_size)
        shared, num_tokens = original.pages[:num_shared], num_shared * self.page_size
        copy = _Sequence(original.seq_shard, original.offset, num_tokens, list(shared))
        new_pages = self._grow(child, copy, num_tail)
        for page in shared:
            self._refcounts[page] += 1
        self._sequences[child] = copy
        return CopyPage(original.pages[num_shared], new_pages[0]) if new_pages else None

    def block_tables(
        self, seq_ids: Sequence[Hashable | None], max_blocks: int | None = None
    ) -> np.ndarray:
        """The block tables of some sequences, as `page_attention` takes them.

        Args:
          seq_ids: the sequence of each row, a list or the like; None is an empty row.
          max_blocks: width of the tables; by default the allocator's, or else that of the longest
            of these sequences.

        Returns:
          [len(seq_ids), max_blocks] int32 page ids, -1 past a sequence's last page.

        Raises:
          ValueError: if a sequence is unknown or has more pages than the table is wide.
        """
        rows = [sequence.pages if sequence else [] for sequence in self._rows(seq_ids)]
        width = self.max_blocks if max_blocks is None else self._check_width(max_blocks)
        if width is None:
            width = max((len(row) for row in rows), default=0) or 1
        tables = np.full((len(rows), width), -1, np.int32)
        for seq_id, table, row in zip(seq_ids, tables, rows, strict=True):
            if len(row) > width:
                raise ValueError(
                    f"sequence {seq_id!r} has {len(row)} pages, which do not fit a table with "
                    f"max_blocks={width}; use max_blocks={len(row)}"
                )
            table[: len(row)] = row
        return tables

    def context_lens(self, seq_ids: Sequence[Hashable | None]) -> np.ndarray:
        """[len(seq_ids)] int32: the tokens that each sequence holds; None gives 0."""
        lens = [sequence.num_tokens if sequence else 0 for sequence in self._rows(seq_ids)]
        return np.array(lens, np.int32)

    def validate_tables(
        self,
        seq_ids: Sequence[Hashable | None],
        block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
        context_lens: Int[np.ndarray, " num_seqs"] | Any | None = None,
        query_lens: Int[np.ndarray, " num_seqs"] | Any | None = None,
    ) -> None:
        """Checks that each row's entries are its own sequence's pages, in their places.

        Args:
          seq_ids: the sequence of each row; None is an empty row.
          block_tables: `[num_seqs, max_blocks]` integers. Entries at or past
            `ceil(context_len / page_size)` are not looked at.
          context_lens: `[num_seqs]` integers; None for all tokens that each sequence holds.
          query_lens: `[num_seqs]` integers, how many of these, the last ones, the step writes:
            their pages must be shared with no other sequence. None for no such check.

        Raises:
          ValueError: naming the row, the entry, its page, and what should stand there.
        """
        rows, shape = self._rows(seq_ids), (len(seq_ids),)
        tables = integers("block_tables", block_tables, "[num_seqs, max_blocks]")
        lens = self.context_lens(seq_ids) if context_lens is None else context_lens
        lens = integers("context_lens", lens, "[num_seqs]")
        new = np.zeros(shape, int) if query_lens is None else query_lens
        new = integers("query_lens", new, "[num_seqs]")
        arrays = {"block_tables": tables, "context_lens": lens, "query_lens": new}
        for name, array in arrays.items():
            if array.shape[:1] != shape:
                raise ValueError(f"{name} has {len(array)} rows for {len(seq_ids)} seq_ids")
        for row, sequence in enumerate(rows):
            self._check_row(row, seq_ids[row], sequence, tables[row], int(lens[row]), int(new[row]))

    def pages(self, seq_id: Hashable) -> list[int]:
        """The pages of a sequence, global ids in the order of its tokens."""
        return list(self._get(seq_id).pages)

    def num_tokens(self, seq_id: Hashable) -> int:
        """How many tokens a sequence holds. Its last page may have room for more."""
        return self._get(seq_id).num_tokens

    def seq_shard(self, seq_id: Hashable) -> int:
        """The shard of sequences that a sequence is on."""
        return self._get(seq_id).seq_shard

    def refcount(self, page: int) -> int:
        """How many sequences have a page; 0 if it is free."""
        return self._refcounts.get(self._check_index("page", page, self.num_pages), 0)

    def num_free(self, seq_shard: int | None = None, context_shard: int | None = None) -> int:
        """Free pages: of all shards, of one seqs shard, of one context shard, or of one pool."""
        if seq_shard is not None:
            self._check_index("seq_shard", seq_shard, self.num_seq_shards)
        if context_shard is not None:
            self._check_index("context_shard", context_shard, self.num_context_shards)
        return sum(
            len(pool)
            for shard, pool in enumerate(self._pools)
            if seq_shard in (None, shard // self.num_context_shards)
            and context_shard in (None, shard % self.num_context_shards)
        )

    @property
    def seq_ids(self) -> list[Hashable]:
        """The sequences there are, oldest first."""
        return list(self._sequences)

    def __contains__(self, seq_id: Hashable) -> bool:
        hashable("seq_id", seq_id)
        return seq_id in self._sequences

    def __repr__(self) -> str:
        return (
            f"PageAllocator({len(self._sequences)} sequences, {self.num_free()} of "
            f"{self.num_pages} pages of {self.page_size} tokens free)"
        )

    def _check_row(
        self,
        row: int,
        seq_id: Hashable,
        sequence: "_Sequence | None",
        table: np.ndarray,
        context_len: int,
        query_len: int,
    ) -> None:
        """Checks a row of a table; see `validate_tables`."""
        held = min(sequence.num_tokens if sequence else 0, len(table) * self.page_size)
        if not 0 <= query_len <= context_len <= held:
            raise ValueError(
                f"row {row}: {query_len} new tokens of {context_len} must be in [0, {held}], what "
                f"sequence {seq_id!r} and the row hold; extend the sequence, or widen the table"
            )
        first_written = (context_len - query_len) // self.page_size if query_len else len(table)
        pages = sequence.pages[: -(-context_len // self.page_size)] if sequence else []
        for entry, (page, actual) in enumerate(zip(pages, table.tolist(), strict=False)):
            if actual != page:
                owners = [name for name, other in self._sequences.items() if actual in other.pages]
                whose = f"of sequence {owners[0]!r}" if owners else "free, or none"
                raise ValueError(
                    f"row {row}, entry {entry}: page id {actual} ({whose}) must be {page}, which "
                    f"sequence {seq_id!r} has there; take tables from block_tables()"
                )
            if entry >= first_written and self._refcounts[page] > 1:
                raise ValueError(
                    f"row {row}, entry {entry}: sequence {seq_id!r} writes to page {page}, which "
                    f"{self._refcounts[page]} sequences share; fork it before those tokens"
                )

    def _grow(self, seq_id: Hashable, sequence: "_Sequence", num_tokens: int) -> list[int]:
        """Adds tokens and the pages for them, or raises before anything has changed."""
        num_blocks = -(-(sequence.num_tokens + num_tokens) // self.page_size)
        if self.max_blocks is not None and num_blocks > self.max_blocks:
            raise ValueError(
                f"sequence {seq_id!r} would have {sequence.num_tokens + num_tokens} tokens, and "
                f"max_blocks={self.max_blocks} pages of {self.page_size} hold "
                f"{self.max_blocks * self.page_size}; end it there, or use a larger max_blocks"
            )
        num_held = len(sequence.pages)
        free = self.num_free(sequence.seq_shard)
        if num_blocks - num_held > free:
            total = self._pages_per_shard * self.num_context_shards
            raise OutOfPages(num_blocks - num_held, free, total, sequence.seq_shard, seq_id)
        while len(sequence.pages) < num_blocks:
            sequence.pages.append(self._take(sequence))
        sequence.num_tokens += num_tokens
        return sequence.pages[num_held:]

    def _take(self, sequence: "_Sequence") -> int:
        """A page for a sequence's next block: from the preferred pool, or from the fullest."""
        pools, block = self._pools_of(sequence.seq_shard), len(sequence.pages)
        if self.placement == "contiguous" and self.max_blocks is not None:
            pool = pools[block // -(-self.max_blocks // self.num_context_shards)]
        else:
            pool = pools[(sequence.offset + block) % self.num_context_shards]
        pool = pool if len(pool) else max(pools, key=len)
        recent = reversed(sequence.pages[-self.num_context_shards :])
        page = pool.take(after=next((page for page in recent if page in pool.pages), None))
        self._refcounts[page] = 1
        return page

    def _pools_of(self, seq_shard: int) -> list["PagePool"]:
        first = seq_shard * self.num_context_shards
        return self._pools[first : first + self.num_context_shards]

    def _rows(self, seq_ids: Sequence[Hashable | None]) -> list["_Sequence | None"]:
        what = "a list of sequences' names, as block_tables has rows"
        instance("seq_ids", seq_ids, Sequence | np.ndarray, what)
        if isinstance(seq_ids, str | bytes):  # a name, of which each letter would be one
            raise ValueError(f"seq_ids must be {what}; got {seq_ids!r}: use [{seq_ids!r}]")
        return [None if seq_id is None else self._get(seq_id) for seq_id in seq_ids]

    def _get(self, seq_id: Hashable, name: str = "seq_id") -> "_Sequence":
        hashable(name, seq_id)
        if seq_id not in self._sequences:
            raise ValueError(
                f"there is no sequence {seq_id!r}: never allocated, or freed already; "
                f"{_some(self._sequences)}"
            )
        return self._sequences[seq_id]

    def _check_new(self, name: str, seq_id: Hashable) -> None:
        hashable(name, seq_id)
        if seq_id is None:
            raise ValueError("None cannot name a sequence: in block_tables it is an empty row")
        if seq_id in self._sequences:
            raise ValueError(
                f"sequence {seq_id!r} exists already; extend it, or free it before its name is "
                "used again"
            )

    def _check_width(self, max_blocks: int) -> int:
        meaning = f"pages of {self.page_size} tokens; a sequence has fewer than 2**31"
        return integer("max_blocks", max_blocks, meaning, most=INT32_MAX // self.page_size)

    @staticmethod
    def _check_index(what: str, value: int, count: int) -> int:
        if integer(what, value, least=0) >= count:
            raise ValueError(f"{what}={value} is out of range: there are {count}, 0 to {count - 1}")
        return int(value)


@dataclass
class _Sequence:
    seq_shard: int
    offset: int  # context shard that round robin starts with
    num_tokens: int = 0
    pages: list[int] = field(default_factory=list)


def _some(seq_ids: Iterable[Hashable]) -> str:
    """A few of the sequences that there are, for an error message."""
    names = [repr(seq_id) for seq_id in seq_ids]
    if not names:
        return "there are none at all"
    return f"there are {len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
