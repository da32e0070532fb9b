"""`python -m launch.bench.publish`: draws the kept reports and puts their figures in documents.

Each table stands between its markers:

<!-- figures: gpu_decode -->   ...generated...   <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..schedule.core import Core
from ..schedule.execute import Executed
from ..schedule.report import draw as draw_calls
from .draw import draw
from .report import COPY, OURS, PLANNED, UNQUANTISED, Row, speed

FOLDER = Path(__file__).parent
_LARGEST = 5  # fusions of a step
MEASURED = ("cpu_decode", "cpu_steps", "gpu_decode", "gpu_sharded")


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
    peers = dict.fromkeys(n for (_, n), row in rows.items() if row.timing and n not in (OURS, COPY))
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


def _steps(report: dict[str, Any]) -> str:
    """Clock and processor time of each implementation, and its work over this library's."""
    rows = list(map(Row.from_json, report["rows"]))
    run_here = {row.name for row in rows if row.timing}
    rows = [row for row in rows if row.name in run_here]
    work = {(row.shape, row.name): row.timing.processor_us for row in rows if row.timing}
    cells = [["step", "by", "ms", "spread", "processor ms", "over ours", "GFLOP/s", "temp MB"]]
    for row in rows:
        timing, ours = row.timing, work[row.shape, OURS]
        if timing is None or timing.processor_us is None or ours is None or row.flops is None:
            cells.append([row.shape, row.name, row.why, *[""] * 5])
            continue
        times = f"{timing.median_us / 1e3:.0f}", f"{timing.spread:.0%}"
        processor = f"{timing.processor_us / 1e3:.0f}", f"{timing.processor_us / ours:.2f}"
        rate = speed(row.flops / timing.processor_us / 1e3)
        cells.append([row.shape, row.name, *times, *processor, rate, f"{row.temp_bytes / 1e6:.0f}"])
    return _table(cells)


def _gpu_steps(report: dict[str, Any]) -> str:
    """Times on an accelerator: with the plan, without, and how many times as long peers take."""
    rows = {(row.shape, row.name): row for row in map(Row.from_json, report["rows"])}
    own = (OURS, PLANNED)
    shown = (n for (_, n), row in rows.items() if row.timing and n not in (*own, "jax reference"))
    peers = dict.fromkeys(shown)
    heads = ("step", "us", "plan made before, us", "TFLOP/s", "of copy")
    cells = [[*heads, *(f"x {p}" for p in peers)]]
    for shape in dict.fromkeys(shape for shape, _ in rows):
        whole, alone = (rows[shape, name] for name in own)
        assert whole.timing is not None
        assert alone.timing is not None
        assert alone.gbps is not None
        assert alone.gflops is not None
        times = f"{whole.timing.median_us:.0f}", f"{alone.timing.median_us:.0f}"
        rates = f"{alone.gflops / 1e3:.0f}", f"{alone.gbps / alone.roof_gbps:.0%}"
        versus = [_versus(alone, rows.get((shape, peer))) for peer in peers]
        cells.append([shape, *times, *rates, *versus])
    return _table(cells)


def _made_once(report: dict[str, Any]) -> str:
    """Calls with their plan before and after its tiles were made once, and without it."""
    names = list(report["rows"][0]["us"])
    cells = [["step", *(f"{name}, us" for name in names)]]
    for row in report["rows"]:
        cells.append([row["step"], *(f"{row['us'][name]['median']:.0f}" for name in names)])
    return _table(cells)


def _before_after(report: dict[str, Any]) -> str:
    """Calls of two versions of this library, and the rate of the later one's attention alone."""
    rows = {
        (which, r["shape"], r["name"]): Row.from_json(r)
        for which in ("before", "after")
        for r in report[which]["rows"]
    }
    commits = [report[which]["commit"] for which in ("before", "after")]
    cells = [["", *(f"{c}, us" for c in commits), "plan made before, us", "TFLOP/s", "GB/s"]]
    for shape in dict.fromkeys(shape for _, shape, _ in rows):
        old, new = (rows.get((which, shape, OURS)) for which in ("before", "after"))
        attention = rows.get(("after", shape, PLANNED), new)
        timed = [f"{r.timing.median_us:.0f}" if r and r.timing else "" for r in (old, new)]
        assert attention is not None
        assert attention.timing is not None
        us = attention.timing.median_us
        alone = "" if attention is new else f"{us:.0f}"
        rate = f"{attention.flops / us / 1e6:.0f}" if attention.flops else ""
        cells.append([shape, *timed, alone, rate, f"{attention.useful_bytes / us / 1e3:.0f}"])
    return _table(cells)


def _versus(ours: Row, peer: Row | None) -> str:
    ratio = speed_up(ours, peer)
    if ratio is None:
        return peer.why.partition(":")[0] if peer else ""
    return f"{ratio:.2f}"


def _quantised(report: dict[str, Any]) -> str:
    """Time and GB/s of each cache, and its bytes and times over bfloat16's."""
    rows = list(map(Row.from_json, report["rows"]))
    exact = {row.shape: row for row in rows if row.name == UNQUANTISED}
    on_cpu = report["device"] == "cpu"  # elsewhere the processor only starts the work
    ratios = ["its bytes", "its time", *(["its processor time"] if on_cpu else [])]
    cells = [["shape", "cache", "us", "spread", "GB/s as stored", *ratios]]
    for row in rows:
        reference = exact[row.shape]
        assert row.timing is not None
        assert row.gbps is not None
        assert reference.timing is not None
        versus = [f"{row.useful_bytes / reference.useful_bytes:.3f}"]
        versus += [f"{row.timing.median_us / reference.timing.median_us:.2f}"]
        if on_cpu:
            assert row.timing.processor_us is not None
            assert reference.timing.processor_us is not None
            versus += [f"{row.timing.processor_us / reference.timing.processor_us:.2f}"]
        times = f"{row.timing.median_us:.0f}", f"{row.timing.spread:.0%}", speed(row.gbps)
        if row is reference:
            versus = [""] * len(versus)
        cells.append([row.shape, row.name, *times, *versus])
    return _table(cells)


def _quality(report: dict[str, Any]) -> str:
    """What each cache loses against float32."""
    head = ["cache", "scale of a", "bytes a token", "logit error: largest", "mean"]
    head += ["same likeliest token", "perplexity", "answers equal for: least", "median"]
    cells = [head]
    for row in report["rows"]:
        errors = f"{row['largest_logit_error']:.3f}", f"{row['mean_logit_error']:.4f}"
        text = f"{row['same_likeliest']:.1%}", f"{row['perplexity']:.3f}"
        equal = str(row["equal_least"]), f"{row['equal_median']:g}"
        kind = row["dtype"], row["scale"] or "-", str(row["bytes_per_token"])
        cells.append([*kind, *errors, *text, *equal])
    text, calibration = report["text"], report["calibration"]
    return (
        f"{_table(cells)}\n\n(`{report['command']}`: {report['model']}; a text of {text['tokens']} "
        f"tokens, {text['file']}; scales of heads from {calibration['tokens']} tokens of "
        f"{calibration['file']}; {report['prompts']} answers of {report['new_tokens']} tokens; jax "
        f"{report['versions']['jax']} on a CPU)"
    )


def _scales(report: dict[str, Any]) -> str:
    """The error of keys and values, root mean square over theirs, by the dtype of scales."""
    errors = {(row["dtype"], row["scale_dtype"]): row["rms_error"] for row in report["scales"]}
    kinds = list(dict.fromkeys(kind for _, kind in errors))
    cells = [["cache", *(f"{kind} scales" for kind in kinds)]]
    for dtype in dict.fromkeys(dtype for dtype, _ in errors):
        cells.append([dtype, *(f"{errors[dtype, kind]:.3%}" for kind in kinds)])
    return _table(cells)


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


def _ratios(report: dict[str, Any]) -> str:
    """Issue over HBM cycles of whole calls: this library's kernel, and JAX's two."""
    kernels = ("decode", "jax paged_attention", "jax ragged_paged_attention")
    ratios = {(c["case"], c["topology"], c["kernel"]): c["ratio"] for c in report["calls"]}
    topologies = list(dict.fromkeys(topology for _, topology, _ in ratios))
    cells = [["case", *(t.partition(":")[0] for t in topologies)]]
    for case in dict.fromkeys(case for case, _, _ in ratios):
        found = ([ratios.get((case, topology, k)) for k in kernels] for topology in topologies)
        shown = (" / ".join("-" if r is None else f"{r:.2f}" for r in each) for each in found)
        cells.append([case, *shown])
    return _table(cells)


def _quantised_calls(report: dict[str, Any]) -> str:
    """Issue over HBM cycles of the bytes that are read, and thousands of cycles of the call."""
    return _by_case(report, "decode", lambda c: f"{c['ratio']:.2f}, {c['cycles'] / 1e3:.0f}")


def _quantised_writes(report: dict[str, Any]) -> str:
    """Microseconds of writes at 1 us of latency."""
    return _by_case(report, "write", lambda c: f"{c['us']['1 us']:.1f}")


def _by_case(report: dict[str, Any], kernel: str, cell: Callable[[dict[str, Any]], str]) -> str:
    calls = {(c["case"], c["topology"]): c for c in report["calls"] if c["kernel"] == kernel}
    topologies = list(dict.fromkeys(topology for _, topology in calls))
    cells = [["case", *(t.partition(":")[0] for t in topologies)]]
    for case in dict.fromkeys(case for case, _ in calls):
        found = (calls[case, topology] for topology in topologies)
        cells.append([case, *map(cell, found)])
    return _table(cells)


def _two_cores(report: dict[str, Any]) -> str:
    """Both cores of a chip: issue over HBM cycles, and microseconds at 1 us of latency."""
    calls = {(c["case"], c["topology"], c["kernel"]): c for c in report["calls"]}
    kinds = list(dict.fromkeys((topology, kernel) for _, topology, kernel in calls))
    head = (f"{topology.partition(':')[0]}: {kernel}" for topology, kernel in kinds)
    cells = [["case", *head]]
    for case in dict.fromkeys(case for case, _, _ in calls):
        found = (calls.get((case, *kind)) for kind in kinds)
        shown = ("-" if c is None else f"{c['ratio']:.2f}, {c['us']['1 us']:.0f} us" for c in found)
        cells.append([case, *shown])
    return _table(cells)


def _beside(cell: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """A table of cases on chips: of each the kernels' cells, one after the other."""

    def table(report: dict[str, Any]) -> str:
        calls: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for call in report["calls"]:
            calls.setdefault((call["case"], call["topology"]), []).append(call)
        topologies = list(dict.fromkeys(topology for _, topology in calls))
        cells = [["case", *(t.partition(":")[0] for t in topologies)]]
        for case in dict.fromkeys(case for case, _ in calls):
            found = (map(cell, calls.get((case, topology), ())) for topology in topologies)
            cells.append([case, *("; ".join(each) or "-" for each in found)])
        return _table(cells)

    return table


def _of_small_copies(call: dict[str, Any]) -> str:
    """Microseconds at 1 us of latency, and if each copy also costs HBM 10 ns."""
    return f"{call['us']['1 us']:.1f} ({call['us']['1 us + 10 ns a copy']:.1f})"


def _over_bound(call: dict[str, Any]) -> str:
    """Issue over what the matrix units or HBM take, and microseconds at 1 us of latency."""
    bound = max(call["mxu_cycles"], call["hbm_cycles"])
    return f"{call['cycles'] / bound:.2f}, {call['us']['1 us']:.0f} us"


def _microseconds(report: dict[str, Any]) -> str:
    """Times of this library's calls on one chip, under each model of memory."""
    calls = [c for c in report["calls"] if c["topology"] == "v6e:2x2"]
    cells = [["case", "kernel", "HBM us", *calls[0]["us"], "no issue in", "copies x KiB"]]
    for c in calls:
        if not c["kernel"].startswith("jax"):
            hbm = f"{c['hbm_cycles'] / c['clock_hz'] * 1e6:.1f}"
            size = f"{c['copies']} x {c['copied_bytes'] / c['copies'] / 1024:.3g}"
            us = (f"{us:.1f}" for us in c["us"].values())
            cells.append(
                [c["case"], c["kernel"], hbm, *us, f"{c['empty'] / c['cycles']:.0%}", size]
            )
    return _table(cells)


def _step(report: dict[str, Any]) -> str:
    """What stands around the kernels in a layer, by who made it: ops / us."""
    steps = report["steps"]
    makers = sorted({op["maker"] for step in steps for op in step["ops"] if op["in_layers"]})
    cells = [["made by", *(f"{s['topology'].partition(':')[0]}: ops, us" for s in steps)]]
    for maker in makers:
        found = [[o for o in s["ops"] if o["in_layers"] and o["maker"] == maker] for s in steps]
        cells.append([maker, *(_ops(ops) for ops in found)])
    ours = [[o for o in s["ops"] if o["in_layers"] and _is_ours(o)] for s in steps]
    equal = [[op for op in ops if op["is_equal"]] for ops in ours]
    cells += [["**attention's**", *map(_ops, ours)], ["equal in all layers", *map(_ops, equal)]]
    for number, (name, *_) in enumerate(steps[0]["kernels"]):
        us = (f"{s['kernels'][number][1]:.1f} / {s['kernels'][number][2]:.1f} us" for s in steps)
        cells.append([f"{name}, issue only / 1 us", *us])
    return f"{_table(cells)}\n\n({steps[0]['title']}.)"


def _is_ours(op: dict[str, Any]) -> bool:
    return op["maker"].startswith(("write", "attend"))


def _ops(ops: list[dict[str, Any]]) -> str:
    return f"{sum(op['times'] for op in ops)}, {sum(op['times'] * op['us'] for op in ops):.1f}"


def _estimates(report: dict[str, Any]) -> str:
    """The fusions of a step that libtpu thinks take longest: its estimate, and as executed."""
    cells = [["chip", "fusion", "made by", "libtpu, us", "executed, us at 1 us latency", "ratio"]]
    for step in report["steps"]:
        clock_hz = Core.of(step["device_kind"]).clock_hz
        ops = [op for op in step["ops"] if op["estimated_cycles"] and op["cycles"]]
        for op in sorted(ops, key=lambda op: -op["estimated_cycles"])[:_LARGEST]:
            us = op["estimated_cycles"] / clock_hz * 1e6
            chip = step["topology"].partition(":")[0]
            figures = f"{us:.1f}", f"{op['us']:.1f}", f"{op['us'] / us:.2f}"
            cells.append([chip, f"`{op['name']}`", op["maker"], *figures])
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


# The report and the table that it becomes, by the name in a document.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu_decode": ("cpu_decode", _with_source(_decode)),
    "cpu_quantised": ("cpu_quantised", _with_source(_quantised)),
    "kv_quality": ("kv_quality", _quality),
    "kv_scales": ("kv_quality", _scales),
    "cpu_steps": ("cpu_steps", _with_source(_steps)),
    "gpu_decode": ("gpu_decode", _with_source(_decode)),
    "gpu_decode_h200": ("gpu_decode_h200", _with_source(_decode)),
    "gpu_steps_h200": ("gpu_steps_h200", _with_source(_gpu_steps)),
    "gpu_prompts_h200": ("gpu_prompts_h200", _with_source(_gpu_steps)),
    "gpu_plan_h200": ("gpu_plan_h200", _made_once),
    "gpu_steps_before_after": ("gpu_steps_before_after", _before_after),
    "gpu_quantised_h200": ("gpu_quantised_h200", _with_source(_quantised)),
    "gpu_sharded": ("gpu_sharded", _with_source(_sharded)),
    "tpu_ratios": ("tpu_schedule", _ratios),
    "tpu_us": ("tpu_schedule", _microseconds),
    "tpu_two_cores": ("tpu_two_cores", _two_cores),
    "tpu_prompts": ("tpu_prompts", _beside(_over_bound)),
    "tpu_token_major": ("tpu_token_major", _beside(_over_bound)),
    "tpu_token_major_steps": ("tpu_token_major_steps", _beside(_over_bound)),
    "tpu_token_major_write": ("tpu_token_major_write", _beside(_of_small_copies)),
    "tpu_quantised": ("tpu_quantised", _quantised_calls),
    "tpu_quantised_writes": ("tpu_quantised", _quantised_writes),
    "tpu_step": ("tpu_step", _step),
    "tpu_estimates": ("tpu_step", _estimates),
}
DOCUMENTS = (FOLDER / "RESULTS.md", FOLDER.parent / "schedule" / "README.md")


def generated(text: str) -> str:
    """The text of a document with every table made anew from its report."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        report, make = TABLES[name]
        return f"<!-- figures: {name} -->\n{make(load(report))}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def draw_all() -> None:
    """A picture beside each report."""
    calls = [Executed.from_json(call) for call in load("tpu_schedule")["calls"]]
    ours = [call for call in calls if call.kernel == "decode"]
    draw_calls(ours, FOLDER / "results/tpu_schedule.png")
    for name in MEASURED:
        report = load(name)
        title = f"{report['num_devices']} x {report['device']}, jax {report['versions']['jax']}"
        path = FOLDER / f"results/{name}.png"
        draw([Row.from_json(row) for row in report["rows"]], title, path)


if __name__ == "__main__":
    draw_all()
    for path in DOCUMENTS:
        path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
