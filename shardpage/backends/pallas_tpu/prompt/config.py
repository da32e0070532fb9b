"""The static configuration of a prompt kernel: tiles, blocks, and what they take of fast memory."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from ....options import Tuning
from ....page_format import PageFormat
from ..chip import chip_of
from ..config import Cores, check_format, choose_cores
from ..geometry import LANES, SUBLANES, round_up
from ..sizes import vmem_page_bytes

# Rows that a matmul has of each KV head: so many that loading the keys into it is nothing beside.
_TILE_ROWS = 2048
_PART_ROWS = 1024
_ROWS_AT_ONCE = 2048  # of some parts
_ROWS_TOGETHER, _MOST_TOGETHER = 512, 8
_MAX_TILE_TOKENS = 256
_BLOCK_TOKENS = 1024
_PIECE_TOKENS = 256
_RESERVE_BYTES = 2 << 20  # what else the compiler takes
# Blocks that the ring holds: one is worked on, the others are on their way. Powers of two.
_PLACES, _PLACES_OF_FEW = 2, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static about a prompt kernel."""

    format: PageFormat  # with the KV heads of one core
    queries_per_kv_head: int
    cores: Cores
    num_queries: int
    max_pages: int  # columns of the table
    tile_tokens: int  # a power of two
    block_pages: int  # a power of two, at most 128
    places: int  # in the ring; a power of two
    widens: bool = False  # see `Chip`

    @property
    def num_heads(self) -> int:
        return self.format.num_kv_heads * self.queries_per_kv_head

    @property
    def head_rows(self) -> int:
        """Query heads in memory: padded to whole tiles of 8."""
        return round_up(self.num_heads, SUBLANES)

    @property
    def rows(self) -> int:
        """Rows of a tile per KV head: first all tokens of its first query head."""
        return self.queries_per_kv_head * self.tile_tokens

    @property
    def part_rows(self) -> int:
        """Rows of one KV head that are worked on at a time: all tokens of some query heads."""
        heads = max(1, min(self.queries_per_kv_head, _PART_ROWS // self.tile_tokens))
        while self.queries_per_kv_head % heads:
            heads -= 1
        return heads * self.tile_tokens

    def rows_of(self, head: Any) -> tuple[Any, Any]:
        """The KV head of a query head, and the rows of its tokens."""
        kv_head, query = (
            lax.div(head, self.queries_per_kv_head),
            lax.rem(head, self.queries_per_kv_head),
        )
        first = pl.multiple_of(query * self.tile_tokens, self.tile_tokens)
        return kv_head, pl.ds(first, self.tile_tokens)

    @property
    def num_parts(self) -> int:
        return self.format.num_kv_heads * (self.rows // self.part_rows)

    @property
    def parts_at_once(self) -> int:
        """Parts in one straight piece of code, so that each hides what the others wait for."""
        return _largest_divisor(self.num_parts, _ROWS_AT_ONCE // self.part_rows)

    @property
    def parts_together(self) -> int:
        """Of those, small ones whose scores come first: see `softmax`."""
        return _largest_divisor(
            self.parts_at_once, min(_MOST_TOGETHER, _ROWS_TOGETHER // self.part_rows)
        )

    def part(self, number: Any) -> tuple[Any, Any]:
        """The KV head of a part, and its rows."""
        per_head = self.rows // self.part_rows
        if per_head == 1:
            return number, pl.ds(0, self.part_rows)
        first = lax.rem(number, per_head) * self.part_rows
        return lax.div(number, per_head), pl.ds(
            pl.multiple_of(first, self.part_rows), self.part_rows
        )

    @property
    def block_rows(self) -> int:
        """Cache rows of a block, per KV head."""
        return self.block_pages * self.format.page_rows

    @property
    def piece_pages(self) -> int:
        """Pages that are worked on at a time where not every query sees the whole block."""
        return min(self.block_pages, _power_of_two_within(_PIECE_TOKENS // self.format.page_size))

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.format.page_size

    @property
    def windows(self) -> int:
        """Windows of 128 page ids in a row of the table."""
        return -(-self.max_pages // LANES)

    @property
    def vmem_bytes(self) -> int:
        """Vector memory that the kernel takes; of logits and keys what the compiler may spill."""
        kv_heads, row = self.format.num_kv_heads, round_up(self.format.row_dim, LANES)
        rows, tokens = kv_heads * self.rows, self.tile_tokens * self.head_rows
        pages = self.places * self.block_pages * vmem_page_bytes(self.format)
        queries = self.format.pack * rows * row * self.format.compute_dtype.itemsize
        sums = 4 * rows * (3 * LANES + 2 * row)
        moved = 2 * 4 * tokens * row
        spilled = 4 * round_up(self.block_rows, LANES) * (self.format.pack * self.part_rows + row)
        return pages + queries + sums + moved + self.parts_together * spilled


def configure(
    page_format: PageFormat,
    num_heads: int,
    num_queries: int,
    max_pages: int,
    tuning: Tuning,
    *,
    few: bool = False,
) -> Config:
    """The kernel for ragged queries of `num_heads` heads over a table of `max_pages` columns.

    `few`: in the smallest tiles that there are, for rows of few queries.

    Raises:
      NotImplementedError: for shapes and options that the kernel does not have.
    """
    check_format(page_format)
    chip = chip_of(tuning)
    cores = choose_cores(page_format, chip, tuning)
    queries_per_kv_head = num_heads // page_format.num_kv_heads
    if cores.by_heads:
        heads = page_format.num_kv_heads // cores.count
        page_format = dataclasses.replace(page_format, num_kv_heads=heads)
    room = chip.vmem_bytes - _RESERVE_BYTES
    config, places = None, _PLACES_OF_FEW if few else _PLACES
    shape = (page_format, queries_per_kv_head, cores, num_queries, max_pages)
    for tokens, pages in _ever_smaller(page_format, queries_per_kv_head, few, tuning):
        config = Config(*shape, tokens, pages, places, chip.widens)
        if config.vmem_bytes <= room:
            return config
    assert config is not None
    raise NotImplementedError(
        f"{config.tile_tokens} query tokens of {config.num_heads} heads against blocks of "
        f"{config.block_tokens} tokens take {config.vmem_bytes:,} B of VMEM, a kernel has "
        f"{room:,} B. Use fewer pages per block, a smaller page_size, or split the KV heads over "
        "more devices"
    )


def _ever_smaller(
    page_format: PageFormat, queries_per_kv_head: int, few: bool, tuning: Tuning
) -> Iterator[tuple[int, int]]:
    """Tokens of a tile and pages of a block, first the best ones."""
    least = 4 * SUBLANES // page_format.compute_dtype.itemsize  # rows of a tile in memory
    tokens = min(_MAX_TILE_TOKENS, _power_of_two_within(_TILE_ROWS // queries_per_kv_head))
    tokens = least if few else max(least, tokens)
    fixed = tuning.pages_per_block
    pages = min(LANES, _power_of_two_within(fixed or _BLOCK_TOKENS // page_format.page_size))
    yield tokens, pages
    while tokens > least or (pages > 1 and not fixed):
        small = tokens <= 4 * least and 8 * tokens <= pages * page_format.page_size
        if tokens == least or (small and pages > 1 and not fixed):
            pages //= 2
        else:
            tokens //= 2
        yield tokens, pages


def _power_of_two_within(most: int) -> int:
    return 1 << (max(most, 1).bit_length() - 1)


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, max(most, 1) + 1) if number % n == 0)
