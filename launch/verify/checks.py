"""The matrix of `shardpage verify`: problems, answers of the library, and what the oracle says."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import shardpage
from shardpage import PageAllocator, PagedKVCache, ShardLayout, Tuning

from ..devices import fetch, is_simulated
from . import oracle

HEAD_DIM, QUERIES_PER_KV_HEAD = 64, 3
# Of a quantised cache a TPU's tiles have 32 rows, packed ones of two tokens.
PAGE_SIZE, QUANTISED_PAGE_SIZE = 16, 64
# Tokens of the sequences on each data shard: none, one, a full page, and ragged ones.
CONTEXT_LENS = (0, 1, 16, 37, 90)
MAX_TOKENS = 128
# New tokens of each of them in a step, and the room that a data shard has for those.
QUERY_LENS, NUM_QUERIES = (0, 1, 5, 37, 1), 48

# An error this many times that of a plain computation in the same dtype is still rounding.
MULTIPLE, FLOOR = 4.0, 1e-6

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 40},
    "cap, sinks": {"attn_logits_soft_cap": 3.0, "sinks": True},
    "splits": {"num_splits": 3},
}
# What a token sees, where a step has prompts, guesses and running sequences.
STEPS: dict[str, dict[str, Any]] = {
    "prompts": {},
    "prompts, chunk": {"chunk": 16},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the matrix: where, and on which cache."""

    backend: str
    kv_layout: str
    dtype: str
    scale: str = ""  # of a quantised cache: "token", or "head"

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return QUANTISED_PAGE_SIZE if self.scale else PAGE_SIZE

    @property
    def compute_dtype(self) -> np.dtype:
        """Of queries, and of matmul operands."""
        return jnp.dtype("bfloat16" if self.scale else self.dtype)


ROWS = (
    Row("xla", "blocks_first", "float32"),
    Row("xla", "heads_first", "float32"),
    Row("xla", "fused", "bfloat16"),
    Row("xla", "blocks_first", "int8", "token"),
    Row("xla", "heads_first", "float8_e4m3fn", "head"),
    Row("xla", "fused", "float8_e5m2", "token"),
    Row("pallas_tpu", "heads_first", "float32"),
    Row("pallas_tpu", "fused", "bfloat16"),
    Row("pallas_tpu", "fused", "int8", "token"),
    Row("pallas_tpu", "heads_first", "float8_e4m3fn", "head"),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One cell of the matrix: an error and what it may be, or why there is none."""

    row: Row
    column: str
    error: float | None = None
    limit: float = 0.0
    refusal: str = ""

    @property
    def ok(self) -> bool:
        """Whether the answer is exact, up to rounding, or was refused with a reason."""
        return bool(self.refusal) or (self.error is not None and self.error <= self.limit)


COLUMNS = ("write", *OPTIONS, *STEPS)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Random sequences, their tokens dense for the oracle and paged for the library.

    Attributes:
      keys, values: a sequence each, `[num_tokens, num_kv_heads, head_dim]`: new tokens.
      stored: of both, what the cache gives back.
      scales: of keys and of values, `[num_kv_heads]` each, where a scale is a KV head's.
    """

    row: Row
    query: np.ndarray  # [num_seqs, num_heads, head_dim]
    queries: np.ndarray  # [num_queries, num_heads, head_dim], of a step
    keys: list[np.ndarray]
    values: list[np.ndarray]
    stored: tuple[list[np.ndarray], list[np.ndarray]]
    scales: tuple[np.ndarray, np.ndarray] | None
    sinks: np.ndarray  # [num_heads]
    tables: np.ndarray  # [num_seqs, max_blocks]
    num_pages: int

    @property
    def context_lens(self) -> np.ndarray:
        """[num_seqs] tokens of each sequence."""
        return np.array([len(key) for key in self.keys], np.int32)

    @property
    def query_lens(self) -> np.ndarray:
        """[num_seqs] new tokens of each sequence in a step."""
        return np.tile(np.array(QUERY_LENS, np.int32), len(self.keys) // len(QUERY_LENS))

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Each query of a step: its row, its sequence, its position there."""
        for seq, (length, new) in enumerate(zip(self.context_lens, self.query_lens, strict=True)):
            shard, place = divmod(seq, len(QUERY_LENS))
            first = shard * NUM_QUERIES + sum(QUERY_LENS[:place])
            for number in range(new):
                yield first + number, seq, int(length - new + number)


def make_problem(mesh: Mesh, row: Row) -> Problem:
    """Draws sequences for every data shard, their pages spread over the context shards."""
    rng = np.random.default_rng(1)
    shards = ShardLayout.of(mesh).shards(mesh)
    num_kv_heads = max(shards.heads, 2)
    lens = CONTEXT_LENS * shards.seqs
    max_blocks = MAX_TOKENS // row.page_size
    per_pool = -(-max_blocks * len(CONTEXT_LENS) // shards.context) + 1
    num_pages = per_pool * shards.pages
    allocator = PageAllocator(
        num_pages,
        row.page_size,
        num_seq_shards=shards.seqs,
        num_context_shards=shards.context,
        max_blocks=max_blocks,
    )
    for seq, num_tokens in enumerate(lens):
        allocator.allocate(seq, num_tokens, seq // len(CONTEXT_LENS))
    draw = lambda *shape: np.asarray(rng.standard_normal(shape), row.compute_dtype)
    scales = _head_scales(row, rng, num_kv_heads) if row.scale == "head" else None
    size = (num_kv_heads, HEAD_DIM)
    (keys, stored_keys), (values, stored_values) = (
        _tokens(row, [draw(n, *size) for n in lens], scales and scales[which]) for which in range(2)
    )
    return Problem(
        row,
        query=draw(len(lens), num_kv_heads * QUERIES_PER_KV_HEAD, HEAD_DIM),
        queries=draw(NUM_QUERIES * shards.seqs, num_kv_heads * QUERIES_PER_KV_HEAD, HEAD_DIM),
        keys=keys,
        values=values,
        stored=(stored_keys, stored_values),
        scales=scales,
        sinks=np.asarray(rng.standard_normal(num_kv_heads * QUERIES_PER_KV_HEAD), np.float32),
        tables=allocator.block_tables(range(len(lens))),
        num_pages=num_pages,
    )


def _head_scales(row: Row, rng: Any, num_kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales with which some elements are clipped, and most are not."""
    largest = rng.uniform(2.5, 3.5, (2, num_kv_heads)) / oracle.largest(row.dtype)
    key, value = largest.astype(np.float32)
    return key, value


def _tokens(
    row: Row, drawn: list[np.ndarray], scales: np.ndarray | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """New tokens, and what the cache gives back of them.

    Quantised ones are moved towards what is stored: between two numbers that are, the last bit of
    a scale would decide.
    """
    if not row.scale:
        return drawn, drawn
    by_head = None if scales is None else scales[:, None]
    stored = [oracle.quantised(each, row.dtype, by_head) for each in drawn]
    tokens = [a + np.float32(0.8) * (b - a) for a, b in zip(stored, drawn, strict=True)]
    return tokens, stored


def check_row(row: Row, mesh: Mesh) -> Iterator[Check]:
    """Answers every column of a row."""
    if row.backend == "pallas_tpu" and jax.process_count() > 1 and is_simulated(mesh):
        # They would wait for ever for the devices of other processes.
        reason = "interpreted kernels run in one process only; use verify --simulate, or TPUs"
        yield Check(row, "write", refusal=reason)
        return
    problem = make_problem(mesh, row)
    try:
        cache = write_tokens(problem, row, mesh)
    except NotImplementedError as refused:
        yield Check(row, "write", refusal=str(refused))
        return
    yield Check(row, "write", write_error(problem, cache), FLOOR if row.scale else 0.0)
    kinds = ((OPTIONS, answer, expected), (STEPS, answer_step, expected_of_step))
    for columns, ask, oracles in kinds:
        for column, options in columns.items():
            try:
                out, lse = ask(problem, row, mesh, cache, options)
            except NotImplementedError as refused:
                yield Check(row, column, refusal=str(refused))
                continue
            yield Check(row, column, *compare(out, lse, oracles(problem, options)))


def write_tokens(problem: Problem, row: Row, mesh: Mesh) -> PagedKVCache:
    """Writes every token of the problem with `write_kv` into a cache of NaN.

    Each data shard brings its own sequences' tokens, equally many.
    """
    num_kv_heads = problem.keys[0].shape[1]
    sizes = (problem.num_pages, num_kv_heads, row.page_size, HEAD_DIM)
    options = {"dtype": row.dtype, "kv_layout": row.kv_layout, "scales": problem.scales}
    cache = PagedKVCache.zeros(*sizes, **options, mesh=mesh)
    scales = map(_poisoned, cache.scales) if row.scale == "token" else None
    cache = cache.replace(map(_poisoned, cache.arrays), scales)
    lens = problem.context_lens
    seq_ids = np.repeat(np.arange(len(lens)), lens).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lens]).astype(np.int32)
    return shardpage.write_kv(
        cache,
        np.concatenate(problem.keys),
        np.concatenate(problem.values),
        seq_ids,
        positions,
        problem.tables,
        mesh=mesh,
    )


def _poisoned(x: jax.Array) -> jax.Array:
    """NaN everywhere, or what an integer has of it."""
    nan = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return jax.device_put(jnp.full_like(x, nan), x.sharding)


def write_error(problem: Problem, cache: PagedKVCache) -> float:
    """The largest difference between the tokens and what their slots hold.

    0 if they are written right; of quantised ones the rounding of a scale.
    """
    worst, page_size = 0.0, problem.row.page_size
    pages = [fetch(x).astype(np.float32) for x in cache.arrays]
    if cache.kv_layout == "fused":
        pages = [pages[0][:, 0], pages[0][:, 1]]
    elif cache.kv_layout == "heads_first":
        pages = [x.swapaxes(0, 1) for x in pages]
    scales = _scales_by_token(problem, cache, pages[0].shape[-2])
    for stored, by_token, tokens in zip(pages, scales, problem.stored, strict=True):
        # [pages, kv_heads, page, dim], whether the rows were packed or not
        stored = stored.reshape(*stored.shape[:2], page_size, HEAD_DIM) * by_token
        for table, expected in zip(problem.tables, tokens, strict=True):
            found = stored[table].swapaxes(1, 2).reshape(-1, *stored.shape[1::2])[: len(expected)]
            difference = np.abs(found - expected.astype(np.float32))
            worst = float(np.maximum(worst, np.max(difference, initial=0.0)))
    return worst


def _scales_by_token(problem: Problem, cache: PagedKVCache, num_rows: int) -> list[np.ndarray]:
    """Of keys and of values, `[pages, kv_heads, page_size, 1]` or what broadcasts to it."""
    row = problem.row
    if not row.scale:
        return [np.ones(1, np.float32)] * 2
    scales = fetch(cache.scales[0])
    if row.scale == "head":
        return [scales[:, which, None, None] for which in range(2)]
    # keys before values; those of the tokens that begin a row before those that follow them
    by_row = scales.reshape(*scales.shape[:2], 2, row.page_size // num_rows, num_rows)
    by_token = by_row.swapaxes(-1, -2).reshape(*scales.shape[:2], 2, row.page_size, 1)
    return [by_token[:, :, which] for which in range(2)]


def answer(
    problem: Problem, row: Row, mesh: Mesh, cache: PagedKVCache, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The library's (out, lse)."""
    layout = ShardLayout.of(mesh)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    out, lse = shardpage.page_attention(
        place(problem.query, layout.spec("seqs", "heads", None)),
        cache.key,
        cache.value,
        place(problem.context_lens, layout.spec("seqs")),
        place(problem.tables, layout.spec("seqs", None)),
        kv_layout=cache.kv_layout,
        mesh=mesh,
        backend=row.backend,
        return_lse=True,
        scales=cache.scales,
        **options | {"sinks": problem.sinks if options.get("sinks") else None},
    )
    return fetch(out).astype(np.float64), fetch(lse).astype(np.float64)


def answer_step(
    problem: Problem, row: Row, mesh: Mesh, cache: PagedKVCache, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The library's (out, lse) of a step, by a plan."""
    plan = shardpage.make_plan(
        cache,
        problem.context_lens,
        problem.tables,
        problem.query_lens,
        num_heads=problem.queries.shape[1],
        num_queries=len(problem.queries),
        mesh=mesh,
        tuning=Tuning(backend=row.backend),
        **options,
    )
    out, lse = shardpage.attend(problem.queries, cache, plan, return_lse=True)
    return fetch(out).astype(np.float64), fetch(lse).astype(np.float64)


# A query's row of the answer, and what gives its (out, lse) in a precision.
Expected = Iterator[tuple[int, Callable[..., tuple[np.ndarray, np.ndarray]]]]


def expected(problem: Problem, options: dict[str, Any]) -> Expected:
    """What the oracle says of `answer`."""
    sequences = zip(problem.query, *problem.stored, strict=True)
    for seq, arrays in enumerate(sequences):
        yield (
            seq,
            functools.partial(
                oracle.attend,
                *arrays,
                weights_dtype=problem.row.compute_dtype,
                window=options.get("sliding_window"),
                soft_cap=options.get("attn_logits_soft_cap"),
                sinks=problem.sinks if options.get("sinks") else None,
            ),
        )


def expected_of_step(problem: Problem, options: dict[str, Any]) -> Expected:
    """What the oracle says of `answer_step`."""
    chunk = options.get("chunk", MAX_TOKENS)
    attend = functools.partial(oracle.attend, weights_dtype=problem.row.compute_dtype)
    for row, seq, position in problem.tokens():
        seen = slice(position // chunk * chunk, position + 1)
        keys, values = (tokens[seq][seen] for tokens in problem.stored)
        yield row, functools.partial(attend, problem.queries[row], keys, values)


def compare(out: np.ndarray, lse: np.ndarray, oracles: Expected) -> tuple[float, float]:
    """The error of an answer, and the error that rounding excuses."""
    error = rounding = 0.0
    for row, attend in oracles:
        exact_out, exact_lse = attend()
        plain_out, _ = attend(precision=np.float32)
        rounding = max(rounding, float(np.abs(plain_out - exact_out).max()))
        error = float(np.maximum(error, np.abs(out[row] - exact_out).max()))  # NaN stays
        if np.isneginf(exact_lse).all() and np.isneginf(lse[row]).all():
            continue
        # an error in lse is one of the same relative size in every weight
        error = float(np.maximum(error, np.abs(lse[row] - exact_lse).max()))
    limit = MULTIPLE * rounding + FLOOR
    return (error if np.isfinite(error) else np.inf), limit
