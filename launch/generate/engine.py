"""Continuous batching: prompts share one pool of pages, joining and leaving between steps.

Each turn of the loop admits prompts for which a row and pages are free, prefills one chunk on every
data shard that has a prompt to read, and decodes one token of every running sequence. A prompt
reserves the pages of its longest possible answer when it joins, so it never has to stop midway;
they go back to the pool when it leaves.

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
from .smollm2.model import DecodeRows, PrefillChunks, Sampling, StepResult

# Prompt tokens of one prefill step: the large size for speed, the small one for short prompts and
# ends. Each is a program of its own.
CHUNK_LENS = (64, 128)


@dataclasses.dataclass
class _Row:
    """A running sequence."""

    request: Request
    table: np.ndarray

    @property
    def num_unread(self) -> int:
        return len(self.request.prompt_ids) - self.request.num_prefilled

    @property
    def position(self) -> int:
        """Position of the newest token, which is not in the cache yet."""
        return len(self.request.prompt_ids) + len(self.request.ids) - 1


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
        chunk_lens: Sequence[int] = CHUNK_LENS,
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
          chunk_lens: sizes of a prefill step in tokens, rounded up to pages.
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
        self._compiled: set[str] = set()
        self._chunk_lens = sorted({_round_up(n, pool.page_size) for n in chunk_lens})

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
                yield from self._prefill()
                yield from self._decode()
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

    def _prefill(self) -> Iterator[Event]:
        """Reads one chunk on each data shard whose oldest unread prompt has one."""
        reading: dict[int, int] = {}
        for index, row in enumerate(self._rows):
            if row is not None and row.num_unread:
                shard, best = self._shard(index), reading.get(self._shard(index))
                if best is None or row.request.key < self._row(best).request.key:
                    reading[shard] = index
        if not reading:
            return
        rows = [self._row(index) for index in reading.values()]
        longest = max(row.num_unread for row in rows)
        chunk_len = next((n for n in self._chunk_lens if n >= longest), self._chunk_lens[-1])
        # Two shapes only, each a program: one chunk, or one on every data shard.
        num_chunks = 1 if len(rows) == 1 else self.num_seq_shards
        chunks = PrefillChunks(
            tokens=np.zeros((num_chunks, chunk_len), np.int32),
            shards=np.full(num_chunks, self.num_seq_shards, np.int32),
            starts=np.zeros(num_chunks, np.int32),
            lens=np.zeros(num_chunks, np.int32),
            sampling=_greedy(num_chunks),
            tables=np.full((self.num_seq_shards, self.pool.max_blocks), -1, np.int32),
        )
        for i, (shard, row) in enumerate(zip(reading, rows, strict=True)):
            start = row.request.num_prefilled
            part = row.request.prompt_ids[start : start + chunk_len]
            chunks.tokens[i, : len(part)] = part
            chunks.shards[i], chunks.starts[i], chunks.lens[i] = shard, start, len(part)
            _put(chunks.sampling, i, row.request)
            chunks.tables[shard] = row.table
        result, seconds = self._run_step("prefill", self.model.prefill, chunks)
        self.stats.prefill_seconds += seconds
        self.stats.prefill_tokens += int(chunks.lens.sum())
        tokens = np.asarray(result.tokens)
        for i, index in enumerate(reading.values()):
            row = self._row(index)
            row.request.num_prefilled += int(chunks.lens[i])
            yield Event("read", row.request)
            if not row.num_unread:
                if self._keep_first_logits:
                    row.request.first_logits = np.asarray(result.logits[i])
                yield from self._append(index, int(tokens[i]))

    def _decode(self) -> Iterator[Event]:
        """Makes one token of every sequence whose prompt has been read."""
        running = [i for i, row in enumerate(self._rows) if row is not None and not row.num_unread]
        if not running:
            return
        rows = DecodeRows(
            tokens=np.zeros(self.pool.num_rows, np.int32),
            positions=np.full(self.pool.num_rows, -1, np.int32),
            sampling=_greedy(self.pool.num_rows),
            tables=np.full((self.pool.num_rows, self.pool.max_blocks), -1, np.int32),
        )
        for i in running:
            row = self._row(i)
            rows.tokens[i], rows.positions[i] = row.request.ids[-1], row.position
            rows.tables[i] = row.table
            _put(rows.sampling, i, row.request)
        result, seconds = self._run_step("decode", self.model.decode, rows)
        self.stats.decode_seconds += seconds
        self.stats.decode_tokens += len(running)
        self.stats.decode_steps += 1
        tokens = np.asarray(result.tokens)
        for i in running:
            yield from self._append(i, int(tokens[i]))

    def _run_step(
        self, name: str, step: Callable[..., StepResult], batch: PrefillChunks | DecodeRows
    ) -> tuple[StepResult, float]:
        """Runs a step to its end; returns its result and seconds."""
        what = f"{name} of {' x '.join(map(str, batch.tokens.shape))} tokens"
        if what not in self._compiled:
            self._on_compile(what)
            _, seconds = self._timed(step, batch.emptied())
            self.stats.compile_seconds += seconds
            self._compiled.add(what)
        return self._timed(step, batch)

    def _timed(self, step: Callable[..., StepResult], batch: Any) -> tuple[StepResult, float]:
        begin = time.perf_counter()
        result = step(self._weights, self.cache, batch)
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

    def _shard(self, index: int) -> int:
        """The data shard of a row."""
        return index // (self.pool.num_rows // self.num_seq_shards)


def _greedy(num_rows: int) -> Sampling:
    return Sampling(np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32))


def _put(sampling: Sampling, index: int, request: Request) -> None:
    sampling.temperatures[index] = request.temperature
    sampling.seeds[index] = request.seed


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
