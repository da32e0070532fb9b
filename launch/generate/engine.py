"""Continuous batching: prompts share one pool of pages, joining and leaving between steps.

Each turn of the loop admits prompts for which a row and pages are free and takes one step: one more
token of every answer, and as much of the prompts as the step has room for. So a long prompt holds
up nobody. A prompt reserves the pages of its longest possible answer when it joins, so it never has
to stop midway; they go back to the pool when it leaves.

The loop is host code without randomness: in a run of several processes each takes the same
decisions, and nothing about the schedule needs to be exchanged.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shardpage import PagedKVCache, read_pages, write_pages

from ..devices import fetch
from .requests import Ending, Event, Pool, Request, Stats, num_cached_tokens
from .rows import Row, Rows
from .smollm2 import Model, Weights
from .smollm2.model import Batch, StepResult

# Tokens of a step on each data shard that only reads prompts: nobody waits for it, and the large
# size is faster, the small one for short prompts and ends.
PROMPT_TOKENS = (64, 128)
_LEAST_STEP_TOKENS = 16


def default_step_tokens(num_rows: int) -> int:
    """Tokens of a step that makes answers for up to so many rows, and reads prompts.

    A third of them for prompts, or more: the next power of two, which XLA multiplies fastest on a
    CPU (there a step of 24 took longer than one of 32), 16 at least.
    """
    return max(1 << (num_rows * 3 // 2 - 1).bit_length(), _LEAST_STEP_TOKENS)


class Engine:
    """Serves requests with one model on one mesh.

    Attributes:
      model: the model's steps.
      rows: who runs, on which pages.
      cache: the pages of all layers.
      stats: work done so far.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        pool: Pool,
        *,
        dtype: Any,
        scales: Any = None,
        stop_id: int,
        step_tokens: int | None = None,
        keep_first_logits: bool = False,
        on_compile: Callable[[str], None] = lambda what: None,
    ):
        """Makes an engine with an empty cache.

        Args:
          model: the model's steps.
          weights: its weights, on the mesh.
          pool: sizes.
          dtype, scales: of the cache, as `PagedKVCache.zeros` takes them.
          stop_id: the token that ends an answer.
          step_tokens: tokens of a step on each data shard, at most, while answers are made, so
            that a long prompt does not hold them up; but at least one a row. None for
            `default_step_tokens`.
          keep_first_logits: fill in `Request.first_logits`.
          on_compile: called before a step that compiles, with its name.

        Raises:
          ValueError: if the pool does not divide over the mesh.
        """
        self.stats = Stats()
        self._stop_id, self._step_tokens = stop_id, step_tokens
        self._keep_first_logits, self._on_compile = keep_first_logits, on_compile
        rows = Rows(pool, model.layout.shards(model.mesh))
        cache = model.empty_cache(pool.num_pages, pool.page_size, dtype, scales)
        self._settle(model, weights, rows, cache)

    def _settle(self, model: Model, weights: Weights, rows: Rows, cache: PagedKVCache) -> None:
        """Serves with these from now on."""
        self.model, self._weights, self.rows, self.cache = model, weights, rows, cache
        self._compiled: set[int] = set()
        wanted = self._step_tokens or default_step_tokens(rows.num_per_shard)
        self._most_tokens = max(wanted, rows.num_per_shard)
        # Each is a program of its own: answers alone, with prompts, and prompts alone.
        self._sizes = sorted({rows.num_per_shard, self._most_tokens, *PROMPT_TOKENS})

    def move_to(self, model: Model, weights: Weights, pool: Pool) -> None:
        """Goes on with another mesh: running answers keep what they have in the cache.

        Between any two events of `run`. The pages of one sequence after the other are copied, so
        memory for both caches and those of one sequence is needed.

        Args:
          model: the same model, on the other mesh.
          weights: its weights, on that mesh.
          pool: sizes there; pages of the same size.

        Raises:
          ValueError: if the pool does not divide over the mesh, has pages of another size, or too
            little room for what runs. All is then as it was.
        """
        if pool.page_size != self.pool.page_size:
            raise ValueError(f"{pool.page_size=} must be {self.pool.page_size}, that of the cache")
        rows = Rows(pool, model.layout.shards(model.mesh))
        tables = [_joined(rows, row) for _, row in self.rows.running()]
        kind = self.cache.format.dtype, _scales(self.cache)
        cache = model.empty_cache(pool.num_pages, pool.page_size, *kind)
        for old, new in tables:
            pages = read_pages(self.cache, old, mesh=self.model.mesh)
            cache = write_pages(cache, new, pages, mesh=model.mesh)
        self._settle(model, weights, rows, cache)

    @property
    def pool(self) -> Pool:
        """Sizes."""
        return self.rows.pool

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of keys, values and scales on each device."""
        return self.cache.bytes_per_device()

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of a token's keys, values and scales, in all layers and on all devices."""
        page_bytes = self.cache.format.page_bytes * self.model.config.num_layers
        return page_bytes // self.pool.page_size

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

        Requests are updated in place, a step at a time. If the caller stops iterating, or an
        exception such as KeyboardInterrupt ends this, those that have not ended do so as
        "interrupted", with what they have.
        """
        waiting = deque(requests)
        try:
            while waiting or any(self.rows.running()):
                yield from self._admit(waiting)
                yield from self._step()
        finally:
            for index, _ in self.rows.running():
                self._leave(index, "interrupted")
            for request in waiting:
                request.ending = request.ending or "interrupted"

    def _admit(self, waiting: deque[Request]) -> Iterator[Event]:
        """Gives rows and pages to waiting requests, in order."""
        while waiting:
            request = waiting[0]
            error = self._misfit(request)
            if error is not None:
                request.ending, request.error = "error", error
                yield Event("ended", waiting.popleft())
            elif self.rows.join(request) is None:
                return
            else:
                request.started = self.clock()
                yield Event("started", waiting.popleft())

    def _misfit(self, request: Request) -> str | None:
        """Why a request can never run, or None."""
        num_prompt, limit = len(request.prompt_ids), self.model.config.max_context_len
        if not num_prompt:
            return "the prompt has no tokens"
        if num_cached_tokens(num_prompt, request.max_new_tokens) > limit:
            return (
                f"{num_prompt} prompt tokens and up to {request.max_new_tokens} new ones exceed "
                f"the {limit} tokens that the model can see"
            )
        return self.rows.misfit(request)

    def _step(self) -> list[Event]:
        """Takes one step; prompts get shorter and answers longer."""
        num_new = self._num_new()
        if not num_new.any():
            return []
        reading = [i for i in np.flatnonzero(num_new) if self.rows[i].num_unread]
        result, seconds = self._run_step(self._batch(num_new))
        num_read = int(num_new[reading].sum())
        self.stats.count(num_read, int(num_new.sum()) - num_read, seconds)
        tokens, events = np.asarray(result.tokens), []
        for i in map(int, np.flatnonzero(num_new)):
            row = self.rows[i]
            if i in reading:
                row.request.num_prefilled += int(num_new[i])
                events.append(Event("read", row.request))
                if self._keep_first_logits and not row.num_unread:
                    row.request.first_logits = np.asarray(result.logits[i])
            if not row.num_unread:
                events += self._append(i, int(tokens[i]))
        return events

    def _num_new(self) -> np.ndarray:
        """How many tokens of each row are next.

        One of each answer; what these leave of each data shard's part goes to its prompts, the
        oldest first. Where no answer waits for the step, prompts may make it as long as they like.
        """
        rows = dict(self.rows.running())
        num_new = np.zeros(self.pool.num_rows, np.int32)
        num_new[[i for i, row in rows.items() if not row.num_unread]] = 1
        most = self._most_tokens if num_new.any() else self._sizes[-1]
        left = most - self._by_shard(num_new).sum(axis=1)
        for i in sorted(rows, key=lambda i: rows[i].request.key):
            if rows[i].num_unread:
                shard = self.rows.shard(i)
                num_new[i] = min(rows[i].num_unread, left[shard])
                left[shard] -= num_new[i]
        return num_new

    def _batch(self, num_new: np.ndarray) -> Batch:
        """The tokens of a step, in the smallest size that they fit."""
        per_shard = self._by_shard(num_new)
        size = next(n for n in self._sizes if n >= per_shard.sum(axis=1).max())
        batch = self._empty_batch(size * len(per_shard))
        batch.query_lens[:] = num_new
        first = size * np.arange(len(per_shard))[:, None]
        ends = (first + np.cumsum(per_shard, axis=1)).ravel()
        for i in np.flatnonzero(num_new):
            row = self.rows[i]
            batch.tokens[ends[i] - num_new[i] : ends[i]] = row.next_tokens(num_new[i])
            batch.context_lens[i] = row.num_cached + num_new[i]
            batch.tables[i] = row.table
            batch.sampling.temperatures[i] = row.request.temperature
            batch.sampling.seeds[i] = row.request.seed
        return batch

    def _empty_batch(self, num_tokens: int) -> Batch:
        return Batch.empty(num_tokens, self.pool.num_rows, self.pool.max_blocks)

    def _by_shard(self, of_rows: np.ndarray) -> np.ndarray:
        """[data shards, rows of each]."""
        return of_rows.reshape(self.rows.shards.seqs, -1)

    def _run_step(self, batch: Batch) -> tuple[StepResult, float]:
        """Runs a step to its end; returns its result and seconds."""
        num_tokens = len(batch.tokens)
        if num_tokens not in self._compiled:
            self._on_compile(f"a step of {num_tokens} tokens")
            self.stats.compile_seconds += self._timed(self._empty_batch(num_tokens))[1]
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
        request = self.rows[index].request
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
        request = self.rows.leave(index)
        request.ending, request.ended = ending, self.clock()


def _scales(cache: PagedKVCache) -> Any:
    """What makes another cache whose scales are of the same kind; those of KV heads are equal."""
    if cache.scale != "head":
        return None
    by_head = fetch(cache.scales[0])
    return by_head[..., 0], by_head[..., 1]


def _joined(rows: Rows, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Lets a running sequence join others; its old pages and its new ones, padded to one length."""
    request = row.request
    joined = None if rows.misfit(request) else rows.join(request)
    if joined is None:
        raise ValueError(
            f"{rows.pool} over {rows.shards} has no room for prompt {request.key} beside those "
            "that joined before; use more num_rows or num_pages, or wait until fewer run"
        )
    used = np.arange(len(row.table)) * rows.pool.page_size < row.num_cached
    new = np.full_like(row.table, -1)
    num_used = int(used.sum())
    new[:num_used] = joined.table[:num_used]
    return np.where(used, row.table, -1), new
