"""JAX's coordination service: who this process is, and a barrier with a time limit.

The only place that reaches into JAX's own modules: `jax.distributed` gives no public access to the
service that it starts. Without starting a backend, nothing else knows this process's number.
"""

import re
from typing import Any

from jax._src import distributed as _distributed


class MissingRanksError(RuntimeError):
    """Some processes did not reach a barrier in time."""

    def __init__(self, name: str, timeout_seconds: float, missing: list[int]):
        ranks = ", ".join(map(str, missing)) if missing else "unknown; see the logs of the others"
        super().__init__(
            f"barrier {name!r}: not every process came within {timeout_seconds:g} s; "
            f"missing rank(s): {ranks}"
        )
        self.missing = missing


def rank_and_count() -> tuple[int, int]:
    """This process's number and how many there are, as `jax.distributed` was told."""
    state: Any = _distributed.global_state
    return state.process_id, state.num_processes


def wait_at_barrier(name: str, timeout_seconds: float) -> None:
    """Waits until every process has called this with the same name; each name works once.

    Raises:
      MissingRanksError: naming those that have not come within the time limit.
      RuntimeError: if `jax.distributed` has not been started.
    """
    client: Any = _distributed.global_state.client
    if client is None:
        raise RuntimeError("barriers need launch.bootstrap.initialize() first")
    try:
        client.wait_at_barrier(name, timeout_in_ms=max(int(timeout_seconds * 1000), 1))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise MissingRanksError(name, timeout_seconds, _missing(str(error))) from error


def _missing(message: str) -> list[int]:
    """The ranks that the service's message lists, one per line, as not having come."""
    _, _, names = message.partition("timed out task names:")
    return sorted({int(rank) for rank in re.findall(r"^(?:\S*task:)?(\d+)$", names, re.MULTILINE)})
