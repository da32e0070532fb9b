"""Executed calls as tables, and as a picture."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

from .execute import Executed
from .timing import MEMORIES, ONE_US

_NAMED_PHASES = 6
_NOTE = """\
issue: the compiled kernel executed on a modelled core, waits for results ('empty': their share)
included; HBM: the bytes that a call must read at the chip's bandwidth (what it moves, for kernels
without such a figure); MXU: the time of its matrix units for what a step's queries see. us:
microseconds if copies cost nothing ('issue only'), or if HBM's full bandwidth comes with this
latency; '10 ns' is the least that a copy then occupies HBM. Nothing here was measured on a TPU:
what a copy costs there is not published."""


def table(rows: Sequence[Executed]) -> str:
    """One table per chip, a case after the other."""
    lines: list[str] = []
    for topology in dict.fromkeys(row.topology for row in rows):
        of_chip = [row for row in rows if row.topology == topology]
        first = ("case", "kernel", "issue/HBM", "issue/MXU", "HBM us")
        header = (*first, *(m.name for m in MEMORIES))
        cells = [(*header, "empty", "copies x KiB", "MB"), *map(_cells, of_chip)]
        lines += ["", f"{of_chip[0].device_kind} ({topology})", *_aligned(cells)]
    return "\n".join([*lines, "", _NOTE, *_doubts(rows)])


def _cells(row: Executed) -> tuple[str, ...]:
    cores = f", {row.cores} cores" if row.cores > 1 else ""
    return (
        row.case,
        row.kernel + cores,
        f"{row.ratio:.2f}",
        f"{row.cycles / row.mxu_cycles:.2f}" if row.mxu_cycles else "",
        f"{row.hbm_cycles / row.clock_hz * 1e6:.1f}",
        *(f"{row.us[memory.name]:.1f}" for memory in MEMORIES),
        f"{row.empty / row.cycles:.0%}",
        f"{row.copies} x {row.copied_bytes / max(1, row.copies) / 1024:.3g}",
        f"{row.copied_bytes / 1e6:.1f}",
    )


def _doubts(rows: Sequence[Executed]) -> list[str]:
    """What keeps a figure from being exact."""
    return [
        f"{row.topology} {row.case} {row.kernel}: {row.guessed} loads of scalars that nobody wrote "
        "were taken as 0: its branches may be others"
        for row in rows
        if row.guessed
    ]


def phases(row: Executed, most: int = 14) -> str:
    """Where the cycles of a call go: functions of its source, by the loop that they run in."""
    header = ("function", "in the loop at", "cycles", "of all", "empty", "waits for copies (1 us)")
    cells = [header]
    for phase in row.phases[:most]:
        cells.append((
            phase["function"],
            phase["loop"],
            f"{phase['cycles']:.0f}",
            f"{phase['cycles'] / row.cycles:.1%}",
            f"{phase['empty']:.0f}",
            f"{phase['waits']:.0f}",
        ))  # fmt: skip
    title = f"{row.device_kind}, {row.case}, {row.kernel}: {row.cycles} cycles"
    busy = ", ".join(f"{unit} {share:.0%}" for unit, share in row.units.items())
    return "\n".join(["", title, *_aligned(cells), f"units busy: {busy}"])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches.

    Raises:
      RuntimeError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'shardpage[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(rows: Sequence[Executed], path: pathlib.Path) -> None:
    """Writes a PNG: where the time of each call goes, over HBM's time, a panel per chip.

    Raises:
      RuntimeError: without matplotlib.
    """
    from matplotlib import colormaps

    topologies = list(dict.fromkeys(row.topology for row in rows))
    names = list(dict.fromkeys(_label(row, rows) for row in rows))
    figure = new_figure(3 + 2.8 * len(topologies), 1.8 + 0.32 * len(names))
    figure.suptitle("Time of a call over HBM's time for its bytes, at 1 us of latency (executed)")
    panels = figure.subplots(1, len(topologies), sharey=True, squeeze=False)[0]
    shown = _longest(rows)
    palette = colormaps["tab10"]
    colors: dict[str, Any] = {part: palette(i) for i, part in enumerate([*shown, "other"])}
    colors |= {"waits for results": "#c8c8c8", "waits for copies": "#707070"}
    for panel, topology in zip(panels, topologies, strict=True):
        for row in (row for row in rows if row.topology == topology):
            left, place = 0.0, names.index(_label(row, rows))
            for part, cycles in _parts(row, shown).items():
                width = cycles / row.hbm_cycles
                panel.barh(place, width, left=left, color=colors[part], label=part)
                left += width
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel(topology)
        panel.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    legend: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _label(row: Executed, rows: Sequence[Executed]) -> str:
    several = len({row.kernel for row in rows}) > 1
    return f"{row.case}: {row.kernel}" if several else row.case


def _longest(rows: Sequence[Executed]) -> list[str]:
    """The functions that take most, as shares of their calls."""
    total = collections.Counter[str]()
    for row in rows:
        for phase in row.phases:
            total[phase["function"]] += (phase["cycles"] - phase["empty"]) / row.cycles
    total.pop("others", None)
    return [name for name, _ in total.most_common(_NAMED_PHASES)]


def _parts(row: Executed, shown: Sequence[str]) -> dict[str, float]:
    """Cycles of a call: issuing for the functions shown and others, and waits."""
    parts = dict.fromkeys([*shown, "other"], 0.0)
    for phase in row.phases:
        name = phase["function"] if phase["function"] in parts else "other"
        parts[name] += phase["cycles"] - phase["empty"]
    parts["waits for results"] = row.empty
    parts["waits for copies"] = row.wait_us[ONE_US.name] * 1e-6 * row.clock_hz
    return parts
