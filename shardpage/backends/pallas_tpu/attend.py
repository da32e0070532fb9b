"""`attend` of the TPU backend: the walk, the call of the decode kernel, the merge."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...cache import PagedKVCache
from ...options import Attention, Tuning
from ...page_format import PageFormat
from ...partial import Partial
from ...plan import Reads
from ...varying import vary_together
from . import decode_kernel, rows, walk
from .chip import chip_of, interpreter
from .config import Config, configure
from .geometry import LANES, round_up
from .softmax import Logits
from .transforms import as_kernel


class Work(NamedTuple):
    """What `prepare` makes of the reads."""

    walk: walk.Schedule
    held: jax.Array  # [cores, queries, splits]: which segments have blocks on which core


def prepare(reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Work:
    """Lays out the walk; see `shardpage.backends` for the contract."""
    config = configure(page_format, num_heads, *_sizes(reads), tuning)
    return Work(*walk.schedule(reads.start, reads.stop, config.lengths))


def attend(
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: Work,
    attention: Attention,
    tuning: Tuning,
) -> Partial:
    """Attends over local pages with a Pallas TPU kernel; see `shardpage.backends`."""
    config = configure(cache.format, query.shape[1], *_sizes(reads), tuning)
    logits = Logits(attention.scale_of(cache.format.key_dim), attention.soft_cap)
    query_rows = rows.query_rows(config, query)
    call = as_kernel(functools.partial(_call, config, logits), tuning)
    result = call(work.walk, reads.ids_by_query(), query_rows, cache)
    return rows.merged_partial(config, *result, work.held)


def _sizes(reads: Reads) -> tuple[int, int]:
    """How many queries, and how wide the table is."""
    return reads.start.shape[0], reads.ids.shape[1]


def _call(
    config: Config,
    logits: Logits,
    tuning: Tuning,
    schedule: walk.Schedule,
    ids: jax.Array,
    query_rows: jax.Array,
    cache: PagedKVCache,
) -> tuple[jax.Array, jax.Array]:
    geometry, sizes, cores = config.geometry, config.sizes, config.cores
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    if sizes.paged:
        ids = _padded(ids, round_up(ids.shape[1], LANES)).reshape(-1, 1, LANES)
        blocks = schedule.blocks.reshape(-1, 1, schedule.blocks.shape[-1])
        schedule = schedule._replace(blocks=_padded(blocks, sizes.step_lanes))
    else:
        ids = _padded(ids, config.table_width).reshape(-1)
        schedule = schedule._replace(blocks=schedule.blocks.reshape(-1))
    agenda = hbm if sizes.paged else scalar
    args = vary_together(schedule, ids, query_rows, cache.arrays)
    varying = jax.typeof(args[0][0]).manual_axis_type
    whole = lambda shape, by_core=True: pl.BlockSpec(
        (1, *shape), lambda core: (core if by_core else 0, *(0,) * len(shape))
    )
    segments = (cores.count, config.num_segments)
    shapes = ((geometry.rows, geometry.format.row_dim), (geometry.lse_tiles, LANES))
    output = lambda shape: jax.ShapeDtypeStruct(
        (*segments, *shape), jnp.float32, manual_axis_type=varying
    )
    return pl.pallas_call(
        functools.partial(decode_kernel.kernel, config=config, logits=logits),
        grid=(cores.count,),
        in_specs=[
            walk.Schedule(agenda, scalar),
            agenda,
            whole(query_rows.shape[1:], cores.by_heads),
            (hbm,) * len(cache.arrays),
        ],
        out_specs=tuple(whole((config.num_segments, *shape)) for shape in shapes),
        scratch_shapes=decode_kernel.scratch_shapes(config),
        out_shape=tuple(map(output, shapes)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores.count > 1 else "arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=chip_of(tuning).vmem_bytes,
        ),
        interpret=interpreter(tuning),
        name="shardpage_decode",
    )(*args)


def _padded(array: jax.Array, width: int) -> jax.Array:
    """With zeros behind the last axis."""
    widths = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
    return jnp.pad(array, widths)
