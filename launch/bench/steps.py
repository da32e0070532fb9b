"""Whole steps, prompts and answers in one batch, beside what a user would pick instead."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardpage import Plan

from . import step_inputs, step_peers, timing
from .peers import Unavailable
from .report import COPY, OURS, Row, first_line
from .shapes import Step

ROUNDS = 3  # a call of a peer takes up to half a minute on a CPU
# Calls per program on an accelerator: between programs it has pauses of some microseconds.
REPEATS = 8


def rows(shapes: Sequence[Step], platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures every implementation on one shape after the other."""
    for shape in shapes:
        yield from measure(shape, platform, roof_gbps)
        jax.clear_caches()


def measure(shape: Step, platform: str, roof_gbps: float) -> Iterator[Row]:
    """Measures one shape. An answer that misses the oracle is reported and not timed."""
    given, repeats = step_inputs.make(shape), 1 if platform == "cpu" else REPEATS
    calls, temp_bytes, missing = {}, {}, {}
    for name, build in step_peers.IMPLEMENTATIONS.items():
        try:
            call, arrays = build(given, platform)
            calls[name], temp_bytes[name] = program(call, arrays, given, repeats)
            out = calls[name]()[-1]
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
    copy = timing.device_copy(shape.kv_bytes, REPEATS)
    timed = timing.in_turn({**calls, COPY: copy}, REPEATS, queued=timing.QUEUED)
    return timed, shape.kv_bytes / timed[COPY].median_us / 1e3


def program(
    call: Any, arrays: tuple[Any, ...], given: step_inputs.StepInputs, repeats: int
) -> tuple[Any, int]:
    """A program of so many calls, and its scratch; what cannot be one is called as often.

    All read the same cache and have the same plan, as a model's layers do, if it was made before;
    of the rest each has its own copy, else XLA would make them one.
    """
    if not hasattr(call, "lower"):
        return lambda: [call(*arrays) for _ in range(repeats)], 0
    is_shared = lambda x: isinstance(x, Plan) or x is given.key or x is given.value
    shared = {i: x for i, x in enumerate(arrays) if is_shared(x)}
    own = {i: x for i, x in enumerate(arrays) if i not in shared}
    each = [jax.tree.map(jnp.copy, own) for _ in range(repeats)]
    in_order = lambda numbered: [numbered[i] for i in range(len(arrays))]
    program = jax.jit(lambda shared, each: [call(*in_order(shared | own)) for own in each])
    compiled = program.lower(shared, each).compile()
    return functools.partial(compiled, shared, each), timing.temp_bytes(compiled)
