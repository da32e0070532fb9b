"""What a peer's tests need beside its attention, and runs on TPUs only: in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def widened(reference: Callable) -> Callable:
    """tpu-inference's reference, which of a float8 cache gets the same numbers in float32.

    So that it rounds neither queries nor weights to float8. What it returns is as without.
    """

    def on_float32(queries, keys, values, kv_cache, *rest, q_scale=None, **options):
        if kv_cache.dtype.itemsize > 1:
            return reference(queries, keys, values, kv_cache, *rest, q_scale=q_scale, **options)
        arrays = (x.astype(jnp.float32) for x in (queries, keys, values, kv_cache))
        *tokens, pages = arrays
        pages = pages.reshape(*pages.shape[:2], -1, 1, pages.shape[-1])  # a word holds one row
        out, pages = reference(*tokens, pages, *rest, **options)
        return out.astype(queries.dtype), pages.astype(kv_cache.dtype).reshape(kv_cache.shape)

    return on_float32


def widened_pages(reference: Callable) -> Callable:
    """JAX's reference, which of float8 pages gets the same numbers in the queries' dtype.

    So that it does not round weights to float8, as it does without scales.
    """

    def on_wider(queries, kv_pages, *rest, **options):
        dtype = queries.dtype if kv_pages.dtype.itemsize == 1 else kv_pages.dtype
        return reference(queries, kv_pages.astype(dtype), *rest, **options)

    return on_wider


def sglang_jax_cache_update(
    new_kv, slices, kv_cache, num_kv_update_slices, page_size, num_slices_per_block
):
    """sglang-jax's `kv_cache_update_impl`, for slices of one token or none, as its pool makes them.

    Args:
      new_kv: `[tokens, 1, words, packing, dim]`.
      slices: `[3, num_slices]`: a slot of the cache, a token of new_kv, how many tokens.
      kv_cache: `[pages, page_size, words, packing, dim]`.
      num_kv_update_slices, page_size, num_slices_per_block: blocks of their kernel; not used.
    """
    del num_kv_update_slices, page_size, num_slices_per_block
    slot, token, length = slices
    # As integers: on CPUs JAX 0.10 scatters bfloat16 through a float32 copy of the whole pool.
    words = jnp.dtype(f"uint{8 * kv_cache.dtype.itemsize}")
    tokens, slots = (
        jax.lax.bitcast_convert_type(x.reshape(-1, *x.shape[2:]), words) for x in (new_kv, kv_cache)
    )
    slots = slots.at[jnp.where(length > 0, slot, len(slots))].set(tokens[token], mode="drop")
    return jax.lax.bitcast_convert_type(slots, kv_cache.dtype).reshape(kv_cache.shape)
