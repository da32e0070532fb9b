"""Continuous batching: prompts share one pool of pages, joining and leaving between steps.

Each turn of the loop admits prompts for which a row and pages are free and takes one step: one more
token of every answer, and as much of the prompts as the step has room for. So a long prompt holds
up nobody. A prompt reserves the pages of its longest possible answer when it joins, so it never has
to stop midway; they go back to the pool when it leaves.

The loop is host code without randomness: in a run of several processes each takes the same
decisions, and nothing about the schedule needs to be exchanged.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shardpage import PageAllocator

from .requests import Ending, Event, Pool, Request, Stats, num_cached_tokens
from .smollm2 import Model, Weights
from .smollm2.model import Batch, StepResult

# Tokens of a step on each data shard that only reads prompts: nobody waits for it, and the large
# size is faster, the small one for short prompts and ends.
PROMPT_TOKENS = (64, 128)


@dataclasses.dataclass
class _Row:
    """A running sequence."""

    request: Request
    table: np.ndarray

    @property
    def num_unread(self) -> int:
        return len(self.request.prompt_ids) - self.request.num_prefilled

    @property
    def num_cached(self) -> int:
        """Tokens in the cache: of an answer, all but the newest."""
        return self.request.num_prefilled + max(len(self.request.ids) - 1, 0)

    def next_tokens(self, count: int) -> Sequence[int]:
        """The next tokens that go into the cache."""
        prompt, start = self.request.prompt_ids, self.request.num_prefilled
        return prompt[start : start + count] if self.num_unread else self.request.ids[-1:]


class Engine:
    """Serves requests with one model on one mesh.

    Attributes:
      stats: work done so far.
      peak_pages: [data shards, context shards], the most pages that were in use on each.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        pool: Pool,
        *,
        dtype: Any,
        stop_id: int,
        step_tokens: int = 32,
        keep_first_logits: bool = False,
        on_compile: Callable[[str], None] = lambda what: None,
    ):
        """Makes an engine with an empty cache.

        Args:
          model: the model's steps.
          weights: its weights, on the mesh.
          pool: sizes.
          dtype: of the cache.
          stop_id: the token that ends an answer.
          step_tokens: tokens of a step on each data shard, at most, while answers are made, so
            that a long prompt does not hold them up; but at least one a row.
          keep_first_logits: fill in `Request.first_logits`.
          on_compile: called before a step that compiles, with its name.

        Raises:
          ValueError: if the pool does not divide over the mesh.
        """
        shards = model.layout.shards(model.mesh)
        self.model, self.pool, self.stats = model, pool, Stats()
        self.num_seq_shards, self.num_context_shards = shards.seqs, shards.context
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
        self.cache = model.empty_cache(pool.num_pages, pool.page_size, dtype)
        self._weights, self._stop_id = weights, stop_id
        self._keep_first_logits, self._on_compile = keep_first_logits, on_compile
        self._rows: list[_Row | None] = [None] * pool.num_rows
        self._compiled: set[int] = set()
        self._step_tokens = max(step_tokens, self._rows_per_shard)
        # Each is a program of its own: answers alone, with prompts, and prompts alone.
        self._sizes = sorted({self._rows_per_shard, self._step_tokens, *PROMPT_TOKENS})

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of keys and values on each device."""
        return self.cache.bytes_per_device()

    @property
    def weight_bytes_per_device(self) -> int:
        """Bytes of weights on each device."""
        parts = jax.tree.leaves(self._weights)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in parts)

    def clock(self) -> float:
        """Seconds, standing still during compilation."""
        return time.perf_counter() - self.stats.compile_seconds

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Serves requests, first come first served, yielding what happens.

        Requests are updated in place. If the caller stops iterating, or an exception such as
        KeyboardInterrupt ends this, those that have not ended do so as "interrupted", with what
        they have.
        """
        waiting = deque(requests)
        try:
            while waiting or any(self._rows):
                yield from self._admit(waiting)
                yield from self._step()
        finally:
            for index, row in enumerate(self._rows):
                if row is not None:
                    self._leave(index, "interrupted")
            for request in waiting:
                request.ending = request.ending or "interrupted"

    def _admit(self, waiting: deque[Request]) -> Iterator[Event]:
        """Gives rows and pages to waiting requests, in order."""
        while waiting:
            request = waiting[0]
            num_tokens = num_cached_tokens(len(request.prompt_ids), request.max_new_tokens)
            error = self._misfit(request, num_tokens)
            if error is not None:
                request.ending, request.error = "error", error
                yield Event("ended", waiting.popleft())
                continue
            index = self._free_row(-(-num_tokens // self.pool.page_size))
            if index is None:
                return
            shard = self._shard(index)
            self.allocator.allocate(request.key, num_tokens, shard)
            table = self.allocator.block_tables([request.key])[0]
            self._rows[index] = _Row(request, table)
            self._note_peak()
            request.started = self.clock()
            yield Event("started", waiting.popleft())

    def _misfit(self, request: Request, num_tokens: int) -> str | None:
        """Why a request can never run, or None."""
        num_prompt, page_size = len(request.prompt_ids), self.pool.page_size
        limit = self.model.config.max_context_len
        if not num_prompt:
            return "the prompt has no tokens"
        if num_tokens > limit:
            return (
                f"{num_prompt} prompt tokens and up to {request.max_new_tokens} new ones exceed "
                f"the {limit} tokens that the model can see"
            )
        needed = -(-num_tokens // page_size)
        available = self.pool.num_pages // self.num_seq_shards
        if needed > available or needed > self.pool.max_blocks:
            share = f" ({self.pool.num_pages} over {self.num_seq_shards} data shards)"
            return (
                f"needs {needed} pages of {page_size} tokens ({num_prompt} prompt tokens and up to "
                f"{request.max_new_tokens} new ones), and {available} are available for a "
                f"sequence{share if self.num_seq_shards > 1 else ''}; use --num-pages "
                f"{_round_up(needed, self.num_context_shards) * self.num_seq_shards} or more, or "
                f"fewer --max-new-tokens"
            )
        return None

    def _free_row(self, num_pages: int) -> int | None:
        """A free row on the data shard with the most free pages, if those are enough."""
        free = {}
        for index, row in enumerate(self._rows):
            if row is None:
                free.setdefault(self._shard(index), index)
        if not free:
            return None
        shard = max(free, key=lambda shard: self.allocator.num_free(shard))
        return free[shard] if self.allocator.num_free(shard) >= num_pages else None

    def _step(self) -> Iterator[Event]:
        """Takes one step; prompts get shorter and answers longer."""
        num_new = self._num_new()
        if not num_new.any():
            return
        reading = [i for i in np.flatnonzero(num_new) if self._row(i).num_unread]
        result, seconds = self._run_step(self._batch(num_new))
        num_read = int(num_new[reading].sum())
        self.stats.count(num_read, int(num_new.sum()) - num_read, seconds)
        tokens = np.asarray(result.tokens)
        for i in map(int, np.flatnonzero(num_new)):
            row = self._row(i)
            if i in reading:
                row.request.num_prefilled += int(num_new[i])
                yield Event("read", row.request)
                if self._keep_first_logits and not row.num_unread:
                    row.request.first_logits = np.asarray(result.logits[i])
            if not row.num_unread:
                yield from self._append(i, int(tokens[i]))

    def _num_new(self) -> np.ndarray:
        """How many tokens of each row are next.

        One of each answer; what these leave of each data shard's part goes to its prompts, the
        oldest first. Where no answer waits for the step, prompts may make it as long as they like.
        """
        rows = {i: row for i, row in enumerate(self._rows) if row is not None}
        num_new = np.zeros(self.pool.num_rows, np.int32)
        num_new[[i for i, row in rows.items() if not row.num_unread]] = 1
        most = self._step_tokens if num_new.any() else self._sizes[-1]
        left = most - num_new.reshape(self.num_seq_shards, -1).sum(axis=1)
        for i in sorted(rows, key=lambda i: rows[i].request.key):
            if rows[i].num_unread:
                num_new[i] = min(rows[i].num_unread, left[self._shard(i)])
                left[self._shard(i)] -= num_new[i]
        return num_new

    def _batch(self, num_new: np.ndarray) -> Batch:
        """The tokens of a step, in the smallest size that they fit."""
        per_shard = num_new.reshape(self.num_seq_shards, -1)
        size = next(n for n in self._sizes if n >= per_shard.sum(axis=1).max())
        num_tokens = size * self.num_seq_shards
        batch = Batch.empty(num_tokens, self.pool.num_rows, self.pool.max_blocks)
        batch.query_lens[:] = num_new
        first = size * np.arange(self.num_seq_shards)[:, None]
        ends = (first + np.cumsum(per_shard, axis=1)).ravel()
        for i in np.flatnonzero(num_new):
            row = self._row(i)
            batch.tokens[ends[i] - num_new[i] : ends[i]] = row.next_tokens(num_new[i])
            batch.context_lens[i] = row.num_cached + num_new[i]
            batch.tables[i] = row.table
            batch.sampling.temperatures[i] = row.request.temperature
            batch.sampling.seeds[i] = row.request.seed
        return batch

    def _run_step(self, batch: Batch) -> tuple[StepResult, float]:
        """Runs a step to its end; returns its result and seconds."""
        num_tokens = len(batch.tokens)
        if num_tokens not in self._compiled:
            self._on_compile(f"a step of {num_tokens} tokens")
            empty = Batch.empty(num_tokens, self.pool.num_rows, self.pool.max_blocks)
            self.stats.compile_seconds += self._timed(empty)[1]
            self._compiled.add(num_tokens)
        return self._timed(batch)

    def _timed(self, batch: Batch) -> tuple[StepResult, float]:
        begin = time.perf_counter()
        result = self.model.step(self._weights, self.cache, batch)
        self.cache = result.cache
        result.tokens.block_until_ready()
        return result, time.perf_counter() - begin

    def _append(self, index: int, token: int) -> Iterator[Event]:
        """Adds a token to an answer, and ends it if it is complete."""
        request = self._row(index).request
        request.ids.append(token)
        if request.first_token is None:
            request.first_token = self.clock()
        yield Event("token", request, token)
        if token == self._stop_id:
            self._leave(index, "stop")
        elif len(request.ids) >= request.max_new_tokens:
            self._leave(index, "length")
        if request.ending:
            yield Event("ended", request)

    def _leave(self, index: int, ending: Ending) -> None:
        """Ends a running sequence; its pages are free again."""
        request = self._row(index).request
        request.ending, request.ended = ending, self.clock()
        self.allocator.free(request.key)
        self._rows[index] = None

    def _note_peak(self) -> None:
        per_pool = self.pool.num_pages // self.peak_pages.size
        for place in np.ndindex(self.peak_pages.shape):
            used = per_pool - self.allocator.num_free(*place)
            self.peak_pages[place] = max(self.peak_pages[place], used)

    def _row(self, index: int) -> _Row:
        row = self._rows[index]
        assert row is not None
        return row

    @property
    def _rows_per_shard(self) -> int:
        return self.pool.num_rows // self.num_seq_shards

    def _shard(self, index: int) -> int:
        """The data shard of a row."""
        return index // self._rows_per_shard


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
