"""The TPU backend: one persistent Pallas kernel a TensorCore. See `kernels/README.md`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import blocks
from ..kernels import decode, rows, softmax, walk
from ..kernels.decode import Config, Cores
from ..kernels.geometry import LANES, SUBLANES, Geometry
from ..kv_layout import KVLayout
from ..pages import LocalPages
from ..partial import Partial
from ..spec import AttentionSpec
from ..vma import vary_together

_DTYPES = ("float32", "bfloat16")
_LARGE_COPY_BYTES = 32 << 10
# Tests run the interpreter with race detection by changing this.
INTERPRET = pltpu.InterpretParams()


def attend(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array | None,
    pages: LocalPages,
    spec: AttentionSpec,
) -> Partial:
    """Attends over this device's pages with a Pallas TPU kernel.

    Args:
      query: `[num_seqs, num_heads, head_dim]`.
      key_cache: in the layout of `spec.kv`, float32 or bfloat16. Its rows may be packed: last two
        axes `[page_size // pack, pack * head_dim]`, the same bytes as `[page_size, head_dim]`.
      value_cache: as key_cache, or None if fused.
      pages: what to attend to.
      spec: options.

    Returns:
      Attention and lse in float32, over the pages of this device.

    Raises:
      NotImplementedError: for shapes and options that the kernel does not have.
    """
    if not spec.inline_seq_dim:
        raise NotImplementedError(
            "inline_seq_dim=False makes each sequence a grid step of its own, where nothing can be "
            "fetched ahead across sequences; this kernel walks over all of them in one loop: use "
            "inline_seq_dim=True"
        )
    geometry = _geometry(query, key_cache, spec.kv)
    interpret = spec.platform != "tpu" if spec.interpret is None else spec.interpret
    if interpret and jax.process_count() > 1:
        raise NotImplementedError(
            "Pallas kernels are interpreted where there is no TPU, and JAX's interpreter knows one "
            f"process, not {jax.process_count()}: it would wait for ever; use backend='xla'"
        )
    chip = blocks.current_chip()
    cores = _cores(spec, chip, geometry)
    if cores.by_heads:
        geometry = dataclasses.replace(geometry, num_kv_heads=geometry.num_kv_heads // cores.count)
    num_seqs, max_pages = pages.ids.shape
    num_splits = max(1, min(spec.num_splits, max_pages))
    config = Config(
        geometry=geometry,
        sizes=blocks.decode_sizes(
            geometry,
            chip,
            cores,
            num_seqs=num_seqs,
            num_splits=num_splits,
            max_pages=max_pages,
            block_pages=spec.pages_per_compute_block,
        ),
        logits=softmax.Logits(spec.scale, spec.soft_cap),
        cores=cores,
        num_seqs=num_seqs,
        num_splits=num_splits,
    )
    caches = (key_cache,) if value_cache is None else (key_cache, value_cache)
    return _attend(config, INTERPRET if interpret else False, query, caches, pages)


def _geometry(query: jax.Array, key_cache: jax.Array, kv: KVLayout) -> Geometry:
    """Reads the sizes off the arrays; refuses what the kernel cannot do."""
    num_heads, head_dim = query.shape[1:]
    sizes = kv.sizes(key_cache.shape, head_dim)
    pack = key_cache.shape[-1] // head_dim
    geometry = Geometry(
        kv=kv,
        num_kv_heads=sizes.num_kv_heads,
        queries_per_kv_head=num_heads // sizes.num_kv_heads,
        head_dim=head_dim,
        pack=pack,
        page_rows=sizes.page_size // pack,
        dtype=np.dtype(key_cache.dtype),
    )
    check_cache(geometry.dtype, head_dim, pack, geometry.page_rows)
    return geometry


def check_cache(dtype: np.dtype, head_dim: int, pack: int, page_rows: int) -> None:
    """Refuses caches that the kernels cannot work on."""
    if dtype.name not in _DTYPES:
        raise NotImplementedError(
            f"a TPU has no matmul for caches of {dtype.name}; use bfloat16 or float32, or "
            "backend='xla'"
        )
    if pack > 1 and head_dim * pack != LANES:
        raise NotImplementedError(
            f"rows of {pack} tokens of {head_dim=} are {head_dim * pack} numbers long; a row holds "
            f"one token, or packs as many as fill {LANES}"
        )
    if page_rows % SUBLANES:
        nearest = -(-page_rows // SUBLANES) * SUBLANES * pack
        raise NotImplementedError(
            f"page_size={page_rows * pack}, {pack} to a cache row, does not fill tiles of "
            f"{SUBLANES} rows; use page_size={nearest}, or backend='xla'"
        )


def _cores(spec: AttentionSpec, chip: blocks.Chip, geometry: Geometry) -> Cores:
    """How the cores of this device share the call."""
    mode, heads = spec.megacore_mode, geometry.num_kv_heads
    if mode is None or (mode == "auto" and chip.cores == 1):
        return Cores()
    if chip.cores == 1:
        raise NotImplementedError(
            f"megacore_mode={mode!r} splits a call over the two TensorCores of a v4 or v5p chip; "
            f"a device of this kind ({chip.name}) is one core: use megacore_mode=None or 'auto'"
        )
    if mode == "kv_head" and heads % chip.cores:
        raise ValueError(
            f"megacore_mode='kv_head' needs KV heads divisible by the {chip.cores} cores, a device "
            f"holds {heads}; use 'batch', which cuts the work at any page block, or 'auto'"
        )
    if mode == "auto":
        # Both balance. Heads need no merge, but halve the copies, which should stay large.
        halves = blocks.page_bytes(geometry) // (geometry.num_arrays * chip.cores)
        by_heads = heads % chip.cores == 0 and halves >= _LARGE_COPY_BYTES
        return Cores(chip.cores, by_heads)
    return Cores(chip.cores, by_heads=mode == "kv_head")


def _attend(
    config: Config, interpret: Any, query: jax.Array, caches: tuple, pages: LocalPages
) -> Partial:
    cores = config.cores
    plan, held = walk.plan(
        pages.start,
        pages.stop,
        block_tokens=config.block_tokens,
        num_splits=config.num_splits,
        num_cores=1 if cores.by_heads else cores.count,
    )
    result = _call(config, interpret, plan, pages.ids, rows.query_rows(config, query), caches)
    return rows.merged_partial(config, result, held)


def _call(config: Config, interpret: Any, plan, ids, query, caches) -> jax.Array:
    geometry, sizes, cores = config.geometry, config.sizes, config.cores
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    if sizes.table_entries:
        spare = -ids.shape[1] % LANES
        table = jnp.pad(ids, ((0, 0), (0, spare))).reshape(config.num_seqs, -1, 1, LANES)
    else:
        table = ids.reshape(-1)
    args = vary_together(plan, table, query, caches)
    return pl.pallas_call(
        functools.partial(decode.kernel, config=config),
        grid=(cores.count,),
        in_specs=[
            jax.tree.map(lambda _: scalar, plan),
            hbm if sizes.table_entries else scalar,
            hbm,
            (hbm,) * len(caches),
        ],
        out_specs=hbm,
        scratch_shapes=decode.scratch_shapes(config),
        out_shape=jax.ShapeDtypeStruct(
            (cores.count, config.num_segments, geometry.rows, geometry.out_lanes),
            jnp.float32,
            manual_axis_type=jax.typeof(args[0][0]).manual_axis_type,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if cores.count > 1 else "arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=blocks.current_chip().vmem_bytes,
        ),
        interpret=interpret,
        name="shardpage_decode",
    )(*args)
