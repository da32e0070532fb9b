"""Plans side by side as a picture: bytes of each device, and what a step waits for."""

import pathlib

from .estimate import Plan, Times

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
        raise RuntimeError("pictures need matplotlib: pip install 'shardpage[plot]'") from error
    figure = Figure(figsize=(11, 2.1 + 0.36 * len(plans)), layout="constrained")
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
    room = "" if limit is None else f" (of {limit / GIB:.3g})"
    if limit is not None and max(plan.memory.total for plan in plans) > 0.3 * limit:
        memory.axvline(limit / GIB, color="black", linestyle="--")
    _label(memory, f"GiB on each device{room}")
    times = [plan.times for plan in plans if plan.times]
    if len(times) == len(plans):
        parts = {"HBM": "hbm", "issue beyond HBM": "issue", "ICI": "ici", "DCN": "dcn"}
        _stack(
            time,
            names,
            {label: [1e3 * _waited(t, part) for t in times] for label, part in parts.items()},
        )
        _label(time, "ms a step at least (attention only)")
    else:
        time.set_axis_off()
    memory.invert_yaxis()
    figure.savefig(path, dpi=120)


def _waited(times: Times, part: str) -> float:
    return times.attend - times.hbm if part == "issue" else getattr(times, part)


def _label(axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _stack(axes, names: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for label, widths in parts.items():
        axes.barh(names, widths, left=left, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
