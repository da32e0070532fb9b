"""Decode steps: page attention beside what a user would pick instead."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax

from . import inputs, peers, timing
from .report import Row, first_line
from .shapes import Shape

# Calls per program on an accelerator, so that the device is timed and not Python.
REPEATS = 32


def rows(shapes: Sequence[Shape], platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures every implementation on one shape after the other."""
    for shape in shapes:
        yield from measure(shape, platform, roof_gbps)
        jax.clear_caches()


def measure(shape: Shape, platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape. An answer that misses the oracle is reported and not timed."""
    given = inputs.make(shape, 1 if platform == "cpu" else REPEATS)
    calls, temp_bytes, missing = {}, {}, {}
    for name, build in peers.IMPLEMENTATIONS.items():
        try:
            attend, kv_layout = build(shape, platform)
            arrays = (given.queries, *given.caches(kv_layout), given.lens, given.tables)
            compiled = jax.jit(in_one_program(attend)).lower(*arrays).compile()
            error, limit = inputs.error_of(given, compiled(*arrays)[-1])
        except peers.Unavailable as reason:
            missing[name] = str(reason)
            continue
        except Exception as failure:  # a peer's failure does not end the run
            if name == peers.OURS:
                raise
            missing[name] = f"failed: {first_line(failure)}"
            continue
        if error > limit:
            missing[name] = f"wrong: error {error:.1e}, rounding allows {limit:.1e}"
            continue
        calls[name] = functools.partial(compiled, *arrays)
        temp_bytes[name] = timing.temp_bytes(compiled)

    timed = timing.in_turn(calls, given.repeats)
    for name in peers.IMPLEMENTATIONS:
        row = functools.partial(Row, "decode", shape.name, name)
        if name in missing:
            yield row(why=missing[name])
        else:
            yield row(timed[name], shape.kv_bytes, temp_bytes[name], roof_gbps)


def in_one_program(attend: peers.Attend) -> Any:
    """Calls `attend` once per stacked query and table, one after the other."""

    def program(queries, key, value, lens, tables):
        if queries.shape[0] == 1:
            return attend(queries[0], key, value, lens, tables[0])[None]
        step = lambda _, call: (None, attend(call[0], key, value, lens, call[1]))
        return lax.scan(step, None, (queries, tables))[1]

    return program
