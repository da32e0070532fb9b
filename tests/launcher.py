"""`shardpage simulate` as a process that tests start, watch and look behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "tests" / "misbehave.py")


class Launcher:
    """`shardpage simulate` as a process, and what it started."""

    def __init__(self, logs: Path):
        self._logs, self._tag = logs, f"LAUNCH_TEST={uuid.uuid4()}"
        self.process: subprocess.Popen[str] | None = None
        self.out = self.err = ""

    def start(
        self,
        *command: str,
        options: tuple[str, ...] = (),
        devices: int = 1,
        shell: tuple[str, ...] = (),
    ) -> "Launcher":
        """Starts two ranks of a command."""
        words = [sys.executable, "-m", "launch", "simulate", "--log-dir", str(self._logs)]
        words += ["--devices-per-process", str(devices), *options, "--", *command]
        return self.spawn(*shell, *words)

    def spawn(self, *words: str) -> "Launcher":
        """Starts a program in its place."""
        name, _, value = self._tag.partition("=")
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | {name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def end(self, within: float = 60.0) -> int:
        """Waits for the end; the exit code as a shell shows it."""
        assert self.process is not None
        self.out, self.err = self.process.communicate(timeout=within)
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def fault(self, rank: int, fault: str, *options: str, within: float = 60.0) -> int:
        """Runs the program that fails; the exit code."""
        return self.start(sys.executable, PROGRAM, str(rank), fault, options=options).end(within)

    def log(self, rank: int) -> str:
        """What a rank has printed so far."""
        path = self._logs / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0, within: float = 60.0) -> None:
        """Waits until a rank has printed this."""
        end = time.monotonic() + within
        while text not in self.log(rank):
            assert time.monotonic() < end, f"rank {rank} never printed {text!r}:\n{self.log(rank)}"
            time.sleep(0.05)

    def pids(self) -> list[int]:
        """All processes that it has started and that are alive, itself included."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is(pid)]

    def _is(self, pid: int) -> bool:
        try:
            return self._tag.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def pid_of(self, rank: int) -> int:
        """The process that is a rank."""
        for pid in self.pids():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"SHARDPAGE_PROCESS_ID={rank}".encode() in variables:
                return pid
        raise AssertionError(f"rank {rank} is not running")

    def keeper(self) -> int:
        """The process that is the keeper."""
        (pid,) = (p for p in self.pids() if b"keeper.py" in Path(f"/proc/{p}/cmdline").read_bytes())
        return pid

    def gone(self, within: float = 5.0) -> list[int]:
        """The processes that are still there after a while."""
        end = time.monotonic() + within
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def first(self) -> tuple[int, str]:
        """The rank that it blames, and why."""
        found = re.search(r"rank (\d+) failed first: (.*)", self.err)
        assert found, self.err
        return int(found[1]), found[2]


@contextlib.contextmanager
def launching(logs: Path) -> Iterator[Launcher]:
    """A launcher that ends with the test, and fails it if a process is left behind."""
    launcher = Launcher(logs)
    try:
        yield launcher
        left = launcher.gone()
    finally:
        if launcher.process is not None and launcher.process.poll() is None:
            launcher.process.kill()
            launcher.process.communicate()
        for pid in launcher.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"
