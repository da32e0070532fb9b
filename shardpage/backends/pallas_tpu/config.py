"""The static configuration of a decode kernel, from shapes and options; refuses what it has not."""

import dataclasses

from ...options import Tuning
from ...page_format import PageFormat
from .chip import Chip, chip_of
from .geometry import LANES, SUBLANES, Geometry, round_up
from .sizes import Demand, Sizes, choose_sizes, vmem_page_bytes
from .walk import Lengths

_DTYPES = ("float32", "bfloat16")
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
    max_pages: int

    @property
    def lengths(self) -> Lengths:
        """What the walk is made for."""
        cores = 1 if self.cores.by_heads else self.cores.count
        page_size = self.geometry.format.page_size
        return Lengths(page_size, self.max_pages, self.num_splits, cores, self.sizes)

    @property
    def table_width(self) -> int:
        """Columns of the table as the kernel has it: whole blocks."""
        return round_up(self.max_pages, self.sizes.block_pages)

    @property
    def num_segments(self) -> int:
        return self.num_queries * self.num_splits


def configure(
    page_format: PageFormat, num_heads: int, num_queries: int, max_pages: int, tuning: Tuning
) -> Config:
    """The kernel for queries of `num_heads` heads over a table of `max_pages` columns.

    Raises:
      NotImplementedError: for shapes and options that the kernel does not have.
    """
    check_format(page_format)
    chip = chip_of(tuning)
    queries_per_kv_head = num_heads // page_format.num_kv_heads
    cores = _choose_cores(page_format, chip, tuning)
    if cores.by_heads:
        heads = page_format.num_kv_heads // cores.count
        page_format = dataclasses.replace(page_format, num_kv_heads=heads)
    geometry = Geometry(page_format, queries_per_kv_head)
    num_splits = max(1, min(tuning.num_splits, max_pages))
    demand = Demand(geometry, cores.count, num_queries, num_splits, max_pages)
    sizes = choose_sizes(demand, chip, tuning.pages_per_block)
    return Config(geometry, sizes, cores, num_queries, num_splits, max_pages)


def check_format(page_format: PageFormat) -> None:
    """Refuses caches that the kernels cannot work on."""
    pack, head_dim = page_format.pack, page_format.key_dim
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
    if page_format.page_rows % SUBLANES:
        nearest = -(-page_format.page_rows // SUBLANES) * SUBLANES * pack
        raise NotImplementedError(
            f"page_size={page_format.page_size}, {pack} per cache row, does not fill tiles of "
            f"{SUBLANES} rows; use page_size={nearest}, or backend='xla'"
        )


def _choose_cores(page_format: PageFormat, chip: Chip, tuning: Tuning) -> Cores:
    """How the cores of this device share the call."""
    mode, heads = tuning.cores, page_format.num_kv_heads
    if mode == "off" or (mode in (None, "auto") and chip.cores == 1):
        return Cores()
    if chip.cores == 1:
        raise NotImplementedError(
            f"cores={mode!r} splits a call over the two TensorCores of a v4 or v5p chip; a device "
            f"of this kind ({chip.name}) is one core: use None or 'auto'"
        )
    if mode == "kv_head" and heads % chip.cores:
        raise ValueError(
            f"cores='kv_head' needs KV heads divisible by the {chip.cores} cores, a device holds "
            f"{heads}; use 'batch', which cuts the work at any block of pages, or 'auto'"
        )
    if mode in (None, "auto"):
        # Both balance. Heads need no merge, but halve the copies, which should stay large.
        halves = vmem_page_bytes(page_format) // (page_format.num_arrays * chip.cores)
        return Cores(chip.cores, heads % chip.cores == 0 and halves >= _LARGE_COPY_BYTES)
    return Cores(chip.cores, mode == "kv_head")
