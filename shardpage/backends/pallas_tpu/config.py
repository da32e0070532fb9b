"""The static configuration of a decode kernel, from shapes and options; refuses what it has not."""

import dataclasses

from ...options import Tuning
from ...page_format import QUANTISED, PageFormat
from . import token_major
from .chip import Chip, chip_of
from .geometry import LANES, Geometry, page_tile_rows, round_up
from .sizes import (
    Demand,
    Sizes,
    choose_sizes,
    heads_per_pass,
    query_vmem_bytes,
    vmem_page_bytes,
)
from .walk import Lengths

_DTYPES = ("float32", "bfloat16", *QUANTISED)
_LARGE_COPY_BYTES = 32 << 10


@dataclasses.dataclass(frozen=True)
class Cores:
    """TensorCores that share a call: by KV heads, or by blocks of the walk."""

    count: int = 1
    by_heads: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static about a kernel."""

    geometry: Geometry
    sizes: Sizes
    cores: Cores
    num_queries: int
    num_splits: int
    max_pages: int  # columns of the table

    @property
    def lengths(self) -> Lengths:
        """What the walk is made for."""
        cores = 1 if self.cores.by_heads else self.cores.count
        page_size = self.geometry.format.page_size
        return Lengths(page_size, self.max_pages, self.num_splits, cores, self.sizes)

    @property
    def num_parts(self) -> int:
        """Results of the kernel that are merged for each query and head."""
        return self.lengths.num_cores * self.num_splits * self.geometry.format.pack

    @property
    def heads_per_pass(self) -> int:
        """KV heads of a step that are worked on at once; all if it has several blocks."""
        if self.sizes.step_blocks > 1:
            return self.geometry.format.num_kv_heads
        return heads_per_pass(self.geometry, self.sizes.block_pages)

    @property
    def num_segments(self) -> int:
        return self.num_queries * self.num_splits


def configure(
    page_format: PageFormat,
    num_heads: int,
    num_queries: int,
    max_pages: int,
    tuning: Tuning,
    num_rows: int | None = None,
) -> Config:
    """The kernel for queries of `num_heads` heads over a table of `max_pages` columns.

    `num_rows` are the rows of the table; None: one for each query.

    Raises:
      NotImplementedError: for shapes and options that the kernel does not have.
    """
    geometry, cores = _share(page_format, num_heads, tuning)
    num_splits = max(1, min(tuning.num_splits, max_pages))
    rows = num_queries if num_rows is None else num_rows
    demand = Demand(geometry, cores.count, num_queries, rows, num_splits, max_pages)
    sizes = choose_sizes(demand, chip_of(tuning), tuning.pages_per_block)
    return Config(geometry, sizes, cores, num_queries, num_splits, max_pages)


def queries_per_call(page_format: PageFormat, num_heads: int, tuning: Tuning) -> int:
    """How many queries, with their results, may stay in fast memory during a call."""
    geometry, _ = _share(page_format, num_heads, tuning)
    room = chip_of(tuning).vmem_bytes // 4
    return max(1, room // query_vmem_bytes(geometry, max(1, tuning.num_splits)))


def _share(page_format: PageFormat, num_heads: int, tuning: Tuning) -> tuple[Geometry, Cores]:
    """What one core works on."""
    check_format(page_format)
    queries_per_kv_head = num_heads // page_format.num_kv_heads
    chip = chip_of(tuning)
    cores = choose_cores(page_format, chip, tuning)
    if cores.by_heads:
        heads = page_format.num_kv_heads // cores.count
        page_format = dataclasses.replace(page_format, num_kv_heads=heads)
    return Geometry(page_format, queries_per_kv_head, chip.widens, chip.integers), cores


def check_format(page_format: PageFormat) -> None:
    """Refuses caches that the kernels cannot work on."""
    pack, head_dim = page_format.pack, page_format.key_dim
    if page_format.layout.token_major and (reason := token_major.refusal(page_format)):
        raise NotImplementedError(f"{reason}, or backend='xla'")
    if page_format.dtype.name not in _DTYPES:
        raise NotImplementedError(
            f"a TPU has no matmul for caches of {page_format.dtype.name}; use bfloat16 or float32, "
            "or backend='xla'"
        )
    if pack > 1 and page_format.row_dim != LANES:
        raise NotImplementedError(
            f"rows of {pack} tokens of {head_dim=} are {page_format.row_dim} elements long; a row "
            f"holds one token, or packs as many as fill {LANES}"
        )
    # Of bfloat16, half a tile is loaded as fast; of one byte, less than a tile cannot be copied.
    tile_rows = page_tile_rows(page_format)
    if page_format.page_rows % tile_rows:
        nearest = round_up(page_format.page_rows, tile_rows) * pack
        raise NotImplementedError(
            f"page_size={page_format.page_size}, {pack} per cache row, does not fill tiles of "
            f"{tile_rows} rows; use page_size={nearest}, or backend='xla'"
        )


def has(page_format: PageFormat) -> bool:
    """Whether the kernels can work on such caches."""
    try:
        check_format(page_format)
    except NotImplementedError:
        return False
    return True


def choose_cores(page_format: PageFormat, chip: Chip, tuning: Tuning) -> Cores:
    """How the cores of this device share the call."""
    mode, heads = tuning.cores, page_format.num_kv_heads
    by_heads = not page_format.layout.token_major  # where a token's heads lie together
    if mode == "off" or (mode in (None, "auto") and chip.cores == 1):
        return Cores()
    if chip.cores == 1:
        raise NotImplementedError(
            f"cores={mode!r} splits a call over the two TensorCores of a v4 or v5p chip; a device "
            f"of this kind ({chip.name}) is one core: use None or 'auto'"
        )
    if mode == "kv_head" and not by_heads:
        raise NotImplementedError(
            f"cores='kv_head' of kv_layout={page_format.layout.label!r}, where all heads of a "
            "token lie together: use 'batch', which cuts the work at any block of pages, or 'auto'"
        )
    if mode == "kv_head" and heads % chip.cores:
        raise ValueError(
            f"cores='kv_head' needs KV heads divisible by the {chip.cores} cores, a device holds "
            f"{heads}; use 'batch', which cuts the work at any block of pages, or 'auto'"
        )
    if mode in (None, "auto"):
        # Both balance. Heads need no merge, but halve the copies, which should stay large.
        halves = vmem_page_bytes(page_format) // (page_format.num_arrays * chip.cores)
        by_heads = by_heads and heads % chip.cores == 0 and halves >= _LARGE_COPY_BYTES
        return Cores(chip.cores, by_heads)
    return Cores(chip.cores, mode == "kv_head")
