"""Block sizes of the decode kernel, from a model of the chip's memories and their latency.

A block should be long enough that the fixed cost of working on one (the latency of two matmuls
and a softmax, some 120 cycles) is small against the time its bytes take, and the ring deep enough
that bytes keep flowing for the time a copy takes to arrive. What is left is what fits.
"""

import dataclasses
import math

from ...page_format import PageFormat
from .chip import MIB, Chip
from .geometry import LANES, SUBLANES, Geometry, round_up

_BLOCK_BYTES = 2 * MIB
_MIN_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 2048
_MAX_BLOCK_PAGES = 128
_CHUNK_TOKENS = 512
_MIN_RING_BLOCKS = 2
_MAX_RING_BLOCKS = 16
# What the compiler takes besides our buffers: spilled registers, its own stack.
_VMEM_RESERVE_BYTES = 2 * MIB
_SMEM_RESERVE_BYTES = 64 << 10
_TABLE_ENTRIES = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes."""

    block_pages: int  # a power of two of at most 128 if the table is not resident
    chunk_pages: int  # that the general path works on at a time; divides `block_pages`
    ring_blocks: int  # one is worked on, the others are on their way
    table_entries: int = 0  # windows in the ring of page ids; 0 if all ids are resident


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of one core's kernel."""

    geometry: Geometry
    num_cores: int  # that share a device's work
    num_queries: int
    num_splits: int  # segments per query
    max_pages: int  # width of the table

    def vmem_bytes(self, block_pages: int, ring_blocks: int) -> int:
        """Vector memory that a kernel of these sizes takes."""
        geometry, page_format = self.geometry, self.geometry.format
        row = round_up(page_format.row_dim, LANES)
        buffers = ring_blocks * block_pages * vmem_page_bytes(page_format)
        queries = (ring_blocks + 1) * geometry.rows * row * page_format.dtype.itemsize
        state = 4 * geometry.rows * (2 * LANES + row + 2 * geometry.out_lanes)
        return buffers + queries + state

    def smem_bytes(self, resident: bool) -> int:
        """Scalar memory of the walk's schedule and of page ids."""
        ids = self.num_queries * self.max_pages if resident else _TABLE_ENTRIES * LANES
        segments = self.num_cores * (self.num_queries * self.num_splits + 1)
        return 4 * (ids + 4 * segments + 2 * self.num_queries + self.num_cores)


def vmem_page_bytes(page_format: PageFormat) -> int:
    """Bytes of one page of all cache arrays in VMEM, padded to tiles."""
    rows = round_up(page_format.page_rows, SUBLANES)
    row = round_up(page_format.row_dim, LANES) * page_format.dtype.itemsize
    return 2 * page_format.num_kv_heads * rows * row


def choose_sizes(demand: Demand, chip: Chip, block_pages: int | None = None) -> Sizes:
    """Chooses block sizes; `block_pages` is how many pages a block has if the caller says so.

    Raises:
      NotImplementedError: if it cannot fit; naming what would.
    """
    page_format, resident = demand.geometry.format, _table_resident(demand, chip)
    page_bytes, room = vmem_page_bytes(page_format), chip.vmem_bytes - _VMEM_RESERVE_BYTES
    if block_pages is None:
        pages = _model_block_pages(demand)
        pages = pages if resident else min(pages, LANES)
        while pages > 1 and demand.vmem_bytes(pages, _MIN_RING_BLOCKS) > room:
            pages //= 2
    elif resident or (block_pages <= LANES and not block_pages & (block_pages - 1)):
        pages = block_pages
    else:  # a window of the table must hold a whole number of blocks
        raise NotImplementedError(
            f"pages_per_block={block_pages}: a table of {demand.num_queries} x {demand.max_pages} "
            f"page ids does not fit the {chip.smem_bytes:,} B of scalar memory and is read in "
            f"windows of {LANES}; use a power of two of at most {LANES}, or None"
        )
    in_flight = math.ceil(chip.bytes_in_flight / (pages * page_bytes))
    ring = max(3, min(_MAX_RING_BLOCKS, 1 + in_flight))
    while ring > _MIN_RING_BLOCKS and demand.vmem_bytes(pages, ring) > room:
        ring -= 1
    if (vmem := demand.vmem_bytes(pages, ring)) > room:
        raise NotImplementedError(
            f"{ring} blocks of {pages} pages take {vmem:,} B of VMEM, a kernel has {room:,} B: a "
            f"page of {page_format.page_size} tokens x {page_format.num_kv_heads} KV heads is "
            f"{page_bytes:,} B. Use fewer pages per block, a smaller page_size, or split the KV "
            "heads over more devices"
        )
    chunk = max(1, min(pages, _CHUNK_TOKENS // page_format.page_size))
    while pages % chunk:
        chunk -= 1
    return Sizes(pages, chunk, ring, 0 if resident else _TABLE_ENTRIES)


def _table_resident(demand: Demand, chip: Chip) -> bool:
    """Whether all page ids fit scalar memory beside the schedule, which must."""
    room = chip.smem_bytes - _SMEM_RESERVE_BYTES
    if demand.smem_bytes(resident=True) <= room:
        return True
    if (smem := demand.smem_bytes(resident=False)) > room:
        raise NotImplementedError(
            f"the schedule of {demand.num_queries} sequences x {demand.num_splits} splits takes "
            f"{smem:,} B of scalar memory, a core has {chip.smem_bytes:,} B, "
            f"{_SMEM_RESERVE_BYTES:,} B of it reserved; split the batch over the mesh's `seqs` "
            "axis or over calls, or use backend='xla'"
        )
    return False


def _model_block_pages(demand: Demand) -> int:
    page_format = demand.geometry.format
    token_bytes = vmem_page_bytes(page_format) / page_format.page_size
    tokens = max(_MIN_BLOCK_TOKENS, min(_MAX_BLOCK_TOKENS, _BLOCK_BYTES / token_bytes))
    pages = 1 << (max(1, int(tokens) // page_format.page_size).bit_length() - 1)
    return min(pages, _MAX_BLOCK_PAGES, 1 << (demand.max_pages - 1).bit_length())
