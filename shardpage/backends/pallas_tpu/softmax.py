"""Attention of all query rows over one block in fast memory, as an online softmax.

Logits are kept in units of log2, for which the hardware has the exponential. A masked logit is
-inf, and the running maximum starts at the lowest finite one, so that no difference is ever NaN by
itself. A logit made of a NaN or an infinity is NaN: it must never look like a masked one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ...options import HUGE_SOFT_CAP, UNCAPPED
from .geometry import LANES, Geometry

FLOAT32_MAX = float(np.finfo(np.float32).max)
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Turns dot products into logits: scaled, capped, in units of log2."""

    scale: float
    soft_cap: float | None

    def __call__(self, dots: jax.Array) -> jax.Array:
        if self.soft_cap is None:
            logits = dots * (self.scale * LOG2_E)
            return jnp.where(logits > -jnp.inf, logits, jnp.nan)  # inf makes NaN by itself
        ratio = dots * (self.scale / self.soft_cap)
        logits = jnp.tanh(ratio) * (self.soft_cap * LOG2_E)
        if self.soft_cap > HUGE_SOFT_CAP:
            logits = jnp.where(jnp.abs(ratio) < UNCAPPED, dots * (self.scale * LOG2_E), logits)
        return jnp.where(jnp.abs(ratio) <= FLOAT32_MAX, logits, jnp.nan)


class State(NamedTuple):
    """References to the running softmax of all rows, float32."""

    maximum: Any  # [rows, 128], each row repeated over the lanes
    total: Any  # [rows, 128], likewise
    out: Any  # [rows, row_dim], not yet divided by the total


class Span(NamedTuple):
    """The tokens that may be seen, `[start, stop)`, and the number of the chunk's first token."""

    start: jax.Array
    stop: jax.Array
    first_token: jax.Array


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some pages of the block at one place of the ring."""

    geometry: Geometry
    buffers: Sequence[Any]
    place: jax.Array
    first_page: jax.Array | int
    num_pages: int

    @property
    def num_rows(self) -> int:
        """Cache rows per KV head."""
        return self.num_pages * self.geometry.format.page_rows

    def load(self, which: int, head: int) -> jax.Array:
        """A head's keys (0) or values (1), [num_rows, row_dim]."""
        pages = pl.ds(self.first_page, self.num_pages)
        if self.geometry.format.fused:
            loaded = self.buffers[0][self.place, pages, which, head]
        else:
            loaded = self.buffers[which][self.place, pages, head]
        return loaded.reshape(self.num_rows, self.geometry.format.row_dim)


def reset(state: State) -> None:
    """No tokens seen yet."""
    state.maximum[...] = jnp.full(state.maximum.shape, -FLOAT32_MAX, jnp.float32)
    state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
    state.out[...] = jnp.zeros(state.out.shape, jnp.float32)


def attend(chunk: Chunk, query: Any, state: State, logits: Logits, span: Span | None) -> None:
    """Adds a chunk to the running softmax of all rows.

    Args:
      chunk: where keys and values are.
      query: reference to the query rows, [rows, row_dim] in the caches' dtype.
      state: is updated.
      logits: scale and cap.
      span: None if all tokens of the chunk are seen. Otherwise nothing of the others reaches the
        result, whatever they are.
    """
    groups = range(chunk.geometry.num_groups)
    # Phase by phase rather than group by group: one group's matmul hides another's softmax.
    scores = [_scores(chunk, group, query, logits, span) for group in groups]
    weights = [_weights(chunk.geometry, group, scores[group], state) for group in groups]
    for group in groups:
        _add_values(chunk, group, *weights[group], state, span)


def _rows(geometry: Geometry, group: int):
    return pl.ds(group * geometry.rows_per_group, geometry.rows_per_group)


def _scores(chunk, group, query, logits, span) -> jax.Array:
    """Logits of a group's rows, -inf where a token is not seen; [rows_per_group, num_rows]."""
    geometry = chunk.geometry
    keys = [chunk.load(0, head) for head in geometry.heads_of(group)]
    if span is not None and geometry.format.pack > 1:  # other tokens of a row are in its products
        seen = _seen_elements(geometry, chunk.num_rows, span)
        keys = [jnp.where(seen, key, 0) for key in keys]
    queries = query[_rows(geometry, group), :]
    scores = logits(_own_rows(geometry, [_dot(queries, key, over=1) for key in keys]))
    if span is not None:
        scores = jnp.where(_seen_logits(geometry, chunk.num_rows, span), scores, -jnp.inf)
    return scores


def _weights(geometry, group, scores, state) -> tuple[jax.Array, jax.Array]:
    """Updates maximum and total; returns the factor on what was summed so far, and the weights."""
    rows = _rows(geometry, group)
    old = state.maximum[rows, :]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - _across(new, scores.shape[1]))
    fade = jnp.exp2(old - new)
    state.maximum[rows, :] = new
    state.total[rows, :] = state.total[rows, :] * fade + jnp.sum(weights, axis=1, keepdims=True)
    return fade, weights.astype(geometry.format.compute_dtype)


def _across(column: jax.Array, width: int) -> jax.Array:
    """Widens [rows, 128] of equal lanes, which costs nothing, to [rows, width]."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def _add_values(chunk, group, fade, weights, state, span) -> None:
    geometry = chunk.geometry
    values = [chunk.load(1, head) for head in geometry.heads_of(group)]
    if span is not None:  # a weight of 0 does not silence a NaN
        seen = _seen_elements(geometry, chunk.num_rows, span)
        values = [jnp.where(seen, value, 0) for value in values]
    added = _own_rows(geometry, [_dot(weights, value, over=0) for value in values])
    rows = _rows(geometry, group)
    state.out[rows, :] = state.out[rows, :] * _across(fade, geometry.format.row_dim) + added


def _dot(rows: jax.Array, matrix: jax.Array, *, over: int) -> jax.Array:
    """Contracts the rows' last axis with one of the matrix, in float32."""
    precision = lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else None
    dims, options = (((1,), (over,)), ((), ())), {"preferred_element_type": jnp.float32}
    return lax.dot_general(rows, matrix, dims, precision=precision, **options)


def _own_rows(geometry: Geometry, by_head: list[jax.Array]) -> jax.Array:
    """Takes each row from its own KV head's result: all were computed for all rows of the group."""
    result = by_head[0]
    if len(by_head) > 1:
        row = lax.broadcasted_iota(jnp.int32, result.shape, 0)
        head = row >> (geometry.rows_per_head.bit_length() - 1)  # a power of two
        for index in range(1, len(by_head)):
            result = jnp.where(head == index, by_head[index], result)
    return result


def _seen_logits(geometry: Geometry, num_rows: int, span: Span) -> jax.Array:
    """Which logits count: [rows_per_group, num_rows]."""
    shape = (geometry.rows_per_group, num_rows)
    token = lax.broadcasted_iota(jnp.int32, shape, 1)
    if geometry.format.pack > 1:
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        if geometry.rows_per_group > geometry.rows_per_head:  # several heads, of 2 ** n rows each
            row &= geometry.rows_per_head - 1
        token = token * geometry.format.pack + lax.div(row, geometry.queries_per_kv_head)
    return _within(token + span.first_token, span)


def _seen_elements(geometry: Geometry, num_rows: int, span: Span) -> jax.Array:
    """Which elements of keys or values count: [num_rows, row_dim]."""
    shape = (num_rows, geometry.format.row_dim)
    token = lax.broadcasted_iota(jnp.int32, shape, 0)
    if geometry.format.pack > 1:
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        token = token * geometry.format.pack + lax.div(lane, geometry.format.key_dim)
    return _within(token + span.first_token, span)


def _within(token: jax.Array, span: Span) -> jax.Array:
    return (token >= span.start) & (token < span.stop)


def write_result(state: State, result: Any) -> None:
    """Divides, and writes `[rows, row_dim]` values and the natural lse in the last 128 lanes."""
    total = state.total[...]
    some = total != 0  # NaN, too, is something
    lse = jnp.where(some, state.maximum[...] + jnp.log2(total), -jnp.inf) / LOG2_E
    row_dim = state.out.shape[-1]
    inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
    result[:, pl.ds(0, row_dim)] = state.out[...] * _across(inverse, row_dim)
    result[:, pl.ds(result.shape[-1] - LANES, LANES)] = lse
