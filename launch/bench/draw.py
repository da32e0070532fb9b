"""Pictures of a report."""

from collections.abc import Sequence
from pathlib import Path

from .report import COPY, OURS, UNQUANTISED, Row, speed

_COLORS = {
    OURS: "#1b6ca8",
    "shardpage xla": "#7fb2d9",
    "gather": "#c9a227",
    "jax paged_attention": "#c44536",
    "jax reference": "#c44536",
    "ejkernel": "#8d5a97",
    "ejkernel v2": "#8d5a97",
    "ejkernel v3": "#5c3a63",
    "matmuls": "#555555",
    "scatter": "#c9a227",
    "flashinfer": "#3c8d5a",
    "flashinfer cuda cores": "#8fbf9f",
    COPY: "#bbbbbb",
    UNQUANTISED: "#1b6ca8",
    "int8": "#c44536",
    "float8_e4m3fn": "#c9a227",
    "float8_e5m2": "#8d5a97",
}
_SAME, _GROWN = "#1b6ca8", "#7fb3d5"


def draw(rows: Sequence[Row], title: str, path: Path) -> list[Path]:
    """Writes one PNG per kind of bench in the rows: `path`, or several with the kind in the name.

    Raises:
      RuntimeError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'shardpage[plot]'") from error

    benches = [b for b in dict.fromkeys(r.bench for r in rows) if _timed(rows, b)]
    written = []
    for bench in benches:
        shown = _timed(rows, bench)
        shapes = list(dict.fromkeys(row.shape for row in shown))
        figure = Figure(figsize=(9, 1.4 + 0.62 * len(shapes)), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        (_draw_efficiency if bench == "sharded" else _draw_speed)(panel, shown, shapes)
        panel.set_title(f"{bench}: {title}", fontsize=10)
        panel.set_yticks(range(len(shapes)), shapes)
        panel.invert_yaxis()
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        target = path if len(benches) == 1 else path.with_stem(f"{path.stem}_{bench}")
        figure.savefig(target, dpi=120)
        written.append(target)
    return written


def _timed(rows: Sequence[Row], bench: str) -> list[Row]:
    return [row for row in rows if row.bench == bench and row.gbps is not None]


def _draw_speed(panel, rows: Sequence[Row], shapes: Sequence[str]) -> None:
    """Bars of GB/s, for steps of GFLOP/s; for decode also the copy roof, if it has no bars."""
    rate = lambda row: (row.gflops if row.bench == "steps" else row.gbps) or 0
    names = [name for name in _COLORS if any(row.name == name for row in rows)]
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        here = [row for row in rows if row.name == name]
        places = [
            shapes.index(row.shape) + height * (number - (len(names) - 1) / 2) for row in here
        ]
        bars = panel.barh(
            places, [rate(row) for row in here], height, color=_COLORS[name], label=name
        )
        panel.bar_label(bars, [speed(rate(row)) for row in here], padding=2, fontsize=7)
    if rows[0].bench == "decode" and COPY not in names:
        panel.axvline(rows[0].roof_gbps, color="black", linewidth=1, label="copy, read + written")
    if rows[0].bench == "decode":
        panel.set_xlabel("GB/s of keys and values")
    elif rows[0].bench == "quantised":
        panel.set_xlabel("GB/s of keys, values and scales as stored")
    elif rows[0].bench == "steps":
        panel.set_xlabel("GFLOP/s of what the queries see")
    else:
        panel.set_xlabel("GB/s of new keys and values")


def _draw_efficiency(panel, rows: Sequence[Row], shapes: Sequence[str]) -> None:
    """Bars of efficiency: the same work in all, and the same work per device."""
    for offset, color, on_it, label, grown in (
        (-0.2, _SAME, "white", "same work in all", False),
        (0.2, _GROWN, "black", "same work per device", True),
    ):
        here = [r for r in rows if r.efficiency is not None and ("work x" in r.name) == grown]
        places = [shapes.index(row.shape) + offset for row in here]
        values = [row.efficiency for row in here]
        bars = panel.barh(places, values, 0.4, color=color, label=label)
        panel.bar_label(bars, fmt="%.2f", label_type="center", color=on_it, fontsize=7)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xlabel("efficiency: 1 if N devices are N times as fast as one")
