"""What kills, stops or blocks the supervisor itself, and what ranks do to escape it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.processes import notes
from launch.processes.supervisor import folder, foreground, gang, keeper, output, restarts, verdict
from launch.processes.supervisor.verdict import Outcome

from .launcher import ROOT, launching
from .test_launch_faults import PATIENT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel's help is Linux's, and so is /proc"
)


@pytest.fixture
def launcher(tmp_path):
    with launching(tmp_path / "logs") as launcher:
        yield launcher


# Ranks end with the supervisor.


@pytest.mark.parametrize("killed_first", ["", "os.kill(self._process.pid, signal.SIGKILL);"])
def test_supervisor_killed_before_the_keeper_knows_of_a_rank(launcher, killed_first):
    program = f"""
import os, signal
from launch.processes.supervisor import gang, keeper

def started(self, group):
    {killed_first}os.kill(os.getpid(), signal.SIGKILL)

keeper.Keeper.started = started
gang.run(gang.Gang(["sleep", "1000"]))
"""
    assert launcher.spawn(sys.executable, "-c", program).end() == 137
    assert not launcher.gone()


def test_parent_that_has_ended_before_the_kernel_was_asked():
    program = "import os; from launch.processes.supervisor.keeper import die_with; "
    program += "die_with(os.getpid()); print('lives on')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def start_patient(launcher) -> None:
    launcher.start(sys.executable, "-c", PATIENT)
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)


def test_keeper_killed_and_then_the_supervisor(launcher):
    start_patient(launcher)
    os.kill(launcher.keeper(), signal.SIGKILL)
    launcher.process.kill()
    assert launcher.end() == 137
    assert not launcher.gone()


def test_keeper_that_is_stopped_keeps_no_job_from_ending(launcher, tmp_path):
    launcher.start("bash", "-c", f"echo up; until [ -e {tmp_path}/go ]; do sleep 0.05; done")
    launcher.wait_for("up", rank=1)
    os.kill(launcher.keeper(), signal.SIGSTOP)
    (tmp_path / "go").touch()
    assert launcher.end(within=20) == 0


def test_keeper_that_does_not_listen_blocks_nobody():
    stopped = keeper.Keeper("NO=ONE")
    os.kill(stopped._process.pid, signal.SIGSTOP)
    for _ in range(20_000):
        stopped.started(1 << 30)  # no such group
    stopped.close()


def test_daemon_of_a_rank_ends_with_the_job(launcher):
    assert launcher.start("bash", "-c", "setsid sleep 1000 & exit 0").end(within=20) == 0
    assert not launcher.gone()


def test_daemon_of_a_rank_ends_with_the_supervisor(launcher):
    launcher.start("bash", "-c", "setsid sleep 1000 & echo up; sleep 1000")
    launcher.wait_for("up", rank=0)
    launcher.wait_for("up", rank=1)
    launcher.process.kill()
    assert launcher.end() == 137
    assert not launcher.gone()


# Nobody reads.

FLOOD = f"yes {'x' * 99} | head -c 3000000; echo end"  # more than pipe and backlog hold
FLOOD_BYTES = 3_000_004


def check_stuck(launcher) -> None:
    """The job has ended though nobody reads: its log is whole, and what was not read is said."""
    assert (Path(launcher._logs) / "rank-0.log").stat().st_size == FLOOD_BYTES
    launcher.end()
    assert "bytes of output were not read: see the log files" in launcher.err


def test_failure_is_seen_though_the_reader_is_stuck(launcher):
    wait = "until grep -q end $SHARDPAGE_NOTES/rank-0.log; do sleep 0.1; done; exit 6"
    program = f"if [ $SHARDPAGE_PROCESS_ID = 1 ]; then {wait}; fi; {FLOOD}; sleep 1000"
    launcher.start("bash", "-c", program, options=("--grace", "1"))
    assert launcher.process.wait(timeout=40) == 6
    check_stuck(launcher)
    assert launcher.first() == (1, "exit code 6")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_seen_though_the_reader_is_stuck(launcher, number):
    launcher.start("bash", "-c", f"{FLOOD}; sleep 1000", options=("--grace", "1"))
    launcher.wait_for("end")
    launcher.process.send_signal(number)
    assert launcher.process.wait(timeout=40) == 128 + number
    check_stuck(launcher)


@pytest.mark.parametrize(
    "script",
    [
        '"$@" | head -1; exit ${PIPESTATUS[0]}',
        '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
    ],
)
def test_code_of_the_job_though_its_streams_are_closed(launcher, script):
    program = "for i in {1..9}; do echo $i; echo $i >&2; sleep 0.02; done; exit 6"
    launcher.start("bash", "-c", program, shell=("bash", "-c", script, "-"))
    assert launcher.end(within=20) == 6
    assert "Traceback" not in launcher.out + launcher.err
    assert "Error" not in launcher.out + launcher.err


def test_backlog_is_limited_and_the_gap_is_named():
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        shown = foreground.Foreground(stream, backlog_bytes=1 << 18)
        for _ in range(100):
            shown.write(b"x" * 9999 + b"\n")  # nobody reads: this returns all the same
        shown.say("the end")
        unread = shown.num_unread
        read = bytearray()
        while not read.endswith(b"the end\n"):
            read += os.read(reader, 1 << 16)
    os.close(reader)
    # one gap, or two: the thread may fill the pipe only when the backlog is full, which makes room
    gaps = [line for line in read.splitlines() if line.startswith(b"==")]
    assert 1 <= len(gaps) <= 2
    left_out = sum(int(gap.split()[1]) for gap in gaps)
    assert 0 < left_out < unread
    assert all(gap.endswith(b" bytes were not read in time: see the log files") for gap in gaps)
    assert read.count(b"x" * 9999) * 10_000 + left_out == 1_000_000


def test_reader_that_does_not_block_its_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream:
        foreground.Foreground(stream).write(b"x" * 500_000)
        read = 0
        while read < 500_000:
            read += len(os.read(reader, 50_000))
    os.close(reader)


# Restarts.


class Clock:
    """Time that passes by itself only in `sleep`."""

    def __init__(self) -> None:
        self.now, self.slept, self.during_sleep = 0.0, 0.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.during_sleep()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (gang, restarts, foreground):
        monkeypatch.setattr(module, "time", clock)
    return clock


def fail_after(monkeypatch, clock, seconds: float) -> list[float]:
    """Attempts that fail after so long; the pauses before them."""
    pauses = []

    class Attempt:
        def __init__(self, *unused):
            pauses.append(round(clock.slept, 3))
            clock.slept = 0.0

        def run(self) -> int:
            clock.now += seconds
            return 9

    monkeypatch.setattr(gang, "_Attempt", Attempt)
    return pauses


def test_rapid_failures_are_restarted_later_and_later(monkeypatch, clock, tmp_path):
    pauses = fail_after(monkeypatch, clock, 0.1)
    said = tmp_path / "said"  # not pytest's capture: what comes while that is read is lost
    with said.open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert gang.run(gang.Gang(["true"], log_dir=tmp_path / "logs", max_restarts=1000)) == 9
        settled(lambda: "failed 8 times in a row, each within 30 s" in said.read_text())
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30]


def test_failures_after_long_work_are_not_counted(monkeypatch, clock, tmp_path):
    pauses = fail_after(monkeypatch, clock, 31.0)
    assert gang.run(gang.Gang(["true"], log_dir=tmp_path, max_restarts=20)) == 9
    assert pauses == [0] + 20 * [0.5]


def test_signal_ends_a_pause(monkeypatch, clock, tmp_path):
    pauses = fail_after(monkeypatch, clock, 0.1)
    clock.during_sleep = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert gang.run(gang.Gang(["true"], log_dir=tmp_path, max_restarts=20)) == 143
    assert pauses == [0]


# Signals that have no name.


def test_real_time_signals_have_a_code(launcher):
    assert Outcome(0, -40).why == "killed by signal 40"
    assert "168" in verdict.table([Outcome(0, -40)], None)
    assert launcher.start("bash", "-c", "kill -40 $$").end(within=20) == 168


# The folder of the log files.


def test_folder_in_use_is_refused(launcher):
    start_patient(launcher)
    words = [sys.executable, "-m", "launch", "simulate", "--log-dir", str(launcher._logs)]
    second = subprocess.run([*words, "--", "true"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert second.returncode == 1
    assert f"is in use by process {launcher.process.pid}" in second.stderr
    assert "give another --log-dir" in second.stderr
    assert launcher.log(0) == "up\n"
    launcher.process.terminate()
    assert launcher.end(within=20) == 143


def test_folder_is_free_after_its_job(tmp_path):
    for _ in range(2):
        with folder.log_folder(tmp_path) as logs:
            assert logs == tmp_path


@pytest.fixture
def victim(tmp_path):
    """A file that links lead to, and nobody may write into."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    yield victim
    assert victim.read_text() == "precious"


LINK = "is a link, and links are not followed: remove it"


@pytest.mark.parametrize("name", ["rank-0.steps", "rank-0.state.part", "rank-0.end.part"])
def test_notes_follow_no_links(tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=LINK):
        write_notes(tmp_path)


def write_notes(folder: Path) -> None:
    written = notes.Notes(str(folder), 0)
    written.state("joining")
    written.ended(1, "why")


def test_links_are_not_read_as_notes(tmp_path):
    (tmp_path / "true").write_text('{"state": "joined"}')
    (tmp_path / "rank-0.state").symlink_to(tmp_path / "true")
    assert notes.read(tmp_path, 0).state == "starting"


def test_logs_and_locks_follow_no_links(tmp_path, victim):
    (tmp_path / "rank-0.log").symlink_to(victim)
    (tmp_path / "supervisor.lock").symlink_to(victim)
    (tmp_path / "restart-1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(OSError, match=LINK):
        output.open_log(tmp_path / "rank-0.log")
    with pytest.raises(OSError, match=LINK), folder.log_folder(tmp_path):
        pass
    with pytest.raises(OSError, match=LINK):
        folder.attempt_folder(tmp_path, 1)


def settled(condition, within: float = 5.0) -> None:
    """Waits for what a thread does."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_rank_ends_with_its_code_though_it_cannot_note_why(tmp_path):
    program = (
        f"import shutil; from launch.processes import guard, notes; "
        f"guard.install(0, notes.Notes({str(tmp_path)!r}, 0)); "
        f"shutil.rmtree({str(tmp_path)!r}); guard.end(7, 'why')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (7, b"")
