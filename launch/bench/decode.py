"""Decode steps: page attention beside what a user would pick instead."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from . import flashinfer, inputs, peers, timing
from .report import COPY, OURS, Row, first_line
from .shapes import Shape

# Calls per program on an accelerator, so that the device is timed and not Python.
REPEATS = 8

Call = Callable[[], Sequence[Any]]


def rows(shapes: Sequence[Shape], platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures every implementation on one shape after the other."""
    for shape in shapes:
        yield from measure(shape, platform, roof_gbps)
        jax.clear_caches()


def measure(shape: Shape, platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape. An answer that misses the oracle is reported and not timed.

    On an accelerator a copy of as many bytes takes its turn, too, and is the roof.
    """
    given = inputs.make(shape, 1 if platform == "cpu" else REPEATS)
    expected = inputs.expected(given)
    builds = {n: functools.partial(_compiled, build) for n, build in peers.IMPLEMENTATIONS.items()}
    builds |= flashinfer.DECODE
    calls, temp_bytes, missing = {}, {}, {}
    for name, build in builds.items():
        try:
            call, temp_bytes[name] = build(given, platform)
            error = expected.error_of(call()[-1])
        except peers.Unavailable as reason:
            missing[name] = str(reason)
            continue
        except Exception as failure:  # a peer's failure does not end the run
            if name == OURS:
                raise
            missing[name] = f"failed: {first_line(failure)}"
            continue
        if error > expected.limit:
            missing[name] = f"wrong: error {error:.1e}, rounding allows {expected.limit:.1e}"
            continue
        calls[name] = call

    queued = 1
    if platform != "cpu":
        calls[COPY], temp_bytes[COPY] = timing.device_copy(shape.kv_bytes, given.repeats), 0
        queued = timing.QUEUED
    timed = timing.in_turn(calls, given.repeats, queued=queued)
    if COPY in timed:
        roof_gbps = shape.kv_bytes / timed[COPY].median_us / 1e3
    for name in (*builds, *timed.keys() - builds):
        row = functools.partial(Row, "decode", shape.name, name)
        if name in missing:
            yield row(why=missing[name])
        else:
            yield row(timed[name], shape.kv_bytes, temp_bytes[name], roof_gbps)


def _compiled(build: peers.Build, given: inputs.Inputs, platform: str) -> tuple[Call, int]:
    """The program of an implementation's calls, and its scratch."""
    attend, kv_layout = build(given.shape, platform)
    arrays = given.calls(kv_layout)
    compiled = jax.jit(in_one_program(attend)).lower(*arrays).compile()
    return functools.partial(compiled, *arrays), timing.temp_bytes(compiled)


def in_one_program(attend: peers.Attend) -> Any:
    """Calls `attend` once per query, lengths and tables: no loop, whose steps would cost, too."""
    one = jax.jit(attend)  # lowered once

    def program(queries, key, value, lens, tables):
        of_calls = zip(queries, lens, tables, strict=True)
        return [one(query, key, value, len_, table) for query, len_, table in of_calls]

    return program
