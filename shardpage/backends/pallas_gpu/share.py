"""Which blocks of which units each CTA works on: equal shares of one flat list, found by itself.

    CTA 0:  [unit 0: blocks 0 1 2] [unit 1: block 0]          unit 1 is cut: a part of it
    CTA 1:  [unit 1: blocks 1 2 3] [unit 2: block 0]          unit 2 as well
    CTA 2:  [unit 2: block 1] [unit 3: block 0] [unit 4: 0]   units 3 and 4 go to the result

At most two units of a share are cut: the one that it begins in and the one that it ends in. (The
idea of Stream-K, Osama et al. 2023, applied to the keys of decode attention.)

All of this is scalar arithmetic; the lengths of `_AT_ONCE` tiles are loaded at a time, since each
load alone would wait for the memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .config import Config

_AT_ONCE = 32


class Position(NamedTuple):
    """A block of a unit in the flat list."""

    item: jax.Array  # its number in the list
    tile: jax.Array
    head: jax.Array
    block: jax.Array  # counted from the first that its tile reads


class Share(NamedTuple):
    """The blocks of one CTA."""

    begin: Position
    length: jax.Array
    total: jax.Array  # blocks of all CTAs


class Segment(NamedTuple):
    """The blocks of one unit in a share."""

    tile: jax.Array
    unit: jax.Array
    head: jax.Array
    block: jax.Array  # the first
    length: jax.Array
    num_blocks: jax.Array  # of the unit
    item: jax.Array  # the first one's number in the flat list
    step: jax.Array  # blocks of the share before it
    number: jax.Array  # segments of the share before it

    @property
    def begins(self) -> jax.Array:
        """Whether the unit begins here."""
        return self.block == 0

    @property
    def whole(self) -> jax.Array:
        return self.begins & (self.length == self.num_blocks)


def first_block(config: Config, start: jax.Array) -> jax.Array:
    """The block that a tile's tokens begin in."""
    return lax.div(start, jnp.int32(config.block_tokens))


def share_of(config: Config, start_ref: Any, stop_ref: Any, cta: jax.Array) -> Share:
    """Finds the share of a CTA."""
    num_heads = config.format.num_kv_heads
    blocks_of = lambda tile: _num_blocks(config, start_ref, stop_ref, tile)
    total = _scan(config, blocks_of, lambda total, _, blocks: total + blocks, jnp.int32(0))
    total = total * num_heads

    def find(item: jax.Array) -> Position:
        def pass_over(carry, tile, blocks):
            end, found, base = carry
            end = end + blocks * num_heads
            passed = (end <= item) & (tile < config.num_tiles)
            return end, jnp.where(passed, tile + 1, found), jnp.where(passed, end, base)

        zero = jnp.int32(0)
        _, tile, base = _scan(config, blocks_of, pass_over, (zero, zero, zero))
        blocks = jnp.maximum(blocks_of(tile), 1)
        head, block = lax.div(item - base, blocks), lax.rem(item - base, blocks)
        if config.num_splits:  # units may be cut between their parts only
            part = lax.div(blocks + (config.num_splits - 1), jnp.int32(config.num_splits))
            behind = lax.rem(block, part)
            return Position(item - behind, tile, head, block - behind)
        return Position(item, tile, head, block)

    begin = find(_cut(config, total, cta))
    end = _cut(config, total, cta + 1)
    end = find(end).item if config.num_splits else end
    return Share(begin, end - begin.item, total)


def last_cta(config: Config, share: Share, segment: Segment) -> jax.Array:
    """Which CTA's share holds the last block of a segment's unit."""
    item = segment.item - segment.block + segment.num_blocks - 1
    each, rest = _division(config, share.total)
    larger = rest * (each + 1)
    behind = rest + lax.div(item - larger, jnp.maximum(each, 1))
    return jnp.where(item < larger, lax.div(item, each + 1), behind)


def for_each_segment(
    config: Config, start_ref: Any, stop_ref: Any, share: Share, body: Callable[[Segment], None]
) -> tuple[jax.Array, jax.Array]:
    """Runs `body` on the segments of a share; returns how many blocks and segments there are."""
    num_heads = config.format.num_kv_heads

    def step(carry):
        left, tile, head, block, done, number = carry
        num_blocks = _num_blocks(config, start_ref, stop_ref, tile)
        count = jnp.minimum(num_blocks - block, left)
        unit, item = tile * num_heads + head, share.begin.item + done

        @jax.named_scope("segment")
        def work():
            body(Segment(tile, unit, head, block, count, num_blocks, item, done, number))

        lax.cond(count > 0, work, lambda: None)
        over = block + count >= num_blocks
        next_head = head + over.astype(jnp.int32)
        next_tile = next_head >= num_heads
        return (
            left - count,
            tile + next_tile.astype(jnp.int32),
            jnp.where(next_tile, 0, next_head),
            jnp.where(over, 0, block + count),
            done + count,
            number + (count > 0).astype(jnp.int32),
        )

    zero = jnp.int32(0)
    init = (share.length, *share.begin[1:], zero, zero)
    *_, steps, segments = lax.while_loop(lambda carry: carry[0] > 0, step, init)
    return steps, segments


def _num_blocks(config: Config, start_ref: Any, stop_ref: Any, tile: jax.Array) -> jax.Array:
    """How many blocks a tile reads; none behind the last tile."""
    at = jnp.minimum(tile, config.num_tiles - 1)
    start, stop = start_ref[at], stop_ref[at]
    behind = lax.div(stop + (config.block_tokens - 1), jnp.int32(config.block_tokens))
    some = (tile < config.num_tiles) & (stop > start)
    return jnp.where(some, behind - first_block(config, start), 0)


def _scan(
    config: Config, blocks_of: Callable[..., Any], step: Callable[..., Any], init: Any
) -> Any:
    """`step(carry, tile, blocks)` over all tiles."""
    at_once = min(_AT_ONCE, config.num_tiles)

    def some(number, carry):
        tiles = [number * at_once + i for i in range(at_once)]
        for tile, blocks in [(tile, blocks_of(tile)) for tile in tiles]:
            carry = step(carry, tile, blocks)
        return carry

    return lax.fori_loop(0, -(-config.num_tiles // at_once), some, init)


def _division(config: Config, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks that each CTA gets, and how many CTAs get one more."""
    num_ctas = jnp.int32(config.num_ctas)
    return lax.div(total, num_ctas), lax.rem(total, num_ctas)


def _cut(config: Config, total: jax.Array, cta: jax.Array) -> jax.Array:
    """The first block of a CTA's share, before whole parts are kept together."""
    each, rest = _division(config, total)
    return cta * each + jnp.minimum(cta, rest)
