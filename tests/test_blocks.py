"""The model that chooses block sizes: fits, is deep enough, and refuses with numbers."""

import ml_dtypes
import numpy as np
import pytest

from shardpage.backends.pallas_tpu.chip import Chip
from shardpage.backends.pallas_tpu.geometry import Geometry
from shardpage.backends.pallas_tpu.sizes import Demand, choose_sizes, vmem_page_bytes
from shardpage.page_format import KVLayout, PageFormat

MIB = 1 << 20
CHIPS = {
    "v4": Chip("v4", 2, 16 * MIB, MIB, 614e3),
    "v5e": Chip("v5e", 1, 64 * MIB, MIB, 819e3),
    "tpu7x": Chip("7x", 1, 32 * MIB, MIB, 3690e3),
}


def page_format(num_kv_heads=8, head_dim=128, page_size=16, pack=1) -> PageFormat:
    dtype = np.dtype(ml_dtypes.bfloat16)
    return PageFormat(KVLayout.FUSED, num_kv_heads, page_size, head_dim, head_dim, dtype, pack)


def demand(page_format, num_queries=16, max_pages=256) -> Demand:
    return Demand(Geometry(page_format, 4), 1, num_queries, num_queries, 1, max_pages)


def sizes(page_format, chip="v5e", block_pages=None, **changes):
    return choose_sizes(demand(page_format, **changes), CHIPS[chip], block_pages)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_chosen_sizes_fit(chip, num_kv_heads, page_size):
    page = page_format(num_kv_heads, page_size=page_size)
    chosen = sizes(page, chip)
    assert demand(page).vmem_bytes(chosen) < CHIPS[chip].vmem_bytes
    assert chosen.paged or demand(page).smem_bytes(chosen) < CHIPS[chip].smem_bytes
    assert chosen.ring_places >= 1


@pytest.mark.parametrize("chip", CHIPS)
def test_enough_bytes_are_in_flight(chip):
    page = page_format(page_size=64)
    chosen = sizes(page, chip)
    blocks = chosen.ring_blocks - chosen.step_blocks
    in_flight = blocks * chosen.block_pages * vmem_page_bytes(page)
    assert in_flight >= CHIPS[chip].bytes_in_flight


def test_short_tables_get_short_blocks():
    assert sizes(page_format(), max_pages=3).block_pages == 4


def test_the_callers_block_is_taken():
    assert sizes(page_format(), block_pages=3).block_pages == 3


@pytest.mark.parametrize(("num_seqs", "max_pages"), [(1024, 8192), (8, 65536)])
def test_long_tables_are_paged_in(num_seqs, max_pages):
    chosen = sizes(page_format(), num_queries=num_seqs, max_pages=max_pages)
    assert chosen.paged
    assert chosen.block_pages <= 128


def test_short_tables_stay():
    assert not sizes(page_format()).paged


def test_any_number_of_sequences_fits_scalar_memory():
    assert sizes(page_format(), num_queries=100, max_pages=8).paged is False
    assert sizes(page_format(), num_queries=1000, max_pages=100_000).paged


def test_too_large_pages_are_refused_with_numbers():
    with pytest.raises(NotImplementedError, match=r"2 blocks of 1 pages take [\d,]+ B of VMEM"):
        sizes(page_format(32, page_size=1024, head_dim=256), "v4")


def test_packed_rows_count_once():
    packed, plain = page_format(head_dim=64, pack=2), page_format(head_dim=64)
    assert vmem_page_bytes(packed) == vmem_page_bytes(plain) // 2
