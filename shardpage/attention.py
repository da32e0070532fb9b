"""`attend`: paged attention over a cache, from checked arguments to a sharded call."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import array_checks, backends, sharded
from .cache import PagedKVCache
from .options import Attention, Tuning
from .partial import add_sinks, merge_over_axis, spread_nan
from .plan import PageRange, make_plan
from .shard_layout import Split, axis_names

# Columns of a wide table that are looked up at a time, as far as the longest context goes. A loop
# costs a GPU a wait of its host, and on TPUs loops and scatters are slow: all at once there.
_PIECES = {"cpu": 1 << 11, "gpu": 1 << 16}
# A collective costs a GPU some 30 us, in which NVLink would move more than this.
_GATHER_UP_TO_BYTES = {"gpu": 1 << 20}

_INPUT_DIMS = (("seqs", "heads", None), ("seqs",), ("seqs", None), ("heads",))
_OUTPUT_DIMS = (("seqs", "heads", None), ("seqs", "heads"))


def attend(
    query: Float[Array, "num_seqs num_heads head_dim"],
    cache: PagedKVCache,
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    sinks: Float[Array, " num_heads"] | None,
    attention: Attention,
    tuning: Tuning,
    split: Split | None,
) -> tuple[Float[Array, "num_seqs num_heads head_dim"], Float[Array, "num_seqs num_heads"]]:
    """Attends with one query token per sequence, and returns lse too: see `page_attention`."""
    array_checks.attention(query, cache, context_lens, block_tables, sinks)
    if split is not None:
        split.check_rows("num_seqs", query.shape[0], "sequences of context_len 0")
        split.check_cache(cache.format, cache.num_pages)
    tuning = sharded.resolve(tuning, split, cache)
    lens, tables = map(sharded.as_int32, (context_lens, block_tables))
    inputs, options = (query, lens, tables, sinks), (attention, tuning)
    return sharded.run(_attend_here, options, split, cache, inputs, _INPUT_DIMS, _OUTPUT_DIMS)


def _attend_here(
    options: tuple[Attention, Tuning],
    split: Split | None,
    cache: PagedKVCache,
    query: jax.Array,
    context_lens: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One device's part: plan, attend, merge."""
    attention, tuning = options
    backend = backends.load(tuning)
    prepare = lambda reads: backend.prepare(reads, query.shape[1], cache.format, tuning)
    with jax.named_scope("plan"):
        pages = PageRange.here(cache.num_pages, split)
        page_size = cache.format.page_size
        piece = _PIECES.get(str(tuning.platform))
        plan = make_plan(
            context_lens, block_tables, page_size, pages, attention, prepare, piece=piece
        )
    with jax.named_scope("attend"):
        partial = backend.attend(query, cache, plan.reads, plan.work, attention, tuning)
    with jax.named_scope("merge"):
        if split is not None and (context := axis_names(split.layout.context)):
            limit = _GATHER_UP_TO_BYTES.get(str(tuning.platform), 0)
            partial = merge_over_axis(partial, context, gather_up_to_bytes=limit)
        if sinks is not None:
            partial = add_sinks(partial, sinks)
        partial = spread_nan(partial)
    out = jnp.where(plan.invalid[:, None, None], jnp.nan, partial.out)
    lse = jnp.where(plan.invalid[:, None], jnp.nan, partial.lse)
    return out.astype(query.dtype), lse
