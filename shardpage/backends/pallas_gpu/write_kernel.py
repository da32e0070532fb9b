"""The write kernel's body: tokens come to shared memory and leave to their slots, all heads at a
time.

A token's heads lie a page apart in the cache, or side by side: one copy takes them there.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...page_format import PageFormat
from .pages import rows_at

_AT_ONCE = 4  # tokens that are on their way together, keys and values each
_ALIGNED_BYTES = 128  # what a copy to shared memory begins at
_CTAS_PER_SM = 4


def num_ctas(num_tokens: int, num_sms: int) -> int:
    """As many as find tokens to write, up to what runs at the same time."""
    return min(-(-num_tokens // _AT_ONCE), num_sms * _CTAS_PER_SM)


def kernel(
    key_ref: Any,
    value_ref: Any,
    page_ref: Any,
    slot_ref: Any,
    *cache_refs: Any,
    page_format: PageFormat,
    num_pages: int,
) -> None:
    """Writes `key[i]`, `value[i]` to slot `slot[i]` of `page[i]`, unless that is `num_pages`."""
    num_tokens, heads, dim = key_ref.shape
    rows = _aligned_rows(heads, dim, page_format)
    pl.run_scoped(
        lambda staged, arrived: _copy_all(
            (key_ref, value_ref), page_ref, slot_ref, cache_refs, staged, arrived,
            page_format=page_format, num_pages=num_pages, num_tokens=num_tokens,
        ),
        plgpu.SMEM((2, _AT_ONCE, rows, dim), page_format.dtype),
        plgpu.Barrier(num_arrivals=2 * _AT_ONCE),
        collective_axes="warpgroup",
    )  # fmt: skip


def _copy_all(
    token_refs: Any, page_ref: Any, slot_ref: Any, cache_refs: Any, staged: Any, arrived: Any,
    *, page_format: PageFormat, num_pages: int, num_tokens: int,
) -> None:  # fmt: skip
    heads = token_refs[0].shape[1]
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    slices = [
        (which, i, staged.at[which, i, pl.ds(0, heads)])
        for i in range(_AT_ONCE)
        for which in (0, 1)
    ]

    def some(round_number, _):
        first = (round_number * ctas + cta) * _AT_ONCE
        # Of the last tokens once more, rather than of none: as many copies arrive each time.
        token = [jnp.minimum(first + i, num_tokens - 1) for i in range(_AT_ONCE)]
        where = [(page_ref[t], slot_ref[t]) for t in token]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for which, i, stage in slices:
            plgpu.copy_gmem_to_smem(token_refs[which].at[token[i]], stage, arrived)
        plgpu.barrier_wait(arrived)
        for which, i, stage in slices:
            page, slot = where[i]
            kept = (first + i < num_tokens) & (page >= 0) & (page < num_pages)

            @pl.when(kept)
            def _(which=which, page=page, slot=slot, stage=stage):
                # All heads' keys or values of one token, `[heads, dim]`.
                to = rows_at(page_format, cache_refs, which, page, slice(None), slot, padded=True)
                plgpu.copy_smem_to_gmem(stage, to)

        return 0

    lax.fori_loop(0, -(-num_tokens // (_AT_ONCE * ctas)), some, 0)
    plgpu.wait_smem_to_gmem(0)


def _aligned_rows(heads: int, dim: int, page_format: PageFormat) -> int:
    multiple = _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, dim * page_format.dtype.itemsize)
    return -(-heads // multiple) * multiple
