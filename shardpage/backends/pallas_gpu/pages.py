"""Which pages a block is of, and where keys and values are in the cache arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...cache import PagedKVCache
from ...page_format import KVLayout, PageFormat
from .config import Config
from .share import Segment, first_block
from .tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of a segment's blocks, piece by piece: what one copy brings."""

    config: Config
    ids: Any  # [rows, pages]
    row: jax.Array
    first: jax.Array  # block of the row
    first_page: jax.Array  # that is read, and the last
    last_page: jax.Array

    @classmethod
    def of(cls, config: Config, ids: Any, tiles: Tiles, segment: Segment) -> "Pages":
        start, stop = tiles.start[segment.tile], tiles.stop[segment.tile]
        page_size = jnp.int32(config.format.page_size)
        return cls(
            config,
            ids,
            segment.tile if tiles.row is None else tiles.row[segment.tile],
            first_block(config, start) + segment.block,
            lax.div(start, page_size),
            lax.div(stop - 1, page_size),
        )

    def pieces_of(self, i: jax.Array | int) -> tuple[jax.Array, ...]:
        """The numbers, in the row, of a block's pieces."""
        per_block = self.config.block_tokens // self.config.piece_tokens
        return tuple((self.first + i) * per_block + j for j in range(per_block))

    def ids_of(self, i: jax.Array | int) -> tuple[jax.Array, ...]:
        """Where in the cache the pages of a block's pieces are.

        Tokens that are not read are of pages that may not be looked up: a page that is serves.
        """
        per_page = jnp.int32(self.config.format.page_size // self.config.piece_tokens)
        pages = [lax.div(number, per_page) for number in self.pieces_of(i)]
        return tuple(
            self.ids[self.row, jnp.clip(page, self.first_page, self.last_page)] for page in pages
        )


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
