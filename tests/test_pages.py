"""Compaction of block tables: both ways of it, whichever this platform takes."""

import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import tables


@pytest.mark.parametrize("compact", [tables._compact_by_scatter, tables._compact_by_shifts])
@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100])
def test_kept_entries_move_left_in_order(compact, columns):
    rng = np.random.default_rng(columns)
    values = rng.integers(0, 1000, (9, columns)).astype(np.int32)
    keep = rng.random((9, columns)) < np.linspace(0, 1, 9)[:, None]  # from none to all
    moved = np.asarray(compact(jnp.asarray(values), jnp.asarray(keep)))
    for before, kept, after in zip(values, keep, moved, strict=True):
        np.testing.assert_array_equal(after[: kept.sum()], before[kept])
