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
    key: Any  # [wide_stages, block_tokens], beside the keys themselves
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
    weights: Any


def scratch(config: Config, interpreted: bool) -> Scratch:
    """Shapes, dtypes and numbers of arrivals."""
    page_format, dtype = config.format, config.format.compute_dtype
    pieces = config.block_tokens // config.piece_tokens
    wave = (config.consumers, MMA_ROWS)
    floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    both_take = config.consumers, config.consumers
    arriving = scales = None
    if config.wide_stages:
        # Scales come with keys; who widens values takes theirs.
        arrivals = pieces * (1 + config.scale_copies), pieces
        takers = 2 if config.scale_copies else 1, 1
        arriving = _ring(config, page_format.dtype, config.stages, arrivals, takers)
        blocks = _ring(config, dtype, config.wide_stages, (1, 1), both_take)
    else:
        blocks = _ring(config, dtype, config.stages, (pieces, pieces), both_take)
    if config.scale_copies:
        scales = Scales(
            floats(config.stages, pieces, scale_lanes(config)[1]),
            floats(config.wide_stages, config.block_tokens),
            floats(config.wide_stages, config.block_tokens),
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
        # The interpreter has no matmul of an operand in registers.
        weights=_tiled(dtype, *wave, config.block_tokens) if interpreted else None,
    )


def _ring(
    config: Config,
    dtype: np.dtype,
    stages: int,
    arrivals: tuple[int, int],
    takers: tuple[int, int],
) -> Ring:
    rows = (stages, config.block_tokens)
    return Ring(
        _tiled(dtype, *rows, config.format.key_dim),
        _tiled(dtype, *rows, config.format.value_dim),
        *(_barriers(count, stages) for count in arrivals),
        *(_barriers(count, stages) for count in takers),
    )


def _tiled(dtype: np.dtype, *shape: int) -> Any:
    """Rows as copies bring them and matmuls take them."""
    swizzle = swizzle_bytes(shape[-1], dtype)
    transforms = (_TILING((8, swizzle // dtype.itemsize)), _SWIZZLE(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _barriers(arrivals: int, count: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
