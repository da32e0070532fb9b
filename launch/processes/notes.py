"""What a rank leaves for its supervisor to read: how far it has come, and why it ended.

Small files per rank in a folder of the supervisor. Without a supervisor nothing is written.
"""

import dataclasses
import errno
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
            self._steps = open_own(self._folder / f"rank-{rank}.steps")

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
            with open(open_own(part), "w") as file:
                json.dump(content, file)
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


def open_own(path: Path, flags: int = os.O_WRONLY | os.O_TRUNC) -> int:
    """Opens a file, or makes one for its owner alone, and follows no link that others put there.

    Raises:
      OSError: if it is a link, or cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"{path} is a link, and links are not followed: remove it") from None


def _text(path: Path) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            return file.read()
    except OSError:  # it is not there yet; or is a link, and then no rank's
        return ""
