"""Every way in which a rank can fail ends it soon, with a reason.

By itself a rank that fails waits for the others at exit, while the others wait for it: for ever.
`install`, which `launch.bootstrap.initialize` calls when there are several processes, sees to this:

- an uncaught exception ends the process at once, with code 1 (SIGTERM: 143, Ctrl-C: 130);
- a step that takes too long dumps the stacks of all threads and ends it with code 75;
- a rank that fails says why to whoever supervises it.

A program with a loop calls `guard.step()` in each turn, and `guard.end(code)` where it would
`sys.exit(code)` because of a failure: `sys.exit` waits for the other ranks.
"""

import atexit
import contextlib
import faulthandler
import linecache
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from .notes import Notes
from .signals import Stopped, stop_on_signals

FAILED, HUNG = 1, 75
# The watchdog is a thread. If something holds the interpreter's lock, a timer outside Python ends
# the process this many seconds later.
_LAST_RESORT_SECONDS = 5.0


class _Guard:
    """The guard of this process."""

    def __init__(self, notes: Notes, step_timeout: float | None):
        self.notes = notes
        self.step_timeout = step_timeout
        self.num_steps = 0
        self.deadline: float | None = None
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._what = ""
        self._last_resort_set: float | None = None

    def arm(self, seconds: float | None, what: str) -> None:
        """Ends the process if `arm` is not called again within this many seconds; None: never."""
        with self._lock:
            self.deadline = None if seconds is None else time.monotonic() + seconds
            self._what = what
            self._lock.notify()
            if seconds is not None and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
                self._thread.start()
        self._arm_last_resort(seconds)

    def _arm_last_resort(self, seconds: float | None) -> None:
        """The timer outside Python. Starts a thread, so steps that follow fast share one."""
        now = time.monotonic()
        if seconds is None:
            faulthandler.cancel_dump_traceback_later()
            self._last_resort_set = None
        elif self._last_resort_set is None or now - self._last_resort_set > 1.0:
            file, late = sys.__stderr__ or 2, seconds + _LAST_RESORT_SECONDS
            faulthandler.dump_traceback_later(late, exit=True, file=file)
            self._last_resort_set = now

    def _watch(self) -> None:
        with self._lock:
            while True:
                if self.deadline is None:
                    self._lock.wait()
                elif (left := self.deadline - time.monotonic()) > 0:
                    self._lock.wait(left)
                else:
                    break
            what = self._what
        where = _main_thread_is_at()
        _print(f"{what}; the main thread is {where}. All stacks:")
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        end(HUNG, f"{what}; at {where}", waiting=_main_thread_waits())


_guard: _Guard | None = None
_rank = 0
_until_the_end = contextlib.ExitStack()  # never left


def set_rank(rank: int) -> None:
    """Tells the guard this process's number, if it was not known when it was installed."""
    global _rank
    _rank = rank


def install(
    rank: int,
    notes: Notes,
    *,
    step_timeout: float | None = None,
    grace_seconds: float = 5.0,
) -> None:
    """Guards this process from now on; see the module's docstring.

    Args:
      rank: its number, for messages.
      notes: where to say how far it is and why it ended.
      step_timeout: the longest that a step may take, in seconds, compilation included. The clock
        starts with the first `step()`.
      grace_seconds: SIGTERM and Ctrl-C raise `signals.Stopped` in the main thread, so that what was
        done so far can be kept; if it is stuck, the process ends after this time.
    """
    global _guard, _rank
    _guard, _rank = _Guard(notes, step_timeout), rank
    sys.excepthook = _on_exception
    if threading.current_thread() is threading.main_thread():
        _until_the_end.enter_context(stop_on_signals(grace_seconds))
    atexit.register(disarm)


def step() -> None:
    """A step begins, so the previous one ended in time. Without a guard this does nothing."""
    if _guard is None:
        return
    _guard.num_steps += 1
    _guard.notes.step(_guard.num_steps)
    if _guard.step_timeout is not None:
        what = f"step {_guard.num_steps} took longer than {_guard.step_timeout:g} s"
        _guard.arm(_guard.step_timeout, what)


def start_clock() -> None:
    """Counts the time from now to the first `step()` as a step, too."""
    if _guard is not None and _guard.step_timeout is not None:
        what = f"the first step did not begin within {_guard.step_timeout:g} s"
        _guard.arm(_guard.step_timeout, what)


def disarm() -> None:
    """Steps are over: what follows may take its time. The next `step()` arms the watchdog again."""
    if _guard is not None:
        _guard.arm(None, "")


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Ends the process with code 75, saying `what`, if the body takes longer than this."""
    if _guard is None:
        yield
        return
    _guard.arm(seconds, what)
    try:
        yield
    finally:
        _guard.arm(None, "")


def barrier(name: str, timeout_seconds: float) -> None:
    """Waits until all ranks are here. A name serves once.

    Raises:
      launch.processes.coordination.MissingRanksError: naming the ranks that have not come in time.
    """
    if _guard is not None:
        from . import coordination  # not above: it imports JAX, which the command line does not

        coordination.wait_at_barrier(name, timeout_seconds)


def end(code: int, reason: str = "", *, waiting: bool = False) -> NoReturn:
    """Ends this process at once, without waiting for other ranks as `sys.exit` would.

    Args:
      code: the exit code.
      reason: for who supervises it.
      waiting: whether it may only have been waiting for another rank.
    """
    if _guard is not None:
        with contextlib.suppress(OSError):  # the folder has gone, or is full
            _guard.notes.ended(code, reason, waiting=waiting)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def is_installed() -> bool:
    """Whether this process is one of several, and guarded."""
    return _guard is not None


def _on_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Replaces `sys.excepthook`."""
    if isinstance(error, Stopped):
        end(error.exit_code, f"stopped by {error.signal_name}")
    traceback.print_exception(kind, error, trace)
    if isinstance(error, KeyboardInterrupt):
        end(130, "stopped by SIGINT")
    words = str(error).strip().splitlines()
    end(FAILED, f"{kind.__name__}: {words[0]}" if words else kind.__name__)


def _main_thread_is_at() -> str:
    """The innermost line of the main thread that is the program's own, not a library's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    own, libraries = frame, (os.sep + "site-packages" + os.sep, os.path.dirname(os.__file__))
    while own is not None and any(part in own.f_code.co_filename for part in libraries):
        own = own.f_back
    return _describe(own or frame)


def _main_thread_waits() -> bool:
    """Whether it waits for another thread, as it does in a collective; False if that is unknown."""
    path = f"/proc/self/task/{threading.main_thread().native_id}/wchan"
    try:
        with open(path, encoding="ascii") as file:
            return file.read().startswith("futex")
    except OSError:
        return False


def _describe(frame: FrameType | None) -> str:
    if frame is None:
        return "gone"
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{os.path.basename(file)}:{line}: {linecache.getline(file, line).strip()}"


def _print(text: str) -> None:
    print(f"rank {_rank}: {text}", file=sys.__stderr__, flush=True)
