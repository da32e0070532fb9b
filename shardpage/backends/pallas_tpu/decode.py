"""Queries that are walked over one by one: the walk, the call of the decode kernel, the merge."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...cache import PagedKVCache, first_page
from ...options import Tuning
from ...page_format import PageFormat
from ...partial import Partial, finish, mark
from ...plan import Reads
from ...varying import result_as, vary_together
from . import decode_kernel, rows, walk
from .chip import chip_of, interpreter
from .config import Config, configure, queries_per_call
from .fetch import hbm_arrays
from .geometry import LANES, round_up
from .softmax import Logits
from .transforms import as_kernel

# What the kernel may leave a final result in.
_OUTPUTS = (jnp.float32, jnp.bfloat16)


class Work(NamedTuple):
    """What `prepare` makes of the reads of some queries."""

    walk: walk.Schedule
    ids: jax.Array  # of the table, as the kernel has them


def prepare(
    reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning
) -> tuple[Work, ...]:
    """Lays out the walk of each call of the kernel."""
    row, work = _rows_of(reads), []
    invalid = jnp.zeros(row.shape, bool) if reads.invalid is None else reads.invalid
    for part in _parts(len(row), num_heads, page_format, tuning):
        spans = (row[part], reads.start[part], reads.stop[part], invalid[part])
        config = _configure(page_format, num_heads, len(spans[0]), reads, tuning)
        schedule = walk.schedule(*spans, reads.ids, config.lengths)
        work.append(_as_in_memory(config, schedule, reads.ids))
    return tuple(work)


def _parts(
    num_queries: int, num_heads: int, page_format: PageFormat, tuning: Tuning
) -> list[slice]:
    """The queries of each call: as many as stay in fast memory."""
    most = queries_per_call(page_format, num_heads, tuning)
    return [slice(first, first + most) for first in range(0, num_queries, most)]


def _rows_of(reads: Reads) -> jax.Array:
    num_rows = reads.ids.shape[0]
    if reads.row is None:
        return jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.clip(reads.row, 0, num_rows - 1)


def _configure(
    page_format: PageFormat, num_heads: int, num_queries: int, reads: Reads, tuning: Tuning
) -> Config:
    num_rows, max_pages = reads.ids.shape
    return configure(page_format, num_heads, num_queries, max_pages, tuning, num_rows)


def _as_in_memory(config: Config, schedule: walk.Schedule, ids: jax.Array) -> Work:
    """Flat for scalar memory; or in rows of whole lanes, to be read in windows."""
    if config.sizes.paged:
        ids = _padded(ids, round_up(ids.shape[1], LANES)).reshape(-1, 1, LANES)
        ids = jnp.pad(ids, ((0, 1), (0, 0), (0, 0)))  # windows come in twos
        num_cores, *_, num_steps = schedule.blocks.shape
        blocks = schedule.blocks.reshape(num_cores, -1, num_steps).mT  # by step
        blocks = _padded(blocks.reshape(num_cores * num_steps, 1, -1), config.sizes.step_lanes)
    else:
        ids, blocks = ids.reshape(-1), schedule.blocks.reshape(-1)
        ids = _padded(ids, len(ids) + config.sizes.block_pages)  # read, not used
    return Work(schedule._replace(blocks=blocks, vacant=schedule.vacant.reshape(-1)), ids)


def _padded(array: jax.Array, width: int) -> jax.Array:
    """With zeros behind the last axis."""
    widths = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
    return jnp.pad(array, widths)


def attend(
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: tuple[Work, ...],
    logits: Logits,
    tuning: Tuning,
    *,
    final: bool = False,
) -> Partial:
    """Attends with each query by itself; `final` as `shardpage.backends` has it."""
    num_queries, num_heads, _ = query.shape
    parts, partials = _parts(num_queries, num_heads, cache.format, tuning), []
    by_kernel = False
    for part, some in zip(parts, work, strict=True):
        here = query[part]
        config = _configure(cache.format, num_heads, len(here), reads, tuning)
        by_kernel = final and config.num_parts == 1
        dtype = query.dtype if by_kernel and query.dtype in _OUTPUTS else jnp.float32
        call = as_kernel(functools.partial(_call, config, logits, by_kernel, dtype), tuning)
        out, lse = call(some.walk, some.ids, rows.query_rows(config, here), cache)
        if len(work) > 1:
            # else XLA may join a call with the concatenation, which takes VMEM that the kernel has
            out, lse = jax.lax.optimization_barrier((out, lse))
        partials.append(rows.merged_partial(config, out, lse))
    partial = Partial(*map(jnp.concatenate, zip(*partials, strict=True)))
    if by_kernel:
        return partial._replace(out=partial.out.astype(query.dtype))
    return finish(mark(partial, reads.invalid_in(cache)), query.dtype) if final else partial


def _call(
    config: Config,
    logits: Logits,
    final: bool,
    dtype: Any,
    tuning: Tuning,
    schedule: walk.Schedule,
    ids: jax.Array,
    query_rows: jax.Array,
    cache: PagedKVCache,
) -> tuple[jax.Array, jax.Array]:
    geometry, cores = config.geometry, config.cores
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    agenda = hbm if config.sizes.paged else scalar
    layer = jnp.zeros(1, jnp.int32) if cache.layer is None else cache.layer.reshape(1)
    interpreted = bool(tuning.interpret)
    caches = hbm_arrays(cache, interpreted=interpreted)
    inputs = vary_together(schedule, ids, layer, query_rows, caches)
    whole = lambda shape, by_core=True: pl.BlockSpec(
        (1, *shape),
        lambda core: (core if by_core else 0, *(0,) * len(shape)),
        pipeline_mode=pl.Buffered(1),
    )
    shapes = [
        (config.num_segments, geometry.rows, geometry.format.row_dim),
        (config.num_segments, geometry.lse_tiles, LANES),
    ]
    output = lambda shape, dtype: result_as(inputs[1], (cores.count, *shape), dtype)
    layers = {"num_layers": cache.num_layers or 1, "num_pages": cache.num_pages}
    how = decode_kernel.How(logits, functools.partial(first_page, **layers), final)
    specs = decode_kernel.Inputs(
        schedule=walk.Schedule(agenda, scalar, scalar, scalar),
        ids=agenda,
        layer=scalar,
        query=whole(query_rows.shape[1:], cores.by_heads),
        caches=(hbm,) * len(caches),
    )
    return pl.pallas_call(
        functools.partial(decode_kernel.kernel, config=config, how=how),
        grid=(cores.count,),
        in_specs=tuple(specs),
        out_specs=tuple(map(whole, shapes)),
        scratch_shapes=decode_kernel.scratch_shapes(config, interpreted=interpreted),
        out_shape=tuple(map(output, shapes, (dtype, jnp.float32))),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores.count > 1 else "arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=chip_of(tuning).vmem_bytes,
        ),
        interpret=interpreter(tuning),
        name="shardpage_decode",
    )(*inputs)
