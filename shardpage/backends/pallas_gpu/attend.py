"""`attend` of the GPU backend: the tiles of queries, the two kernels, the partial."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...cache import PagedKVCache
from ...options import Attention, Tuning
from ...page_format import PageFormat
from ...partial import Partial, finish, mark
from ...plan import Reads
from ...varying import result_as, vary_together
from . import attend_kernel, merge_kernel, pages, split
from .config import Config, configure, reduction_bytes
from .mosaic import WARPGROUP, as_kernel, compiler_params, in_place, interpreter
from .scratch import Scratch, scratch
from .softmax import LOG2E, Logits
from .tiles import Tiles, Windows, Work, states, tile


def prepare(reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Work | None:
    """Tiles the queries, where a row may have several; see `shardpage.backends`."""
    config = configure(page_format, num_heads, reads, tuning)
    if reads.row is None:
        return None
    # Else XLA finds each element's tile anew where it gathers elements: 400 us of 3764 on an H200.
    return jax.lax.optimization_barrier(tile(reads, config))


def attend(
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: Work | None,
    attention: Attention,
    tuning: Tuning,
    *,
    final: bool = False,
) -> Partial:
    """Attends over local pages with Pallas Mosaic GPU kernels; see `shardpage.backends`."""
    final_dtype = query.dtype if final else None
    config = configure(cache.format, query.shape[1], reads, tuning, final_dtype)
    logits = Logits.of(attention, cache.format.key_dim)
    tiles = Tiles(reads.start, reads.stop) if work is None else work.tiles
    rows = _tiled(config, query.astype(cache.format.compute_dtype), work)
    rows = split.queries(rows, cache.format) if config.pieces > 1 else (rows, None)
    call = as_kernel(functools.partial(_call, config, logits), tuning)
    scales = cache.scales if cache.scale == "token" else ()
    invalid = reads.invalid_in(cache) if final else None
    state = states(reads, invalid) if config.out_in_place else None
    out, lse = call(*rows, pages.arrays(cache), scales, cache.in_layer(reads.ids), tiles, state)
    partial = _partial(config, out, lse, reads, work)
    if not final:
        return partial
    finished = finish(mark(partial, invalid), query.dtype, by_lse=True)
    return finished._replace(out=out) if config.out_in_place else finished


def _tiled(config: Config, query: jax.Array, work: Work | None) -> jax.Array:
    """The rows of each unit, `[copies, query_rows, key_dim]`, if the kernel does not find them."""
    if config.in_place:
        return query
    num_heads, group, dim = config.format.num_kv_heads, config.group, config.format.key_dim
    query = query.reshape(-1, num_heads, group, dim)
    if work is not None:
        query = query.at[work.query].get(mode="clip").transpose(0, 2, 3, 1, 4)
    query = query.reshape(config.num_units // config.fold, -1, dim)
    spare = config.query_rows - query.shape[1]
    return jnp.pad(query, ((0, 0), (0, spare), (0, 0))) if spare else query


def _partial(
    config: Config, out: jax.Array, lse: jax.Array, reads: Reads, work: Work | None
) -> Partial:
    """Each query's rows, of the units that read something."""
    fold, some = config.fold, (reads.stop > reads.start)[:, None]
    # Units that share a copy of queries have their rows one behind the other.
    lse = lse.reshape(-1, fold, WARPGROUP)
    own = [lse[:, i, i * config.rows : (i + 1) * config.rows] for i in range(fold)]
    lse = _by_query(config, jnp.stack(own, axis=1).reshape(-1, config.rows), work)
    lse = jnp.where(some, lse * (1 / LOG2E), -jnp.inf)
    if not config.out_in_place:
        out = _by_query(config, out[:, : config.rows, : config.format.value_dim], work)
        out = jnp.where(some[..., None], out, 0.0)
    return Partial(out, lse)


def _by_query(config: Config, rows: jax.Array, work: Work | None) -> jax.Array:
    """What units have for each row, `[queries, heads, ..]`."""
    num_heads, group, queries = config.format.num_kv_heads, config.group, config.tile_queries
    behind = rows.shape[2:]
    rows = rows.reshape(config.num_tiles, num_heads, group, queries, *behind)
    if work is None:
        rows = rows[:, :, :, 0]
    else:
        rows = rows[work.place // queries, :, :, work.place % queries]
    return rows.reshape(len(rows), num_heads * group, *behind)


def _call(
    config: Config,
    logits: Logits,
    tuning: Tuning,
    query: jax.Array,
    query_units: jax.Array | None,
    arrays: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...],
    ids: jax.Array,
    tiles: Tiles,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    *varied, state = vary_together(query, query_units, arrays, scales, ids, tiles, state)
    windows = attend_kernel.Inputs(*varied).tiles.windows
    inputs, structure = jax.tree.flatten(varied)
    outputs = attend_kernel.outputs(config)
    out_type = tuple(result_as(inputs[0], each.shape, each.dtype) for each in outputs)
    shared = scratch(config, bool(tuning.interpret))._asdict()
    missing: dict[str, Any] = {name: x for name, x in shared.items() if x is None}
    scratch_types = {name: x for name, x in shared.items() if x is not None}
    params = compiler_params(
        exact_math=logits.soft_cap is not None, reduction_bytes=reduction_bytes(config)
    )

    def body(*refs: Any, **scratch_refs: Any) -> None:
        ins = attend_kernel.Inputs(*jax.tree.unflatten(structure, refs[: len(inputs)]))
        outs = attend_kernel.Outputs(*refs[len(inputs) :])
        shared = Scratch(**scratch_refs, **missing)
        attend_kernel.Kernel(config, logits, ins, outs, shared).run()

    outs = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        kernel_name="shardpage_attend",
        compiler_params=params,
        **interpreter(tuning),
    )(*inputs)
    return _merged(config, tuning, attend_kernel.Outputs(*outs), windows, state)


def _merged(
    config: Config,
    tuning: Tuning,
    outputs: attend_kernel.Outputs,
    windows: Windows | None,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The results, with the units that were cut between shares merged."""
    flat = lambda x: x.reshape(x.shape[0], -1, config.merge_width)
    inputs = merge_kernel.Inputs(flat(outputs.part_out), outputs.part_lse, outputs.cut, None, None)
    out = flat(outputs.out)
    if config.out_in_place:
        inputs, out = inputs._replace(windows=windows, state=state), outputs.out
    inputs, structure = jax.tree.flatten(inputs)

    def body(*refs: Any) -> None:
        *ins, out_ref, lse_ref = refs
        ins = merge_kernel.Inputs(*jax.tree.unflatten(structure, ins))
        merge_kernel.kernel(ins, out_ref, lse_ref, config=config)

    out, lse = in_place(
        body,
        [out, outputs.lse],
        inputs,
        grid=merge_kernel.grid(config),
        grid_names=("share", "vector"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="shardpage_merge",
        compiler_params=compiler_params(),
        **interpreter(tuning),
    )
    return out.reshape(outputs.out.shape), lse
