"""The model that chooses block sizes: fits, is deep enough, and refuses with numbers."""

import dataclasses

import numpy as np
import pytest

from shardpage import blocks
from shardpage.kernels.decode import Cores
from shardpage.kernels.geometry import Geometry
from shardpage.kv_layout import KVLayout

MIB = 1 << 20
CHIPS = {
    "v4": blocks.Chip("v4", 2, 16 * MIB, MIB, 614e3),
    "v5e": blocks.Chip("v5e", 1, 64 * MIB, MIB, 819e3),
    "tpu7x": blocks.Chip("7x", 1, 32 * MIB, MIB, 3690e3),
}


def geometry(
    num_kv_heads=8, queries=4, head_dim=128, page_size=16, pack=1, dtype="bfloat16"
) -> Geometry:
    dtype = np.dtype(np.float32) if dtype == "float32" else np.dtype("V2")
    return Geometry(KVLayout.FUSED, num_kv_heads, queries, head_dim, pack, page_size // pack, dtype)


def sizes(geometry, chip="v5e", **changes):
    arguments = {"num_seqs": 64, "num_splits": 1, "max_pages": 256} | changes
    return blocks.decode_sizes(geometry, CHIPS[chip], Cores(), **arguments)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_chosen_sizes_fit(chip, num_kv_heads, page_size):
    shape = geometry(num_kv_heads, page_size=page_size)
    chosen = sizes(shape, chip)
    need = blocks.decode_need(shape, chosen, Cores(), 64, 1, 256)
    assert need.vmem < CHIPS[chip].vmem_bytes
    assert need.smem < CHIPS[chip].smem_bytes
    assert chosen.block_pages % chosen.chunk_pages == 0
    assert chosen.slots >= 2


@pytest.mark.parametrize("chip", CHIPS)
def test_enough_bytes_are_in_flight(chip):
    shape = geometry(page_size=64)
    chosen = sizes(shape, chip)
    in_flight = (chosen.slots - 1) * chosen.block_pages * blocks.page_bytes(shape)
    assert in_flight >= CHIPS[chip].bytes_in_flight


def test_short_tables_get_short_blocks():
    assert sizes(geometry(), max_pages=3).block_pages == 4


def test_the_callers_block_is_taken():
    assert sizes(geometry(), block_pages=3).block_pages == 3


@pytest.mark.parametrize(("num_seqs", "max_pages"), [(1024, 8192), (8, 65536)])
def test_long_tables_are_paged_in(num_seqs, max_pages):
    chosen = sizes(geometry(), num_seqs=num_seqs, max_pages=max_pages)
    assert chosen.table_entries > 0
    assert 128 % chosen.block_pages == 0


def test_short_tables_stay():
    assert sizes(geometry()).table_entries == 0


def test_too_many_sequences_are_refused_with_numbers():
    with pytest.raises(NotImplementedError, match=r"100000 sequences .* takes [\d,]+ B of scalar"):
        sizes(geometry(), num_seqs=100_000)


def test_too_large_pages_are_refused_with_numbers():
    with pytest.raises(NotImplementedError, match=r"2 blocks of 1 pages take [\d,]+ B of VMEM"):
        sizes(geometry(32, page_size=1024, head_dim=256), "v4")


def test_packed_rows_count_once():
    packed, plain = geometry(head_dim=64, pack=2), geometry(head_dim=64)
    assert blocks.page_bytes(packed) == blocks.page_bytes(plain) // 2


def test_tuned_sizes_are_loaded(monkeypatch):
    table = {"v5e": [{"when": {"num_kv_heads": 8, "kv": "fused"}, "sizes": {"slots": 7}}]}
    monkeypatch.setattr(blocks, "_tuned_table", lambda: table)
    assert sizes(geometry()).slots == 7
    assert sizes(geometry(4)).slots != 7


def test_the_tuned_table_names_real_fields():
    fields = {field.name for field in dataclasses.fields(Geometry)}
    for rows in blocks._tuned_table().values():
        for row in rows:
            assert set(row["when"]) <= fields
            assert set(row["sizes"]) <= {"block_pages", "slots"}
            assert row["why"]
