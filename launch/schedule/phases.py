"""Where the cycles of a run go, by the source lines that the compiler notes at instructions."""

import ast
import collections
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from .bundles import Bundle, Op
from .machine import Run
from .program import Program
from .timing import Timing

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A function of the kernel's source, as far as it runs in one loop.

    Attributes:
      loop: function and line of the innermost loop around it, or "".
      function: e.g. "softmax.attend".
      cycles: in which its instructions issued, or would have: `empty` are among them.
      empty: in which nothing issued, because a result that it takes was not there.
      waits: for copies, on top.
    """

    loop: str
    function: str
    cycles: float
    empty: float
    waits: float


def breakdown(program: Program, run: Run, timing: Timing) -> list[Phase]:
    """All phases, the longest first. Functions share a bundle by their instructions in it."""
    cycles, empty, waits = (collections.Counter() for _ in range(3))
    loops = _loops(program)
    for index, (bundle, shares) in enumerate(zip(program.bundles, _shares(program), strict=True)):
        for function, share in shares.items():
            phase = loops[index], function
            cycles[phase] += run.visits[index] * share
            empty[phase] += run.visits[index] * share * (not bundle.ops)
            waits[phase] += timing.waits.get(index, 0) * share
    found = [
        Phase(loop, function, cycles[loop, function], empty[loop, function], waits[loop, function])
        for loop, function in cycles
        if cycles[loop, function]
    ]
    return sorted(found, key=lambda phase: -phase.cycles - phase.waits)


def longest(phases: Sequence[Phase], share: float = 0.005) -> list[Phase]:
    """Those that take this share of all, and one phase for the others."""
    least = share * sum(phase.cycles + phase.waits for phase in phases)
    kept = [phase for phase in phases if phase.cycles + phase.waits >= least]
    rest = phases[len(kept) :]
    total = lambda name: sum(getattr(phase, name) for phase in rest)
    others = Phase("", "others", total("cycles"), total("empty"), total("waits"))
    return [*kept, others] if rest else kept


def _shares(program: Program) -> list[dict[str, float]]:
    """Of each bundle, the functions that it works for; an empty one for those of the next."""
    shares: list[dict[str, float]] = []
    following = {"(compiler)": 1.0}
    for bundle in reversed(program.bundles):
        names = [_function(op.place) for op in bundle.ops if op.place and op.name != "sphi"]
        if names:
            following = {n: c / len(names) for n, c in collections.Counter(names).items()}
        shares.append(following)
    return shares[::-1]


def _loops(program: Program) -> list[str]:
    """The name of the innermost loop around each bundle."""
    names, sizes = [""] * len(program.bundles), [len(program.bundles) + 1] * len(program.bundles)
    for first, last in program.loops():
        branch = program.bundles[last - program.core.delay_slots]
        name = _loop_name(program.bundles[first], branch)
        for index in range(first, min(last + 1, len(names))):
            if last - first < sizes[index]:
                names[index], sizes[index] = name, last - first
    return names


def _loop_name(head: Bundle, branch: Bundle) -> str:
    """Values that a loop carries come from the line that it stands in."""
    carried: Sequence[Op] = [op for op in head.ops if op.name == "sphi" and op.place]
    carried = carried or [op for op in (*branch.ops, *head.ops) if op.place]
    if not carried:
        return "(compiler)"
    place, _ = collections.Counter(op.place for op in carried).most_common(1)[0]
    assert place is not None
    return f"{_function(place)}:{place[1]}"


@functools.cache
def _function(place: Place) -> str:
    """The innermost function around a line, with what it is in: a class, function or module."""
    file, line = place
    inside = [f for f in _functions(file) if f[0] <= line <= f[1]]
    stem = pathlib.Path(file).stem
    return ".".join([stem, *max(inside)[2].split(".")][-2:]) if inside else f"{stem}:{line}"


@functools.cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First line, last line and qualified name of each function in a file, if it is there."""
    try:
        tree = ast.parse(pathlib.Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                name = f"{prefix}{child.name}."
                if isinstance(child, ast.FunctionDef) and child.name != "_":
                    first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    found.append((first, child.end_lineno or first, name[:-1]))
            visit(child, name if not name.endswith("._.") else prefix)

    visit(tree, "")
    return found
