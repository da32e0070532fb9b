"""The second kernel: merges the parts of the units that are cut between shares, in place.

A CTA for each share and some columns: share `c` ends inside a unit, whose parts are the last of
share `c` and the first of the next ones. Elements of all rows lie side by side.

Where results leave for their places (`window.py`), one more for each share fills those of queries
that no unit tells of: zeros where nothing is read, NaN for invalid ones.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config
from .mosaic import WARPGROUP, load
from .softmax import LOG2E, LOWEST
from .tiles import NOTHING, READS, Windows
from .window import Window

# Parts that are on their way together, by elements a thread. Large units have few parts.
_AT_ONCE = {1: 8, 4: 2}
_STATES_AT_ONCE = 16


class Inputs(NamedTuple):
    part_out: Any  # [parts, vectors, merge_width]
    part_lse: Any  # [parts, 128]
    cut: Any  # see `attend_kernel.Outputs`
    windows: Windows | None  # where results leave for their places, and the state of each query
    state: Any


def grid(config: Config) -> tuple[int, int]:
    """Shares, and vectors of a unit's elements, its lse, and what no unit tells of."""
    return config.num_ctas, _num_vectors(config) + 1 + config.out_in_place


def kernel(inputs: Inputs, out_ref: Any, lse_ref: Any, *, config: Config) -> None:
    """Changes `out`, `[units, vectors, merge_width]` or in place `[queries, heads, dim]`.

    And `lse`, `[units, 128]`.
    """
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
        at, first = (
            jnp.minimum(vector, num_vectors - 1),
            lax.rem(unit, jnp.int32(config.fold)) * config.rows,
        )
        width = config.merge_width
        lse_of = functools.partial(_lse_by_element, config, inputs.part_lse, at, first)
        value_of = lambda part: load(inputs.part_out.at[part, at], _flat(width))
        sums, _, total = _merge(width, share, last - share + 1, lse_of, value_of)
        none = total == 0.0
        mean = jnp.where(none, 0.0, sums / jnp.where(none, 1.0, total))
        mean = mean.astype(out_ref.dtype)
        if inputs.windows is None:
            out_ref[unit, at] = mean
        else:
            window = Window.of(config, inputs.windows, unit)
            _store(mean, out_ref, window, at * (width // config.out_dim), inputs.state)

    if inputs.windows is not None:
        pl.when(vector == num_vectors + 1)(lambda: _fill(config, inputs.state, out_ref, share))


def _num_vectors(config: Config) -> int:
    return config.out_rows * config.out_dim // config.merge_width


def _store(
    means: jax.Array, out_ref: Any, window: Window, first_row: jax.Array, state_ref: Any
) -> None:
    """Copies rows, side by side, to where they belong."""
    dim = out_ref.shape[-1]

    def copy(staged_ref: Any) -> None:
        staged_ref[...] = means
        plgpu.commit_smem()
        for i in range(len(means) // dim):
            query, head = window.at(first_row + i)
            own = (query >= window.begin) & (query < window.end) & (state_ref[query] == READS)

            @pl.when(own)
            def _(query=query, head=head, i=i):
                row = staged_ref.at[pl.ds(i * dim, dim)]
                plgpu.copy_smem_to_gmem(row, out_ref.at[query, head])

        plgpu.wait_smem_to_gmem(0)

    _with_smem(copy, means.shape, means.dtype)


def _fill(config: Config, state_ref: Any, out_ref: Any, share: jax.Array) -> None:
    """Fills the places of every `num_ctas`th query that reads nothing, or is invalid."""
    num_queries, num_heads, dim = out_ref.shape
    heads = config.merge_width // dim
    layout = plgpu.Layout.WG_STRIDED((heads, dim), vec_size=config.merge_width // WARPGROUP)

    def fill(blank_ref: Any) -> None:
        for which, value in enumerate((0.0, jnp.nan)):
            blank = jnp.full((heads, dim), value, out_ref.dtype)
            blank_ref.at[which][...] = plgpu.layout_cast(blank, layout)
        plgpu.commit_smem()

        def copy(query: jax.Array, state: jax.Array, i: jax.Array) -> None:
            blank = blank_ref.at[(state != NOTHING).astype(jnp.int32)]
            plgpu.copy_smem_to_gmem(blank, out_ref.at[query, pl.ds(i * heads, heads)])

        def some(number, _):
            first = (number * _STATES_AT_ONCE) * config.num_ctas + share
            queries = [first + i * config.num_ctas for i in range(_STATES_AT_ONCE)]
            states = [state_ref[jnp.minimum(query, num_queries - 1)] for query in queries]
            for query, state in zip(queries, states, strict=True):

                @pl.when((query < num_queries) & (state != READS))
                def _(query=query, state=state):
                    one = lambda i, _: copy(query, state, i)
                    lax.fori_loop(0, num_heads // heads, one, None)

        rounds = -(-num_queries // (config.num_ctas * _STATES_AT_ONCE))
        lax.fori_loop(0, rounds, some, None)
        plgpu.wait_smem_to_gmem(0)

    _with_smem(fill, (2, heads, dim), out_ref.dtype)


def _with_smem(body: Callable[[Any], None], shape: tuple[int, ...], dtype: Any) -> None:
    """Runs `body` on an array in the shared memory of the CTA, of one warpgroup."""
    pl.run_scoped(body, plgpu.SMEM(shape, dtype), collective_axes="warpgroup")


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


def _lse_by_element(
    config: Config, lse_ref: Any, vector: jax.Array, first_row: jax.Array, part: jax.Array
) -> jax.Array:
    """The lse of the row that each element of a vector is of."""
    dim, width = config.out_dim, config.merge_width
    row = lax.div(vector * width, jnp.int32(dim))
    behind = vector * width - row * dim  # of the row's elements, those before this vector
    element = behind + plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=_flat(width))
    lse_of = lambda i: lse_ref[part, jnp.minimum(first_row + row + i, WARPGROUP - 1)]
    lse = _full(width, lse_of(0))
    for i in range(1, (dim - 1 + width - 1) // dim + 1):
        lse = jnp.where(element >= i * dim, lse_of(i), lse)
    return lse
