"""`python -m launch.bench.publish`: draws the kept reports and puts their figures in RESULTS.md.

Each table stands between its markers:

<!-- figures: gpu_decode -->   ...generated...   <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .draw import draw
from .peers import OURS
from .report import Row, speed

FOLDER = Path(__file__).parent
MEASURED = ("cpu_decode", "gpu_decode", "gpu_sharded")


def load(name: str) -> dict[str, Any]:
    """A kept report."""
    return json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))


def speed_up(ours: Row, peer: Row | None) -> float | None:
    """How many times as fast as a peer; None if either has no time."""
    if peer is None or peer.timing is None or ours.timing is None:
        return None
    return peer.timing.median_us / ours.timing.median_us


def _decode(report: dict[str, Any]) -> str:
    """Time and GB/s of this library, and its speed-up over each peer."""
    rows = {(row.shape, row.name): row for row in map(Row.from_json, report["rows"])}
    peers = dict.fromkeys(n for (_, n), row in rows.items() if row.timing and n != OURS)
    cells = [["shape", f"{OURS}, us", "GB/s", "of copy", "temp MB", *(f"x {p}" for p in peers)]]
    for shape in dict.fromkeys(shape for shape, _ in rows):
        ours = rows[shape, OURS]
        assert ours.timing is not None
        assert ours.gbps is not None
        times = f"{ours.timing.median_us:.0f}", speed(ours.gbps)
        share, temp_mb = f"{ours.gbps / ours.roof_gbps:.0%}", f"{ours.temp_bytes / 1e6:.0f}"
        versus = [_versus(ours, rows.get((shape, peer))) for peer in peers]
        cells.append([shape, *times, share, temp_mb, *versus])
    return _table(cells)


def _versus(ours: Row, peer: Row | None) -> str:
    ratio = speed_up(ours, peer)
    if ratio is None:
        return peer.why.partition(":")[0] if peer else ""
    return f"{ratio:.2f}"


def _sharded(report: dict[str, Any]) -> str:
    """Time and efficiency of each split."""
    cells = [["split: work", "devices", "us", "spread", "efficiency"]]
    for row in map(Row.from_json, report["rows"]):
        figures = [row.why, "", ""]
        if row.timing is not None:
            efficiency = "" if row.efficiency is None else f"{row.efficiency:.2f}"
            figures = [f"{row.timing.median_us:.0f}", f"{row.timing.spread:.0%}", efficiency]
        cells.append([row.shape, row.name, *figures])
    return _table(cells)


def _schedule(report: dict[str, Any]) -> str:
    """Issue cycles over HBM cycles: both layouts of this library, and JAX's kernel."""
    ratios = {(r["case"], r["topology"], r["kernel"]): r["ratio"] for r in report["schedules"]}
    topologies = list(dict.fromkeys(topology for _, topology, _ in ratios))
    cells = [["case", *(t.partition(":")[0] for t in topologies)]]
    for case in dict.fromkeys(r["case"] for r in report["schedules"] if r["limit"] is not None):
        found = [
            [ratios.get((case, topology, kernel)) for kernel in ("fused", "separate", "stock")]
            for topology in topologies
        ]
        shown = (" / ".join("-" if r is None else f"{r:.2f}" for r in each) for each in found)
        cells.append([case, *shown])
    return _table(cells)


def _table(cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])


def _with_source(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """A table, and below it the origin of its figures."""

    def both(report: dict[str, Any]) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        copies = f"a copy reads and writes {report['roof_gbps']:.0f} GB/s ({report['roof']})"
        source = f"`{report['command']}` on {report['num_devices']} x {report['device']}"
        return f"{table(report)}\n\n({source}; {copies}; {versions})"

    return both


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu_decode": _with_source(_decode),
    "gpu_decode": _with_source(_decode),
    "gpu_sharded": _with_source(_sharded),
    "tpu_schedule": _schedule,
}


def generated(text: str) -> str:
    """The text of RESULTS.md with every table made anew from its report."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- figures: {name} -->\n{TABLES[name](load(name))}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def draw_all() -> None:
    """A picture beside each measured report."""
    for name in MEASURED:
        report = load(name)
        title = f"{report['num_devices']} x {report['device']}, jax {report['versions']['jax']}"
        path = FOLDER / f"results/{name}.png"
        draw([Row.from_json(row) for row in report["rows"]], title, path)


if __name__ == "__main__":
    draw_all()
    path = FOLDER / "RESULTS.md"
    path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
