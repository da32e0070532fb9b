"""The call of the prompt kernel: what it is given, and its results by query."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ....cache import PagedKVCache
from ....options import Tuning
from ....partial import Partial
from ....plan import Reads, rank
from ....tiles import Tiles
from ....varying import result_as, vary_together
from ..chip import chip_of, interpreter
from ..fetch import hbm_arrays
from ..geometry import LANES, round_up
from ..softmax import Logits
from ..transforms import as_kernel
from . import kernel
from .config import Config
from .walk import Schedule, schedule


class Work(NamedTuple):
    """What `prepare` makes of some tiles."""

    schedule: Schedule
    tile: jax.Array  # [queries]: of each, or any of another's
    place: jax.Array  # [queries]: in its tile
    own: jax.Array  # [queries]: which are in these tiles


def prepare(reads: Reads, tiles: Tiles, config: Config) -> Work:
    """Lays out the walk over some tiles."""
    query = jnp.arange(config.num_queries, dtype=jnp.int32)
    tile = jnp.maximum(rank(tiles.first_query, query, "right") - 1, 0)
    index = query - tiles.first_query[tile]
    own = (index >= 0) & (index < tiles.num_queries[tile])
    return Work(schedule(reads, tiles, config), tile, jnp.where(own, index, 0), own)


def ids_in_windows(ids: jax.Array) -> jax.Array:
    """Page ids in rows of whole windows of 128, to be read one at a time."""
    width = round_up(ids.shape[1], LANES)
    return jnp.pad(ids, ((0, 0), (0, width - ids.shape[1]))).reshape(-1, 1, LANES)


def query_rows(query: jax.Array, config: Config) -> jax.Array:
    """[shards, queries, head_rows, row_dim] float32, with a copy for each token of a cache row;
    zeros where a row holds something else."""
    shards = config.cores.count if config.cores.by_heads else 1
    rows = query.astype(config.format.compute_dtype).astype(jnp.float32)
    rows = rows.reshape(len(query), shards, config.num_heads, -1)
    rows = jnp.tile(rows, (1, 1, 1, config.format.pack))
    spare = config.head_rows - config.num_heads, config.format.row_dim - rows.shape[-1]
    rows = jnp.pad(rows, ((0, 0), (0, 0), *((0, more) for more in spare)))
    return jnp.moveaxis(rows, 1, 0)


def partial_of(out: jax.Array, lse: jax.Array, config: Config) -> Partial:
    """Results by query, from `out` as the kernels leave it, and lse [queries, shards, heads]."""
    shards, num_queries = out.shape[:2]
    first, elements = config.format.first_value, config.format.pack * config.format.value_dim
    out = out[:, :, : config.num_heads, first : first + elements].reshape(
        shards, num_queries, config.num_heads, config.format.pack, -1
    )
    out = jnp.moveaxis(out.sum(axis=3), 0, 1).reshape(num_queries, -1, config.format.value_dim)
    return Partial(out, lse.reshape(num_queries, -1))


def attend(
    config: Config,
    logits: Logits,
    tuning: Tuning,
    query: jax.Array,
    cache: PagedKVCache,
    ids: jax.Array,
    work: Work,
    before: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Attends with the queries of some tiles.

    Args:
      query: of `query_rows`.
      ids: of `ids_in_windows`.
      before: results of other queries, to be kept; or nothing.

    Returns:
      Results of all queries, in rows like theirs; and lse [queries, shards, heads], -inf of others.
    """
    call = as_kernel(functools.partial(_call, config, logits), tuning)
    out, lse = call(work.schedule, ids, query, cache, tuple(before))
    # Of each tile and token, then of each query.
    by_token = jnp.moveaxis(lse, 3, 2)[..., : config.num_heads]
    by_token = by_token.reshape(lse.shape[0], -1, config.num_heads)
    own = by_token[:, work.tile * config.tile_tokens + work.place]
    return out, jnp.where(work.own[:, None, None], jnp.moveaxis(own, 0, 1), -jnp.inf)


def _call(
    config: Config,
    logits: Logits,
    tuning: Tuning,
    walk: Schedule,
    ids: jax.Array,
    query: jax.Array,
    cache: PagedKVCache,
    before: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    first_page = jnp.int32(0) if cache.first_page is None else cache.first_page
    interpreted = bool(tuning.interpret)
    caches = hbm_arrays(cache, interpreted=interpreted)
    inputs = kernel.Inputs(walk, ids, first_page.reshape(1), query, caches, before)
    specs = kernel.Inputs(
        Schedule(scalar, scalar, scalar, hbm), hbm, scalar, hbm,
        (hbm,) * len(caches), (hbm,) * len(before),
    )  # fmt: skip
    inputs = vary_together(*inputs)
    lse_shape = (query.shape[0], walk.spans.shape[0], config.head_rows, config.tile_tokens)
    count = config.cores.count
    return pl.pallas_call(
        functools.partial(kernel.kernel, config=config, logits=logits),
        grid=(count,),
        in_specs=tuple(specs),
        out_specs=(hbm, hbm),
        scratch_shapes=kernel.scratch_shapes(config, interpreted=interpreted),
        out_shape=tuple(
            result_as(inputs[1], shape, jnp.float32) for shape in (query.shape, lse_shape)
        ),
        input_output_aliases={len(jax.tree.leaves(inputs)) - 1: 0} if before else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if count > 1 else "arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=chip_of(tuning).vmem_bytes,
        ),
        interpret=interpreter(tuning),
        name="shardpage_prompt",
    )(*inputs)
