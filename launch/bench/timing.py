"""Times calls against each other: in turn, in one process; medians and quartiles."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

WARM_UP, ROUNDS = 3, 9
QUEUED = 4  # programs, on an accelerator
_COPIES = 4
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
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 1,
    rounds: int | None = None,
    queued: int = 1,
) -> dict[str, Timing]:
    """Times each call once per round, after a few rounds that do not count.

    In turn, so that a noisy machine disturbs all of them alike, and with a pause before each.

    Args:
      calls: the calls by name; a call ends when its result is ready.
      repeats: how often each call does its work; times are divided by it.
      rounds: how many count, of calls so long that they need none before; None for `ROUNDS`, after
        `WARM_UP`.
      queued: above 1, a time is what `queued` calls one behind the other take longer than one call,
        per call more: what the host does before the first and after the last is left out.
    """
    warm_up, rounds = (WARM_UP, ROUNDS) if rounds is None else (0, rounds)
    times: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    for round_number in range(warm_up + rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)
            seconds = _seconds(call, queued)
            if queued > 1:
                seconds = (seconds - _seconds(call, 1)) / (queued - 1)
            if round_number >= warm_up:
                times[name].append(1e6 * seconds / repeats)
    return {name: _timing(samples) for name, samples in times.items()}


def _seconds(call: Callable[[], Any], count: int) -> np.ndarray:
    """What some calls take, one behind the other: by the clock, and of the process's threads."""
    before = np.array([time.perf_counter(), time.process_time()])
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return np.array([time.perf_counter(), time.process_time()]) - before


def temp_bytes(compiled: Any) -> int:
    """Scratch of a compiled program, per device."""
    return compiled.memory_analysis().temp_size_in_bytes


def _timing(samples: list[np.ndarray]) -> Timing:
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
    timing = in_turn({"copy": device_copy(2 << 30, _COPIES)}, _COPIES, queued=QUEUED)["copy"]
    return (2 << 30) / timing.median_us / 1e3, "1 GiB read and written by the device"


def device_copy(num_bytes: int, repeats: int) -> Callable[[], Any]:
    """A call that reads and writes this many bytes several times, other ones each time.

    It copies half of them, so that a kernel that reads as many bytes has the same time.

    Args:
      repeats: a multiple of four.
    """
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), num_bytes // 4, "bfloat16"))
    sources = [draw(seed) for seed in range(_COPIES)]
    # The device's own copy: on an H200 XLA's kernels read and write at three quarters of its speed.
    copy = jax.jit(lambda sources: [jax.numpy.copy(x) for x in sources])

    def call():
        result = None
        for _ in range(repeats // _COPIES):
            result = copy(sources)
        return result

    return call
