"""Named steps: many queries per sequence, in one batch; and the data for them.

As hard to get right by accident as `cases`: pages permuted, garbage where a table must not be
looked up, NaN in every slot that no query reads, and in new tokens' own slots until written.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from shardpage import PagedKVCache, Plan, Tuning, attend, make_plan, write_kv

from . import cases, quantised, reference
from .backends import interpret
from .cases import Case, Placement, cache_options
from .tolerance import assert_close


@dataclasses.dataclass(frozen=True)
class Step:
    """The lengths and options of one step; shapes and dtypes are those of a `Case`.

    Attributes:
      seqs: (context_len, query_len) of each sequence.
      num_queries: rows of the query array for each shard of the sequences.
    """

    name: str
    seqs: tuple[tuple[int, int], ...]
    num_queries: int
    window: int | None = None
    chunk: int | None = None
    causal: bool = True
    sinks: bool = False
    soft_cap: float | None = None
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    page_size: int = 8
    max_blocks: int = 12
    dtype: str = "float32"
    scale: str = "none"  # what a scale of a quantised cache covers

    @property
    def mask(self) -> dict:
        """The arguments of `make_plan` that say what a token sees."""
        return {"window": self.window, "chunk": self.chunk, "causal": self.causal}

    def replace(self, **changes) -> "Step":
        return dataclasses.replace(self, **changes)


# Four sequences a shard at most meshes: prompt, decoding, guesses, nothing to do.
MIXED = ((37, 37), (90, 1), (64, 5), (20, 0), (96, 21), (1, 1), (16, 1), (33, 8))
STEPS = (
    Step("mixed", MIXED, 80),
    Step("prompt", ((96, 96), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)), 96),
    Step("guesses", tuple((n, 4) for n in (4, 8, 9, 40, 41, 63, 90, 96)), 32),
    Step("decoding", tuple((n, 1) for n in (1, 7, 8, 9, 30, 64, 95, 96)), 8),
    Step("one_token", ((5, 1),), 1),
    Step("all_padding", ((5, 0), (0, 0)) * 4, 12),
    Step("one_token_over_a_page", ((17, 17), (9, 9), (25, 2), (8, 8)) * 2, 72),
    Step("window", MIXED, 80, window=19),
    Step("window_of_one", MIXED, 80, window=1),
    Step("chunk", MIXED, 80, chunk=24),
    Step("chunk_and_window", MIXED, 80, chunk=40, window=30),
    Step("not_causal", MIXED, 80, causal=False),
    Step("not_causal_in_chunks", MIXED, 80, causal=False, chunk=16),
    Step("capped_with_sinks", MIXED, 80, sinks=True, soft_cap=1.5),
    Step("bf16", MIXED, 80, dtype="bfloat16", page_size=16, max_blocks=6),
)


def named(name: str) -> Step:
    """The step of this name."""
    return {step.name: step for step in STEPS}[name]


@dataclasses.dataclass
class StepInputs:
    """The arrays of one step, NumPy, global."""

    step: Step
    query: np.ndarray  # [num_queries, num_heads, head_dim]
    key: np.ndarray  # [num_queries, num_kv_heads, head_dim], of the new tokens
    value: np.ndarray
    key_cache: np.ndarray  # with the new tokens
    value_cache: np.ndarray | None
    key_cache_before: np.ndarray  # without them
    value_cache_before: np.ndarray | None
    context_lens: np.ndarray
    query_lens: np.ndarray
    block_tables: np.ndarray
    sinks: np.ndarray | None
    kv_layout: str
    num_seq_shards: int
    scales: Any = None  # of a quantised cache, as `PagedKVCache.of` takes them
    scales_before: Any = None
    pages: tuple[quantised.Pages, ...] = ()  # of its keys and its values, with the new tokens

    @property
    def num_queries(self) -> int:
        """Over all shards."""
        return len(self.query)

    def cache(self, *, written: bool = True) -> PagedKVCache:
        """With the new tokens, or without them."""
        arrays = (self.key_cache, self.value_cache)
        if not written:
            arrays = (self.key_cache_before, self.value_cache_before)
        arrays = [None if x is None else jnp.asarray(x) for x in arrays]
        options = cache_options(self.kv_layout, self.step.head_dim)
        scales = jax.tree.map(jnp.asarray, self.scales if written else self.scales_before)
        return PagedKVCache.of(*arrays, **options, scales=scales)


def make(
    step: Step,
    kv_layout: str = "blocks_first",
    seed: int = 0,
    *,
    num_seq_shards: int = 1,
    num_context_shards: int = 1,
    placement: Placement = "random",
    packed: bool = False,
) -> StepInputs:
    """Draws the arrays of a step; see `cases.make`. Sequences keep their order over shards.

    Of a quantised cache queries and new tokens are float32.
    """
    lens, query_lens = (np.array(x, np.int32) for x in zip(*step.seqs, strict=True))
    case = Case(
        step.name,
        num_seqs=len(lens),
        num_heads=step.num_heads,
        num_kv_heads=step.num_kv_heads,
        head_dim=step.head_dim,
        page_size=step.page_size,
        max_blocks=step.max_blocks,
        lens=tuple(map(int, lens)),
        dtype="float32" if step.scale != "none" else step.dtype,
        sinks=step.sinks,
    )
    inputs = cases.make(
        case,
        "tokens_first",
        seed,
        num_seq_shards=num_seq_shards,
        num_context_shards=num_context_shards,
        placement=placement,
        poison=False,
    )
    rng = np.random.default_rng(seed)
    num_queries = step.num_queries * num_seq_shards
    shape = (num_queries, step.num_heads, step.head_dim)
    query = rng.standard_normal(shape, np.float32).astype(inputs.query.dtype)
    shape = (num_queries, step.num_kv_heads, step.head_dim)
    key, value = rng.standard_normal((2, *shape), np.float32).astype(inputs.query.dtype)
    # [num_pages, page_size, num_kv_heads, head_dim], of which only what is read is no NaN.
    pages = [inputs.key_cache, inputs.value_cache]
    read = np.zeros(pages[0].shape[:2], bool)
    before = np.zeros_like(read)
    at = _query_rows(step, num_seq_shards)
    for seq, (length, new) in enumerate(step.seqs):
        reach = min([length, *filter(None, (step.window, step.chunk))])
        first = max(0, length - new + 1 - reach) if new else length
        if step.chunk and new:
            first = max(first, (length - new) // step.chunk * step.chunk)
        for position in range(first, length):
            page = inputs.block_tables[seq, position // step.page_size]
            slot = position % step.page_size
            read[page, slot] = True
            before[page, slot] = position < length - new
            if position >= length - new:
                row = at[seq] + position - (length - new)
                pages[0][page, slot], pages[1][page, slot] = key[row], value[row]
    caches, scales, stand_for = [], [], ()
    for kept in (read, before):
        nan = np.array(np.nan, query.dtype)
        stored = [np.where(kept[..., None, None], x, nan) for x in pages]
        if step.scale != "none":
            same = scales[0] if scales and step.scale == "head" else None
            stored, kept_scales, kept_pages = cases.quantise(pages, step, kept, packed, same)
            stand_for = stand_for or kept_pages
            scales.append(kept_scales)
        arrays = cases.lay_out(*stored, kv_layout)
        caches += [cases.packed_rows(x) if packed else x for x in arrays]
    return StepInputs(
        step,
        query,
        key,
        value,
        *caches,
        lens,
        query_lens,
        inputs.block_tables,
        inputs.sinks,
        kv_layout,
        num_seq_shards,
        *scales,
        pages=stand_for,
    )


def _query_rows(step: Step, num_seq_shards: int) -> list[int]:
    """The row of each sequence's first query."""
    rows, per_shard = [], len(step.seqs) // num_seq_shards
    for shard in range(num_seq_shards):
        row = shard * step.num_queries
        for _, new in step.seqs[shard * per_shard : (shard + 1) * per_shard]:
            rows.append(row)
            row += new
        assert row <= (shard + 1) * step.num_queries
    return rows


def planned(inputs: StepInputs, backend: str, mesh: Mesh | None, cache: PagedKVCache) -> Plan:
    """The inputs' plan, for their cache or one of their sizes."""
    return make_plan(
        cache,
        inputs.context_lens,
        inputs.block_tables,
        inputs.query_lens,
        num_heads=inputs.step.num_heads,
        num_queries=inputs.num_queries,
        mesh=mesh,
        tuning=Tuning(backend=backend, interpret=interpret(backend)),
        **inputs.step.mask,
    )


def run_as(inputs: StepInputs, tuning: Tuning) -> tuple[np.ndarray, np.ndarray]:
    """Plans, writes the new tokens and attends, as told: (out, lse)."""
    cache, step = inputs.cache(written=False), inputs.step
    plan = make_plan(
        cache, inputs.context_lens, inputs.block_tables, inputs.query_lens,
        num_heads=step.num_heads, num_queries=inputs.num_queries, tuning=tuning, **step.mask,
    )  # fmt: skip
    cache = write_kv(cache, jnp.asarray(inputs.key), jnp.asarray(inputs.value), plan)
    sinks = None if inputs.sinks is None else jnp.asarray(inputs.sinks)
    options = {"soft_cap": step.soft_cap, "sinks": sinks, "return_lse": True}
    out, lse = attend(jnp.asarray(inputs.query), cache, plan, **options)
    return np.array(out), np.array(lse)


def exact(inputs: StepInputs, attend_token=None) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's (out, lse); of a quantised cache, of what its pages stand for."""
    caches, kv_layout = (inputs.key_cache, inputs.value_cache), inputs.kv_layout
    if inputs.pages:
        key, value = inputs.pages
        caches = key.exact, value.with_folded if attend_token else value.exact
        kv_layout = "tokens_first"
    return reference.step_attention(
        inputs.query,
        *caches,
        inputs.context_lens,
        inputs.block_tables,
        inputs.query_lens,
        kv_layout=kv_layout,
        sinks=inputs.sinks,
        soft_cap=inputs.step.soft_cap,
        num_seq_shards=inputs.num_seq_shards,
        attend_token=attend_token,
        **inputs.step.mask,
    )


def assert_exact(inputs: StepInputs, out, lse):
    """Fails where (out, lse) is further from the oracle than rounding to the dtype goes."""
    exact_out, exact_lse = exact(inputs)
    assert out.dtype == inputs.query.dtype
    if inputs.pages:
        plain_out, plain_lse = exact(inputs, quantised.plain_token)
        assert_close("out", out, exact_out, plain_out)
        return assert_close("lse", lse, exact_lse, plain_lse)
    # Weights are rounded to the cache's dtype before the second matmul, outputs after it.
    rounding = 2 * float(np.finfo(np.float32).eps)
    if inputs.step.dtype == "bfloat16":
        rounding = 2.0**-8 * 2
    plain_out = exact_out + rounding * np.nan_to_num(np.abs(exact_out)).max()
    assert_close("out", out, exact_out, plain_out)
    assert_close("lse", lse, exact_lse, exact_lse + 1e-5)
