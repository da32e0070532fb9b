"""Attention of a tile's queries over one block in fast memory, as an online softmax.

A KV head at a time: its rows are all tokens of its first query head, then of its second, and so on.
Logits, and what they are when something is not finite: see `..softmax`.

A block that every query sees whole needs no masks. In any other, a token may be seen by some
queries of the tile and not by others, and a weight of 0 does not silence a NaN: keys and values
that are not finite become zeros there, and their logits NaN for those who see them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..geometry import LANES, SUBLANES
from ..softmax import FLOAT32_MAX, LOG2_E, Logits, across, dot, finite_or_nan
from .config import Config


class Sums(NamedTuple):
    """References to the softmax of a tile over what it has seen so far, per KV head."""

    maximum: Any  # [kv_heads, rows, 128], each row repeated over the lanes
    total: Any  # [kv_heads, rows, 128], of each lane's tokens
    out: Any  # [kv_heads, rows, row_dim], not yet divided by the total


class Place(NamedTuple):
    """References to what one part of the rows leaves for the next stage."""

    scores: Any  # [pack, part_rows, block_rows]
    largest: Any  # [part_rows, 128], of each row, repeated over the lanes


class Stages(NamedTuple):
    """The places of the parts of two stages, in turn."""

    scores: Any  # of each [stage_parts, pack, part_rows, block_rows]
    largest: Any  # of each [stage_parts, part_rows, 128]

    def at(self, turn: int, index: int) -> Place:
        return Place(self.scores[turn].at[index], self.largest[turn].at[index])


@dataclasses.dataclass(frozen=True)
class Block:
    """Keys and values of a block, in fast memory."""

    config: Config
    buffers: Any  # of each cache array [block_pages, *page_shape]
    first_page: Any = 0
    num_pages: int | None = None  # None: all

    @property
    def rows(self) -> int:
        """Cache rows per KV head."""
        return (self.num_pages or self.config.block_pages) * self.config.format.page_rows

    def keys(self, head: Any) -> jax.Array:
        """[block_rows, row_dim]"""
        return self._elements(0, head)

    def values(self, head: Any) -> jax.Array:
        return self._elements(1, head)

    def _elements(self, which: int, head: Any) -> jax.Array:
        page_format = self.config.format
        pages = pl.ds(self.first_page, self.num_pages or self.config.block_pages)
        if page_format.fused:
            elements = self.buffers[0][pages, which, head]
        else:
            elements = self.buffers[which][pages, head]
        return elements.reshape(self.rows, page_format.row_dim)


def query_rows(config: Config, rows: jax.Array, copy: int) -> jax.Array:
    """Queries in the lanes of one token of a cache row, zeros elsewhere."""
    if config.format.pack > 1:
        rows = jnp.where(_copy_lanes(config, rows, copy), rows, 0.0)
    return rows.astype(config.format.compute_dtype)


def attend(
    sums: Sums,
    stages: Stages,
    queries: Any,
    block: Block,
    logits: Logits,
    begins: jax.Array,
    spans: Any | None,
) -> None:
    """Adds a block to the sums of all KV heads.

    Scores of some parts of the rows are computed while the weights of those before are: the one
    keeps the matrix unit busy, the other the vector unit.

    Args:
      queries: reference, [kv_heads, pack, rows, row_dim].
      begins: whether nothing was seen before, whatever the sums hold.
      spans: [tile_tokens, 128], the tokens `[start, stop)` of each query in its first two lanes,
        counted from the block's first; None if all see the whole block.
    """
    config = block.config

    def score(number: Any, turn: int) -> None:
        for index in range(config.stage_parts):
            part, place = number * config.stage_parts + index, stages.at(turn, index)
            _score(place, queries, block, part, logits, spans)

    def add(number: Any, turn: int) -> None:
        for index in range(config.stage_parts):
            part, place = number * config.stage_parts + index, stages.at(turn, index)
            _add(sums, place, block, part, begins, masked=spans is not None)

    num_stages = config.num_parts // config.stage_parts
    score(0, 0)

    @pl.loop(0, (num_stages - 1) // 2)
    def _(pair):
        for turn in range(2):
            score(2 * pair + turn + 1, 1 - turn)
            add(2 * pair + turn, turn)

    if num_stages % 2 == 0:
        score(num_stages - 1, 1)
        add(num_stages - 2, 0)
    add(num_stages - 1, 1 - num_stages % 2)


def _score(
    place: Place, queries: Any, block: Block, number: Any, logits: Logits, spans: Any
) -> None:
    """Logits of a part of the rows, and the largest of each."""
    config = block.config
    head, rows = config.part(number)
    keys, flaws = block.keys(head), []
    if spans is not None:
        keys, of_keys = _silenced(config, keys)
        _, of_values = _silenced(config, block.values(head))
        flaws = [a + b for a, b in zip(of_keys, of_values, strict=True)]
    peaks = []
    for copy in range(config.format.pack):
        score = logits.of_scaled(dot(queries[head, copy, rows], keys, over=1) * logits.factor)
        if spans is not None:
            score = _masked(config, finite_or_nan(score), spans, flaws[copy], copy)
        place.scores[copy, :, : block.rows] = score
        peak = jnp.max(score, axis=1, keepdims=True)
        if spans is None and logits.soft_cap is None:
            # One of -inf must not pass for one that is masked.
            peak = jnp.where(jnp.min(score, axis=1, keepdims=True) > -jnp.inf, peak, jnp.nan)
        peaks.append(peak)
    largest = functools.reduce(jnp.maximum, peaks)
    place.largest[...] = jnp.broadcast_to(largest, (config.part_rows, LANES))


def _add(
    sums: Sums, place: Place, block: Block, number: Any, begins: jax.Array, *, masked: bool
) -> None:
    """Adds a part's scores to its sums."""
    config = block.config
    head, rows = config.part(number)
    values = block.values(head)
    if masked:
        values, _ = _silenced(config, values)
    before = jnp.where(begins, -FLOAT32_MAX, sums.maximum[head, rows])
    largest = place.largest[...]
    maximum = jnp.where(largest == largest, jnp.maximum(before, largest), jnp.nan)
    fade = jnp.exp2(before - maximum)
    total = jnp.where(begins, 0.0, sums.total[head, rows]) * fade
    products = []
    for copy in range(config.format.pack):
        score = place.scores[copy, :, : block.rows]
        weights = jnp.exp2(score - across(maximum, score.shape[1]))
        total += _lane_sums(weights)
        products.append(dot(weights.astype(config.format.compute_dtype), values, over=0))
    out = products[0]
    for copy, product in enumerate(products[1:], 1):
        out = jnp.where(_copy_lanes(config, product, copy), product, out)
    before_out = jnp.where(begins, 0.0, sums.out[head, rows])
    sums.maximum[head, rows], sums.total[head, rows] = maximum, total
    sums.out[head, rows] = before_out * across(fade, out.shape[1]) + out


def finish(sums: Sums, kv_head: Any, rows: Any, any_seen: Any) -> tuple[jax.Array, jax.Array]:
    """Of some rows, the output [rows, row_dim] and the natural lse, [rows, 128] of equal lanes."""
    maximum, total, out = (jnp.where(any_seen, ref[kv_head, rows], 0.0) for ref in sums)
    total = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
    some = total != 0  # NaN, too, is something
    lse = jnp.where(some, maximum + jnp.log2(total), -jnp.inf) / LOG2_E
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
    return out * across(inverse, out.shape[1]), lse


def as_lanes(column: jax.Array) -> jax.Array:
    """Lays rows of equal lanes, [width, 128], side by side: [1, width]."""
    parts = []
    for first in range(0, len(column), LANES):
        part = column[first : first + LANES]
        row = lax.broadcasted_iota(jnp.int32, part.shape, 0)
        lane = lax.broadcasted_iota(jnp.int32, part.shape, 1)
        own = jnp.sum(jnp.where(row == lane, part, 0.0), axis=0, keepdims=True)
        parts.append(own[:, : len(part)])
    return jnp.concatenate(parts, axis=1)


def _lane_sums(weights: jax.Array) -> jax.Array:
    """Sums per lane, [rows, 128]: lanes are added once a tile, at its end."""
    width = weights.shape[1]
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
    """Zeros for what is not finite; and how many of those each token of a row has: [1, rows]."""
    finite = jnp.abs(elements.astype(jnp.float32)) <= FLOAT32_MAX
    flawed = jnp.where(finite, 0.0, 1.0).astype(elements.dtype)
    ones = jnp.ones((SUBLANES, elements.shape[1]), jnp.float32)
    counts = []
    for copy in range(config.format.pack):
        own = ones
        if config.format.pack > 1:
            own = jnp.where(_copy_lanes(config, ones, copy), ones, 0.0)
        counts.append(dot(own.astype(elements.dtype), flawed, over=1)[:1])
    return jnp.where(finite, elements, 0), counts


def _masked(
    config: Config, score: jax.Array, spans: jax.Array, flawed: jax.Array, copy: int
) -> jax.Array:
    """-inf where a token is not seen, NaN where it is and has a flaw."""
    shape = (config.tile_tokens, score.shape[1])
    token = lax.broadcasted_iota(jnp.int32, shape, 1) * config.format.pack + copy
    seen = (token >= spans[:, :1]) & (token < spans[:, 1:2])
    by_head = score.reshape(-1, *shape)
    flawless = jnp.where(flawed > 0, jnp.nan, jnp.zeros(shape, jnp.float32))
    return jnp.where(seen[None], by_head + flawless[None], -jnp.inf).reshape(score.shape)
