"""Block sizes of the TPU kernels, from a model of what the chip holds and how far its memory is.

A block should be long enough that the fixed cost of working on one (the latency of two matmuls
and a softmax, some 120 cycles) is small against the time its bytes take, and the ring deep enough
that bytes keep flowing for the time a copy takes to arrive. What is left is what fits.
"""

import dataclasses
import functools
import json
import math
from importlib import resources

import numpy as np
from jax.experimental.pallas import tpu as pltpu

from .kernels.decode import Cores, Sizes
from .kernels.geometry import LANES, SUBLANES, Geometry, round_up

MIB = 1 << 20

_BLOCK_BYTES = 2 * MIB
_MIN_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 2048
_MAX_BLOCK_PAGES = 128
_CHUNK_TOKENS = 512
_MIN_SLOTS = 2
_MAX_SLOTS = 16
_COPY_LATENCY_US = 2.5
# What the compiler takes besides our buffers: spilled registers, its own stack.
_VMEM_RESERVE_BYTES = 2 * MIB
_SMEM_RESERVE_BYTES = 64 << 10
_TABLE_ENTRIES = 16


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore, as far as block sizes depend on it.

    Attributes:
      name: as in the tuned tables.
      cores: TensorCores a device.
      vmem_bytes: vector memory that a kernel may ask for.
      smem_bytes: scalar memory.
      hbm_bytes_per_us: HBM bandwidth.
    """

    name: str
    cores: int
    vmem_bytes: int
    smem_bytes: int
    hbm_bytes_per_us: float

    @property
    def bytes_in_flight(self) -> int:
        """What must be on its way at any time for the memory never to wait."""
        return int(self.hbm_bytes_per_us * _COPY_LATENCY_US)


# Where the chip is unknown: what runs on all of them, v4's VMEM.
UNKNOWN_CHIP = Chip("unknown", 1, 16 * MIB, MIB, 1.0e6)


def current_chip() -> Chip:
    """The chip that is being compiled for, if JAX knows it, else `UNKNOWN_CHIP`."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return UNKNOWN_CHIP
    return Chip(
        name=str(info.chip_version),
        cores=info.num_cores,
        # Half: XLA keeps arrays of its own there, and more would not be faster.
        vmem_bytes=max(16 * MIB, info.vmem_capacity_bytes // 2),
        smem_bytes=info.smem_capacity_bytes,
        hbm_bytes_per_us=info.mem_bw_bytes_per_second / 1e6,
    )


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of fast memory that one core of a decode kernel takes."""

    buffers: int
    queries: int
    state: int
    table: int
    plan: int

    @property
    def vmem(self) -> int:
        return self.buffers + self.queries + self.state

    @property
    def smem(self) -> int:
        return self.table + self.plan


def page_bytes(geometry: Geometry) -> int:
    """Bytes of one page of all cache arrays in VMEM, padded to tiles."""
    itemsize = geometry.dtype.itemsize
    rows = round_up(geometry.page_rows, SUBLANES)
    row = round_up(geometry.row_dim, LANES) * itemsize
    return 2 * geometry.num_kv_heads * rows * row


def decode_need(
    geometry: Geometry, sizes: Sizes, cores: Cores, num_seqs: int, num_splits: int, max_pages: int
) -> Need:
    """What a decode kernel of these sizes takes."""
    row = round_up(geometry.row_dim, LANES)
    entries = cores.count * (num_seqs * num_splits + 1)
    return Need(
        buffers=sizes.slots * sizes.block_pages * page_bytes(geometry),
        queries=(sizes.slots + 1) * geometry.rows * row * geometry.dtype.itemsize,
        state=4 * geometry.rows * (2 * LANES + row + 2 * geometry.out_lanes),
        table=4 * (sizes.table_entries * LANES if sizes.table_entries else num_seqs * max_pages),
        plan=4 * (4 * entries + 2 * num_seqs + cores.count),
    )


def decode_sizes(
    geometry: Geometry,
    chip: Chip,
    cores: Cores,
    *,
    num_seqs: int,
    num_splits: int,
    max_pages: int,
    block_pages: int | None = None,
) -> Sizes:
    """Chooses block sizes, or refuses with the numbers that do not fit.

    Args:
      geometry: what one core works on.
      chip: where.
      cores: how a device's cores share the work.
      num_seqs: rows of the table.
      num_splits: segments a sequence.
      max_pages: width of the table.
      block_pages: pages a block, if the caller wants a certain number.

    Raises:
      NotImplementedError: if it cannot fit; naming what would.
    """
    tuned = tuned_sizes(chip.name, geometry)
    wanted = block_pages or tuned.get("block_pages") or _model_block_pages(geometry, max_pages)
    fits_vmem = chip.vmem_bytes - _VMEM_RESERVE_BYTES
    fits_smem = chip.smem_bytes - _SMEM_RESERVE_BYTES

    def sizes_of(pages: int, slots: int, resident: bool) -> Sizes:
        chunk = max(1, min(pages, _CHUNK_TOKENS // geometry.page_size))
        while pages % chunk:
            chunk -= 1
        return Sizes(pages, chunk, slots, 0 if resident else _TABLE_ENTRIES)

    def need(sizes: Sizes) -> Need:
        return decode_need(geometry, sizes, cores, num_seqs, num_splits, max_pages)

    resident = need(sizes_of(wanted, 2, True)).smem <= fits_smem
    if not resident:
        wanted = _power_of_two(min(wanted, LANES)) if block_pages is None else wanted
        if wanted > LANES or wanted & (wanted - 1):
            raise NotImplementedError(
                f"pages_per_compute_block={wanted}: a table of {num_seqs} x {max_pages} page ids "
                f"does not fit the {chip.smem_bytes:,} B of scalar memory and is read in windows "
                f"of {LANES}; use a power of two of at most {LANES}, or None"
            )
    smem = need(sizes_of(wanted, 2, resident)).smem
    if smem > fits_smem:
        raise NotImplementedError(
            f"the plan of {num_seqs} sequences x {num_splits} splits takes {smem:,} B of scalar "
            f"memory, a core has {chip.smem_bytes:,} B, {_SMEM_RESERVE_BYTES:,} B of it reserved; "
            "split the batch over the mesh's `seqs` axis or over calls, or use backend='xla'"
        )
    while (
        block_pages is None and wanted > 1 and need(sizes_of(wanted, 2, resident)).vmem > fits_vmem
    ):
        wanted //= 2
    slots = tuned.get("slots") or _model_slots(geometry, chip, wanted)
    while slots > _MIN_SLOTS and need(sizes_of(wanted, slots, resident)).vmem > fits_vmem:
        slots -= 1
    sizes = sizes_of(wanted, slots, resident)
    if (vmem := need(sizes).vmem) > fits_vmem:
        raise NotImplementedError(_does_not_fit(geometry, sizes, vmem, fits_vmem))
    return sizes


def _model_block_pages(geometry: Geometry, max_pages: int) -> int:
    token_bytes = page_bytes(geometry) / geometry.page_size
    tokens = max(_MIN_BLOCK_TOKENS, min(_MAX_BLOCK_TOKENS, _BLOCK_BYTES / token_bytes))
    pages = _power_of_two(max(1, int(tokens) // geometry.page_size))
    return min(pages, _MAX_BLOCK_PAGES, _power_of_two_above(max_pages))


def _model_slots(geometry: Geometry, chip: Chip, block_pages: int) -> int:
    """One block is worked on, the others are in flight."""
    block_bytes = block_pages * page_bytes(geometry)
    return max(3, min(_MAX_SLOTS, 1 + math.ceil(chip.bytes_in_flight / block_bytes)))


def _does_not_fit(geometry: Geometry, sizes: Sizes, vmem: int, limit: int) -> str:
    page = page_bytes(geometry)
    return (
        f"{sizes.slots} blocks of {sizes.block_pages} pages take {vmem:,} B of VMEM, a kernel has "
        f"{limit:,} B: a page of {geometry.page_size} tokens x {geometry.num_kv_heads} KV heads is "
        f"{page:,} B. Use fewer pages a block (pages_per_compute_block), a smaller page_size, or "
        "split the KV heads over more devices"
    )


def _power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _power_of_two_above(value: int) -> int:
    return 1 << (value - 1).bit_length()


def tuned_sizes(chip: str, geometry: Geometry) -> dict[str, int]:
    """Sizes that beat the model for this chip and geometry; {} where there are none."""
    for row in _tuned_table().get(chip, ()):
        if _matches(row["when"], geometry):
            return row["sizes"]
    return {}


def _matches(when: dict, geometry: Geometry) -> bool:
    return all(_describe(geometry, key) == value for key, value in when.items())


def _describe(geometry: Geometry, key: str):
    value = getattr(geometry, key)
    if isinstance(value, np.dtype):
        return value.name
    return value.name.lower() if key == "kv" else value


@functools.cache
def _tuned_table() -> dict:
    return json.loads(resources.files("shardpage").joinpath("blocks.json").read_text())
