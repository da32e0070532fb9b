"""Draws hostile calls, and says how many came out right.

    python -m tests.fuzz                                 2000 calls of the xla backend
    python -m tests.fuzz --calls 50 --backend pallas_tpu --seed 7
    python -m tests.fuzz --mesh data=2,context=2         on simulated devices

A call is right if each of its sequences has the oracle's numbers, or NaN where it is invalid or
reads what is not finite; or if it is refused in words, which must be so for options that float32 or
int32 cannot hold. A finite number that is wrong, a NaN elsewhere, any other exception: these are
printed with the seed that draws them again.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

import numpy as np

from shardpage.shard_layout import ShardCounts, ShardLayout

from . import reference
from .cases import KV_LAYOUTS, Case, Inputs, make

# Few shapes, so that most calls run a program that is compiled already: values are what is hostile.
SHAPES = (
    Case("fuzz", num_seqs=4, num_heads=4, num_kv_heads=2, head_dim=16, page_size=8, max_blocks=5),
    Case("fuzz_odd", num_seqs=4, num_heads=6, num_kv_heads=2, head_dim=24, page_size=8),
    Case("fuzz_mqa", num_seqs=4, num_heads=5, num_kv_heads=1, head_dim=32, page_size=16),
    Case("fuzz_bf16", num_seqs=4, num_heads=4, num_kv_heads=4, head_dim=64, dtype="bfloat16"),
)
OPTIONS = (
    {},
    {"sliding_window": 1},
    {"sliding_window": 13, "pages_per_compute_block": 2},
    {"sliding_window": 2**31 - 1, "num_splits": 3},
    {"attn_scale": 0.0},
    {"attn_scale": -1.5, "attn_logits_soft_cap": 2.0},
    {"attn_logits_soft_cap": 2.0**126, "sinks": True},
    {"attn_logits_soft_cap": 1e-3, "max_context_len": 29},
    {"sinks": True, "num_splits": 2**31 - 1},
    {"pages_per_compute_block": 1, "max_context_len": 2**31 - 1},
)
IMPOSSIBLE = (
    {"sliding_window": 2**31},
    {"attn_scale": 1e39},
    {"attn_scale": 1e-320},
    {"attn_logits_soft_cap": 3e38},
    {"max_context_len": 2**63},
    {"num_splits": 2**31},
)
LAYOUTS = (*KV_LAYOUTS, "interleaved_words")
ONE_DEVICE = ShardCounts()
NOT_FINITE = (np.nan, np.inf, -np.inf)


@dataclasses.dataclass
class Drawn:
    """A call, and what may come of it."""

    inputs: Inputs
    broken: np.ndarray  # [num_seqs, num_heads]: reads what is not finite
    impossible: dict


def draw(seed: int, shards: ShardCounts = ONE_DEVICE) -> Drawn:
    """The call of a seed, for a mesh that splits into this many shards."""
    rng = np.random.default_rng(seed)
    shapes = [case for case in SHAPES if case.num_kv_heads % shards.heads == 0]
    case = shapes[rng.integers(len(shapes))].replace(**OPTIONS[rng.integers(len(OPTIONS))])
    kv_layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    if kv_layout == "interleaved_words":
        case = case.replace(head_dim=64)  # key and value fill a row
    inputs = make(
        case,
        kv_layout,
        seed % 16,
        num_seq_shards=shards.seqs,
        num_context_shards=shards.context,
    )
    inputs = dataclasses.replace(
        inputs, context_lens=inputs.context_lens.copy(), block_tables=inputs.block_tables.copy()
    )
    broken = np.zeros((case.num_seqs, case.num_heads), bool)
    for _ in range(rng.integers(3)):
        HOSTILE[rng.integers(len(HOSTILE))](rng, inputs, broken)
    impossible = IMPOSSIBLE[rng.integers(len(IMPOSSIBLE))] if rng.random() < 0.05 else {}
    return Drawn(inputs, broken, impossible)


def _length(rng, inputs: Inputs, broken) -> None:
    """A length that no table holds."""
    del broken
    full = inputs.case.max_blocks * inputs.case.page_size
    bad = (-1, full + 1, 2**31 - 1, -(2**31))
    inputs.context_lens[rng.integers(inputs.case.num_seqs)] = bad[rng.integers(len(bad))]


def _page(rng, inputs: Inputs, broken) -> None:
    """A page id that is none, where it may or may not be looked up."""
    del broken
    seq, block = rng.integers(inputs.case.num_seqs), rng.integers(inputs.case.max_blocks)
    bad = (-1, inputs.num_pages, 2**31 - 1, -(2**31))
    inputs.block_tables[seq, block] = bad[rng.integers(len(bad))]


def _token(rng, inputs: Inputs, broken) -> None:
    """One element of one key or value that is not finite, in a page that is read."""
    case, seq = inputs.case, rng.integers(inputs.case.num_seqs)
    length = int(inputs.context_lens[seq])
    if not 0 < length <= case.max_blocks * case.page_size:
        return
    # Of pages before the window the table holds garbage, which may be another sequence's page.
    first = max(length - (case.sliding_window or length), 0) // case.page_size * case.page_size
    position, head = int(rng.integers(first, length)), int(rng.integers(case.num_kv_heads))
    page, slot = inputs.block_tables[seq, position // case.page_size], position % case.page_size
    if not 0 <= page < inputs.num_pages:
        return
    for name, index in _element(rng, inputs, int(page), head, slot):
        changed = getattr(inputs, name).copy()
        changed[index] = NOT_FINITE[rng.integers(3)]
        setattr(inputs, name, changed)
    if position >= length - (case.sliding_window or length):
        group = case.num_heads // case.num_kv_heads
        broken[seq, head * group : (head + 1) * group] = True


def _element(rng, inputs: Inputs, page: int, head: int, slot: int) -> Iterator[tuple]:
    dim, which = int(rng.integers(inputs.case.head_dim)), int(rng.integers(2))
    match inputs.kv_layout:
        case "fused":
            yield "key_cache", (page, which, head, slot, dim)
        case "heads_first":
            yield ("key_cache", "value_cache")[which], (head, page, slot, dim)
        case "interleaved_words":
            word = divmod(head, inputs.key_cache.shape[3])
            yield "key_cache", (page, slot, *word, which * inputs.case.head_dim + dim)
        case _:
            yield ("key_cache", "value_cache")[which], (page, head, slot, dim)


def _query(rng, inputs: Inputs, broken) -> None:
    """One element of a query that is not finite."""
    seq, head = rng.integers(inputs.case.num_seqs), rng.integers(inputs.case.num_heads)
    inputs.query = inputs.query.copy()
    inputs.query[seq, head, rng.integers(inputs.case.head_dim)] = NOT_FINITE[rng.integers(3)]
    broken[seq, head] |= inputs.context_lens[seq] > 0


def _sink(rng, inputs: Inputs, broken) -> None:
    """A sink of -inf is none; NaN and inf are seen by all sequences."""
    if inputs.sinks is not None:
        head, value = rng.integers(inputs.case.num_heads), NOT_FINITE[rng.integers(3)]
        inputs.sinks = inputs.sinks.copy()
        inputs.sinks[head] = value
        broken[:, head] |= value != -np.inf


HOSTILE = (_length, _page, _token, _token, _query, _sink)


def complaint(drawn: Drawn, out: np.ndarray, lse: np.ndarray) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    inputs, finite = drawn.inputs, dataclasses.replace(drawn.inputs)
    for name in ("query", "key_cache", "value_cache", "sinks"):
        array = getattr(inputs, name)
        if array is not None and name != "sinks":
            array = np.where(np.isfinite(array.astype(np.float32)), array, 0)
        setattr(finite, name, array)
    with np.errstate(all="ignore"):
        exact = reference.page_attention(
            *finite.arrays,
            kv_layout=inputs.kv_layout,
            sinks=inputs.sinks,
            num_seq_shards=inputs.num_seq_shards,
            **inputs.case.reference_options,
        )
    # Rounding in bfloat16: the weights' 2**-8, against values of a few units.
    rounding = 0.06 if inputs.case.dtype == "bfloat16" else 1e-4
    for what, actual, expected in (("out", out, exact[0]), ("lse", lse, exact[1])):
        expected = expected.copy()
        expected[drawn.broken] = np.nan
        actual = actual.astype(np.float64)
        same = np.isclose(actual, expected, rtol=rounding, atol=rounding, equal_nan=True)
        if not same.all():
            at = tuple(int(i) for i in np.argwhere(~same)[0])
            return f"{what}{list(at)} is {actual[at]:.6g}, not {expected[at]:.6g}"
    return None


def check(seed: int, attend, *, backend: str = "xla", mesh=None) -> str | None:
    """Runs the call of a seed with `attend`; what is wrong with it, or None."""
    drawn = draw(seed, ShardLayout.of(mesh).shards(mesh) if mesh else ONE_DEVICE)
    try:
        out, lse = attend(drawn.inputs, backend, mesh=mesh, **drawn.impossible)
    except (ValueError, NotImplementedError) as error:
        refused = next(iter(drawn.impossible), "")
        named = bool(drawn.impossible) and refused in str(error)
        return None if named else f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if drawn.impossible:
        return f"took {drawn.impossible}"
    return complaint(drawn, out, lse)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--backend", default="xla")
    parser.add_argument("--mesh", help="for instance data=2,context=2")
    options = parser.parse_args()
    os.environ.setdefault("NPROC", "20")
    from . import backends, cases  # after the devices are there

    mesh = cases.build_mesh(options.mesh) if options.mesh else None
    done = right = 0
    try:
        for seed in range(options.seed, options.seed + options.calls):
            wrong = check(seed, backends.attend, backend=options.backend, mesh=mesh)
            done, right = done + 1, right + (wrong is None)
            if wrong:
                print(f"seed {seed}: {wrong}", flush=True)
    except KeyboardInterrupt:  # what was seen until then counts
        print(f"interrupted after {done} of {options.calls} calls")
    print(f"{right} of {done} right")
    return 0 if right == done else 1


if __name__ == "__main__":
    import chex

    chex.set_n_cpu_devices(8)
    sys.exit(main())
