"""Which rank failed first, why, and the exit code that follows from it."""

import dataclasses
import signal

from .. import notes
from ..guard import HUNG
from ..signals import name_of

USAGE = 2
# Ranks abort when JAX's coordination service tells them that another one is gone.
ABORTED = -signal.SIGABRT


@dataclasses.dataclass
class Outcome:
    """How a rank ended.

    Attributes:
      rank: its number.
      status: as `subprocess` gives it: an exit code, or minus a signal; None while it runs.
      seconds: how long it ran.
      order: its place among those seen to have ended; 1 is the first.
      stopped: the supervisor had told it to stop before it ended.
      problem: what the supervisor noticed while it ran, and the code that goes with it.
      found: what it noted itself.
    """

    rank: int
    status: int | None = None
    seconds: float = 0.0
    order: int = 0
    stopped: bool = False
    problem: tuple[int, str] | None = None
    found: notes.Found = dataclasses.field(default_factory=notes.Found)

    @property
    def failed(self) -> bool:
        """Whether it failed by itself."""
        return self.problem is not None or (self.status not in (None, 0) and not self.stopped)

    @property
    def code(self) -> int:
        """Its exit code as a shell shows it."""
        if self.problem is not None:
            return self.problem[0]
        status = self.status or 0
        return 128 - status if status < 0 else status

    @property
    def why(self) -> str:
        """What became of it, in words."""
        if self.problem is not None:
            return self.problem[1]
        if self.failed and self.found.end is not None and self.found.end[0] == self.status:
            return self.found.end[1] or f"exit code {self.status}"
        if self.status is None:
            return "running"
        if self.stopped:
            return "stopped with the others"
        if self.status == ABORTED:
            return "aborted (JAX aborts when it loses another process)"
        if self.status < 0:
            return f"killed by {name_of(-self.status)}"
        return "done" if self.status == 0 else f"exit code {self.status}"


def first_failure(outcomes: list[Outcome]) -> Outcome | None:
    """The rank to blame: what the others did may be a consequence, and may be seen earlier.

    Someone killed it (the others cannot have), or the supervisor found it at fault, or it was the
    first by its own clock to give up; an abort is usually a consequence.
    """
    failed = [outcome for outcome in outcomes if outcome.failed]
    first = min(failed, key=_blame, default=None)
    if first is None or not _gave_up(first):
        return first
    # All of them hang where one does, and the watchdog of any may be first. To blame is one that
    # does not wait for others, or else the one that has come least far.
    blame = lambda outcome: (outcome.found.waiting, outcome.found.steps or 0)
    return min(filter(_gave_up, failed), key=blame)


def _gave_up(outcome: Outcome) -> bool:
    """Whether its own watchdog ended it."""
    end = outcome.found.end
    return outcome.problem is None and outcome.status == HUNG and end is not None


def _blame(outcome: Outcome) -> tuple[int, float, int]:
    if outcome.problem is not None:
        return (0, 0.0, outcome.order)
    if outcome.status is not None and outcome.status < 0 and outcome.status != ABORTED:
        return (1, 0.0, outcome.order)
    if outcome.status == ABORTED:
        return (3, 0.0, outcome.order)
    at = outcome.found.end[2] if outcome.found.end is not None else 0.0
    return (2, at, outcome.order)


def may_restart(code: int) -> bool:
    """Whether another attempt may end differently."""
    return code not in (0, USAGE)


def table(outcomes: list[Outcome], blamed: Outcome | None) -> str:
    """The ranks, one per line."""
    lines = [f"{'rank':>4}  {'exit':>4}  {'seconds':>7}  {'steps':>6}  what happened"]
    for outcome in outcomes:
        steps = "-" if outcome.found.steps is None else str(outcome.found.steps)
        mark = "  <- first" if outcome is blamed else ""
        lines.append(
            f"{outcome.rank:>4}  {outcome.code:>4}  {outcome.seconds:>7.1f}  {steps:>6}  "
            f"{outcome.why}{mark}"
        )
    return "\n".join(lines)
