"""Query heads as rows of the kernel, and its rows as partial results; see `geometry`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...partial import Partial, merge_stacked
from .config import Config
from .geometry import Geometry


def query_rows(
    config: Config, query: Float[Array, "queries num_heads head_dim"]
) -> Float[Array, "shards queries rows row_dim"]:
    """Lays queries out as rows, padded with zeros; by core, where cores split the heads."""
    geometry, page_format = config.geometry, config.geometry.format
    num_queries, _, head_dim = query.shape
    shards = config.cores.count if config.cores.by_heads else 1
    heads = query.astype(page_format.compute_dtype).reshape(
        num_queries, shards, page_format.num_kv_heads, geometry.queries_per_kv_head, head_dim
    )
    # For each token of a cache row, a copy of the queries in the lanes of its key.
    spare = page_format.row_dim - head_dim
    lanes = range(0, page_format.pack * head_dim, head_dim)
    copies = [_pad(heads, axis=4, before=lane, after=spare - lane) for lane in lanes]
    rows = jnp.concatenate(copies, axis=3)
    rows = _pad(rows, axis=3, after=geometry.rows_per_head - geometry.rows_in_use)
    rows = rows.reshape(num_queries, shards, -1, page_format.row_dim)
    rows = _pad(rows, axis=2, after=geometry.rows - rows.shape[2])
    return jnp.moveaxis(rows, 1, 0)


def _pad(array: jax.Array, *, axis: int, before: int = 0, after: int = 0) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (before, after)
    return jnp.pad(array, widths)


def merged_partial(
    config: Config,
    out: Float[Array, "num_cores num_segments rows row_dim"],
    lse: Float[Array, "num_cores num_segments lse_tiles lanes"],
) -> Partial:
    """Takes the kernel's output apart, and merges what splits, packing and cores kept apart."""
    geometry, by_query = config.geometry, (config.num_queries, config.num_splits)
    lse = lse.reshape(*lse.shape[:2], -1)[..., : geometry.rows, None]
    by_segment = lambda rows: rows.reshape(config.cores.count, *by_query, *rows.shape[2:])
    out, lse = (_by_head(geometry, by_segment(x)) for x in (out, lse))
    if config.cores.by_heads:  # the cores' heads side by side
        out, lse = (jnp.concatenate(list(x), axis=2)[None] for x in (out, lse))
    lse = lse[..., 0]
    dim, first = geometry.format.value_dim, geometry.format.first_value
    lanes = [slice(first + j * dim, first + (j + 1) * dim) for j in range(geometry.format.pack)]
    parts = [
        Partial(out[core, :, split, :, j, :, lanes[j]], lse[core, :, split, :, j])
        for core in range(out.shape[0])
        for split in range(config.num_splits)
        for j in range(geometry.format.pack)
    ]
    out, lse = parts[0]
    if len(parts) > 1:
        out, lse = merge_stacked(Partial(*map(jnp.stack, zip(*parts, strict=True))))
    return Partial(out.reshape(config.num_queries, -1, dim), lse.reshape(config.num_queries, -1))


def _by_head(geometry: Geometry, rows: jax.Array) -> jax.Array:
    """[cores, queries, splits, rows, n] as [.., kv_heads, pack, queries_per_kv_head, n]."""
    page_format = geometry.format
    heads = (*rows.shape[:3], page_format.num_kv_heads)
    used = page_format.num_kv_heads * geometry.rows_per_head
    rows = rows[:, :, :, :used].reshape(*heads, geometry.rows_per_head, -1)
    rows = rows[:, :, :, :, : geometry.rows_in_use]
    return rows.reshape(*heads, page_format.pack, geometry.queries_per_kv_head, -1)
