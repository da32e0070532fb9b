"""What a rank leaves for its supervisor to read: how far it has come, and why it ended.

Small files per rank in a folder of the supervisor. Without a supervisor nothing is written.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Literal

State = Literal["starting", "joining", "joined"]
_STEP_WIDTH = 20


class Notes:
    """Written by one rank."""

    def __init__(self, folder: str | None, rank: int):
        self._folder = None if folder is None else Path(folder)
        self._rank = rank
        self._steps = None
        if self._folder is not None:
            flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
            self._steps = os.open(self._folder / f"rank-{rank}.steps", flags, 0o600)

    def state(self, state: State) -> None:
        """The rank is waiting for the others ("joining"), or all have come ("joined")."""
        self._write("state", {"state": state})

    def step(self, count: int) -> None:
        """This many steps have begun."""
        if self._steps is not None:
            os.pwrite(self._steps, f"{count:<{_STEP_WIDTH}}".encode(), 0)

    def ended(self, code: int, reason: str, *, waiting: bool = False) -> None:
        """The rank is about to end for this reason; `waiting` if it was for something else."""
        content = {"code": code, "reason": reason, "time": time.time(), "waiting": waiting}
        self._write("end", content)

    def _write(self, kind: str, content: dict[str, object]) -> None:
        if self._folder is not None:
            path = self._folder / f"rank-{self._rank}.{kind}"
            part = path.with_suffix(f".{kind}.part")
            part.write_text(json.dumps(content))
            part.replace(path)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a rank has noted so far.

    Attributes:
      state: whether it has asked for the others, and got them.
      steps: steps begun; None if it counts none.
      end: exit code, reason and time since the epoch, if it ended by itself.
      waiting: it was waiting then, perhaps for another rank, rather than doing something.
    """

    state: State = "starting"
    steps: int | None = None
    end: tuple[int, str, float] | None = None
    waiting: bool = False


def read(folder: Path, rank: int) -> Found:
    """Reads the notes of a rank."""
    text = lambda kind: _text(folder / f"rank-{rank}.{kind}")
    state, steps, end = text("state"), text("steps").strip(), text("end")
    found = json.loads(end) if end else None
    return Found(
        state=json.loads(state)["state"] if state else "starting",
        steps=int(steps) if steps else None,
        end=None if found is None else (found["code"], found["reason"], found["time"]),
        waiting=found is not None and found["waiting"],
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
