"""`make_plan`: what follows from the lengths and tables of a step, once for all its layers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from . import array_checks, backends, sharded
from .arguments import instance, integer
from .cache import PagedKVCache
from .options import Mask, Tuning
from .plan import MadeFor, Plan, Queries, Reads, plan_reads, plan_writes
from .shard_layout import ShardLayout, Split
from .tables import PageRange

# Columns of a wide table that are looked up at a time, as far as the longest context goes. A loop
# costs a GPU a wait of its host, and on TPUs loops and scatters are slow: all at once there.
_PIECES = {"cpu": 1 << 11, "gpu": 1 << 16}

_INPUT_DIMS = (("seqs",), ("seqs", None), ("seqs",))
_OUTPUT_DIMS = (("seqs",), ("seqs",), ("pages",), ("pages",))


def make_plan(
    cache: PagedKVCache,
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    query_lens: Int[Array, " num_seqs"] | None = None,
    *,
    num_heads: int,
    num_queries: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    causal: bool = True,
    max_context_len: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    tuning: Tuning | None = None,
) -> Plan:
    """Plans a step: prompts, running sequences and guesses to verify, all in one batch.

    A step's *queries* are the new tokens of all sequences, one after another: `query_lens` says how
    many each has, and `context_lens` counts them. Token `i` of a sequence is at position
    `context_len - query_len + i`. On a mesh each `seqs` shard has an equal part of the queries,
    which its own sequences fill from the left. What is behind the last token is padding.

    Every layer of the step uses the plan, in `attend` and `write_kv`; layers that see other
    positions (a model of windows and full layers) take a plan each. It is a pytree: make it inside
    a `jax.jit` and outside of the loop over layers, or hand it in.

    Args:
      cache: the cache, or one like it (`PagedKVCache.abstract`): only its shapes are looked at.
      context_lens: `[num_seqs]` int32, tokens of each sequence, the step's own included.
      block_tables: `[num_seqs, max_blocks]` int32, page ids, *global* on a mesh. Entries at or
        past `ceil(context_len / page_size)` are never looked up.
      query_lens: `[num_seqs]` int32, new tokens of each sequence, 0 allowed; None for one each, or
        none where `context_len` is 0.
      num_heads: query heads, over all devices.
      num_queries: rows of the query array, at least the sum of `query_lens` (of each `seqs` shard,
        in its part); needed with `query_lens`.
      window: a token sees the last this many positions only, its own included; pages before those
        are not looked up and may have been freed. None for all.
      chunk: a token sees positions of its own multiple of `chunk` only. None for all.
      causal: a token sees none behind its own; False shows it the whole context.
      max_context_len: a longer context is invalid; None for the table's width.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      tuning: how to compute it; None chooses.

    Returns:
      The plan. A sequence whose lengths are impossible, or whose table holds a bad page id where
      it is looked up, gets NaN from `attend`; `validate_step` says on the host which and why.

    Raises:
      ValueError: if arguments contradict each other or the mesh; the message says what would work.
      NotImplementedError: if the backend does not have an option; the message says which does.
    """
    array_checks.tables(cache, context_lens, block_tables, query_lens)
    integer("num_heads", num_heads)
    mask = Mask(window, chunk, causal, max_context_len)
    if query_lens is None:
        num_queries = context_lens.shape[0] if num_queries is None else num_queries
        if num_queries != context_lens.shape[0]:
            raise ValueError(
                f"{num_queries=} for {context_lens.shape[0]} sequences of one token each; pass "
                "query_lens= where they have more or fewer"
            )
    elif num_queries is None:
        raise ValueError("with query_lens=, pass num_queries=: rows of the query array")
    num_queries = integer("num_queries", num_queries)
    split = Split.of(mesh, layout)
    if split is not None:
        split.check_rows("num_seqs", context_lens.shape[0], "sequences of context_len 0")
        split.check_rows("num_queries", num_queries, "tokens of no sequence, behind each part")
        split.check_cache(cache.format, cache.num_pages)
    array_checks.query_heads(num_heads, cache.format.num_kv_heads)
    instance("tuning", tuning, Tuning | None, "a Tuning, or None")
    tuning = sharded.resolve(tuning or Tuning(), split, cache)
    made_for = MadeFor(cache.format, cache.num_pages, num_heads, tuning, split)
    arrays = (context_lens, block_tables, query_lens)
    inputs = [None if x is None else sharded.as_int32(x) for x in arrays]
    options = (made_for, mask, num_queries)
    positions, invalid, reads, writes = sharded.run(
        _plan_here, options, split, inputs, _INPUT_DIMS, _OUTPUT_DIMS
    )
    return Plan(positions, invalid, reads, writes, made_for)


def _plan_here(
    options: tuple[MadeFor, Mask, int],
    split: Split | None,
    context_lens: jax.Array,
    block_tables: jax.Array,
    query_lens: jax.Array | None,
) -> tuple[Any, ...]:
    """One device's part: the fields of a `Plan`."""
    made_for, mask, num_queries = options
    made_for = made_for.here
    if split is not None:
        num_queries //= split.shards.seqs
    lens = (context_lens, query_lens, num_queries)
    reads, work, queries = reads_here(made_for, mask, lens, block_tables)
    page_format, tuning = made_for.page_format, made_for.tuning
    row = jnp.arange(num_queries, dtype=jnp.int32) if queries.row is None else queries.row
    pages = PageRange.here(made_for.num_pages, split)
    with jax.named_scope("plan"):
        writes = plan_writes(row, queries.position, block_tables, page_format.page_size, pages)
        write_work = backends.load(tuning).prepare_writes(
            writes, made_for.num_pages, page_format, tuning
        )
    per_shard = ((reads, work), (writes, write_work))
    return queries.position, queries.invalid, *per_shard


def reads_here(
    made_for: MadeFor,
    mask: Mask,
    lens: tuple[jax.Array, jax.Array | None, int],
    block_tables: jax.Array,
) -> tuple[Reads, Any, Queries]:
    """What this device's queries read, and the backend's work: the part of a plan that attends.

    `lens` are `context_lens`, `query_lens` and how many rows the query array has.
    """
    page_format, tuning = made_for.page_format, made_for.tuning
    pages = PageRange.here(made_for.num_pages, made_for.split)
    with jax.named_scope("plan"):
        reads, queries = plan_reads(
            *lens,
            block_tables,
            page_format.page_size,
            pages,
            mask,
            piece=_PIECES.get(str(tuning.platform)),
            aligned=tuning.invariant,
        )
        work = backends.load(tuning).prepare(reads, made_for.num_heads, page_format, tuning)
    return reads, work, queries
