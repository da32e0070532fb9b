"""Where keys and values are in the cache arrays, as the kernels index them."""

from typing import Any

import jax
from jax.experimental import pallas as pl

from ...cache import PagedKVCache
from ...page_format import KVLayout, PageFormat


def arrays(cache: PagedKVCache) -> tuple[jax.Array, ...]:
    """The cache's arrays with one key or value per row, those of a head apart from each other."""
    cache = cache.unpacked()
    if not cache.layout.interleaved:
        return cache.arrays
    (both,) = cache.arrays
    return (both.reshape(*both.shape[:-2], -1, 2, both.shape[-1]),)


def rows_at(
    page_format: PageFormat, refs: Any, which: int, page: Any, head: Any, token: Any, *,
    padded: bool = False,
) -> Any:  # fmt: skip
    """Keys (0) or values (1) of a page: some tokens of a head, or some heads of a token.

    Args:
      refs: of `arrays(cache)`.
      head, token: an index of the one, a slice of the other.
      padded: with what is behind them in a row, if anything.
    """
    dim = slice(None)
    if page_format.padding and not padded:
        dim = pl.ds(0, page_format.key_dim)
    match page_format.layout:
        case KVLayout.BLOCKS_FIRST:
            return refs[which].at[page, head, token]
        case KVLayout.HEADS_FIRST:
            return refs[which].at[head, page, token]
        case KVLayout.FUSED:
            return refs[0].at[page, which, head, token]
        case KVLayout.TOKENS_FIRST:
            return refs[which].at[page, token, head, dim]
        case KVLayout.INTERLEAVED | KVLayout.INTERLEAVED_WORDS:
            return refs[0].at[page, token, head, which, dim]
