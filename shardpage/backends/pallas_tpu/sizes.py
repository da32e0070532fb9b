"""Sizes of the decode kernel, from a model of the chip's memories and their latency.

A step should hold enough independent blocks that the latency of each (two matmuls and a softmax,
some 600 cycles) hides behind the others, and the rings be deep enough that bytes keep flowing for
the time a copy takes to arrive. What is left is what fits.
"""

import dataclasses
import math
from collections.abc import Iterator

from ...page_format import SCALE_DTYPE, PageFormat
from . import token_major
from .chip import MIB, Chip
from .geometry import LANES, SUBLANES, Geometry, round_up

_STEP_BYTES = 4 * MIB
_BLOCK_BYTES = 2 * MIB
_PASS_BYTES = 2 * MIB
_MIN_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 512  # of two bytes an element, or of more; twice as many of one
# Tiles of logits, 8 rows of 128 tokens, that a step's softmaxes keep in registers.
_STEP_TILES = 64
_MIN_RING_PLACES = 2
_MAX_RING_PLACES = 8
# What one copy may bring, of pages that follow each other: more makes no copy faster.
_RUN_TOKENS = 64
_RUN_BYTES = 32 << 10
# What the compiler takes besides our buffers: spilled registers, its own stack.
_VMEM_RESERVE_BYTES = 2 * MIB
_SMEM_RESERVE_BYTES = 64 << 10
IDS_AHEAD = 2
_STEP_FIELDS = 8  # scalars that say what a block is


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of blocks, steps and rings."""

    block_pages: int  # at most 128 if the agenda is paged
    step_blocks: int
    ring_places: int  # steps that each of the two rings holds
    paged: bool = False  # whether the agenda comes from HBM, not all at once
    run_pages: int = 1  # that one copy brings where their ids follow each other

    @property
    def step_pages(self) -> int:
        return self.step_blocks * self.block_pages

    @property
    def ring_blocks(self) -> int:
        """Blocks in both rings: those of one step are worked on, the others are on their way."""
        return 2 * self.ring_places * self.step_blocks

    @property
    def step_lanes(self) -> int:
        """Scalars of a step of a paged agenda."""
        return round_up(self.step_blocks * _STEP_FIELDS, LANES)

    @property
    def agenda_steps(self) -> int:
        """Steps of a paged agenda that are on their way or still needed; a power of two."""
        return _power_of_two(2 * self.ring_places + 2 * IDS_AHEAD + 2)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of one core's kernel."""

    geometry: Geometry
    num_cores: int  # that share a device's work
    num_queries: int
    num_rows: int  # of the table
    num_splits: int  # segments per query
    max_pages: int  # width of the table

    def vmem_bytes(self, sizes: Sizes) -> int:
        """Vector memory that a kernel of these sizes takes."""
        geometry, page_format = self.geometry, self.geometry.format
        row = round_up(page_format.row_dim, LANES)
        pages = sizes.ring_blocks * sizes.block_pages * vmem_page_bytes(page_format)
        sums = 4 * geometry.rows * (2 * LANES + row)
        return pages + sums + self.num_queries * query_vmem_bytes(geometry, self.num_splits)

    def smem_bytes(self, sizes: Sizes) -> int:
        """Scalar memory of an agenda that is not paged: the walk's steps, and page ids."""
        blocks = self.num_queries * -(-self.max_pages // sizes.block_pages)
        steps = -(-blocks // sizes.step_blocks) + self.num_cores * (2 * sizes.ring_places + 1)
        ids = self.num_rows * self.max_pages + sizes.block_pages
        return 4 * (ids + steps * sizes.step_blocks * _STEP_FIELDS)


def query_vmem_bytes(geometry: Geometry, num_splits: int) -> int:
    """Bytes of one query and its results, all of which stay during a call."""
    row = round_up(geometry.format.row_dim, LANES)
    results = 4 * (geometry.rows * row + round_up(geometry.lse_tiles, SUBLANES) * LANES)
    return geometry.rows * row * geometry.format.compute_dtype.itemsize + num_splits * results


def vmem_page_bytes(page_format: PageFormat) -> int:
    """Bytes of one page of all cache arrays in VMEM, padded to tiles."""
    if page_format.layout.token_major:
        rows = page_format.num_arrays * page_format.page_size * token_major.pitch(page_format)
        elements = 4 * LANES * rows
        return elements + _scales_bytes(page_format)
    rows = round_up(page_format.page_rows, SUBLANES)
    row = round_up(page_format.row_dim, LANES) * page_format.dtype.itemsize
    elements = 2 * page_format.num_kv_heads * rows * row
    return elements + _scales_bytes(page_format)


def _scales_bytes(page_format: PageFormat) -> int:
    """Of those, the bytes of the scales of tokens."""
    if page_format.scale != "token":
        return 0
    *heads, lanes = page_format.page_scales_shape
    return math.prod(heads) * round_up(lanes, LANES) * SCALE_DTYPE.itemsize


def _elements_bytes(page_format: PageFormat) -> int:
    """Of those, the bytes of keys and values."""
    return vmem_page_bytes(dataclasses.replace(page_format, scale="none"))


def choose_sizes(demand: Demand, chip: Chip, block_pages: int | None = None) -> Sizes:
    """Chooses block sizes; `block_pages` is how many pages a block has if the caller says so.

    Raises:
      NotImplementedError: if it cannot fit; naming what would.
    """
    page_format, room = demand.geometry.format, chip.vmem_bytes - _VMEM_RESERVE_BYTES
    sizes = wanted = _wanted(demand, chip, block_pages or _model_block_pages(demand))
    for sizes in _ever_smaller(wanted, fixed_block=block_pages is not None):
        if demand.vmem_bytes(sizes) <= room:
            break
    else:
        page_bytes = vmem_page_bytes(page_format)
        raise NotImplementedError(
            f"{sizes.ring_blocks} blocks of {sizes.block_pages} pages take "
            f"{demand.vmem_bytes(sizes):,} B of VMEM, a kernel has {room:,} B: a page of "
            f"{page_format.page_size} tokens x {page_format.num_kv_heads} KV heads is "
            f"{page_bytes:,} B. Use fewer pages per block, "
            "a smaller page_size, or split the KV heads over more devices"
        )
    sizes = dataclasses.replace(sizes, run_pages=_run_pages(page_format, sizes.block_pages))
    if demand.smem_bytes(sizes) <= chip.smem_bytes - _SMEM_RESERVE_BYTES:
        return sizes
    if sizes.block_pages > LANES:
        raise NotImplementedError(
            f"pages_per_block={sizes.block_pages}: a table of {demand.num_rows} x "
            f"{demand.max_pages} page ids does not fit the {chip.smem_bytes:,} B of scalar memory "
            f"and is read in windows of {LANES}; use at most {LANES}, or None"
        )
    return dataclasses.replace(sizes, paged=True)


def heads_per_pass(geometry: Geometry, block_pages: int) -> int:
    """KV heads of a block that one straight piece of code works on: all, unless they are large.

    A compiler's time grows with the square of such a piece: 16 MiB took it 24 GiB of memory.
    """
    num_heads, row_tile = geometry.format.num_kv_heads, 2 * SUBLANES  # of bfloat16 rows
    apart = [
        heads
        for heads in range(1, num_heads)
        if num_heads % heads == 0 and heads * geometry.rows_per_head % row_tile == 0
    ]
    head_bytes = block_pages * _elements_bytes(geometry.format) / num_heads
    fitting = [heads for heads in (*apart, num_heads) if heads * head_bytes <= _PASS_BYTES]
    return max(fitting, default=min(apart, default=num_heads))


def _wanted(demand: Demand, chip: Chip, block_pages: int) -> Sizes:
    """The best sizes, if there is room."""
    step_blocks = min(chip.step_blocks, _model_step_blocks(demand, block_pages))
    step_bytes = step_blocks * block_pages * vmem_page_bytes(demand.geometry.format)
    places = math.ceil((chip.bytes_in_flight / step_bytes + 1) / 2)
    return Sizes(block_pages, step_blocks, min(max(places, _MIN_RING_PLACES), _MAX_RING_PLACES))


def _ever_smaller(sizes: Sizes, *, fixed_block: bool) -> Iterator[Sizes]:
    """First fewer places, then fewer blocks a step, then smaller blocks."""
    yield sizes
    while sizes.ring_places > _MIN_RING_PLACES:
        sizes = dataclasses.replace(sizes, ring_places=sizes.ring_places - 1)
        yield sizes
    while sizes.step_blocks > 1:
        sizes = dataclasses.replace(sizes, step_blocks=sizes.step_blocks // 2)
        yield sizes
    while sizes.ring_places > 1:
        sizes = dataclasses.replace(sizes, ring_places=sizes.ring_places - 1)
        yield sizes
    while sizes.block_pages > 1 and not fixed_block:
        sizes = dataclasses.replace(sizes, block_pages=sizes.block_pages // 2)
        yield sizes


def _run_pages(page_format: PageFormat, block_pages: int) -> int:
    """Pages of a run: as many as make a large copy, a power of two that divides a block."""
    if page_format.layout.value.pages != 0:
        return 1  # their heads are far from each other
    copy_bytes = vmem_page_bytes(page_format) // page_format.num_arrays
    most = min(_RUN_TOKENS // page_format.page_size, _RUN_BYTES // copy_bytes)
    return math.gcd(block_pages, 1 << max(most, 1).bit_length() - 1)


def _model_block_pages(demand: Demand) -> int:
    page_format = demand.geometry.format
    token_bytes = _elements_bytes(page_format) / page_format.page_size
    most = _MAX_BLOCK_TOKENS * (2 if page_format.dtype.itemsize == 1 else 1)
    tokens = max(_MIN_BLOCK_TOKENS, min(most, _BLOCK_BYTES / token_bytes))
    pages = 1 << (max(1, int(tokens) // page_format.page_size).bit_length() - 1)
    return min(pages, LANES, _power_of_two(demand.max_pages))


def _model_step_blocks(demand: Demand, block_pages: int) -> int:
    """As many blocks as hide each other's latencies, keep in registers, and there are."""
    geometry = demand.geometry
    bytes_each = block_pages * _elements_bytes(geometry.format)
    tiles_each = geometry.rows // SUBLANES * -(-block_pages * geometry.format.page_rows // LANES)
    there_are = demand.num_queries * max(demand.num_splits, -(-demand.max_pages // block_pages))
    return max(1, min(_STEP_BYTES // bytes_each, _STEP_TILES // tiles_each, there_are))
