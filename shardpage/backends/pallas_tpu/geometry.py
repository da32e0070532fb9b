"""How query heads are laid over the rows of a kernel.

Rows of all query heads are packed without gaps, so that heads with few queries share a tile of
8 rows: a *group* is what one pass of the softmax works on, either several KV heads of at most
8 rows together or one KV head of more.

A head_dim of which several fit the 128 lanes may be *packed*: a cache row then holds `pack`
consecutive tokens side by side. The kernel treats that as `pack` times as many queries: copy `j`
has its elements in the lanes of the j-th token of a row and zeros elsewhere, sees only those
tokens, and the copies' partial results are merged at the end.
"""

import dataclasses

from ...page_format import PageFormat

LANES = 128
SUBLANES = 8


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def page_tile_rows(page_format: PageFormat) -> int:
    """Rows that a page must be a multiple of."""
    if page_format.layout.token_major:  # of words
        return SUBLANES
    return 4 * SUBLANES if page_format.dtype.itemsize == 1 else SUBLANES


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The query rows of what one core works on."""

    format: PageFormat  # with the KV heads of one core
    queries_per_kv_head: int
    widens: bool = False  # see `Chip`
    integers: bool = False  # likewise

    @property
    def rows_in_use(self) -> int:
        """Rows in use per KV head: its queries, once for each token of a cache row."""
        return self.format.pack * self.queries_per_kv_head

    @property
    def rows_per_head(self) -> int:
        """Rows that a KV head takes: padded to a divisor or a multiple of 8."""
        used = self.rows_in_use
        return 1 << (used - 1).bit_length() if used < SUBLANES else round_up(used, SUBLANES)

    @property
    def rows_per_group(self) -> int:
        return max(self.rows_per_head, SUBLANES)

    @property
    def num_groups(self) -> int:
        return -(-self.format.num_kv_heads * self.rows_per_head // self.rows_per_group)

    @property
    def rows(self) -> int:
        """Rows per query token."""
        return self.num_groups * self.rows_per_group

    def heads_of(self, group: int) -> range:
        """The KV heads whose rows the group holds."""
        heads = self.rows_per_group // self.rows_per_head
        return range(group * heads, min((group + 1) * heads, self.format.num_kv_heads))

    def of_heads(self, num_kv_heads: int) -> "Geometry":
        """The rows of some of the KV heads."""
        return dataclasses.replace(
            self, format=dataclasses.replace(self.format, num_kv_heads=num_kv_heads)
        )

    @property
    def lse_tiles(self) -> int:
        """Tiles of 128 lanes that hold a logarithm for each row."""
        return -(-self.rows // LANES)
