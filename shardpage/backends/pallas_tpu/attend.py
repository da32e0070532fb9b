"""`attend` of the TPU backend: which queries go to which kernel.

Where every row has one query, all go to the decode kernel. In a step of ragged queries it depends
on how many a row has: one goes to the decode kernel; more go to the prompt kernel, in tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...cache import PagedKVCache
from ...options import Attention, Tuning
from ...page_format import PageFormat
from ...partial import Partial, finish, mark
from ...plan import Reads
from ...tiles import Tiles, tiles_of
from . import decode
from .prompt import attend as prompt
from .prompt import config as prompt_config
from .softmax import Logits


class StepWork(NamedTuple):
    """What `prepare` makes of the reads of ragged queries."""

    single: tuple[Reads, tuple[decode.Work, ...], jax.Array]  # with the query of each row
    tiled: tuple[prompt.Work, ...]
    ids: jax.Array  # of the table, as the prompt kernel has them


def prepare(reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Any:
    """Lays out the walks of all kernels; see `shardpage.backends` for the contract."""
    if reads.row is None:
        return decode.prepare(reads, num_heads, page_format, tuning)
    configs = _configs(reads, num_heads, page_format, tuning)
    single, *tiled = tiles_of(reads, (1, *(c.tile_tokens for c in configs)), compact=True)
    alone = Reads(reads.ids, _row(reads, single), single.start, single.stop)
    first = jnp.where(single.num_queries > 0, single.first_query, len(reads.start))
    work = [prompt.prepare(reads, t, c) for t, c in zip(tiled, configs, strict=True)]
    decoding = decode.prepare(alone, num_heads, page_format, tuning)
    return StepWork((alone, decoding, first), tuple(work), prompt.ids_in_windows(reads.ids))


def _row(reads: Reads, tiles: Tiles) -> jax.Array:
    assert reads.row is not None
    return jnp.minimum(reads.row.at[tiles.first_query].get(mode="clip"), len(reads.ids) - 1)


def _configs(
    reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning
) -> list[prompt_config.Config]:
    """The kernels for few and for many queries of a row, as far as there can be such."""
    shape = (page_format, num_heads, len(reads.start), reads.ids.shape[1], tuning)
    few, many = prompt_config.configure(*shape, few=True), prompt_config.configure(*shape)
    return [few, many] if min(len(reads.start), many.tile_tokens) > few.tile_tokens else [few]


def attend(
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: Any,
    attention: Attention,
    tuning: Tuning,
    *,
    final: bool = False,
) -> Partial:
    """Attends over local pages with Pallas TPU kernels; see `shardpage.backends`."""
    logits = Logits(attention.scale_of(cache.format.key_dim), attention.soft_cap)
    if reads.row is None:
        return decode.attend(query, cache, reads, work, logits, tuning, final=final)
    configs = _configs(reads, query.shape[1], cache.format, tuning)
    rows, lses = prompt.query_rows(query, configs[0]), []
    tiled_out: list[jax.Array] = []
    for config, tiled in zip(configs, work.tiled, strict=True):
        new, lse = prompt.attend(config, logits, tuning, rows, cache, work.ids, tiled, tiled_out)
        tiled_out = [new]
        lses.append(lse)
    out, lse = prompt.partial_of(tiled_out[0], jnp.max(jnp.stack(lses), axis=0), configs[0])
    alone, decoding, first = work.single
    single = decode.attend(query.at[first].get(mode="clip"), cache, alone, decoding, logits, tuning)
    put = lambda array, new: array.at[first].set(new, mode="drop")
    partial = Partial(put(out, single.out), put(lse, single.lse))
    return finish(mark(partial, reads.invalid_in(cache)), query.dtype) if final else partial
