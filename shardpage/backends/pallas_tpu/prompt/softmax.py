"""Attention of a tile's queries over one block in fast memory, as an online softmax.

A KV head at a time: its rows are all tokens of its first query head, then of its second, and so on.
Logits, and what they are when something is not finite: see `..softmax`.

A block that every query sees whole needs no masks. In any other, a token may be seen by some queries
of the tile and not by others, and a weight of 0 does not silence a NaN: keys and values that are not
finite become zeros there, and their logits NaN for those who see them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..geometry import LANES, SUBLANES
from ..softmax import FLOAT32_MAX, LOG2_E, Logits, across, dot
from .config import Config


class Sums(NamedTuple):
    """References to the softmax of a tile over what it has seen so far, per KV head."""

    maximum: Any  # [kv_heads, rows, 128], each row repeated over the lanes
    total: Any  # [kv_heads, rows, 128], of each lane's tokens
    out: Any  # [kv_heads, rows, row_dim], not yet divided by the total


@dataclasses.dataclass(frozen=True)
class Block:
    """Keys and values of a block, in fast memory."""

    config: Config
    buffers: Any  # of each cache array [block_pages, *page_shape]

    def keys(self, head: jax.Array) -> jax.Array:
        """[block_rows, row_dim]"""
        return self._elements(0, head)

    def values(self, head: jax.Array) -> jax.Array:
        return self._elements(1, head)

    def _elements(self, which: int, head: jax.Array) -> jax.Array:
        page_format = self.config.format
        if page_format.fused:
            pages = self.buffers[0][:, which, head]
        else:
            pages = self.buffers[which][:, head]
        return pages.reshape(self.config.block_rows, page_format.row_dim)


def begin(sums: Sums) -> None:
    """Nothing seen yet."""
    sums.maximum[...] = jnp.full(sums.maximum.shape, -FLOAT32_MAX, jnp.float32)
    sums.total[...] = jnp.zeros(sums.total.shape, jnp.float32)
    sums.out[...] = jnp.zeros(sums.out.shape, jnp.float32)


def attend(
    sums: Sums, queries: Any, block: Block, head: jax.Array, logits: Logits, spans: Any | None
) -> None:
    """Adds a block to the sums of a KV head.

    Args:
      queries: reference, [kv_heads, pack, rows, row_dim].
      spans: [tile_tokens, 128], the tokens `[start, stop)` of each query in its first two lanes,
        counted from the block's first; None if all see the whole block.
    """
    config = block.config
    keys, values = block.keys(head), block.values(head)
    if spans is not None:
        keys, keys_flawed = _silenced(config, keys)
        values, values_flawed = _silenced(config, values)
        flawed = [a + b for a, b in zip(keys_flawed, values_flawed, strict=True)]
    scores = []
    for copy in range(config.format.pack):
        score = logits(dot(queries[head, copy], keys, over=1))
        if spans is not None:
            score = _masked(config, score, spans, flawed[copy], copy)
        scores.append(score)
    before = sums.maximum[head]
    largest = jnp.max(scores[0], axis=1, keepdims=True)
    for score in scores[1:]:
        largest = jnp.maximum(largest, jnp.max(score, axis=1, keepdims=True))
    maximum = jnp.maximum(before, jnp.broadcast_to(largest, before.shape))
    fade = jnp.exp2(before - maximum)
    total, out = sums.total[head] * fade, None
    for copy, score in enumerate(scores):
        weights = jnp.exp2(score - across(maximum, score.shape[1]))
        total += _lane_sums(weights)
        product = dot(weights.astype(config.format.compute_dtype), values, over=0)
        out = product if out is None else jnp.where(_copy_lanes(config, product, copy), product, out)
    sums.maximum[head], sums.total[head] = maximum, total
    sums.out[head] = sums.out[head] * across(fade, out.shape[1]) + out


def finish(sums: Sums, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a KV head, the output [rows, row_dim] and the natural lse, [rows, 128] of equal lanes."""
    total = jnp.sum(sums.total[head], axis=1, keepdims=True)
    total = jnp.broadcast_to(total, sums.total.shape[1:])
    some = total != 0  # NaN, too, is something
    lse = jnp.where(some, sums.maximum[head] + jnp.log2(total), -jnp.inf) / LOG2_E
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
    out = sums.out[head]
    return out * across(inverse, out.shape[1]), lse


def lanes_of(config: Config, rows: jax.Array, copy: int) -> jax.Array:
    """Rows with their elements in the lanes of one token of a cache row, zeros elsewhere."""
    if config.format.pack == 1:
        return rows
    return jnp.where(_copy_lanes(config, rows, copy), rows, 0.0)


def as_lanes(column: jax.Array, width: int) -> jax.Array:
    """Lays rows of equal lanes, [width, 128], side by side: [1, width]."""
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, column.shape, 1)
    return jnp.sum(jnp.where(row == lane, column, 0.0), axis=0, keepdims=True)[:, :width]


def _lane_sums(weights: jax.Array) -> jax.Array:
    """Sums per lane, [rows, 128]: lanes are added once a tile, at its end."""
    rows, width = weights.shape
    if width < LANES:
        return jnp.pad(weights, ((0, 0), (0, LANES - width)))
    parts = [weights[:, lane : lane + LANES] for lane in range(0, width, LANES)]
    if parts[-1].shape[1] < LANES:
        parts[-1] = jnp.pad(parts[-1], ((0, 0), (0, LANES - parts[-1].shape[1])))
    return sum(parts[1:], parts[0])


def _copy_lanes(config: Config, array: jax.Array, copy: int) -> jax.Array:
    """Which elements are of the copy's token of each cache row."""
    lane = lax.broadcasted_iota(jnp.int32, array.shape, 1)
    return lane // config.format.key_dim == copy


def _silenced(config: Config, elements: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Zeros for what is not finite; and for each token of a row, how many such elements: [1, rows]."""
    finite = jnp.abs(elements.astype(jnp.float32)) <= FLOAT32_MAX
    ones = jnp.ones((SUBLANES, elements.shape[1]), elements.dtype)
    flawed = jnp.where(finite, 0.0, 1.0).astype(elements.dtype)
    counts = [
        dot(ones if config.format.pack == 1 else jnp.where(_copy_lanes(config, ones, copy), ones, 0),
            flawed, over=1)[:1]
        for copy in range(config.format.pack)
    ]  # fmt: skip
    return jnp.where(finite, elements, 0), counts


def _masked(
    config: Config, score: jax.Array, spans: jax.Array, flawed: jax.Array, copy: int
) -> jax.Array:
    """-inf where a token is not seen, NaN where it is and has a flaw."""
    shape = (config.tile_tokens, score.shape[1])
    token = lax.broadcasted_iota(jnp.int32, shape, 1) * config.format.pack + copy
    seen = (token >= spans[:, :1]) & (token < spans[:, 1:2])
    by_head = score.reshape(config.queries_per_kv_head, *shape)
    flawless = jnp.where(flawed > 0, jnp.nan, jnp.zeros(shape, jnp.float32))
    return jnp.where(seen[None], by_head + flawless[None], -jnp.inf).reshape(score.shape)
