"""Times calls against each other: in turn, in one process, medians and quartiles."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

WARM_UP, ROUNDS = 3, 9
# A large call's buffers are given back after it has returned (on a CPU: 1 x 32768 after a peer that
# had taken 273 MB, 40 ms without a pause, 31 with one).
_PAUSE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over the rounds."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int = 1) -> dict[str, Timing]:
    """Times each call once a round, after a few rounds that do not count.

    In turn, so that a noisy machine troubles all alike; with a pause before each.

    Args:
      calls: what to time, by name; what it returns is waited for.
      repeats: how often each of them does its work; times are divided by it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)
            start = time.perf_counter()
            jax.block_until_ready(call())
            if round_number >= WARM_UP:
                times[name].append(1e6 * (time.perf_counter() - start) / repeats)
    return {name: _timing(samples) for name, samples in times.items()}


def temp_bytes(compiled: Any) -> int:
    """Scratch of a compiled program, a device."""
    return compiled.memory_analysis().temp_size_in_bytes


def _timing(samples: list[float]) -> Timing:
    low, median, high = (round(float(x), 2) for x in np.percentile(samples, [25, 50, 75]))
    return Timing(median, low, high, len(samples))


def copy_roof(platform: str) -> tuple[float, str]:
    """GB/s read and written by a copy, and how it was made.

    On a CPU one process's NumPy copies 256 MiB; elsewhere the device copies 1 GiB.
    """
    if platform == "cpu":
        source, target = (np.ones(256 << 20, np.uint8) for _ in range(2))
        timing = in_turn({"copy": lambda: np.copyto(target, source)})["copy"]
        return 2 * source.nbytes / timing.median_us / 1e3, "numpy.copyto of 256 MiB, one process"
    source = jax.numpy.ones(256 << 20, jax.numpy.uint32)
    copy = jax.jit(lambda x: x + 1)  # without the addition it would be no kernel, but an alias
    timing = in_turn({"copy": lambda: [copy(source) for _ in range(8)]}, repeats=8)["copy"]
    return 2 * source.nbytes / timing.median_us / 1e3, "1 GiB read and written by the device"
