"""Compiles this library's kernels for every chip in many shapes: do all its defaults compile?"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from shardpage import PagedKVCache, Tuning, make_plan, page_attention, write_kv
from shardpage import attend as attend_step

from ..json_file import read_json, write_json
from . import worker

_CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
_TWO_CORES = ("v4", "v5p")
_AXES: dict[str, tuple[Any, ...]] = {
    "topology": _CHIPS,
    "op": ("decode",) * 4 + ("write", "step"),
    "kv_heads": (1, 1, 2, 4, 8, 16, 32, 64, 128),
    "queries": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32),
    "head_dim": (32, 64, 64, 80, 96, 128, 128, 128, 192, 256),
    "page_size": (8, 16, 32, 64, 128, 256, 512),
    "num_seqs": (1, 2, 7, 16, 64, 100, 256, 512, 1024),
    "context": (100, 512, 4096, 4096, 8192, 32768, 131072, 1 << 20),
    "cores": (None, None, "off", "batch", "kv_head"),
    "num_splits": (0, 0, 0, 1, 4, 16),
    "window": (None, None, 128, 1024, 4096),
    "dtype": ("bfloat16",) * 4 + ("float32",),
    "kv_layout": (None, None, "fused", "blocks_first", "heads_first"),
    "tokens": (8, 64, 300, 1024, 8192),
}
_MOST_HEADS = 128
# A shape's table and cache are what a device could hold.
_MOST_ENTRIES, _MOST_CACHE_BYTES = 1 << 26, 4 << 30
COMPILED, REFUSED, FAILED = "compiled", "refused", "failed"
_SAVED_EVERY = 5


@dataclasses.dataclass(frozen=True)
class GridCase:
    """A shape on a chip, with the library's choice for all that it does not name."""

    topology: str
    op: str
    kv_heads: int
    queries: int
    head_dim: int
    page_size: int
    num_seqs: int
    context: int
    cores: str | None
    num_splits: int
    window: int | None
    dtype: str
    kv_layout: str | None
    tokens: int | None  # of all queries of a step; None where each sequence has one

    @property
    def max_blocks(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the cache: of all sequences, or as many as a device holds."""
        item = 2 if self.dtype == "bfloat16" else 4
        page_bytes = 2 * self.kv_heads * self.page_size * max(self.head_dim, 128) * item
        return min(self.num_seqs * self.max_blocks, max(1, _MOST_CACHE_BYTES // page_bytes))

    @property
    def is_possible(self) -> bool:
        """Whether a device could hold it, and has the cores that it asks for."""
        has_cores = self.cores is None or self.topology.startswith(_TWO_CORES)
        fits = self.num_seqs * self.max_blocks <= _MOST_ENTRIES
        return has_cores and fits and self.kv_heads * self.queries <= _MOST_HEADS

    @property
    def name(self) -> str:
        values = (f"{key}={value}" for key, value in dataclasses.asdict(self).items())
        return " ".join(value for value in values if not value.endswith("=None"))


_ONCE_FAILED: tuple[GridCase, ...] = (
    # A page of 16 MiB, for which the compiler took more memory than there was.
    GridCase(
        "v5e:2x2", "decode", 128, 1, 64, 512, 2, 4096, None, 4, None, "bfloat16", "fused", None
    ),
    # Tiles of 64 KV heads, of which a ring of 16 did not fit.
    GridCase(
        "v4:2x2x1", "write", 64, 2, 96, 64, 100, 32768, "batch", 0, 1024, "bfloat16", None, None
    ),
)


def grid(count: int) -> list[GridCase]:
    """The first `count` cases of a fixed sequence; each chip has as many as the others."""
    drawn, rng = dict.fromkeys(_ONCE_FAILED), random.Random(0)
    while len(drawn) < count:
        values = {axis: rng.choice(choices) for axis, choices in _AXES.items()}
        cases_of = collections.Counter(case.topology for case in drawn)
        values["topology"] = min(_CHIPS, key=lambda chip: cases_of[chip])
        case = GridCase(**values)
        if case.op != "step":
            case = dataclasses.replace(case, tokens=None)
        if case.is_possible:
            drawn[case] = None
    return list(drawn)


class Result(NamedTuple):
    """What came of a case."""

    outcome: str
    why: str = ""
    program: str | None = None  # a digest of what the compiler was given


def compile_case(case: GridCase, before: Result | None = None) -> Result:
    """Compiles a case, in the worker; `before` is what is known of its program of then."""
    jax.config.update("jax_traceback_in_locations_limit", 0)  # lines are no part of a program
    mesh = worker.one_device(case.topology)
    described = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, jax.P())
    )
    cache_shape = case.num_pages, case.kv_heads, case.page_size, case.head_dim
    num_seqs, heads = case.num_seqs, case.kv_heads * case.queries
    lens = described((num_seqs,), "int32")
    tables = described((num_seqs, case.max_blocks), "int32")

    def attend(cache, query, lens, tables):
        return page_attention(
            query, cache.key, cache.value, lens, tables, num_splits=case.num_splits,
            megacore_mode=case.cores, sliding_window=case.window, kv_layout=cache.kv_layout,
            mesh=mesh,
        )  # fmt: skip

    def write(cache, new, seq_ids, tables):
        return write_kv(cache, new, new, seq_ids, seq_ids, tables, mesh=mesh)

    def step(cache, query, lens, tables):
        tuning = Tuning(num_splits=case.num_splits, cores=case.cores)
        plan = make_plan(
            cache, lens, tables, query_lens=lens, num_queries=case.tokens, window=case.window,
            num_heads=heads, mesh=mesh, tuning=tuning,
        )  # fmt: skip
        return attend_step(query, cache, plan)

    function, num_queries, num_heads = {
        "decode": (attend, num_seqs, heads),
        "write": (write, num_seqs, case.kv_heads),
        "step": (step, case.tokens, heads),
    }[case.op]
    try:
        cache = PagedKVCache.abstract(
            *cache_shape, dtype=case.dtype, kv_layout=case.kv_layout, mesh=mesh
        )
        new = described((num_queries, num_heads, case.head_dim), case.dtype)
        donated = jax.jit(function, donate_argnums=0 if case.op == "write" else ())
        lowered = donated.lower(cache, new, lens, tables)
    except (ValueError, NotImplementedError) as error:
        return Result(REFUSED, f"{type(error).__name__}: {error}".partition("\n")[0])
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    if before is not None and before.program == program:
        return before
    try:
        lowered.compile()
    except Exception as error:  # whatever the compiler says is what is asked for
        return Result(FAILED, f"{error}".partition("\n")[0], program)
    return Result(COMPILED, program=program)


def run(count: int, path: pathlib.Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles the grid, and keeps its report in `path`.

    A program that is in the report of the same compiler already is not compiled again: so a run
    that was stopped goes on, and one after a change takes as long as what the change touches.
    """
    compiler = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    before: dict[str, list[Any]] = {}
    if path is not None and path.is_file():
        report = read_json(path)
        before = report["results"] if report.get("compiler") == compiler else {}
    cases, results = grid(count), {}
    for number, case in enumerate(cases):
        say(f"{number + 1} of {count}: {case.name}")
        known = before.get(case.name)
        results[case.name] = list(_result(case, known and Result(*known)))
        if path is not None and (number % _SAVED_EVERY == 0 or number + 1 == count):
            write_json(path, {"compiler": compiler, "results": before | results})
    return {"compiler": compiler, "results": results}


def _result(case: GridCase, before: Result | None) -> Result:
    try:
        return worker.call(compile_case, case, before, dumping=False)
    except RuntimeError as error:
        return Result(FAILED, str(error))


def table(report: dict[str, Any]) -> str:
    """How many compiled on each chip, what was refused and why, and every failure."""
    results = {name: Result(*result) for name, result in report["results"].items()}
    lines = ["", f"{'chip':<14}{COMPILED:>10}{REFUSED:>10}{FAILED:>10}"]
    for chip in _CHIPS:
        outcomes = collections.Counter(
            result.outcome for name, result in results.items() if f"topology={chip} " in name
        )
        lines.append(
            f"{chip:<14}" + "".join(f"{outcomes[o]:>10}" for o in (COMPILED, REFUSED, FAILED))
        )
    refused = collections.Counter(
        _kind(result.why) for result in results.values() if result.outcome == REFUSED
    )
    lines += [f"refused {count} of {len(results)}: {why}" for why, count in refused.most_common()]
    failures = (
        f"FAILED {name}: {result.why}"
        for name, result in results.items()
        if result.outcome == FAILED
    )
    return "\n".join([*lines, *failures])


def _kind(why: str) -> str:
    """An error without its numbers, so that equal ones count together."""
    words: Sequence[str] = "".join("#" if c.isdigit() else c for c in why).split()
    return " ".join(words)[:160]
