"""Shared memory and barriers of a CTA."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config, query_smem_rows, scale_lanes, swizzle_bytes
from .mosaic import MMA_ROWS

_TILING: Any = plgpu.TilingTransform  # abstract, as JAX's annotations have it
_SWIZZLE: Any = plgpu.SwizzleTransform


class Ring(NamedTuple):
    """Blocks of keys and of values, which some fill and others take."""

    key: Any  # [stages, block_tokens, key_dim]
    value: Any
    key_full: Any
    value_full: Any
    key_free: Any
    value_free: Any


class Scales(NamedTuple):
    """Of tokens: as they arrive, and in the order of tokens."""

    arriving: Any  # [stages, pieces, lanes]: of keys, then of values
    key: Any  # [scale_stages, block_tokens]
    value: Any


class Scratch(NamedTuple):
    """What the warpgroups of a CTA share."""

    query: Any
    arriving: Ring | None  # blocks as stored, where matmuls do not take them so
    blocks: Ring  # as matmuls take them
    scales: Scales | None
    out: Any
    lse: Any
    query_full: Any
    query_free: Any
    half_full: Any  # the result of half the tokens, in `out` and `lse` of the other warpgroup
    half_free: Any
    weights: Any


def scratch(config: Config, interpreted: bool) -> Scratch:
    """Shapes, dtypes and numbers of arrivals."""
    page_format, dtype = config.format, config.format.compute_dtype
    pieces = config.block_tokens // config.piece_tokens
    wave = (config.consumers, MMA_ROWS)
    floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    arriving = scales = None
    if config.wide_stages:
        arrivals = pieces, pieces * (1 + config.scale_copies)
        arriving = _ring(config, page_format.dtype, config.stages, arrivals, takers=1)
        arrivals = 2 if config.scale_copies else 1, 1
        blocks = _ring(config, dtype, config.wide_stages, arrivals, config.consumers)
    else:
        blocks = _ring(config, dtype, config.stages, (pieces, pieces), config.consumers)
    if config.scale_copies:
        scales = Scales(
            floats(config.stages, pieces, scale_lanes(config)[1]),
            floats(config.scale_stages, config.block_tokens),
            floats(config.scale_stages, config.block_tokens),
        )
    return Scratch(
        query=_tiled(dtype, query_smem_rows(config), page_format.key_dim),
        arriving=arriving,
        blocks=blocks,
        scales=scales,
        out=floats(*wave, config.store_chunk),
        lse=floats(*wave),
        query_full=_barriers(1, config.query_slots),
        query_free=_barriers(config.consumers, config.query_slots),
        half_full=_barriers(1, 1) if config.halves > 1 else None,
        half_free=_barriers(1, 1) if config.halves > 1 else None,
        # The interpreter has no matmul of an operand in registers.
        weights=_tiled(dtype, *wave, config.block_tokens // config.halves) if interpreted else None,
    )


def _ring(
    config: Config, dtype: np.dtype, stages: int, arrivals: tuple[int, int], takers: int
) -> Ring:
    rows = (stages, config.block_tokens)
    return Ring(
        _tiled(dtype, *rows, config.format.key_dim),
        _tiled(dtype, *rows, config.format.value_dim),
        *(_barriers(count, stages) for count in arrivals),
        *(_barriers(takers, stages) for _ in arrivals),
    )


def _tiled(dtype: np.dtype, *shape: int) -> Any:
    """Rows as copies bring them and matmuls take them."""
    swizzle = swizzle_bytes(shape[-1], dtype)
    transforms = (_TILING((8, swizzle // dtype.itemsize)), _SWIZZLE(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _barriers(arrivals: int, count: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
