"""Real processes die, hang and are killed: the launcher ends in time, with the right code and rank.

Every test is bounded in time, and leaves no process behind: the fixture looks for them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "tests" / "misbehave.py")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for left-over processes in /proc"
)


class Launcher:
    """`shardpage simulate` as a process, and what it started."""

    def __init__(self, logs: Path):
        self._logs, self._tag = logs, f"LAUNCH_TEST={uuid.uuid4()}"
        self.process: subprocess.Popen[str] | None = None
        self.out = self.err = ""

    def start(self, *command: str, options: tuple[str, ...] = (), devices: int = 1) -> "Launcher":
        """Starts two ranks of a command."""
        name, _, value = self._tag.partition("=")
        words = [sys.executable, "-m", "launch", "simulate", "--log-dir", str(self._logs)]
        words += ["--devices-per-process", str(devices), *options, "--", *command]
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


@pytest.fixture
def launcher(tmp_path):
    launcher = Launcher(tmp_path / "logs")
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


def test_all_ranks_done(launcher):
    assert launcher.fault(0, "none") == 0
    assert launcher.out.splitlines() == [f"step {i} sum 2.0" for i in range(5)] + ["done"]
    assert "Gloo" not in launcher.err
    assert "Gloo" in launcher.log(0)  # only the foreground is spared


def test_kill_rank_1_in_a_collective(launcher):
    assert launcher.fault(1, "kill") == 137
    assert launcher.first() == (1, "killed by SIGKILL")


def test_kill_rank_0_in_a_collective(launcher):
    assert launcher.fault(0, "kill") == 137
    assert launcher.first() == (0, "killed by SIGKILL")


def test_exception_in_one_rank_while_the_other_waits(launcher):
    assert launcher.fault(1, "fail", within=30) == 1
    assert launcher.first() == (1, "ValueError: no such page")
    assert '[1]     raise ValueError("no such page")' in launcher.err


def test_rank_that_sleeps_for_ever(launcher):
    assert launcher.fault(1, "sleep", "--step-timeout", "4") == 75
    rank, why = launcher.first()
    assert "took longer than 4 s" in why
    assert "time.sleep(1000)" in launcher.err  # of rank 1, in the table or as its last lines
    assert "Current thread" in launcher.log(rank)  # stacks


def test_stopped_rank(launcher):
    assert launcher.fault(1, "stop", "--heartbeat-timeout", "6") == 75
    assert launcher.first() == (1, "stopped by SIGSTOP for more than 3 s")


def test_sigterm_to_a_rank(launcher):
    assert launcher.fault(1, "term") == 143
    assert launcher.first() == (1, "stopped by SIGTERM")


def test_rank_missing_at_start(launcher):
    assert launcher.fault(1, "missing", "--start-timeout", "3") == 75
    assert launcher.first() == (1, "has not joined the others within 3 s")


def test_rank_that_ends_before_it_joins(launcher):
    assert launcher.fault(1, "absent", within=30) == 1
    assert launcher.first() == (1, "ended without having joined the others")


def test_rank_failing_after_the_last_collective(launcher):
    assert launcher.fault(1, "late", "--grace", "2") == 1
    assert launcher.first() == (1, "ValueError: after the last collective")


def test_barrier_names_the_missing_rank(launcher):
    assert launcher.fault(1, "barrier") == 1
    rank, why = launcher.first()
    assert rank == 0
    assert why.endswith("not every process came within 1 s; missing rank(s): 1")


@pytest.mark.slow
def test_plain_sys_exit_in_one_rank_is_bounded(launcher):
    assert launcher.fault(1, "leave", within=60) != 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_launcher(launcher, number, code):
    launcher.start(sys.executable, PROGRAM, "1", "sleep", options=("--grace", "2"))
    launcher.wait_for("step 2")
    launcher.process.send_signal(number)
    assert launcher.end(within=20) == code
    assert f"stopped by {number.name}" in launcher.err


def test_launcher_killed(launcher):
    launcher.start(sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)")
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)
    assert len(launcher.pids()) == 4  # with itself, and the keeper
    launcher.process.kill()
    assert launcher.end() == 137
    assert not launcher.gone()
