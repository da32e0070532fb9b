"""`shardpage schedule`: where the cycles of a TPU kernel go, asked of the compiler alone."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Option

from ..json_file import JsonOption
from ..plan.workload import Model, Workload, preset_names
from ..schedule import grid as grids
from ..schedule import report, worker
from ..schedule import step as steps
from ..schedule.cases import ALL, CASES, KERNELS, STEPS, default_cases
from ..schedule.execute import Executed
from . import options

DEFAULT_TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
_GRID_CASES = 500
_CASE_HELP = (
    f"One of {', '.join(repr(c.name) for c in CASES)}, or a shape of `bench`; with --kernel step "
    f"one of {', '.join(repr(c.name) for c in STEPS)}; by default all of them."
)


def schedule(
    topology: Annotated[list[str] | None, options.TOPOLOGY] = None,
    case: Annotated[list[str] | None, Option(help=_CASE_HELP)] = None,
    kernel: Annotated[
        list[str] | None, Option(help=f"One of {', '.join(KERNELS)}; by default decode.")
    ] = None,
    cores: Annotated[
        list[str] | None,
        Option(
            help="TensorCores of a v4 or v5p chip: off (one), auto, batch or kv_head; by default "
            "off."
        ),
    ] = None,
    subject: Annotated[
        str | None,
        Option(
            metavar="FILE.py:FUNCTION",
            help="Execute the Pallas kernels of what FUNCTION() returns instead: a function and "
            "its arguments, integers as arrays.",
        ),
    ] = None,
    phases: Annotated[bool, Option("--phases", help="Show where the cycles go.")] = False,
    step: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Show what stands around the kernels in each layer of a decode step instead, of a "
            f"model of `plan`: {', '.join(preset_names())}.",
        ),
    ] = None,
    mesh: options.Mesh = None,
    batch: Annotated[int, Option(help="Sequences of a step, over all devices.")] = 64,
    context: Annotated[int, Option(help="Tokens of each, in a step.")] = 4096,
    page_size: Annotated[int, Option(help="Tokens per page, in a step.")] = 16,
    grid: Annotated[
        bool,
        Option(
            "--grid",
            help=f"Only compile {_GRID_CASES} shapes for all chips; goes on where --json ends.",
        ),
    ] = False,
    json_file: options.Json = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
) -> None:
    """Compile TPU kernels without a TPU, and execute what the compiler made of them.

    A modelled core runs the compiled program of a whole call, bundle by bundle: real branches, trip
    counts and copies, waits for results counted. What memory does is a model, of several latencies.
    --topology, --case, --kernel and --cores may be
    repeated. See launch/schedule/README.md.
    """
    for what, chosen, known in (("case", case, [*ALL]), ("kernel", kernel, [*KERNELS])):
        if unknown := [name for name in chosen or () if name not in known]:
            _fail(f"--{what} {unknown[0]!r} is none of {known}")
    say, topologies = options.progress(quiet), topology or DEFAULT_TOPOLOGIES
    try:
        with options.stoppable():
            if grid:
                _grid(json_file, say)
            elif step is not None:
                work = Workload(Model.preset(step), batch, context, page_size)
                _steps(topologies, mesh, work, json_file, say)
            else:
                kernels = kernel or ["decode"]
                calls = _calls(topologies, case, kernels, cores or ["off"], subject, say)
                _executed(calls, phases, json_file, plot)
    except typer.Exit:  # a RuntimeError
        raise
    except (ValueError, RuntimeError, NotImplementedError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _calls(
    topologies: Sequence[str],
    cases: Sequence[str] | None,
    kernels: Sequence[str],
    modes: Sequence[str],
    subject: str | None,
    say: Callable[[str], None],
) -> Iterator[Executed]:
    """All cases with all kernels; what is refused is said, and left out of several."""
    for topology in topologies:
        say(f"executing for {topology} ...")
        if subject is not None:
            yield from worker.call(worker.execute_file, topology, subject)
            continue
        for kernel in kernels:
            names = cases or [shape.name for shape in default_cases(kernel)]
            for case, cores in itertools.product(names, modes):
                if cores == "kv_head" and ALL[case].num_kv_heads % 2 and len(names) > 1:
                    print(f"{topology} {case}: {cores} has no KV head to split", file=sys.stderr)
                    continue
                try:
                    yield from worker.call(worker.execute_case, topology, kernel, case, cores)
                except Exception as error:  # JAX's kernels assert what they do not have
                    if not kernel.startswith("jax "):
                        raise
                    reason = repr(error).partition("\\n")[0]
                    print(f"{topology} {case}: {kernel} fails: {reason}", file=sys.stderr)


def _executed(
    calls: Iterator[Executed], phases: bool, json_file: Path | None, plot: Path | None
) -> None:
    file, rows = JsonOption(json_file), []
    for row in calls:
        rows.append(row)
        file.write(_content(rows))
    if plot is not None and rows:
        report.draw(rows, plot)
    print(report.table(rows))
    if phases:
        print(*map(report.phases, rows), sep="\n")
    file.write(_content(rows), last=True)
    file.close()


def _content(rows: list[Executed]) -> dict[str, Any]:
    return {"calls": [row.to_json() for row in rows]}


def _steps(
    topologies: Sequence[str],
    mesh: str | None,
    work: Workload,
    json_file: Path | None,
    say: Callable[[str], None],
) -> None:
    file, found = JsonOption(json_file), []
    for topology in topologies:
        say(f"compiling a step for {topology} ...")
        found.append(worker.call(steps.analyze, topology, mesh, work))
        print(steps.table(found[-1]))
    file.write({"steps": [dataclasses.asdict(step) for step in found]}, last=True)
    file.close()


def _grid(json_file: Path | None, say: Callable[[str], None]) -> None:
    """Exit code 1 if the compiler failed."""
    found = grids.run(_GRID_CASES, json_file, say)
    print(grids.table(found))
    if any(outcome == grids.FAILED for outcome, *_ in found["results"].values()):
        raise typer.Exit(1)
