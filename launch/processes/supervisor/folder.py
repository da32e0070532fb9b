"""The folder of a job's log files: one job at a time, and no links that someone else put there."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..notes import open_own

_LOCK = "supervisor.lock"


@contextlib.contextmanager
def log_folder(wanted: Path | None) -> Iterator[Path]:
    """Makes the folder, or a temporary one, and keeps it from other jobs.

    Raises:
      OSError: if it cannot be made or written, or another job uses it.
    """
    if wanted is None:
        folder = Path(tempfile.mkdtemp(prefix="shardpage-"))  # for this user only
    else:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = wanted.absolute()
    with open(open_own(folder / _LOCK, os.O_RDWR), "r+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{folder} is in use by process {lock.read().decode()}, and a folder has the logs "
                f"of one job: wait for its end, or give another --log-dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        yield folder


def attempt_folder(folder: Path, attempt: int) -> Path:
    """The folder of the first attempt, or one inside it for each restart.

    Raises:
      OSError: if it cannot be made, or is a link.
    """
    if not attempt:
        return folder
    logs = folder / f"restart-{attempt}"
    logs.mkdir(mode=0o700, exist_ok=True)
    if logs.is_symlink():
        raise OSError(f"{logs} is a link, and links are not followed: remove it")
    return logs
