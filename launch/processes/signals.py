"""Ending on request: Ctrl-C and SIGTERM as exceptions, and the exit codes that they stand for."""

import functools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


def name_of(number: int) -> str:
    """The name of a signal; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Stopped(BaseException):
    """Someone asked this process to end. Not an `Exception`: nothing handles it by accident."""

    def __init__(self, signal_name: str):
        super().__init__(signal_name)
        self.signal_name = signal_name

    @property
    def exit_code(self) -> int:
        """The conventional exit code."""
        return EXIT_CODES[self.signal_name]


@contextmanager
def stop_on_signals(grace_seconds: float = 10.0) -> Iterator[None]:
    """Raises `Stopped` in the main thread at the first SIGINT or SIGTERM; ignores later ones.

    An impatient second signal thereby does not cut short the cleaning up after the first. A main
    thread that is stuck outside Python (in a compilation, or a collective that never ends) cannot
    see the exception: the process then ends at once after `grace_seconds`.

    A signal may come where exceptions are dropped: in a finalizer, in a callback of the garbage
    collector, or in a bare `except:` (JAX has some around compilation). The exception then ceases
    to exist without having got here, which is how it is noticed, and is raised again a moment
    later.
    """
    left = threading.Event()
    main_thread = threading.get_ident()
    on_its_way: weakref.ref[Stopped] | None = None

    def stop(number: int, frame: object) -> None:
        if on_its_way is None or on_its_way() is None:
            raise new(number)  # kept in no variable here: its own traceback would keep it alive

    def new(number: int) -> Stopped:
        nonlocal on_its_way
        stopped = Stopped(signal.Signals(number).name)
        on_its_way = weakref.ref(stopped, lambda _: again(number))
        return stopped

    def again(number: int) -> None:
        if not left.is_set():
            threading.Timer(0.01, send, [number]).start()

    def send(number: int) -> None:
        if not left.is_set():
            signal.pthread_kill(main_thread, number)

    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    wakeup_before = signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    before = {name: signal.getsignal(signal.Signals[name]) for name in EXIT_CODES}
    hook_before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_say_unless_stopped, hook_before)
    for name in EXIT_CODES:
        signal.signal(signal.Signals[name], stop)
    watching = (wakeup_read, left, grace_seconds)
    watcher = threading.Thread(target=_watch, args=watching, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)
        sys.unraisablehook = hook_before
        signal.set_wakeup_fd(wakeup_before)
        os.close(wakeup_write)  # the watcher reads the end of it
        watcher.join()
        os.close(wakeup_read)


def _say_unless_stopped(say: Callable[[Any], object], unraisable: "sys.UnraisableHookArgs") -> None:
    """What Python does with an exception that it drops."""
    if not isinstance(unraisable.exc_value, Stopped):
        say(unraisable)


def _watch(wakeup: int, left: threading.Event, grace_seconds: float) -> None:
    """Ends a process that a signal did not."""
    number = os.read(wakeup, 1)  # written when a signal comes, even if nobody handles it
    names = [name for name in EXIT_CODES if number == bytes([signal.Signals[name]])]
    if names and not left.wait(grace_seconds):
        os.write(2, f"stopped by {names[0]}, stuck for {grace_seconds:.0f} s\n".encode())
        os._exit(EXIT_CODES[names[0]])
