"""Times calls against each other: in turn, in one process; medians and quartiles."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

WARM_UP, ROUNDS = 3, 9
# A large call's buffers are freed after it has returned (on a CPU 1 x 32768, after a peer that had
# used 273 MB: 40 ms without a pause, 31 with one).
_PAUSE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and quartiles of the rounds.

    `processor_us` is the median time that this process's threads ran: on a CPU with other work to
    do it says more than the clock. None in older reports.
    """

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    processor_us: float | None = None

    @property
    def spread(self) -> float:
        """The distance between the quartiles, relative to the median."""
        return (self.high_us - self.low_us) / self.median_us


def in_turn(
    calls: Mapping[str, Callable[[], Any]], repeats: int = 1, rounds: int | None = None
) -> dict[str, Timing]:
    """Times each call once per round, after a few rounds that do not count.

    In turn, so that a noisy machine disturbs all of them alike, and with a pause before each.

    Args:
      calls: the calls by name; a call ends when its result is ready.
      repeats: how often each call does its work; times are divided by it.
      rounds: how many count, of calls so long that they need none before; None for `ROUNDS`, after
        `WARM_UP`.
    """
    warm_up, rounds = (WARM_UP, ROUNDS) if rounds is None else (0, rounds)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for round_number in range(warm_up + rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)
            start, ran = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            seconds = time.perf_counter() - start, time.process_time() - ran
            if round_number >= warm_up:
                times[name].append(tuple(1e6 * each / repeats for each in seconds))
    return {name: _timing(samples) for name, samples in times.items()}


def temp_bytes(compiled: Any) -> int:
    """Scratch of a compiled program, per device."""
    return compiled.memory_analysis().temp_size_in_bytes


def _timing(samples: list[tuple[float, ...]]) -> Timing:
    clock, processor = zip(*samples, strict=True)
    low, median, high = (round(float(x), 2) for x in np.percentile(clock, [25, 50, 75]))
    return Timing(median, low, high, len(samples), round(float(np.median(processor)), 2))


def copy_roof(platform: str) -> tuple[float, str]:
    """GB/s that a copy reads and writes, and which copy it was.

    On a CPU NumPy copies 256 MiB in one process; elsewhere the device copies 1 GiB.
    """
    if platform == "cpu":
        source, target = (np.ones(256 << 20, np.uint8) for _ in range(2))
        timing = in_turn({"copy": lambda: np.copyto(target, source)})["copy"]
        return 2 * source.nbytes / timing.median_us / 1e3, "numpy.copyto of 256 MiB, one process"
    source = jax.numpy.ones(256 << 20, jax.numpy.uint32)
    copy = jax.jit(lambda x: x + 1)  # without the addition there would be no kernel, but an alias
    timing = in_turn({"copy": lambda: [copy(source) for _ in range(8)]}, repeats=8)["copy"]
    return 2 * source.nbytes / timing.median_us / 1e3, "1 GiB read and written by the device"
