"""`python -m launch.bench.against_seed`: this library's CPU speed against the seed's, in one run.

The seed is ejkernel's XLA `page_attention`. It needs jax 0.10 and is no dependency of this project:

    pip install "jax==0.10.2" ejkernel==0.0.80.3 && pip install -e .

The two are called in turn in one process; figures are medians of seven, so that a noisy machine
troubles both alike. The copy roof is the time in which one process's NumPy copies as many bytes
as there are keys and values to read.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from shardpage import page_attention

RESULTS = Path(__file__).parent / "results" / "cpu_against_seed.json"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
WARM_UP, ROUNDS = 5, 7
# name, num_seqs, table width in tokens, context_lens, dtype, the ratio that was asked for
ROWS = (
    ("8 x 2048 f32", 8, 2048, None, jnp.float32, 3.0),
    ("8 x 10..900 in a table of 2048, f32", 8, 2048, (10, 900), jnp.float32, 5.0),
    ("1 x 32768 f32", 1, 32768, None, jnp.float32, 5.0),
    ("8 x 2048 bf16", 8, 2048, None, jnp.bfloat16, 2.0),
)


def main() -> None:
    """Measures, prints and keeps the table."""
    jax.config.update("jax_platforms", "cpu")
    try:
        from ejkernel.kernels._xla.page_attention._interface import (  # pyright: ignore
            page_attention as seed,
        )
    except ImportError as error:
        sys.exit(f"the seed is not installed ({error}); see this module's docstring")

    rows = [measure(seed, *row) for row in ROWS]
    report = {
        "command": "python -m launch.bench.against_seed",
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "ejkernel")},
        "commit": _commit(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'':38s} {'seed ms':>9s} {'ours ms':>9s} {'copy ms':>9s} {'ratio':>6s} {'asked':>6s}")
    for row in rows:
        print(
            f"{row['name']:38s} {row['seed_ms']:9.1f} {row['ours_ms']:9.1f} {row['copy_ms']:9.1f} "
            f"{row['ratio']:6.1f} {row['asked']:6.1f}"
        )
    print(f"kept in {RESULTS.name}")


def measure(seed: Callable, name, num_seqs, width, bounds, dtype, asked) -> dict:
    """One row: both implementations on the same arrays, in turn."""
    rng = np.random.default_rng(0)
    max_blocks = width // PAGE_SIZE
    num_pages = num_seqs * max_blocks
    shape = (num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
    lens = (
        np.full(num_seqs, width) if bounds is None else np.linspace(bounds[0], bounds[1], num_seqs)
    )
    keys, values = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(2))
    query = jnp.asarray(rng.standard_normal((num_seqs, NUM_HEADS, HEAD_DIM), np.float32), dtype)
    tables = jnp.asarray(rng.permutation(num_pages).reshape(num_seqs, max_blocks), jnp.int32)
    args = (query, keys, values, jnp.asarray(lens, jnp.int32), tables)

    ours = jax.jit(lambda *args: page_attention(*args, kv_layout="blocks_first"))
    theirs = jax.jit(seed)
    difference = jnp.abs(ours(*args).astype(jnp.float32) - theirs(*args).astype(jnp.float32)).max()
    assert difference < (2e-2 if dtype == jnp.bfloat16 else 1e-4), f"{name}: {difference=}"

    read = 2 * int(lens.astype(int).sum()) * NUM_KV_HEADS * HEAD_DIM * keys.dtype.itemsize
    source, target = np.ones(read, np.uint8), np.ones(read, np.uint8)
    calls = {
        "ours_ms": lambda: ours(*args).block_until_ready(),
        "seed_ms": lambda: theirs(*args).block_until_ready(),
        "copy_ms": lambda: np.copyto(target, source),
    }
    times = {name: [] for name in calls}
    for round_number in range(WARM_UP + ROUNDS):
        for which, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= WARM_UP:
                times[which].append(1e3 * (time.perf_counter() - start))
    medians = {which: round(float(np.median(ms)), 2) for which, ms in times.items()}
    ratio = float(np.median(np.array(times["seed_ms"]) / np.array(times["ours_ms"])))
    return {"name": name, **medians, "ratio": round(ratio, 2), "asked": asked, "kv_bytes": read}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
