"""Schedules as a table, and as a picture."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from .cases import KERNELS
from .measure import Measured

_COLORS = {"fused": "#1b6ca8", "separate": "#7fb3d5", "stock": "#c44536"}
_LABELS = {
    "fused": "shardpage, K and V in one array",
    "separate": "shardpage, two arrays",
    "stock": "jax.experimental paged_attention",
}
_TICKS = (0.1, 0.3, 1, 3, 10)
HEADER = (
    *("kernel", "block", "issue", "HBM", "issue/HBM", "limit", "DMAs x KiB"),
    *("in flight/needed MB", "per sequence", "per call", "temp MB"),
)
NOTE = """\
issue: bundles of the loop over blocks; HBM: cycles in which memory delivers a block. Stalls
are left out, and a whole call takes longer: up to 3 times at one KV head, so below 1 does not mean
that memory is the limit. 'per sequence', 'per call': bundles outside that loop, counted once each
(this library's kernel works on a sequence of a single block there). Bounds from below: stalls, DMA
latency and trip counts are not in them."""


def table(rows: Sequence[Measured]) -> str:
    """One table per chip, a case after the other."""
    lines: list[str] = []
    for topology in dict.fromkeys(row.topology for row in rows):
        of_chip = [row for row in rows if row.topology == topology]
        cases = [""] + [row.case for row in of_chip]
        shown = [case if case != before else "" for before, case in itertools.pairwise(cases)]
        cells = [("", *HEADER)] + [(c, *_cells(row)) for c, row in zip(shown, of_chip, strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", f"{of_chip[0].device_kind} ({topology})", *(_line(c, widths) for c in cells)]
    return "\n".join([*lines, "", NOTE])


def _cells(row: Measured) -> list[str]:
    over = "" if row.within_limit else " over"
    verdict = "" if row.limit is None else f"{row.limit:.2f}{over}"
    return [
        row.kernel,
        f"{row.block_bytes >> 10} KiB",
        str(row.issue_cycles),
        f"{row.hbm_cycles:.0f}",
        f"{row.ratio:.2f}",
        verdict,
        f"{row.copies} x {row.copy_bytes / 1024:.3g}",
        f"{row.bytes_in_flight / 1e6:.1f} / {row.bytes_needed / 1e6:.1f}",
        str(row.per_sequence),
        str(row.per_call + row.around),
        f"{row.temp_bytes / 1e6:.1f}",
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


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


def draw(rows: Sequence[Measured], path: pathlib.Path) -> None:
    """Writes a PNG: issue cycles over HBM cycles, a panel per chip.

    Of the cases that have a target: short sequences hardly enter the loop over blocks.

    Raises:
      RuntimeError: without matplotlib.
    """
    aimed = {row.case for row in rows if row.limit is not None}
    rows = [row for row in rows if row.case in aimed or not aimed]
    topologies = list(dict.fromkeys(row.topology for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = new_figure(3 + 2.6 * len(topologies), 1.6 + 0.5 * len(cases))
    figure.suptitle("Issue cycles of the block loop over the HBM cycles of its bytes (log scale)")
    panels = figure.subplots(1, len(topologies), sharex=True, sharey=True, squeeze=False)[0]
    kernels = [kernel for kernel in KERNELS if any(row.kernel == kernel for row in rows)]
    for panel, topology in zip(panels, topologies, strict=True):
        for number, kernel in enumerate(kernels):
            here = [row for row in rows if (row.topology, row.kernel) == (topology, kernel)]
            height = 0.8 / len(kernels)
            places = [cases.index(row.case) + height * (number - 1) for row in here]
            ratios = [row.ratio for row in here]
            panel.barh(places, ratios, height, color=_COLORS[kernel], label=_LABELS[kernel])
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks(_TICKS, [str(tick) for tick in _TICKS])
        panel.minorticks_off()
        panel.set_xlabel(topology)
        panel.set_yticks(range(len(cases)), cases)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
