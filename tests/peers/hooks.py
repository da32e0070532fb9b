"""A plugin of pytest that puts our adapters in the place of a peer's functions."""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from jax._src import test_util

from .closeness import tighten
from .peers import Peer


class Hooks:
    """Replaces functions before a test file is imported, or in it, and counts their calls."""

    def __init__(self, peer: Peer, checkout: Path):
        self.peer, self.checkout = peer, checkout
        self.calls: dict[str, int] = {}

    def pytest_configure(self) -> None:
        """Puts ours in the place of theirs, and our tolerances beside theirs."""
        peer = self.peer
        sys.path.insert(0, str(self.checkout / peer.folder))
        for name, folder in peer.packages.items():
            package = types.ModuleType(name)
            package.__path__ = [str(self.checkout / folder)]
            sys.modules[name] = package
        for name, needed in peer.stubs.items():
            sys.modules[name] = mock.MagicMock(**needed)
        for theirs, ours in peer.replaced.items():
            _replace(theirs, lambda _, theirs=theirs, ours=ours: self._counted(theirs, ours))
        for theirs, stand_in in peer.stand_ins.items():
            _replace(theirs, lambda _, stand_in=stand_in: stand_in)
        for theirs, options in peer.exact.items():
            _replace(theirs, functools.partial(functools.partial, **options))
        for theirs, wider in peer.widened.items():
            _replace(theirs, wider)
        for theirs, names in peer.renamed.items():
            _replace(theirs, functools.partial(_renamed, names))
        for name in ("is_device_tpu_at_least", "is_device_tpu"):
            mock.patch.object(test_util, name, return_value=True).start()
        tighten()

    def _counted(self, name: str, call: Callable) -> Callable:
        self.calls.setdefault(name, 0)

        def counted(*args, **kwargs):
            self.calls[name] += 1
            return call(*args, **kwargs)

        return counted

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Replaces in the files; there, nothing skips because a platform of theirs is missing."""
        for path, names in self.peer.tests.items():
            inside = [item for item in items if item.path == self.checkout / path]
            for name, ours in names.items() if inside else ():
                counted = self._counted(f"{path}:{name}", ours)
                mock.patch.object(sys.modules[inside[0].function.__module__], name, counted).start()
            for node in (node for item in inside if names for node in item.listchain()):
                node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says how often ours was called: a run in which it was not proves nothing."""
        for name, count in self.calls.items():
            terminalreporter.write_line(f"{count:5d} calls of ours for {name}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run without a call of ours fails."""
        if not any(self.calls.values()) and not session.config.option.collectonly:
            session.exitstatus = 1


def _replace(name: str, made: Callable[[Callable], Callable]) -> None:
    """Puts what is made of "module:function" in its place."""
    module, function = name.split(":")
    home = importlib.import_module(module)
    mock.patch.object(home, function, made(getattr(home, function))).start()


def _renamed(names: dict[str, str], call: Callable) -> Callable:
    return lambda *args, **named: call(*args, **{names.get(k, k): v for k, v in named.items()})
