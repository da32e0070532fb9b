"""Whole steps, prompts and answers in one batch, beside what a user would pick instead."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from . import step_inputs, step_peers, timing
from .peers import Unavailable
from .report import COPY, OURS, Row, first_line
from .shapes import Step

ROUNDS = 3  # a call of a peer takes up to half a minute on a CPU
_QUEUED = 16  # calls on an accelerator: one is shorter than what the host does for it


def rows(shapes: Sequence[Step], platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures every implementation on one shape after the other."""
    for shape in shapes:
        yield from measure(shape, platform, roof_gbps)
        jax.clear_caches()


def measure(shape: Step, platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape. An answer that misses the oracle is reported and not timed."""
    given = step_inputs.make(shape)
    calls, temp_bytes, missing = {}, {}, {}
    for name, build in step_peers.IMPLEMENTATIONS.items():
        try:
            call, arrays = build(given, platform)
            call, temp_bytes[name] = _compiled(call, arrays)
            calls[name] = functools.partial(call, *arrays)
            out = calls[name]()
            error, limit = (0.0, 0.0) if name == step_peers.MATMULS else given.error_of(out)
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as failure:  # a peer's failure does not end the run
            if name == OURS:
                raise
            missing[name] = f"failed: {first_line(failure)}"
        else:
            if error > limit:
                missing[name] = f"wrong: error {error:.1e}, rounding allows {limit:.1e}"
    right = {name: call for name, call in calls.items() if name not in missing}
    if platform == "cpu":
        timed = timing.in_turn(right, rounds=ROUNDS)
    else:
        timed, roof_gbps = _on_accelerator(right, shape)
    for name in step_peers.IMPLEMENTATIONS:
        row = functools.partial(Row, "steps", shape.name, name, flops=shape.flops)
        if name in missing:
            yield row(why=missing[name])
        else:
            yield row(timed[name], shape.kv_bytes, temp_bytes[name], roof_gbps)


def _on_accelerator(calls: dict[str, Any], shape: Step) -> tuple[dict[str, timing.Timing], float]:
    """Times of the calls, and GB/s of a copy of as many bytes that takes its turn."""
    copies = 4  # in a call
    copy = timing.device_copy(shape.kv_bytes, copies)
    timed = timing.in_turn({**calls, COPY: copy}, queued=_QUEUED)
    return timed, copies * shape.kv_bytes / timed[COPY].median_us / 1e3


def _compiled(call: Any, arrays: tuple[Any, ...]) -> tuple[Any, int]:
    """A compiled program and its scratch; what is no program stays as it is, without."""
    if not hasattr(call, "lower"):
        return call, 0
    compiled = call.lower(*arrays).compile()
    return compiled, timing.temp_bytes(compiled)
