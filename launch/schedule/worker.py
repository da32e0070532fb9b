"""One process that compiles for TPUs with the compiler's schedules written out.

Libtpu is told where to write when it loads, once per process: so another process does it.
"""

import atexit
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
from jax.sharding import Mesh

import meshes

from . import bundles, cases
from .execute import Executed, Subject, execute

_MOST_COMPILED = 100

# In the worker only: where the compiler writes its schedules.
_dump: pathlib.Path


def submit(function: Callable[..., Any], *arguments: Any) -> "concurrent.futures.Future[Any]":
    """Has the worker call a function of this package, which finds the folder with `dump()`."""
    return _pool(True).submit(function, *arguments)


def call(function: Callable[..., Any], *arguments: Any, dumping: bool = True) -> Any:
    """The answer of the worker; without `dumping`, of one whose compiler writes nothing.

    Raises:
      RuntimeError: if the compiler took the process down; and what the function raises.
    """
    try:
        return _pool(dumping).submit(function, *arguments).result()
    except BrokenProcessPool:
        _pool.cache_clear()
        raise RuntimeError("the compiler ended its process") from None


def dump() -> pathlib.Path:
    """The folder of schedules, in the worker."""
    return _dump


@functools.cache
def _pool(dumping: bool) -> concurrent.futures.ProcessPoolExecutor:
    folder = tempfile.TemporaryDirectory(prefix="shardpage_schedule_")
    context = multiprocessing.get_context("spawn")
    # A compiler that is asked for hundreds of programs keeps gigabytes of them.
    most = None if dumping else _MOST_COMPILED
    pool = concurrent.futures.ProcessPoolExecutor(
        1, context, _enter, (folder.name, dumping), max_tasks_per_child=most
    )
    atexit.register(folder.cleanup)
    return pool


def _enter(folder: str, dumping: bool) -> None:
    global _dump
    _dump = pathlib.Path(folder)
    if dumping:
        before = os.environ.get("LIBTPU_INIT_ARGS", "")
        flags = f"--xla_jf_dump_to={folder} {bundles.FLAGS}"
        os.environ["LIBTPU_INIT_ARGS"] = f"{before} {flags}".strip()
    jax.config.update("jax_platforms", "cpu")


def execute_case(topology: str, kernel: str, case: str, cores: str) -> list[Executed]:
    """Executes a case, in the worker."""
    mesh = one_device(topology)
    return execute(cases.subject(kernel, cases.ALL[case], mesh, cores), topology, mesh, dump())


def execute_file(topology: str, spec: str) -> list[Executed]:
    """Executes the kernels of `FILE.py:FUNCTION`, in the worker."""
    return execute(load(spec), topology, one_device(topology), dump())


def one_device(topology: str) -> Mesh:
    """A mesh of the first device of a slice."""
    return Mesh(meshes.topology(topology).devices.flat[:1], ("data",))


def load(spec: str) -> Subject:
    """What `FUNCTION()` of `FILE.py` returns: a function and its arguments, as a tuple.

    Raises:
      ValueError: if there is no such function.
    """
    file, _, name = spec.rpartition(":")
    if not file or not pathlib.Path(file).is_file():
        raise ValueError(f"--subject {spec}: no file {file!r}; it is FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location("subject", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    make: Any = getattr(module, name, None)
    if make is None:
        raise ValueError(f"--subject {spec}: {file} has no function {name!r}")
    function, arguments = make()
    return Subject(name, "", function, tuple(arguments))
