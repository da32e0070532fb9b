"""What stands between a peer's tests and our adapters: whose function is replaced, how exact."""

import dataclasses
import functools
import importlib
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

# error / max(1, |x|), by the bits of the less exact of two arrays.
TOLERANCES = {32: 5e-5, 16: 2.5e-2}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
      tests: its test files, in its checkout.
      replaced: "module:function" of theirs, and ours in its place.
      exact: "module:function" of theirs, a reference, and the arguments that have it compute in
        float32: at its defaults it rounds bfloat16 logits of 32 to an eighth.
      packages: those of its packages that are entered without running their `__init__`, which
        would import a server, and their folders in the checkout.
      stubs: modules that are not needed and would import a server.
    """

    tests: tuple[str, ...]
    replaced: dict[str, str]
    exact: dict[str, dict] = dataclasses.field(default_factory=dict)
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    stubs: tuple[str, ...] = ()


_V3 = "tpu_inference.kernels.ragged_paged_attention.v3."
_JAX = "jax.experimental.pallas.ops.tpu."
PEERS = {
    "tpu-inference": Peer(
        tests=(
            "tests/kernels/ragged_paged_attention_kernel_v3_test.py",
            "tests/kernels/ragged_paged_attention_kernel_v3_hd64_test.py",
        ),
        replaced={
            _V3 + "kernel:ragged_paged_attention": "tpu_inference:ragged_paged_attention",
            _V3 + "kernel_hd64:ragged_paged_attention_hd64": (
                "tpu_inference:ragged_paged_attention_hd64"
            ),
        },
        exact={_V3 + "kernel:ref_ragged_paged_attention": {"out_dtype": np.float32}},
        packages={"tpu_inference": "tpu_inference"},
        stubs=("tpu_inference.logger", "tpu_inference.utils"),
    ),
    "jax": Peer(
        tests=(
            "tests/pallas/tpu_ragged_paged_attention_test.py",
            "tests/pallas/tpu_paged_attention_kernel_test.py",
        ),
        replaced={
            _JAX + "ragged_paged_attention:ragged_paged_attention": (
                "jax_pallas:ragged_paged_attention"
            ),
            _JAX + "paged_attention:paged_attention": "jax_pallas:paged_attention",
            _JAX + "paged_attention.paged_attention_kernel:paged_attention": (
                "jax_pallas:paged_attention"
            ),
        },
    ),
}


class Hooks:
    """A plugin of pytest: replaces the functions before a test file is imported."""

    def __init__(self, peer: Peer, checkout: Path):
        self.peer, self.checkout, self.calls = peer, checkout, {}

    def pytest_configure(self) -> None:
        """Puts ours in the place of theirs, and our tolerances in that of theirs."""
        sys.path.insert(0, str(self.checkout))
        for name, folder in self.peer.packages.items():
            package = types.ModuleType(name)
            package.__path__ = [str(self.checkout / folder)]
            sys.modules[name] = package
        sys.modules.update((name, mock.MagicMock()) for name in self.peer.stubs)
        for theirs, ours in self.peer.replaced.items():
            (module, function), (adapter, call) = theirs.split(":"), ours.split(":")
            adapted = getattr(importlib.import_module(f"shardpage.adapters.{adapter}"), call)
            counted = self._counted(theirs, adapted)
            mock.patch.object(importlib.import_module(module), function, counted).start()
        for theirs, options in self.peer.exact.items():
            module, function = theirs.split(":")
            home = importlib.import_module(module)
            exact = functools.partial(getattr(home, function), **options)
            mock.patch.object(home, function, exact).start()
        test_util = importlib.import_module("jax._src.test_util")
        case = test_util.JaxTestCase
        for name in ("is_device_tpu_at_least", "is_device_tpu"):
            mock.patch.object(test_util, name, return_value=True).start()
        mock.patch.object(case, "assertAllClose", _assert_close).start()

    def _counted(self, name: str, call):
        def counted(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            return call(*args, **kwargs)

        return counted

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says how often ours was called: a run in which it was not proves nothing."""
        for name in self.peer.replaced:
            terminalreporter.write_line(f"{self.calls.get(name, 0):5d} calls of ours for {name}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run without a call of ours fails."""
        if not self.calls and not session.config.option.collectonly:
            session.exitstatus = 1


def _assert_close(self, actual, desired, **_theirs) -> None:
    """As `assertAllClose`, whose own tolerances (0.05 to 0.2) would hide a wrong number."""
    bits = min(8 * np.asarray(x).dtype.itemsize for x in (actual, desired))
    actual, desired = (np.asarray(x).astype(np.float64) for x in (actual, desired))
    assert actual.shape == desired.shape
    error = np.abs(actual - desired) / np.maximum(1.0, np.abs(desired))
    assert error.max(initial=0.0) <= TOLERANCES[bits]
