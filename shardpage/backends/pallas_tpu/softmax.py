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
from jax.experimental.pallas import tpu as pltpu

from ...options import UNCAPPED, factor_under_cap
from ...page_format import PageFormat
from ...quantise import largest
from . import token_major
from .geometry import LANES, Geometry
from .widen import as_matrix, lanes, row_at

FLOAT32_MAX = float(np.finfo(np.float32).max)
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Turns dot products into logits: scaled, capped, in units of log2."""

    scale: float
    soft_cap: float | None

    @property
    def factor(self) -> float:
        """What dot products are multiplied by before anything else."""
        if self.soft_cap is None:
            return self.scale * LOG2_E
        return factor_under_cap(self.scale, self.soft_cap) or self.scale

    def __call__(self, dots: jax.Array, scales: jax.Array | None = None) -> jax.Array:
        """Logits of dot products; `scales` of the keys, where each has one."""
        factor = self.factor if scales is None else scales * self.factor
        logits = self.of_scaled(dots * factor)
        return logits if self.soft_cap is not None else finite_or_nan(logits)

    def of_scaled(self, scaled: jax.Array) -> jax.Array:
        """Logits of dot products times the factor; without a cap one may be -inf."""
        if self.soft_cap is None:
            return scaled
        is_ratio = factor_under_cap(self.scale, self.soft_cap) is not None
        ratio = scaled if is_ratio else scaled / self.soft_cap
        logits = jnp.tanh(ratio) * (self.soft_cap * LOG2_E)
        if not is_ratio:
            logits = jnp.where(jnp.abs(ratio) < UNCAPPED, scaled * LOG2_E, logits)
        return jnp.where(jnp.abs(scaled) <= FLOAT32_MAX, logits, jnp.nan)


def finite_or_nan(logits: jax.Array) -> jax.Array:
    """NaN for -inf; inf makes NaN by itself."""
    return jnp.where(logits > -jnp.inf, logits, jnp.nan)


class Sums(NamedTuple):
    """The softmax of some rows over some tokens."""

    maximum: Any  # [rows, 128], each row repeated over the lanes
    total: Any  # [rows, 128], likewise
    out: Any  # [rows, row_dim], not yet divided by the total


class Span(NamedTuple):
    """The tokens of a block that may be seen, `[start, stop)`, counted from its first."""

    start: jax.Array
    stop: jax.Array


@dataclasses.dataclass(frozen=True)
class View:
    """A block in fast memory, and the queries that see it."""

    geometry: Geometry
    buffers: Sequence[Any]  # [places, step_pages, ...] of `fetch.page_buffers`
    place: jax.Array | int
    first_page: int
    num_pages: int
    used_pages: jax.Array  # that hold tokens to be seen
    query: Any  # [rows, row_dim] in the dtype of matmuls
    span: Span
    first_head: Any = 0  # of those whose words the buffers hold

    @property
    def num_rows(self) -> int:
        """Cache rows per KV head."""
        return self.num_pages * self.geometry.format.page_rows

    def of_heads(self, first: Any, count: int) -> tuple["View", Any]:
        """What some KV heads see of it, from a multiple of `count` on; and their rows."""
        part = self.geometry.of_heads(count)
        rows = pl.ds(pl.multiple_of(first * part.rows_per_head, part.rows), part.rows)
        of_page = (slice(None),) * (3 if part.format.fused else 2)
        axes = [of_page] * part.format.num_arrays + [(slice(None),) * 2]  # before the heads
        some = pl.ds(first, count)
        buffers = [x.at[(*y, some)] for x, y in zip(self.buffers, axes, strict=False)]
        changed: dict[str, Any] = {"buffers": buffers, "query": self.query.at[rows]}
        if part.format.layout.token_major:  # heads of a token are not apart
            words = self.buffers[: part.format.num_arrays]
            changed |= {"buffers": [*words, *buffers[len(words) :]], "first_head": first}
        return dataclasses.replace(self, geometry=part, **changed), rows

    def keys(self, head: int) -> jax.Array:
        """A head's keys, [num_rows, row_dim]."""
        return as_matrix(self.geometry, self._elements(0, head))

    def values(self, head: int) -> jax.Array:
        """A head's values, [num_rows, row_dim]; zeros in pages that are not used."""
        values = self._elements(1, head)
        if not self.may_be_nan:
            return as_matrix(self.geometry, values)
        words = pltpu.bitcast(values, jnp.int32)
        words = words.reshape(self.num_pages, -1, words.shape[-1])
        page = lax.broadcasted_iota(jnp.int32, words.shape, 0)
        words = jnp.where(page < self.used_pages, words, 0).reshape(-1, words.shape[-1])
        return as_matrix(self.geometry, pltpu.bitcast(words, values.dtype))

    @property
    def may_be_nan(self) -> bool:
        """Whether an element that must not be seen could be: a weight of 0 does not silence it."""
        return self.geometry.format.dtype != np.int8

    def scales(self, which: int, group: int) -> jax.Array | None:
        """Scales of keys or values for a group's rows, [1 or rows_per_group, num_rows]."""
        geometry = self.geometry
        if geometry.format.scale != "token":
            return None
        buffer = self.buffers[-1].at[self.place]
        pages = range(self.first_page, self.first_page + self.num_pages)
        parts = [
            scale_row(geometry, [buffer[page, head] for page in pages], which, copy)
            for head in geometry.heads_of(group)
            for copy in range(geometry.format.pack)
        ]
        return _by_own_part(geometry, parts)

    def clean(self, which: int) -> None:
        """Zeros the keys or values in the first and the last page that must not be seen.

        For a weight of 0 does not silence a NaN.
        """
        page_format, last = self.geometry.format, jnp.maximum(self.used_pages - 1, 0)
        if page_format.layout.token_major:
            page = lambda number: self._words(which).at[self.place, self.first_page + number]
            token_major.keep_from(page(0), self.span.start)
            token_major.keep_until(page(last), self.span.stop - last * page_format.page_size)
            return
        for page in (0, last):
            elements = self._pages(which, self.first_page + page)
            first = page * page_format.page_size
            span = Span(self.span.start - first, self.span.stop - first)
            seen = _seen_elements(self.geometry, page_format.page_rows, span)
            elements[...] = jnp.where(seen, elements[...], 0)

    def _elements(self, which: int, head: int) -> jax.Array:
        page_format, pages = self.geometry.format, pl.ds(self.first_page, self.num_pages)
        if page_format.layout.token_major:
            words = self._words(which).at[self.place, pages]
            return token_major.elements(page_format, words, which, self.first_head + head)
        pages = self._pages(which, pages)[:, head]
        return pages.reshape(self.num_rows, -1)

    def _words(self, which: int) -> Any:
        return self.buffers[token_major.array_of(self.geometry.format, which)]

    def _pages(self, which: int, pages: Any) -> Any:
        """Reference to keys or values of some pages, or of one."""
        if self.geometry.format.fused:
            return self.buffers[0].at[self.place, pages, which]
        return self.buffers[which].at[self.place, pages]


def scale_row(where: Any, pages: Sequence[jax.Array], which: int, copy: int) -> jax.Array:
    """Scales of the keys (0) or values (1) that are `copy`th in their rows, [1, cache rows], of
    pages' [1, 2 * page_size]."""
    page_format = where.format
    first = which * page_format.page_size + copy * page_format.page_rows
    own = [page[:, first : first + page_format.page_rows] for page in pages]
    return lanes(where, own[0] if len(own) == 1 else jnp.concatenate(own, axis=1))


def attend(views: Sequence[View], logits: Logits) -> list[Sums]:
    """The softmax over each block by itself, of all its query's rows.

    Nothing of the tokens outside of a block's span reaches its result, whatever they are.
    """
    chains = [(view, group) for view in views for group in range(view.geometry.num_groups)]
    for view in views:
        if view.geometry.format.pack > 1 and view.may_be_nan:  # a row's others are in its products
            view.clean(0)
    # Phase by phase rather than block by block: one's matmul hides another's softmax.
    scores = [_scores(view, group, logits) for view, group in chains]
    for view in views:
        if view.may_be_nan:
            view.clean(1)
    weights = [_weights(each, *chain) for each, chain in zip(scores, chains, strict=True)]
    outs = [_values(view, group, w.out) for w, (view, group) in zip(weights, chains, strict=True)]
    sums = [w._replace(out=out) for w, out in zip(weights, outs, strict=True)]
    groups = len(chains) // len(views)
    return [_stack(sums[i * groups : (i + 1) * groups]) for i in range(len(views))]


def _stack(groups: Sequence[Sums]) -> Sums:
    """The rows of all groups."""
    return Sums(*(x[0] if len(x) == 1 else jnp.concatenate(x) for x in zip(*groups, strict=True)))


def nothing(rows: int, row_dim: int) -> Sums:
    """No tokens seen."""
    full = lambda value, width: jnp.full((rows, width), value, jnp.float32)
    return Sums(full(-FLOAT32_MAX, LANES), full(0.0, LANES), full(0.0, row_dim))


def load(refs: Sums) -> Sums:
    return Sums(*(ref[...] for ref in refs))


def store(refs: Sums, sums: Sums) -> None:
    for ref, value in zip(refs, sums, strict=True):
        ref[...] = value


def forget(sums: Sums, begins: jax.Array) -> Sums:
    """Nothing, where a segment begins, else the same."""
    fresh = nothing(*sums.out.shape)
    return Sums(*(jnp.where(begins, x, y) for x, y in zip(fresh, sums, strict=True)))


def add(before: Sums, block: Sums) -> Sums:
    """The softmax over the tokens of both."""
    maximum = jnp.maximum(before.maximum, block.maximum)
    parts = [(each, jnp.exp2(each.maximum - maximum)) for each in (before, block)]
    total = sum(each.total * fade for each, fade in parts)
    out = sum(each.out * across(fade, each.out.shape[1]) for each, fade in parts)
    return Sums(maximum, total, out)


def _rows(geometry: Geometry, group: int):
    return pl.ds(group * geometry.rows_per_group, geometry.rows_per_group)


def _scores(view: View, group: int, logits: Logits) -> jax.Array:
    """Logits of a group's rows, -inf where a token is not seen; [rows_per_group, num_rows]."""
    geometry = view.geometry
    keys = [view.keys(head) for head in geometry.heads_of(group)]
    queries = view.query[_rows(geometry, group), :]
    integers = geometry.integers and geometry.format.dtype == np.int8
    dots, first = (_integer_dots if integers else _dots)(geometry, queries, keys)
    scores = logits(dots, view.scales(0, group))
    if first is not None:
        scores = jnp.where(is_token(geometry.format, first), scores, jnp.nan)
    return jnp.where(_seen_logits(geometry, view.num_rows, view.span), scores, -jnp.inf)


def _dots(
    geometry: Geometry, queries: jax.Array, keys: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """Dot products, [rows_per_group, num_rows], and of keys that may be marked their marks."""
    by_head = lambda rows: _own_rows(geometry, [dot(rows, key, over=1) for key in keys])
    if geometry.format.scale != "head":
        return by_head(queries), None
    ones = first_elements(geometry.format, geometry.rows_per_group, _copies(geometry))
    return by_head(queries), by_head(ones)


def _integer_dots(
    geometry: Geometry, queries: jax.Array, keys: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """The same of int8 keys as they are stored, which need not be widened for it.

    Queries are the sums of two pieces of 8 bits, more rows of the matmul, whose sums are exact: so
    an element is within 2**-15 of its row's largest.
    """
    queries, rows = queries.astype(jnp.float32), geometry.rows_per_group
    unit = jnp.max(jnp.abs(queries), axis=1, keepdims=True) * (1 / 127)
    units = queries / unit
    high = jnp.round(units)
    pieces = [high, jnp.round((units - high) * 128)]
    if geometry.format.scale == "head":
        ones = first_elements(geometry.format, rows, _copies(geometry))
        pieces.append(ones.astype(jnp.float32))
    stacked = jnp.concatenate(pieces).astype(jnp.int8)
    dims, options = (((1,), (1,)), ((), ())), {"preferred_element_type": jnp.int32}
    found = [lax.dot_general(stacked, key, dims, **options) for key in keys]
    part = lambda i: [each[i * rows : (i + 1) * rows] for each in found]
    sums = [(high << 7) + low for high, low in zip(part(0), part(1), strict=True)]
    dots = _own_rows(geometry, sums).astype(jnp.float32) * (unit * (1 / 128))
    if geometry.format.scale != "head":
        return dots, None
    return dots, _own_rows(geometry, part(2)).astype(jnp.float32)


def first_elements(page_format: PageFormat, rows: int, copy: Any) -> jax.Array:
    """A matrix whose product with keys is the first element of each: of a row's token `copy`."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, page_format.row_dim), 1)
    one = jnp.where(lane == copy * page_format.key_dim, 1.0, 0.0)
    return one.astype(page_format.compute_dtype)


def is_token(page_format: PageFormat, first: jax.Array) -> jax.Array:
    """Whether tokens are numbers, by the first elements of their keys: see `quantise.INT8_NAN`.

    A product may make 480 of float8_e4m3fn's NaN, which no number is stored as either.
    """
    return jnp.abs(first) <= largest(page_format.dtype)


def _copies(geometry: Geometry) -> Any:
    """Which token of a cache row each row of a group is for."""
    if geometry.format.pack == 1:
        return 0
    row = lax.broadcasted_iota(jnp.int32, (geometry.rows_per_group, geometry.format.row_dim), 0)
    if geometry.rows_per_group > geometry.rows_per_head:  # several heads, of 2 ** n rows each
        row &= geometry.rows_per_head - 1
    return lax.div(row, geometry.queries_per_kv_head)


def _weights(scores: jax.Array, view: View, group: int) -> Sums:
    """The maximum and the total, and for now the weights in place of the output."""
    largest = jnp.maximum(jnp.max(scores, axis=1, keepdims=True), -FLOAT32_MAX)
    weights = jnp.exp2(scores - largest)
    total = jnp.sum(weights, axis=1, keepdims=True)
    shape = (scores.shape[0], LANES)
    maximum, total = (jnp.broadcast_to(x, shape) for x in (largest, total))
    scales = view.scales(1, group)
    if scales is not None:
        # A token that is NaN is so in the logits of who sees it: both its scales are NaN.
        weights *= jnp.where(jnp.abs(scales) <= FLOAT32_MAX, scales, 0.0)
    return Sums(maximum, total, weights.astype(view.geometry.format.compute_dtype))


def across(column: jax.Array, width: int) -> jax.Array:
    """Widens [rows, 128] of equal lanes, which costs nothing, to [rows, width]."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def _values(view: View, group: int, weights: jax.Array) -> jax.Array:
    geometry = view.geometry
    values = [view.values(head) for head in geometry.heads_of(group)]
    return _own_rows(geometry, [dot(weights, value, over=0) for value in values])


def dot(rows: jax.Array, matrix: jax.Array, *, over: int) -> jax.Array:
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


def _by_own_part(geometry: Geometry, parts: list[jax.Array]) -> jax.Array:
    """To each row of a group what is its KV head's, and its copy's of a cache row."""
    if len(parts) == 1:
        return parts[0]
    shape = (geometry.rows_per_group, parts[0].shape[1])
    row, rows = lax.broadcasted_iota(jnp.int32, shape, 0), geometry.rows_per_head
    result = jnp.broadcast_to(parts[0], shape)
    pack = geometry.format.pack
    for index in range(1, len(parts)):
        first = index // pack * rows + index % pack * geometry.queries_per_kv_head
        result = jnp.where(row >= first, parts[index], result)
    return result


def _seen_logits(geometry: Geometry, num_rows: int, span: Span) -> jax.Array:
    """Which logits count: [rows_per_group, num_rows]."""
    shape = (geometry.rows_per_group, num_rows)
    token = row_at(geometry, lax.broadcasted_iota(jnp.int32, shape, 1))
    if geometry.format.pack > 1:
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        if geometry.rows_per_group > geometry.rows_per_head:  # several heads, of 2 ** n rows each
            row &= geometry.rows_per_head - 1
        token = token * geometry.format.pack + lax.div(row, geometry.queries_per_kv_head)
    return _within(token, span)


def _seen_elements(geometry: Geometry, num_rows: int, span: Span) -> jax.Array:
    """Which elements of keys or values count: [num_rows, row_dim]."""
    shape = (num_rows, geometry.format.row_dim)
    token = lax.broadcasted_iota(jnp.int32, shape, 0)
    if geometry.format.pack > 1:
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        token = token * geometry.format.pack + lax.div(lane, geometry.format.key_dim)
    return _within(token, span)


def _within(token: jax.Array, span: Span) -> jax.Array:
    return (token >= span.start) & (token < span.stop)


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The output, [rows, row_dim], and the natural lse, [rows, 128] of equal lanes."""
    some = sums.total != 0  # NaN, too, is something
    lse = jnp.where(some, sums.maximum + jnp.log2(sums.total), -jnp.inf) / LOG2_E
    inverse = jnp.where(some, 1 / jnp.where(some, sums.total, 1.0), 0.0)
    return sums.out * across(inverse, sums.out.shape[1]), lse


def broken(out: jax.Array) -> jax.Array:
    """NaN where an element is not finite, else 0.

    A weighted mean of finite values is finite: what is not has read a NaN or an infinity.
    """
    return out - out


def as_lanes(column: jax.Array, tiles: int) -> jax.Array:
    """Lays rows of equal lanes, [rows, 128], side by side: `[tiles, 128]`, 128 rows in each."""
    row = lax.broadcasted_iota(jnp.int32, column.shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, column.shape, 1)
    own = jnp.where(row % LANES == lane, column, 0.0)
    parts = [own[tile * LANES : (tile + 1) * LANES] for tile in range(tiles)]
    return jnp.concatenate([jnp.sum(part, axis=0, keepdims=True) for part in parts])
