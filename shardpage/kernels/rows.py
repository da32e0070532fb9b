"""Query heads as rows of the kernel, and its rows as partial results; see `geometry`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..partial import Partial, merge
from .decode import Config
from .geometry import Geometry


def query_rows(
    config: Config, query: Float[Array, "num_seqs num_heads head_dim"]
) -> Float[Array, "shards num_seqs rows row_dim"]:
    """Lays queries out as rows, padded with zeros; by core, where cores split the heads."""
    geometry = config.geometry
    num_seqs, _, head_dim = query.shape
    shards = config.cores.count if config.cores.by_heads else 1
    heads = query.astype(geometry.dtype).reshape(
        num_seqs, shards, geometry.num_kv_heads, geometry.queries_per_kv_head, head_dim
    )
    # For each token of a cache row, a copy of the queries in that token's lanes.
    spare = geometry.row_dim - head_dim
    copies = [
        _pad(heads, axis=4, before=lane, after=spare - lane)
        for lane in range(0, geometry.row_dim, head_dim)
    ]
    rows = jnp.concatenate(copies, axis=3)
    rows = _pad(rows, axis=3, after=geometry.rows_per_head - geometry.queries_per_head)
    rows = rows.reshape(num_seqs, shards, -1, geometry.row_dim)
    rows = _pad(rows, axis=2, after=geometry.rows - rows.shape[2])
    return jnp.moveaxis(rows, 1, 0)


def _pad(array: jax.Array, *, axis: int, before: int = 0, after: int = 0) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (before, after)
    return jnp.pad(array, widths)


def merged_partial(
    config: Config,
    result: Float[Array, "num_cores num_segments rows out_lanes"],
    held: Bool[Array, "num_plans num_seqs num_splits"],
) -> Partial:
    """Takes the kernel's output apart, and merges what splits, packing and cores kept apart.

    Args:
      config: of the kernel.
      result: values and, in the last lanes, the lse; garbage where nothing was written.
      held: which segments were written, by each core that had a walk of its own.
    """
    geometry, cores = config.geometry, config.cores
    result = result.reshape(
        cores.count, config.num_seqs, config.num_splits, geometry.rows, geometry.out_lanes
    )
    out, lse = _by_head(geometry, result)
    if cores.by_heads:  # the cores' heads side by side
        out, lse = (jnp.concatenate(list(x), axis=2)[None] for x in (out, lse))
    written = held[..., None, None, None]
    out, lse = jnp.where(written[..., None], out, 0.0), jnp.where(written, lse, -jnp.inf)
    dim = geometry.head_dim
    parts = [
        Partial(out[core, :, split, :, j, :, j * dim : (j + 1) * dim], lse[core, :, split, :, j])
        for core in range(out.shape[0])
        for split in range(config.num_splits)
        for j in range(geometry.pack)
    ]
    merged = functools.reduce(merge, parts)
    return Partial(
        merged.out.reshape(config.num_seqs, -1, dim), merged.lse.reshape(config.num_seqs, -1)
    )


def _by_head(geometry: Geometry, result: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[cores, seqs, splits, kv_heads, pack, queries, row_dim] values, and lse without the last."""
    used = geometry.num_kv_heads * geometry.rows_per_head
    rows = result[:, :, :, :used].reshape(
        *result.shape[:3], geometry.num_kv_heads, geometry.rows_per_head, -1
    )
    rows = rows[:, :, :, :, : geometry.queries_per_head].reshape(
        *rows.shape[:4], geometry.pack, geometry.queries_per_kv_head, -1
    )
    return rows[..., : geometry.row_dim], rows[..., -1]
