"""The second kernel: merges the parts of the units that are cut between shares, in place.

A CTA for each share and some columns: share `c` ends inside a unit, whose parts are the last of
share `c` and the first of the next ones. Elements of all rows lie side by side.

Where results are in their places already, one more for each share says of some queries that they
read nothing: those of which no unit tells.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config
from .mosaic import WARPGROUP, load
from .softmax import LOG2E, LOWEST
from .tiles import INVALID, READS, Tiles

# Parts that are on their way together, by elements a thread. Large units have few parts.
_AT_ONCE = {1: 8, 4: 2}
_QUERIES_AT_ONCE = 16


class Inputs(NamedTuple):
    part_out: Any  # [parts, vectors, merge_width]
    part_lse: Any  # [parts, 128]
    cut: Any  # see `attend_kernel.Outputs`
    state: Any = None  # of queries, if results are in place; see `tiles.Work`
    first: Any = None  # query of each tile, if these have several, and how many there are
    count: Any = None


def _num_vectors(config: Config) -> int:
    return config.out_rows * config.out_dim // config.merge_width


def grid(config: Config) -> tuple[int, int]:
    """Shares, and vectors of a unit's elements, its lse, and what reads nothing."""
    return config.num_ctas, _num_vectors(config) + 1 + config.in_place


def kernel(inputs: Inputs, out_ref: Any, lse_ref: Any, *, config: Config) -> None:
    """Changes `out` `[units, vectors, merge_width]`, in place `[queries, kv_heads, vectors of both,
    merge_width]`, and `lse` `[units, 128]`."""
    share, vector = lax.axis_index("share"), lax.axis_index("vector")
    num_vectors = _num_vectors(config)
    unit, last = inputs.cut[share, 0], inputs.cut[share, 1]

    @pl.when((unit >= 0) & (vector == num_vectors))
    def _():
        lse_of = lambda part: load(inputs.part_lse.at[part], _flat(WARPGROUP))
        _, peak, total = _merge(WARPGROUP, share, last - share + 1, lse_of, lambda part: None)
        none = total == 0.0
        log = jnp.log(jnp.where(none, 1.0, total)) * LOG2E
        lse_ref[unit] = jnp.where(none, -jnp.inf, peak + log)

    @pl.when((unit >= 0) & (vector < num_vectors))
    def _():
        at, width = jnp.minimum(vector, num_vectors - 1), config.merge_width
        lse_of = functools.partial(_lse_by_element, config, inputs.part_lse, at)
        value_of = lambda part: load(inputs.part_out.at[part, at], _flat(width))
        sums, _, total = _merge(width, share, last - share + 1, lse_of, value_of)
        none = total == 0.0
        mean = jnp.where(none, 0.0, sums / jnp.where(none, 1.0, total)).astype(out_ref.dtype)
        if config.in_place:
            _put(config, inputs, out_ref, unit, at, mean)
        else:
            out_ref[unit, at] = mean

    if config.in_place:
        pl.when(vector > num_vectors)(lambda: _put_nothing(config, inputs.state, out_ref, share))


def _put(
    config: Config, inputs: Inputs, out_ref: Any, unit: jax.Array, at: jax.Array, mean: jax.Array
) -> None:
    """Stores a vector of a unit's results where its query's are, if there is one that reads."""
    num_heads, per_query = config.format.num_kv_heads, out_ref.shape[2]
    tile, head = lax.div(unit, jnp.int32(num_heads)), lax.rem(unit, jnp.int32(num_heads))
    number, vector = lax.div(at, jnp.int32(per_query)), lax.rem(at, jnp.int32(per_query))
    first, count = Tiles(None, None, first=inputs.first, count=inputs.count).queries(tile)

    @pl.when(number < count)
    def _():
        query = first + number

        @pl.when(inputs.state[query] == READS)
        def _():
            out_ref[query, head, vector] = mean


def _put_nothing(config: Config, state_ref: Any, out_ref: Any, share: jax.Array) -> None:
    """Zeros of each of a share's queries that reads nothing, and NaN of one that is invalid."""
    num_queries, num_heads, num_vectors, width = out_ref.shape
    stride = config.num_ctas

    def fill(query: jax.Array) -> None:
        broken = (state_ref[query] == INVALID) & config.final
        value = jnp.where(broken, jnp.nan, 0.0)
        row = lax.broadcast_in_dim(value, (width,), ())
        row = plgpu.layout_cast(row, _flat(width)).astype(out_ref.dtype)

        def put(i, _):
            out_ref[query, lax.div(i, num_vectors), lax.rem(i, num_vectors)] = row
            return 0

        lax.fori_loop(0, num_heads * num_vectors, put, 0)

    def some(number, _):
        first = share + number * _QUERIES_AT_ONCE * stride
        queries = [first + i * stride for i in range(_QUERIES_AT_ONCE)]
        states = [state_ref[jnp.minimum(query, num_queries - 1)] for query in queries]
        for query, state in zip(queries, states, strict=True):
            pl.when((query < num_queries) & (state != READS))(functools.partial(fill, query))
        return 0

    lax.fori_loop(0, -(-num_queries // (stride * _QUERIES_AT_ONCE)), some, 0)


def _flat(width: int) -> Any:
    return plgpu.Layout.WG_STRIDED((width,), vec_size=width // WARPGROUP)


def _full(width: int, value: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full((width,), value, jnp.float32), _flat(width))


def _merge(
    width: int, share: jax.Array, count: jax.Array, lse_of: Any, value_of: Any
) -> tuple[Any, Any, Any]:
    """Sums of values and of weights, relative to the peak, element by element."""

    at_once = _AT_ONCE[width // WARPGROUP]

    def some(number, carry):
        sums, peak, total = carry
        loaded = []
        for i in range(at_once):
            which = number * at_once + i
            part = 2 * (share + jnp.minimum(which, count - 1)) + (which == 0).astype(jnp.int32)
            beyond = jnp.where(which < count, 0.0, -jnp.inf)  # the last part again: to be ignored
            loaded.append((lse_of(part) + beyond, value_of(part)))
        next_peak = functools.reduce(jnp.maximum, [lse for lse, _ in loaded], peak)
        shrink = jnp.exp2(peak - next_peak)
        sums, total = sums * shrink, total * shrink
        for lse, value in loaded:
            weight = jnp.exp2(lse - next_peak)
            total += weight
            if value is not None:  # of no part, or of rows without keys, it is any
                sums += jnp.where(lse == -jnp.inf, 0.0, weight * value)
        return sums, next_peak, total

    rounds = lax.div(count + (at_once - 1), jnp.int32(at_once))
    init = (_full(width, 0.0), _full(width, LOWEST), _full(width, 0.0))
    return lax.fori_loop(0, rounds, some, init)


def _lse_by_element(config: Config, lse_ref: Any, vector: jax.Array, part: jax.Array) -> jax.Array:
    """The lse of the row that each element of a vector is of."""
    dim, width = config.out_dim, config.merge_width
    row = lax.div(vector * width, jnp.int32(dim))
    behind = vector * width - row * dim  # of the row's elements, those before this vector
    element = behind + plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=_flat(width))
    lse_of = lambda i: lse_ref[part, jnp.minimum(row + i, WARPGROUP - 1)]
    lse = _full(width, lse_of(0))
    for i in range(1, (dim - 1 + width - 1) // dim + 1):
        lse = jnp.where(element >= i * dim, lse_of(i), lse)
    return lse
