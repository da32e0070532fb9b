"""Compiles cases for a chip with the compiler's schedule written out, and reads it.

The compiler is told where to write when libtpu loads, once per process: `measure` starts a process
for each chip, which this file is the program of.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import meshes

from .bundles import block_loop, read_dump
from .cases import CASES, KERNELS, Case, Kernel, Program, limit, lower, program


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one compiled kernel says.

    Attributes:
      topology: what it was compiled for; device_kind: as JAX calls that.
      case: name of the shapes; kernel: "fused", "separate" or "stock".
      block_pages: pages of a block; block_bytes: keys and values of one.
      issue_cycles: bundles of the loop over blocks.
      hbm_cycles: cycles in which HBM delivers a block's bytes.
      per_sequence: bundles of the loop over sequences that are not in the loop over blocks.
      per_call: bundles of the kernel that are in neither.
      around: bundles of the program's other kernels.
      copies: DMAs per block; copy_bytes: bytes of each.
      bytes_in_flight: on their way while a block is worked on.
      bytes_needed: to cover 2 us of latency at the chip's bandwidth.
      temp_bytes: scratch of the whole program in HBM.
      compile_s: seconds.
      limit: the most that `ratio` should be, None for no target.
    """

    topology: str
    device_kind: str
    case: str
    kernel: str
    block_pages: int
    block_bytes: int
    issue_cycles: int
    hbm_cycles: float
    per_sequence: int
    per_call: int
    around: int
    copies: int
    copy_bytes: int
    bytes_in_flight: int
    bytes_needed: int
    temp_bytes: int
    compile_s: float
    limit: float | None

    @property
    def ratio(self) -> float:
        """Of the plain block loop alone, without stalls: a whole call takes more."""
        return self.issue_cycles / self.hbm_cycles

    @property
    def within_limit(self) -> bool:
        """Whether the ratio, to two digits, is no more than its limit."""
        return self.limit is None or round(self.ratio, 2) <= self.limit


def measure(
    topology: str, cases: Sequence[str] = (), kernels: Sequence[str] = ()
) -> list[Measured]:
    """Compiles cases (all, if none are named) for a chip, in a process of its own.

    Raises:
      RuntimeError: with what the compiler said, if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="shardpage_schedule_") as folder:
        out = pathlib.Path(folder) / "measured.json"
        dump = pathlib.Path(folder) / "dump"
        dump.mkdir()
        environment = os.environ | dumping_to(dump)
        command = [sys.executable, "-m", __name__, topology, str(dump), str(out)]
        command += ["--cases", *cases] if cases else []
        command += ["--kernels", *kernels] if kernels else []
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            last = "\n".join(run.stderr.strip().splitlines()[-15:])
            raise RuntimeError(f"compiling for {topology} failed:\n{last}")
        return [Measured(**row) for row in json.loads(out.read_text())]


def dumping_to(folder: pathlib.Path) -> dict[str, str]:
    """What the environment of a process must say before libtpu loads, for schedules in a folder."""
    # Of some 60 passes only the last is read; writing all out takes four times as long.
    only = "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {only}"
    return {
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
    }


def _measure_here(topology: str, dump: pathlib.Path, cases, kernels) -> list[Measured]:
    """Every chosen case with every chosen kernel that has its shape."""
    device = meshes.topology(topology).devices.flat[0]
    chosen = (
        _measure_one(topology, device, case, kernel, dump)
        for case in CASES
        for kernel in KERNELS
        if (not cases or case.name in cases) and (not kernels or kernel in kernels)
    )
    return [row for row in chosen if row is not None]


def _measure_one(
    topology: str, device: Any, case: Case, kernel: Kernel, dump: pathlib.Path
) -> Measured | None:
    """One kernel for one device; None if it is JAX's and does not have the shape."""
    for path in dump.iterdir():
        path.unlink()
    started = time.monotonic()
    try:
        compiled, sizes = _compile(case, kernel, device)
    except ValueError:
        if kernel == "stock":
            return None
        raise
    elapsed = time.monotonic() - started
    trees = list(read_dump(dump).values())
    tree = max(trees, key=lambda tree: tree.count("matmul"))
    loop, sequences = block_loop(tree)
    clock_hz, bytes_per_s = core_rates(device.device_kind)
    return Measured(
        topology=topology,
        device_kind=device.device_kind,
        case=case.name,
        kernel=kernel,
        block_pages=sizes.block_pages,
        block_bytes=sizes.block_bytes,
        issue_cycles=loop.bundles,
        hbm_cycles=sizes.block_bytes / bytes_per_s * clock_hz,
        per_sequence=sequences.bundles - loop.bundles,
        per_call=tree.bundles - sequences.bundles,
        around=sum(tree.bundles for tree in trees) - tree.bundles,
        copies=sizes.copies * sizes.block_pages,
        copy_bytes=sizes.copy_bytes,
        bytes_in_flight=(sizes.ring_blocks - 1) * sizes.block_bytes,
        bytes_needed=int(2e-6 * bytes_per_s),
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        compile_s=round(elapsed, 2),
        limit=limit(case, kernel, newest=device.device_kind == "TPU7x"),
    )


def _compile(case: Case, kernel: Kernel, device: Any) -> tuple[Any, Program]:
    """A case compiled for one device, and the sizes that its kernel has there."""
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return lower(case, kernel, mesh).compile(), program(case, kernel)


def core_rates(device_kind: str) -> tuple[float, float]:
    """Clock in Hz and HBM bytes/s of one TensorCore.

    The clock follows from the peak rate: 4 MXUs per core, each 128 or (from v6e on) 256 square, and
    2 flops per place and cycle.
    """
    chip = meshes.Chip.of_kind(device_kind)
    assert chip is not None
    side = 256 if device_kind in ("TPU v6 lite", "TPU7x") else 128
    clock_hz = chip.bf16_tflops * 1e12 / (2 * 4 * side**2 * chip.cores)
    return clock_hz, chip.hbm_gbps * 1e9 / chip.cores


def to_json(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """With the ratio, for other programs."""
    return [dataclasses.asdict(row) | {"ratio": round(row.ratio, 4)} for row in rows]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("dump", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--kernels", nargs="*", default=[])
    args = parser.parse_args()
    rows = _measure_here(args.topology, args.dump, args.cases, args.kernels)
    args.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    _main()
