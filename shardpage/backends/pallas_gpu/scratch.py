"""Shared memory and barriers of a CTA."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config, query_smem_rows, scale_lanes, swizzle_bytes, unit_lanes
from .mosaic import MMA_ROWS

_TILING: Any = plgpu.TilingTransform  # abstract, as JAX's annotations have it
_SWIZZLE: Any = plgpu.SwizzleTransform


class Ring(NamedTuple):
    """Blocks of keys, or of values, which some fill and others take."""

    blocks: Any  # [stages, block_tokens, dim]
    full: Any
    free: Any


class Scales(NamedTuple):
    """Of tokens: as they arrive, and in the order of tokens."""

    arriving: Any  # [stages, pieces, lanes]: of keys, then of values
    key: Any  # [wide_stages, block_tokens], beside what is widened
    value: Any


class Scratch(NamedTuple):
    """What the warpgroups of a CTA share. Of two, the first is of keys, the second of values."""

    query: Any
    query_units: Any  # [query_slots, lanes], of queries that are split, or None
    arriving: tuple[Ring, Ring]  # blocks as stored
    wide: tuple[Ring | None, Ring | None]  # where matmuls do not take them so
    scales: Scales | None
    out: Any  # of whole units
    part_out: Any  # of parts, if another
    lse: Any
    query_full: Any
    query_free: Any
    weights: Any  # of a block, where a matmul takes them from here, or None

    @property
    def taken(self) -> tuple[Ring, Ring]:
        """Blocks as matmuls take them."""
        key, value = (wide or stored for wide, stored in zip(self.wide, self.arriving, strict=True))
        return key, value


def scratch(config: Config, interpreted: bool) -> Scratch:
    """Shapes, dtypes and numbers of arrivals."""
    page_format, wide_dtype = config.format, config.format.compute_dtype
    pieces = config.block_tokens // config.piece_tokens
    floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    arriving, wide = [], []
    for which, dim in enumerate((page_format.key_dim, page_format.value_dim)):
        widened = which in config.widened
        copies = pieces * (1 + config.scale_copies * (which == config.scales_with))
        takers = config.wideners if widened else config.consumers
        if widened and config.scale_copies and which == config.scales_with == 0:
            takers += config.wideners  # who widens values takes theirs
        arriving.append(_ring(config, page_format.dtype, (dim, dim), config.stages, copies, takers))
        ring = None
        if widened:
            arrivals, takers = config.wideners, config.consumers
            dims = dim, config.wide_dim(which)
            ring = _ring(config, wide_dtype, dims, config.wide_stages, arrivals, takers)
        wide.append(ring)
    scales = units = weights = part_out = None
    if config.scale_copies:
        ordered = config.wide_stages, config.block_tokens
        lanes = scale_lanes(config)[1]
        scales = Scales(floats(config.stages, pieces, lanes), floats(*ordered), floats(*ordered))
    query_dtype = page_format.dtype if config.pieces > 1 else wide_dtype
    if config.pieces > 1:
        units = floats(config.query_slots, unit_lanes(config))
    if config.tokens_first:
        out = _tiled(np.dtype(np.float32), config.query_rows, config.store_chunk)
        lse = floats(config.query_rows)
        shape = config.query_rows, config.block_tokens
        weights = _tiled(wide_dtype, *shape, dim=page_format.value_dim)  # as the values'
    else:
        wave = (config.consumers, MMA_ROWS)
        out = plgpu.SMEM((*wave, config.store_chunk), config.out_dtype)
        part_out = floats(*wave, config.part_chunk) if config.narrow else None
        lse = floats(*wave)
        # The interpreter has no matmul of an operand in registers.
        weights = _tiled(wide_dtype, *wave, config.block_tokens) if interpreted else None
    return Scratch(
        query=_tiled(query_dtype, query_smem_rows(config), page_format.key_dim),
        query_units=units,
        arriving=(arriving[0], arriving[1]),
        wide=(wide[0], wide[1]),
        scales=scales,
        out=out,
        part_out=part_out,
        lse=lse,
        query_full=_barriers(config.query_copies + (units is not None), config.query_slots),
        query_free=_barriers(config.consumers, config.query_slots),
        weights=weights,
    )


def _ring(
    config: Config,
    dtype: np.dtype,
    dims: tuple[int, int],
    stages: int,
    arrivals: int,
    takers: int,
) -> Ring:
    """Of rows of so many elements, in as many."""
    blocks = _tiled(dtype, stages, config.block_tokens, dims[1], dim=dims[0])
    return Ring(blocks, _barriers(arrivals, stages), _barriers(takers, stages))


def _tiled(dtype: np.dtype, *shape: int, dim: int | None = None) -> Any:
    """Rows as copies bring them and matmuls take them; `dim` where these have something else."""
    swizzle = swizzle_bytes(dim or shape[-1], dtype)
    transforms = (_TILING((8, swizzle // dtype.itemsize)), _SWIZZLE(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _barriers(arrivals: int, count: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
