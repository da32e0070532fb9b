"""Attention of a tile's queries over one block in fast memory, as an online softmax.

A KV head at a time: its rows are all tokens of its first query head, then of its second, and so on.
Logits, and what they are when something is not finite: see `..softmax`.

A block that every query sees whole (`add_whole`) needs no masks, and hardly ever new maxima: a
row's largest logit of its first few tokens (`begin`) serves all others, too, unless one is so much
larger that its weight might overflow. So weights need not wait for maxima, and go from one matrix
product into the other. Afterwards two checks say, of all rows at once, whether that was right.

In any other block (`add_masked`) a token may be seen by some queries of the tile and not by others,
and a weight of 0 does not silence a NaN: keys and values that are not finite become zeros there,
and their logits NaN for those who see them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ....quantise import largest
from .. import token_major
from ..geometry import LANES, SUBLANES
from ..softmax import (
    FLOAT32_MAX,
    LOG2_E,
    Logits,
    across,
    dot,
    finite_or_nan,
    first_elements,
    is_token,
    scale_row,
)
from ..widen import as_matrix, row_at
from .config import Config

# Maxima serve as long as no weights of a block sum to more. They lose nothing by being large, for
# bfloat16 has float32's range. Of 1 each, some 2**15 are added.
_MOST_WEIGHT = 2.0**20


class Sums(NamedTuple):
    """References to the softmax of a tile over what it has seen so far, per KV head."""

    maximum: Any  # [kv_heads, rows, 128], each row repeated over the lanes
    total: Any  # [kv_heads, rows, 128], of each lane's tokens
    out: Any  # [kv_heads, rows, row_dim], not yet divided by the total


class Before(NamedTuple):
    """References to what `add_whole` has changed in the sums, should it have to be undone."""

    total: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """Keys and values of a block or a piece of one, in fast memory."""

    config: Config
    buffers: Any  # of each cache array [block_pages, *page_shape]; then of the scales, if any
    first_page: Any
    num_pages: int

    @property
    def rows(self) -> int:
        """Cache rows per KV head."""
        return self.num_pages * self.config.format.page_rows

    def keys(self, head: Any) -> jax.Array:
        """[block_rows, row_dim]"""
        return self._elements(0, head)

    def values(self, head: Any) -> jax.Array:
        return self._elements(1, head)

    def scales(self, which: int, head: Any, copy: int) -> jax.Array | None:
        """Of the keys or values that are `copy`th in their rows, [1, block_rows]."""
        page_format = self.config.format
        if page_format.scale != "token":
            return None
        pages = [self.buffers[-1][self.first_page + i, head] for i in range(self.num_pages)]
        return scale_row(self.config, pages, which, copy)

    def sizes(self, which: int, head: Any, elements: jax.Array) -> jax.Array:
        """In one tile, sums of what these elements are without their signs, or more."""
        page_format = self.config.format
        if not page_format.quantised:
            return _size(elements)
        if page_format.scale == "head":  # scaled already
            return jnp.full((SUBLANES, LANES), largest(page_format.dtype), jnp.float32)
        scales = (self.scales(which, head, copy) for copy in range(page_format.pack))
        row = jnp.concatenate([x for x in scales if x is not None], axis=1)
        row *= largest(page_format.dtype)
        return _size(jnp.broadcast_to(row, (SUBLANES, row.shape[1])))

    def flaws(self, keys: jax.Array, copy: int) -> jax.Array:
        """1 for each token that is marked as NaN, else 0; [8, block_rows], of equal rows."""
        ones = first_elements(self.config.format, SUBLANES, copy)
        return jnp.where(is_token(self.config.format, dot(ones, keys, over=1)), 0.0, 1.0)

    def _elements(self, which: int, head: Any) -> jax.Array:
        page_format = self.config.format
        pages = pl.ds(self.first_page, self.num_pages)
        if page_format.layout.token_major:
            words = self.buffers[token_major.array_of(page_format, which)].at[pages]
            return as_matrix(self.config, token_major.elements(page_format, words, which, head))
        if page_format.fused:
            elements = self.buffers[0][pages, which, head]
        else:
            elements = self.buffers[which][pages, head]
        return as_matrix(self.config, elements.reshape(self.rows, page_format.row_dim))


def query_rows(config: Config, rows: jax.Array, copy: int) -> jax.Array:
    """Queries in the lanes of one token of a cache row, zeros elsewhere."""
    if config.format.pack > 1:
        rows = jnp.where(_copy_lanes(config, rows, copy), rows, 0.0)
    return rows.astype(config.format.compute_dtype)


def _scores(
    queries: jax.Array, keys: jax.Array, scales: jax.Array | None, logits: Logits
) -> jax.Array:
    """Logits, [rows, block_rows]; one may be -inf."""
    factor = logits.factor if scales is None else scales * logits.factor
    return logits.of_scaled(dot(queries, keys, over=1) * factor)


def _scaled(config: Config, weights: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Weights as the product with values takes them."""
    if scales is not None:
        weights *= scales
    return weights.astype(config.format.compute_dtype)


def begin(sums: Sums, queries: Any, block: Block, logits: Logits) -> None:
    """Sums of nothing, with the maxima of a block that every query sees whole."""
    config = block.config

    def of_parts(numbers: list[Any], carry: tuple[()]) -> tuple[()]:
        for head, rows in map(config.part, numbers):
            keys, highest = block.keys(head), jnp.full((config.part_rows, LANES), -FLOAT32_MAX)
            for copy in range(config.format.pack):
                own = queries[head, copy, rows]
                score = _scores(own, keys, block.scales(0, head, copy), logits)
                highest = jnp.maximum(highest, jnp.max(score, axis=1, keepdims=True))
            sums.maximum[head, rows] = highest
            sums.total[head, rows], sums.out[head, rows] = (
                jnp.zeros((config.part_rows, ref.shape[-1])) for ref in (sums.total, sums.out)
            )
        return carry

    _of_all_parts(config, of_parts, ())


def add_whole(sums: Sums, before: Before, queries: Any, block: Block, logits: Logits) -> jax.Array:
    """Adds a block that every query sees whole, to sums that have maxima.

    Args:
      queries: reference, [kv_heads, pack, rows, row_dim].

    Returns:
      Whether that failed, since a row needs another maximum, a result overflowed with this one, or
      a dot product may have: then the sums are to be restored.
    """

    def add(numbers: list[Any], checks: tuple[jax.Array, jax.Array]):
        return _add_whole(sums, before, queries, block, logits, numbers, checks)

    zeros = jnp.zeros((SUBLANES, LANES), jnp.float32)
    weight, size = _of_all_parts(block.config, add, (zeros, zeros))
    most = FLOAT32_MAX
    if _checks_elements(block):  # below, no dot product and no logit can overflow
        row_dim = block.config.format.row_dim
        most = math.sqrt(FLOAT32_MAX / 2 / (row_dim * max(1.0, logits.factor)))
    good = (weight <= _MOST_WEIGHT) & (size <= most)
    return jnp.sum(jnp.where(good, 0.0, 1.0)) != 0


def _add_whole(
    sums: Sums,
    before: Before,
    queries: Any,
    block: Block,
    logits: Logits,
    numbers: list[Any],
    checks: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Adds a block to some parts; checks weights, and what could make a logit of -inf.

    A matrix unit takes products in the order in which they stand here. So the scores of small parts
    come first: the softmax of one has the time of the others' products.
    """
    config, elements = block.config, _checks_elements(block)
    weight, size = checks
    parts = [config.part(number) for number in numbers]
    scores = []
    for head, rows in parts:
        keys = block.keys(head)
        if elements:
            size += block.sizes(0, head, keys)
        for copy in range(config.format.pack):
            own = queries[head, copy, rows]
            score = _scores(own, keys, block.scales(0, head, copy), logits)
            if config.format.scale == "head":
                size += _lane_sums(jnp.where(block.flaws(keys, copy) > 0, jnp.nan, 0.0))
            size += _size(own if elements else score)
            scores.append(score)
    for head, rows in parts:
        values = block.values(head)
        maximum, total, out = (ref[head, rows] for ref in sums)
        before.total[head, rows], before.out[head, rows] = total, out
        added, products = jnp.zeros_like(total), []
        for copy in range(config.format.pack):
            score = scores.pop(0)
            weights = jnp.exp2(score - across(maximum, score.shape[1]))
            added += _lane_sums(weights)
            weights = _scaled(config, weights, block.scales(1, head, copy))
            products.append(dot(weights, values, over=0))
        out += _of_copies(config, products)
        sums.total[head, rows], sums.out[head, rows] = total + added, out
        weight += _size(added)
        # Values within the bound of queries and keys overflow with no weight that is allowed.
        size += block.sizes(1, head, values) if elements else _size(out - out)
    return weight, size


def _checks_elements(block: Block) -> bool:
    """Whether a part has fewer queries, keys and values than logits."""
    part_rows, rows = block.config.part_rows, block.rows
    return block.config.format.row_dim * (part_rows + 2 * rows) < part_rows * rows


def restore(sums: Sums, before: Before) -> None:
    """Makes the sums what they were before `add_whole`."""

    @pl.loop(0, before.total.shape[0])
    def _(head):
        sums.total[head], sums.out[head] = before.total[head], before.out[head]


def add_masked(
    sums: Sums, queries: Any, block: Block, logits: Logits, begins: jax.Array, spans: jax.Array
) -> None:
    """Adds a block of which each query sees a span.

    Args:
      queries: reference, [kv_heads, pack, rows, row_dim].
      begins: whether nothing was seen before, whatever the sums hold.
      spans: [tile_tokens, 128], the tokens `[start, stop)` of each query in its first two lanes,
        counted from the block's first.
    """

    def add(numbers: list[Any], carry: tuple[()]) -> tuple[()]:
        _add_masked(sums, queries, block, logits, numbers, begins, spans)
        return carry

    _of_all_parts(block.config, add, ())


def _add_masked(
    sums: Sums,
    queries: Any,
    block: Block,
    logits: Logits,
    numbers: list[Any],
    begins: jax.Array,
    spans: jax.Array,
) -> None:
    config = block.config
    parts = [config.part(number) for number in numbers]
    scores, values = [], []
    for head, rows in parts:
        keys, of_keys = _silenced(config, block.keys(head))
        value, of_values = _silenced(config, block.values(head))
        values.append(value)
        for copy, (of_key, of_value) in enumerate(zip(of_keys, of_values, strict=True)):
            flawed, scales = of_key + of_value, block.scales(0, head, copy)
            if scales is not None:
                flawed += jnp.where(jnp.abs(scales) <= FLOAT32_MAX, 0.0, 1.0)
                scales = _finite(scales)
            if config.format.scale == "head":
                flawed += block.flaws(block.keys(head), copy)[:1]
            score = _scores(queries[head, copy, rows], keys, scales, logits)
            scores.append(_masked(config, finite_or_nan(score), spans, flawed, copy))
    for (head, rows), value in zip(parts, values, strict=True):
        own = [scores.pop(0) for _ in range(config.format.pack)]
        before = jnp.where(begins, -FLOAT32_MAX, sums.maximum[head, rows])
        maximum = before
        for score in own:
            maximum = jnp.maximum(maximum, jnp.max(score, axis=1, keepdims=True))
        fade = jnp.exp2(before - maximum)
        total, products = jnp.where(begins, 0.0, sums.total[head, rows]) * fade, []
        for copy, score in enumerate(own):
            weights = jnp.exp2(score - across(maximum, score.shape[1]))
            total += _lane_sums(weights)
            scales = block.scales(1, head, copy)
            scales = None if scales is None else _finite(scales)
            products.append(dot(_scaled(config, weights, scales), value, over=0))
        out = _of_copies(config, products)
        before_out = jnp.where(begins, 0.0, sums.out[head, rows])
        sums.maximum[head, rows], sums.total[head, rows] = maximum, total
        sums.out[head, rows] = before_out * across(fade, out.shape[1]) + out


def _of_all_parts(config: Config, add: Callable[[list[Any], Any], Any], carry: Any) -> Any:
    """Calls `add` with the numbers of some parts at a time."""
    at_once, together = config.parts_at_once, config.parts_together

    def some(first: jax.Array, carry: Any) -> Any:
        for index in range(0, at_once, together):
            carry = add([first * at_once + index + each for each in range(together)], carry)
        return carry

    return lax.fori_loop(0, config.num_parts // at_once, some, carry)


def _size(elements: jax.Array) -> jax.Array:
    """In one tile, [8, 128], sums of what elements are without their signs: none is larger.

    A sum keeps a NaN or an infinity, which a maximum may lose.
    """
    sizes = jnp.abs(elements.astype(jnp.float32)).reshape(-1, SUBLANES, elements.shape[1])
    return _lane_sums(jnp.sum(sizes, axis=0))


def _of_copies(config: Config, products: list[jax.Array]) -> jax.Array:
    """Of each copy's product, what is in the lanes of its token."""
    out = products[0]
    for copy, product in enumerate(products[1:], 1):
        out = jnp.where(_copy_lanes(config, product, copy), product, out)
    return out


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
    parts = _in_lanes(weights)
    return sum(parts[1:], parts[0])


def _in_lanes(array: jax.Array) -> list[jax.Array]:
    """The columns of an array in pieces of 128, zeros behind."""
    array = jnp.pad(array, ((0, 0), (0, -array.shape[1] % LANES)))
    return [array[:, lane : lane + LANES] for lane in range(0, array.shape[1], LANES)]


def _copy_lanes(config: Config, array: jax.Array, copy: int) -> jax.Array:
    """Which elements are of the copy's token of each cache row."""
    lane = lax.broadcasted_iota(jnp.int32, array.shape, 1)
    return lane // config.format.key_dim == copy


def _silenced(config: Config, elements: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Zeros for what is not finite; and how many of those each token of a row has: [1, rows]."""
    if jnp.issubdtype(elements.dtype, jnp.integer):
        return elements, [jnp.zeros((1, elements.shape[0]), jnp.float32)] * config.format.pack
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


def _finite(scales: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(scales) <= FLOAT32_MAX, scales, 0.0)


def _masked(
    config: Config, score: jax.Array, spans: jax.Array, flawed: jax.Array, copy: int
) -> jax.Array:
    """-inf where a token is not seen, NaN where it is and has a flaw."""
    shape = (config.tile_tokens, score.shape[1])
    row = row_at(config, lax.broadcasted_iota(jnp.int32, shape, 1))
    token = row * config.format.pack + copy
    seen = (token >= spans[:, :1]) & (token < spans[:, 1:2])
    by_head = score.reshape(-1, *shape)
    flawless = jnp.where(flawed > 0, jnp.nan, jnp.zeros(shape, jnp.float32))
    return jnp.where(seen[None], by_head + flawless[None], -jnp.inf).reshape(score.shape)
