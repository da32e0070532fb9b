"""From what a core did to how long it takes, under assumptions about its memory."""

import collections
import dataclasses
import heapq
from collections.abc import Sequence

from .core import Core
from .machine import Event, Run


@dataclasses.dataclass(frozen=True)
class Memory:
    """A model of HBM and its copy engine. What real ones do is not published.

    Attributes:
      name: as in tables.
      latency_us: from the start of a copy to its first byte.
      copy_ns: the least that one copy occupies the engine for.
      is_free: copies arrive at once: what remains is the time to issue.
    """

    name: str
    latency_us: float = 0.0
    copy_ns: float = 0.0
    is_free: bool = False


ISSUE = Memory("issue only", is_free=True)
ONE_US = Memory("1 us", latency_us=1.0)
MEMORIES = (
    ISSUE,
    ONE_US,
    Memory("2 us", latency_us=2.0),
    Memory("1 us + 10 ns a copy", latency_us=1.0, copy_ns=10.0),
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a run takes.

    Attributes:
      cycles: in all.
      waits: cycles that the core waited for copies, by the index of the bundle that waits.
    """

    cycles: float
    waits: dict[int, float]


def replay(run: Run, memory: Memory, core: Core) -> Timing:
    """Times a run.

    Copies start in the order of issue. The memory delivers one after the other, each no earlier
    than its latency after it was issued; copies within the chip take no time.

    Raises:
      RuntimeError: if a wait never ends.
    """
    values: dict[int, int] = collections.defaultdict(int)
    arriving: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)
    waits: dict[int, float] = collections.defaultdict(float)
    latency, least = memory.latency_us * 1e-6 * core.clock_hz, memory.copy_ns * 1e-9 * core.clock_hz
    waited = engine_free = 0.0
    for event in run.events:
        time = event.time + waited
        if event.kind == "copy":
            if "hbm" in event.path and not memory.is_free:
                takes = max(event.num_bytes / core.bytes_per_s * core.clock_hz, least)
                engine_free = max(time + latency, engine_free) + takes
                heapq.heappush(arriving[event.semaphore], (engine_free, event.amount))
            else:
                heapq.heappush(arriving[event.semaphore], (time, event.amount))
        elif event.kind == "signal":
            values[event.semaphore] += event.amount
        elif event.kind == "reset":
            values[event.semaphore] = event.amount
            arriving[event.semaphore].clear()
        else:
            queue = arriving[event.semaphore]
            ready = time
            while values[event.semaphore] < event.amount:
                if not queue:
                    have = f"{values[event.semaphore]} of {event.amount}"
                    raise RuntimeError(f"bundle {event.bundle} waits for ever, for {have}")
                arrived, amount = heapq.heappop(queue)
                ready = max(ready, arrived)
                values[event.semaphore] += amount
            waits[event.bundle] += ready - time
            waited += ready - time
    return Timing(run.cycles + waited, dict(waits))


def copies(events: Sequence[Event]) -> tuple[int, int]:
    """How many copies from or to HBM, and their bytes."""
    sizes = [e.num_bytes for e in events if e.kind == "copy" and "hbm" in e.path]
    return len(sizes), sum(sizes)
