"""The static sizes of one kernel, and how query heads are laid over its rows.

Rows of all query heads are packed without gaps, so that heads with few queries share a tile of
8 rows: a *group* is what one pass of the softmax works on, either several KV heads of at most
8 rows together or one KV head of more.

A head_dim of which several fit the 128 lanes may be *packed*: a cache row then holds `pack`
consecutive tokens side by side. The kernel treats that as `pack` times as many queries: copy `j`
has its numbers in the lanes of the j-th token of a row and zeros elsewhere, sees only those
tokens, and the copies' partial results are merged at the end.
"""

import dataclasses

import numpy as np

from ..kv_layout import KVLayout

LANES = 128
SUBLANES = 8


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of what one core works on.

    Attributes:
      kv: layout of the cache.
      num_kv_heads: KV heads of one core.
      queries_per_kv_head: query heads that share a KV head.
      head_dim: numbers of a key.
      pack: tokens that lie side by side in one cache row.
      page_rows: cache rows a page and head; a page holds `page_rows * pack` tokens.
      dtype: of the caches and of the matmul operands.
    """

    kv: KVLayout
    num_kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    pack: int
    page_rows: int
    dtype: np.dtype

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.page_rows * self.pack

    @property
    def row_dim(self) -> int:
        """Numbers a cache row."""
        return self.head_dim * self.pack

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Shape of one page of one cache array, all of the core's KV heads."""
        both = (2,) if self.kv.fused else ()
        return (*both, self.num_kv_heads, self.page_rows, self.row_dim)

    @property
    def num_arrays(self) -> int:
        """Cache arrays: one of keys and one of values, or one of both."""
        return 1 if self.kv.fused else 2

    @property
    def queries_per_head(self) -> int:
        """Rows in use a KV head: its queries, once for each token of a cache row."""
        return self.pack * self.queries_per_kv_head

    @property
    def rows_per_head(self) -> int:
        """Rows a KV head takes: padded to a divisor or a multiple of 8."""
        used = self.queries_per_head
        return 1 << (used - 1).bit_length() if used < SUBLANES else round_up(used, SUBLANES)

    @property
    def rows_per_group(self) -> int:
        return max(self.rows_per_head, SUBLANES)

    @property
    def num_groups(self) -> int:
        return -(-self.num_kv_heads * self.rows_per_head // self.rows_per_group)

    @property
    def rows(self) -> int:
        """Query rows a sequence."""
        return self.num_groups * self.rows_per_group

    def heads_of(self, group: int) -> range:
        """The KV heads whose rows the group holds."""
        heads = self.rows_per_group // self.rows_per_head
        return range(group * heads, min((group + 1) * heads, self.num_kv_heads))

    @property
    def out_lanes(self) -> int:
        """Lanes of an output row: the weighted values, then a tile that repeats the lse."""
        return round_up(self.row_dim, LANES) + LANES
