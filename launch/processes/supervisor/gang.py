"""Starts the ranks of a job, watches them, and stops the rest when one fails."""

import contextlib
import dataclasses
import functools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import notes
from ..guard import FAILED, HUNG
from ..signals import name_of
from .environment import PREFIX, free_port, rank_environment
from .folder import attempt_folder, log_folder
from .foreground import Foreground, settle
from .keeper import Keeper, die_with, kill_group, kill_marked
from .output import Stream, open_log, tail
from .restarts import MOST_RAPID, RAPID_SECONDS, Restarts, wait
from .verdict import Outcome, first_failure, may_restart, table

_POLL_SECONDS = 0.05
_NOTES_SECONDS = 0.25
# Where one rank hangs, so do the others: their watchdogs may still say where.
_SETTLE_SECONDS = 1.5
# What ranks have printed comes before what is said about it, if somebody reads it.
_ORDER_SECONDS = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Gang:
    """Several processes that are one job on this machine.

    Attributes:
      command: what each rank runs.
      num_processes: how many ranks.
      devices_per_process: CPU devices that each simulates.
      mesh: the mesh, for the job to read.
      show_all: every rank's output in the foreground, not only that of rank 0.
      log_dir: where the ranks' log files go; None for a temporary folder, kept if the job fails.
      start_timeout: seconds from the first rank that waits for the others until all have come.
      step_timeout: seconds that a step may take; None for the ranks' default.
      heartbeat_timeout: seconds of silence after which JAX counts a rank as dead.
      grace: seconds from SIGTERM to SIGKILL.
      max_restarts: how often to start all ranks again after a failure.
    """

    command: Sequence[str]
    num_processes: int = 2
    devices_per_process: int = 4
    mesh: str | None = None
    show_all: bool = False
    log_dir: Path | None = None
    start_timeout: float = 60.0
    step_timeout: float | None = None
    heartbeat_timeout: float = 20.0
    grace: float = 10.0
    max_restarts: int = 0


class CannotStart(Exception):
    """The command of a job is not there, or may not be run; the message says which and why."""


def run(gang: Gang) -> int:
    """Runs a job to its end, restarting it if that is wanted.

    Returns:
      The exit code: 0; that of the rank that failed first, as a shell shows it; 75 for hangs; 130
      or 143 if SIGINT or SIGTERM ended it.

    Raises:
      CannotStart: if there is no such command.
      OSError: if the folder of the log files cannot be made or written.
    """
    out, err = streams = Foreground(sys.stdout), Foreground(sys.stderr)
    with _caught_signals() as received, log_folder(gang.log_dir) as folder:
        code = _run_attempts(gang, folder, received, streams)
        settle(streams, gang.grace, received)
        unread = out.num_unread + err.num_unread
        if unread:
            err.say(f"== {unread} bytes of output were not read: see the log files")
        if code == 0 and gang.log_dir is None and not unread:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            err.say(f"== logs: {folder}")
        settle((err,), _ORDER_SECONDS, received)
    return code


def _run_attempts(
    gang: Gang, folder: Path, received: list[int], streams: tuple[Foreground, Foreground]
) -> int:
    restarts, attempt, (_, err) = Restarts(), 0, streams
    while True:
        began = time.monotonic()
        logs = attempt_folder(folder, attempt)
        code = _Attempt(gang, logs, received, attempt, streams).run()
        if received or not may_restart(code) or attempt == gang.max_restarts:
            return code
        attempt += 1
        pause = restarts.pause(time.monotonic() - began)
        if pause is None:
            err.say(
                f"== not restarted: failed {MOST_RAPID} times in a row, each within "
                f"{RAPID_SECONDS:g} s; mend what the ranks say, then start again"
            )
            return code
        many = f"restart {attempt} of {gang.max_restarts}"
        err.say(f"== {many}, in {pause:g} s: all ranks, on a new port")
        wait(pause, received)
        if received:
            return _stopped(received[0], err)


def _stopped(number: int, err: Foreground) -> int:
    """Says which signal ended the job; the exit code that goes with it."""
    err.say(f"== stopped by {name_of(number)}")
    return 128 + number


class _Attempt:
    """One attempt."""

    def __init__(
        self,
        gang: Gang,
        logs: Path,
        received: list[int],
        attempt: int,
        streams: tuple[Foreground, Foreground],
    ) -> None:
        self._gang, self._logs, self._received, self._attempt = gang, logs, received, attempt
        self._streams, self._err = streams, streams[1]
        self._mark = f"{PREFIX}NOTES={logs}"  # in the environment of all that ranks start
        self._keeper = Keeper(self._mark)
        self._outcomes = [Outcome(rank) for rank in range(gang.num_processes)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._files = contextlib.ExitStack()
        self._selector = self._files.enter_context(selectors.DefaultSelector())
        self._began = time.monotonic()
        self._num_ended = 0
        self._stopped_since: dict[int, float] = {}
        self._joining_since: float | None = None
        self._notes_read = 0.0
        self._failed_at: float | None = None
        self._stop_at: float | None = None  # TERM was sent; KILL follows
        self._killed = False

    def run(self) -> int:
        """Runs the ranks to their end; returns the exit code."""
        try:
            self._start()
            while any(outcome.status is None for outcome in self._outcomes):
                self._pump(_POLL_SECONDS)
                self._reap()
                self._look()
                self._decide()
            self._drain()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    kill_group(process.pid)
                    process.wait()
            kill_marked(self._mark)
            self._keeper.close()
            self._files.close()
        return self._report()

    def _start(self) -> None:
        gang = self._gang
        address = f"127.0.0.1:{free_port()}"
        same = ("num_processes", "devices_per_process", "mesh", "step_timeout", "heartbeat_timeout")
        settings = {name: getattr(gang, name) for name in same} | {
            "coordinator": address,
            "bind": address,  # nobody else's business
            "start_timeout": gang.start_timeout + 5,  # this supervisor knows who is missing
            "grace": gang.grace / 2,
            "notes": self._logs,
            "attempt": self._attempt,
        }
        for rank in range(gang.num_processes):
            for old in self._logs.glob(f"rank-{rank}.*"):
                old.unlink()
            try:
                process = subprocess.Popen(
                    gang.command,
                    env=rank_environment(os.environ, settings | {"process_id": rank}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    process_group=0,
                    # safe beside threads: it takes no lock
                    preexec_fn=functools.partial(die_with, os.getpid()),
                )
            except OSError as error:
                raise CannotStart(f"{gang.command[0]}: {error.strerror}") from error
            self._keeper.started(process.pid)
            self._processes.append(process)
            self._attach(rank, process)

    def _attach(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        log = self._files.enter_context(open_log(self._logs / f"rank-{rank}.log"))
        prefix = f"[{rank}] " if self._gang.show_all else ""
        sources = (process.stdout, process.stderr)
        for source, target in zip(sources, self._streams, strict=True):
            assert source is not None
            self._files.enter_context(source)
            seen = rank == 0 or self._gang.show_all
            stream = Stream(source, log, target if seen else None, prefix)
            self._selector.register(source, selectors.EVENT_READ, stream)

    def _pump(self, timeout: float) -> bool:
        """Passes on what the ranks print; whether there was anything."""
        if not self._selector.get_map():
            time.sleep(timeout)
            return False
        events = self._selector.select(timeout)
        for key, _ in events:
            if not key.data.pump():
                self._selector.unregister(key.fileobj)
        return bool(events)

    def _drain(self) -> None:
        """Reads what is left in the pipes of ranks that have ended."""
        end = time.monotonic() + 1.0
        while self._selector.get_map() and time.monotonic() < end and self._pump(_POLL_SECONDS):
            pass

    def _reap(self) -> None:
        """Notes which ranks have ended, and kills what they left behind."""
        for outcome, process in self._running():
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                continue
            # before its number is free to be someone else's
            kill_group(process.pid)
            self._keeper.ended(process.pid)
            outcome.status = process.wait()
            outcome.seconds = time.monotonic() - self._began
            outcome.order = self._num_ended = self._num_ended + 1
            outcome.stopped = self._stop_at is not None
            outcome.found = notes.read(self._logs, outcome.rank)

    def _look(self) -> None:
        """Finds fault with ranks that are alive and do no good."""
        now = time.monotonic()
        if now - self._notes_read < _NOTES_SECONDS or self._stop_at is not None:
            return
        self._notes_read = now
        for outcome, process in self._running():
            outcome.found = notes.read(self._logs, outcome.rank)
            self._look_for_stopped(outcome, process.pid, now)
        self._look_for_missing(now)

    def _look_for_stopped(self, outcome: Outcome, pid: int, now: float) -> None:
        try:
            what = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # it has ended since the last `_reap`
            what = None
        if what is None:
            self._stopped_since.pop(outcome.rank, None)
            return
        since = self._stopped_since.setdefault(outcome.rank, now)
        most = self._gang.heartbeat_timeout / 2  # sooner than the others give up on it
        if now - since > most:
            name = name_of(what.si_status)
            outcome.problem = (HUNG, f"stopped by {name} for more than {most:g} s")

    def _look_for_missing(self, now: float) -> None:
        states = [outcome.found.state for outcome in self._outcomes]
        if "joining" not in states:
            self._joining_since = None
            return
        if self._joining_since is None:
            self._joining_since = now
        for outcome in self._outcomes:
            if outcome.found.state == "starting" and outcome.status == 0:
                outcome.problem = (FAILED, "ended without having joined the others")
            elif outcome.found.state == "starting" and (
                now - self._joining_since > self._gang.start_timeout
            ):
                late = f"has not joined the others within {self._gang.start_timeout:g} s"
                outcome.problem = (HUNG, late)

    def _decide(self) -> None:
        """Stops the ranks after a failure or a signal."""
        now = time.monotonic()
        blamed = first_failure(self._outcomes)
        if len(self._received) > 1:
            self._kill()
        elif self._stop_at is None and self._received:
            self._stop(signal.Signals(self._received[0]))
        elif self._stop_at is None and blamed is not None:
            self._failed_at = self._failed_at or now
            settle = _SETTLE_SECONDS if blamed.status == HUNG else 0.0
            if now - self._failed_at >= settle:
                self._stop(signal.SIGTERM)
        if self._stop_at is not None and now > self._stop_at + self._gang.grace:
            self._kill()

    def _stop(self, number: signal.Signals) -> None:
        """Asks all that run to end."""
        self._stop_at = time.monotonic()
        for outcome, process in self._running():
            outcome.stopped = outcome.problem is None
            number = signal.SIGTERM if number == signal.SIGHUP else number
            if outcome.problem is not None or outcome.rank in self._stopped_since:
                kill_group(process.pid)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _kill(self) -> None:
        if not self._killed:
            self._killed = True
            for _, process in self._running():
                kill_group(process.pid)

    def _running(self) -> Iterator[tuple[Outcome, subprocess.Popen[bytes]]]:
        for outcome, process in zip(self._outcomes, self._processes, strict=True):
            if outcome.status is None:
                yield outcome, process

    def _report(self) -> int:
        settle(self._streams, _ORDER_SECONDS, self._received)
        blamed = first_failure(self._outcomes)
        if self._received:
            code = _stopped(self._received[0], self._err)
        elif blamed is None:
            code = 0
        else:
            code = blamed.code
            self._err.say(f"== rank {blamed.rank} failed first: {blamed.why}")
            if blamed.rank != 0 and not self._gang.show_all:
                for line in tail(self._logs / f"rank-{blamed.rank}.log"):
                    self._err.say(f"[{blamed.rank}] {line}")
        self._err.say(table(self._outcomes, blamed))
        return code


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collects signals instead of ending by them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, frame: received.append(n)) for number in _SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
