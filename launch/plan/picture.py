"""Plans side by side as a picture: bytes of each device, and what a step waits for."""

import pathlib

from .estimate import Plan

GIB = 2**30


def draw(plans: list[Plan], path: pathlib.Path, title: str) -> None:
    """Writes a PNG with one bar a mesh: memory to the left, bounds on time to the right.

    Raises:
      RuntimeError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [plan.split.spec for plan in plans]
    _stack(
        memory,
        names,
        {
            "KV pages": [plan.memory.cache / GIB for plan in plans],
            "scratch": [plan.memory.temp / GIB for plan in plans],
            "arguments": [plan.memory.other / GIB for plan in plans],
        },
    )
    limit = plans[0].memory.limit
    if limit is not None:
        memory.axvline(limit / GIB, color="black", linestyle="--", label="HBM")
    memory.set_xlabel("GiB on each device")
    memory.legend(fontsize=8)
    times = [plan.times for plan in plans]
    if all(times):
        parts = ("hbm", "ici", "dcn")
        bars = {part.upper(): [getattr(t, part) * 1e3 for t in times] for part in parts}
        _stack(time, names, bars)
        time.set_xlabel("ms a step at least (attention only)")
        time.legend(fontsize=8)
    else:
        time.set_axis_off()
    memory.invert_yaxis()
    figure.savefig(path, dpi=120)


def _stack(axes, names: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for label, widths in parts.items():
        axes.barh(names, widths, left=left, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
