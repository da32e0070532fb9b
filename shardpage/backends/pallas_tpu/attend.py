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
from .geometry import LANES
from .softmax import Logits
from .transforms import as_kernel


class Work(NamedTuple):
    """What `prepare` makes of the reads."""

    walk: walk.Schedule
    held: jax.Array  # [cores, queries, splits]: which segments have blocks on which core


def prepare(reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Work:
    """Lays out the walk; see `shardpage.backends` for the contract."""
    config = configure(page_format, num_heads, *_sizes(reads), tuning)
    num_cores = 1 if config.cores.by_heads else config.cores.count
    sizes = {"block_tokens": config.block_tokens, "num_splits": config.num_splits}
    return Work(*walk.schedule(reads.start, reads.stop, num_cores=num_cores, **sizes))


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
    return rows.merged_partial(config, result, work.held)


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
) -> jax.Array:
    geometry, sizes, cores = config.geometry, config.sizes, config.cores
    scalar: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm: Any = pl.BlockSpec(memory_space=pl.ANY)
    table = ids.reshape(-1)
    if sizes.table_entries:
        spare = -ids.shape[1] % LANES
        table = jnp.pad(ids, ((0, 0), (0, spare))).reshape(config.num_queries, -1, 1, LANES)
    args = vary_together(schedule, table, query_rows, cache.arrays)
    varying = jax.typeof(args[0][0]).manual_axis_type
    shape = (cores.count, config.num_segments, geometry.rows, geometry.out_lanes)
    return pl.pallas_call(
        functools.partial(decode_kernel.kernel, config=config, logits=logits),
        grid=(cores.count,),
        in_specs=[
            jax.tree.map(lambda _: scalar, schedule),
            hbm if sizes.table_entries else scalar,
            hbm,
            (hbm,) * len(cache.arrays),
        ],
        out_specs=hbm,
        scratch_shapes=decode_kernel.scratch_shapes(config),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores.count > 1 else "arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=chip_of(tuning).vmem_bytes,
        ),
        interpret=interpreter(tuning),
        name="shardpage_decode",
    )(*args)
