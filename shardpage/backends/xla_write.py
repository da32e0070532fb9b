"""Writing tokens into pages with XLA: a scatter, which XLA does in place on a donated cache."""

import jax

from ..kv_layout import KVLayout


def write(
    kv: KVLayout,
    key_cache: jax.Array,
    value_cache: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    page_ids: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Writes tokens into local pages; see `shardpage.backends` for the contract."""
    return kv.put(key_cache, value_cache, page_ids, slots, key, value)
