"""Which requests run, each in a row of the batch and with pages of its own."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from shardpage import PageAllocator
from shardpage.shard_layout import ShardCounts

from .requests import Pool, Request, num_cached_tokens


@dataclasses.dataclass
class Row:
    """A running sequence."""

    request: Request
    table: np.ndarray

    @property
    def num_unread(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return len(self.request.prompt_ids) - self.request.num_prefilled

    @property
    def num_cached(self) -> int:
        """Tokens in the cache: of an answer, all but the newest."""
        return self.request.num_prefilled + max(len(self.request.ids) - 1, 0)

    def next_tokens(self, count: int) -> Sequence[int]:
        """The next tokens that go into the cache."""
        prompt, start = self.request.prompt_ids, self.request.num_prefilled
        return prompt[start : start + count] if self.num_unread else self.request.ids[-1:]


class Rows:
    """The rows of a batch and the pool of pages; both are divided over the data shards.

    Attributes:
      shards: of the mesh.
      allocator: of the pool.
      peak_pages: [data shards, context shards], the most pages that were in use on each.
    """

    def __init__(self, pool: Pool, shards: ShardCounts):
        """All rows and pages are free.

        Raises:
          ValueError: if the pool does not divide over the shards.
        """
        self.pool, self.shards = pool, shards
        self.allocator = PageAllocator(
            pool.num_pages,
            pool.page_size,
            num_seq_shards=shards.seqs,
            num_context_shards=shards.context,
            max_blocks=pool.max_blocks,
        )
        if pool.num_rows % shards.seqs:
            raise ValueError(f"{pool.num_rows=} must be divisible by the {shards.seqs} data shards")
        self.peak_pages = np.zeros((shards.seqs, shards.context), int)
        self._rows: list[Row | None] = [None] * pool.num_rows

    @property
    def num_per_shard(self) -> int:
        """Rows of each data shard."""
        return self.pool.num_rows // self.shards.seqs

    def shard(self, index: int) -> int:
        """The data shard of a row."""
        return index // self.num_per_shard

    def running(self) -> Iterator[tuple[int, Row]]:
        """The rows that are taken, with their numbers."""
        yield from ((index, row) for index, row in enumerate(self._rows) if row is not None)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        assert row is not None
        return row

    def misfit(self, request: Request) -> str | None:
        """Why a request has no place even if all of it is free, or None."""
        needed, available = self._num_pages(request), self.pool.num_pages // self.shards.seqs
        if needed <= min(available, self.pool.max_blocks):
            return None
        over = f" ({self.pool.num_pages} over {self.shards.seqs} data shards)"
        num_pages = -(-needed // self.shards.context) * self.shards.context * self.shards.seqs
        return (
            f"needs {needed} pages of {self.pool.page_size} tokens ({len(request.prompt_ids)} "
            f"prompt tokens and up to {request.max_new_tokens} new ones), and {available} are "
            f"available for a sequence{over if self.shards.seqs > 1 else ''}; use --num-pages "
            f"{num_pages} or more, or fewer --max-new-tokens"
        )

    def join(self, request: Request) -> Row | None:
        """Gives a request a row, and the pages of its longest answer; None if there are none now.

        It joins the data shard with the most free pages, of those with a free row.
        """
        free: dict[int, int] = {}
        for index, row in enumerate(self._rows):
            if row is None:
                free.setdefault(self.shard(index), index)
        shard = max(free, key=self.allocator.num_free, default=None)
        if shard is None or self.allocator.num_free(shard) < self._num_pages(request):
            return None
        num_tokens = num_cached_tokens(len(request.prompt_ids), request.max_new_tokens)
        self.allocator.allocate(request.key, num_tokens, shard)
        row = Row(request, self.allocator.block_tables([request.key])[0])
        self._rows[free[shard]] = row
        self._note_peak()
        return row

    def leave(self, index: int) -> Request:
        """Ends a running sequence; its row and pages are free again."""
        request = self[index].request
        self.allocator.free(request.key)
        self._rows[index] = None
        return request

    def _num_pages(self, request: Request) -> int:
        num_tokens = num_cached_tokens(len(request.prompt_ids), request.max_new_tokens)
        return -(-num_tokens // self.pool.page_size)

    def _note_peak(self) -> None:
        per_pool = self.pool.num_pages // self.peak_pages.size
        for place in np.ndindex(self.peak_pages.shape):
            used = per_pool - self.allocator.num_free(*place)
            self.peak_pages[place] = max(self.peak_pages[place], used)
