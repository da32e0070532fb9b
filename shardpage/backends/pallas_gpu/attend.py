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
from .mosaic import as_kernel, compiler_params, in_place, interpreter
from .scratch import Scratch, scratch
from .softmax import LOG2E, Logits
from .tiles import INVALID, Tiles, Work, work_of


def prepare(reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Work:
    """Tiles the queries, where a row may have several; see `shardpage.backends`."""
    config = configure(page_format, num_heads, reads, tuning)
    # Else XLA finds each element's tile anew where it gathers elements: 400 us of 3764 on an H200.
    return jax.lax.optimization_barrier(work_of(reads, config))


def attend(
    query: jax.Array,
    cache: PagedKVCache,
    reads: Reads,
    work: Work,
    attention: Attention,
    tuning: Tuning,
    *,
    final: bool = False,
) -> Partial:
    """Attends over local pages with Pallas Mosaic GPU kernels; see `shardpage.backends`."""
    final_dtype = query.dtype if final else None
    config = configure(cache.format, query.shape[1], reads, tuning, final_dtype)
    logits = Logits.of(attention, cache.format.key_dim)
    rows = _rows(config, query.astype(cache.format.compute_dtype), work)
    rows = split.queries(rows, cache.format) if config.pieces > 1 else (rows, None)
    state = work.state
    if cache.layer is not None:  # that may not be there
        state = jnp.where(cache.first_page < 0, INVALID, state)
    call = as_kernel(functools.partial(_call, config, logits), tuning)
    scales = cache.scales if cache.scale == "token" else ()
    ids = cache.in_layer(reads.ids)
    out, lse = call(*rows, pages.arrays(cache), scales, ids, work.tiles, state)
    partial = _partial(config, out, lse, reads, work)
    if not final:
        return partial
    finished = finish(mark(partial, reads.invalid_in(cache)), query.dtype, by_lse=True)
    as_it_is = config.in_place and partial.out.dtype == query.dtype
    return finished._replace(out=partial.out) if as_it_is else finished


def _rows(config: Config, query: jax.Array, work: Work) -> jax.Array:
    """The rows of each unit, `[units, query_rows, key_dim]`, or all queries as they are."""
    num_heads, group, dim = config.format.num_kv_heads, config.group, config.format.key_dim
    query = query.reshape(-1, num_heads, group, dim)
    if config.in_place:
        return query
    if work.query is not None:
        query = query.at[work.query].get(mode="clip").swapaxes(1, 2)
    query = query.reshape(config.num_units, -1, dim)
    spare = config.query_rows - query.shape[1]
    return jnp.pad(query, ((0, 0), (0, spare), (0, 0))) if spare else query


def _partial(config: Config, out: jax.Array, lse: jax.Array, reads: Reads, work: Work) -> Partial:
    """Each query's rows, of the units that read something."""
    num_queries, some = reads.start.shape[0], (reads.stop > reads.start)[:, None]
    lse = _by_query(config, lse[:, : config.rows], work).reshape(num_queries, -1)
    lse = jnp.where(some, lse * (1 / LOG2E), -jnp.inf)
    if config.in_place:
        return Partial(out.reshape(*lse.shape, -1), lse)
    out = out[:, : config.rows, : config.format.value_dim]
    out = _by_query(config, out, work).reshape(*lse.shape, -1)
    return Partial(jnp.where(some[..., None], out, 0.0), lse)


def _by_query(config: Config, rows: jax.Array, work: Work) -> jax.Array:
    """Rows of units `[units, rows, ...]` as `[queries, kv_heads, group, ...]`."""
    num_heads, count = config.format.num_kv_heads, config.tile_queries
    rows = rows.reshape(config.num_tiles, num_heads, count, config.group, *rows.shape[2:])
    place = work.place
    return rows[:, :, 0] if place is None else rows[place // count, :, place % count]


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
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    inputs = attend_kernel.Inputs(query, query_units, arrays, scales, ids, tiles)
    inputs, structure = jax.tree.flatten(vary_together(*inputs))
    outputs = attend_kernel.outputs(config, query.shape[0])
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
    return _merged(config, tuning, attend_kernel.Outputs(*outs), tiles, state)


def _merged(
    config: Config, tuning: Tuning, outputs: attend_kernel.Outputs, tiles: Tiles, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The results, with the units that were cut between shares merged."""
    flat = lambda x: x.reshape(*x.shape[:-2], -1, config.merge_width)
    places = (state, tiles.first, tiles.count) if config.in_place else ()
    inputs = merge_kernel.Inputs(flat(outputs.part_out), outputs.part_lse, outputs.cut, *places)
    inputs, structure = jax.tree.flatten(inputs)

    def body(*refs: Any) -> None:
        of_parts = jax.tree.unflatten(structure, refs[: len(inputs)])
        merge_kernel.kernel(of_parts, *refs[len(inputs) :], config=config)

    out, lse = in_place(
        body,
        [flat(outputs.out), outputs.lse],
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
