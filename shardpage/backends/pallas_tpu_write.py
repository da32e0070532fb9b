"""`write` of the TPU backend: only the tiles that get tokens are read and written, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .. import blocks
from ..kernels import write as kernels
from ..kv_layout import KVLayout
from ..vma import vary_together
from . import pallas_tpu

# Bounds what a call takes besides the cache: scalar memory for the plan, tokens in float32.
_TOKENS_PER_CALL = 1 << 13


def write(
    kv: KVLayout,
    key_cache: Float[Array, "..."],
    value_cache: Float[Array, "..."] | None,
    key: Float[Array, "num_tokens num_kv_heads head_dim"],
    value: Float[Array, "num_tokens num_kv_heads head_dim"],
    page_ids: Int[Array, " num_tokens"],
    slots: Int[Array, " num_tokens"],
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Writes tokens into local pages; see `shardpage.backends` for the contract.

    Raises:
      NotImplementedError: for pages and dtypes that `attend` does not have either.
    """
    sizes = kv.sizes(key_cache.shape, key.shape[-1])
    tiles = kernels.Tiles(
        kv=kv,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        pack=key_cache.shape[-1] // sizes.head_dim,
        page_rows=key_cache.shape[-2],
        dtype=np.dtype(key_cache.dtype),
    )
    pallas_tpu.check_cache(tiles.dtype, tiles.head_dim, tiles.pack, tiles.page_rows)
    caches = [key_cache] if value_cache is None else [key_cache, value_cache]
    tokens = (jnp.stack([key, value], axis=1),) if kv.fused else (key, value)
    for start in range(0, key.shape[0], _TOKENS_PER_CALL):
        part = slice(start, start + _TOKENS_PER_CALL)
        caches = _write(
            tiles, sizes.num_pages, caches, [x[part] for x in tokens], page_ids[part], slots[part]
        )
    return caches[0], None if kv.fused else caches[1]


def _write(tiles: kernels.Tiles, num_pages: int, caches, tokens, page_ids, slots):
    plan, order = kernels.plan(tiles, num_pages, page_ids, slots)
    # A row a token, its numbers repeated for each place that it may have in a cache row.
    tokens = [
        jnp.tile(x[order].astype(jnp.float32), tiles.pack).reshape(
            x.shape[0], *tiles.heads, 1, tiles.row_dim
        )
        for x in tokens
    ]
    plan, tokens, caches = vary_together(plan, tuple(tokens), tuple(caches))
    scalar, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    num_before = len(plan) + len(tokens)
    return pl.pallas_call(
        functools.partial(kernels.kernel, tiles=tiles),
        in_specs=[
            jax.tree.map(lambda _: scalar, plan),
            (hbm,) * len(tokens),
            (hbm,) * len(caches),
        ],
        out_specs=(hbm,) * len(caches),
        out_shape=tuple(
            jax.ShapeDtypeStruct(
                cache.shape, cache.dtype, manual_axis_type=jax.typeof(cache).manual_axis_type
            )
            for cache in caches
        ),
        input_output_aliases={num_before + i: i for i in range(len(caches))},
        scratch_shapes=kernels.scratch_shapes(tiles, len(caches)),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=pallas_tpu.INTERPRET if blocks.current_chip() is blocks.UNKNOWN_CHIP else False,
        name="shardpage_write",
    )(plan, tokens, caches)
