"""Real processes die, hang and are killed: the launcher ends in time, with the right code and rank.

Every test is bounded in time, and leaves no process behind: the fixture looks for them.
"""

import signal
import sys
import time
from pathlib import Path

import pytest

from .launcher import PROGRAM, launching

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for left-over processes in /proc"
)


@pytest.fixture
def launcher(tmp_path):
    with launching(tmp_path / "logs") as launcher:
        yield launcher


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
    why = "step 4 took longer than 4 s; at misbehave.py:32: time.sleep(1000)"
    assert launcher.first() == (1, why)
    assert "most recent call first" in launcher.log(1)  # stacks


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


def test_plain_sys_exit_in_one_rank_is_bounded(launcher):
    assert launcher.fault(1, "leave", within=60) != 0


def test_sigterm_to_the_launcher(launcher):
    launcher.start(sys.executable, PROGRAM, "1", "sleep", options=("--grace", "2"))
    launcher.wait_for("step 2")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.end(within=20) == 143
    assert "stopped by SIGTERM" in launcher.err


PATIENT = "import time; print('up', flush=True); time.sleep(1000)"
STUBBORN = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {PATIENT}"


def test_ctrl_c(launcher):
    launcher.start(sys.executable, "-c", PATIENT)
    launcher.wait_for("up", rank=1)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end(within=20) == 130
    assert "stopped by SIGINT" in launcher.err


def test_second_ctrl_c_does_not_wait(launcher):
    launcher.start(sys.executable, "-c", STUBBORN, options=("--grace", "60"))
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)
    launcher.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.process.poll() is None
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end(within=20) == 130


def test_stubborn_ranks_are_killed_after_the_grace(launcher):
    launcher.start(sys.executable, "-c", STUBBORN, options=("--grace", "1"))
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end(within=20) == 130


def test_what_a_rank_leaves_behind_is_ended_with_it(launcher):
    assert launcher.start("bash", "-c", "sleep 1000 & exit 0").end(within=20) == 0


def test_restarts_are_counted(launcher):
    program = "echo attempt $SHARDPAGE_ATTEMPT; exit $((SHARDPAGE_ATTEMPT < 2 ? 9 : 0))"
    launcher.start("bash", "-c", program, options=("--max-restarts", "3"))
    assert launcher.end(within=20) == 0, launcher.err
    assert launcher.out.splitlines()[-1] == "attempt 2"
    assert "restart 2 of 3" in launcher.err


def test_a_mistake_in_the_command_is_not_repeated(launcher):
    launcher.start("bash", "-c", "exit 2", options=("--max-restarts", "3"))
    assert launcher.end(within=20) == 2
    assert "restart" not in launcher.err


def test_launcher_killed(launcher):
    launcher.start(sys.executable, "-c", PATIENT)
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)
    assert len(launcher.pids()) == 4  # with itself, and the keeper
    launcher.process.kill()
    assert launcher.end() == 137
    assert not launcher.gone()
