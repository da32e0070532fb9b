"""What `test_schedule.py` has the compiling process do, and a Pallas kernel of a user's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from launch.bench.shapes import Shape
from launch.schedule import bundles, cases, worker
from launch.schedule.execute import compile_kernels

_SCALAR = re.compile(r"%([sp]\d+)_([sp]\d+)")
# Short sequences, in a cache that is too large for XLA to keep it on the chip.
SMALL = Shape("64 of 1..512", 64, 16384, (1, 512), num_heads=8, num_kv_heads=1, page_size=16)


def pages_fetched(topology: str) -> tuple[list[int], list[int]]:
    """Page ids of the copies of the decode kernel, and those that the sequences have; sorted."""
    mesh = worker.one_device(topology)
    subject = cases.subject("decode", SMALL, mesh, "off")
    kernels = compile_kernels(subject, mesh, worker.dump())
    ((run,),) = kernels.run(subject.arguments)
    (program,) = kernels.programs
    # The cache is the array of five axes.
    (cache,) = [o.index for o in program.operands.values() if o.shape.count(",") == 4]
    page = SMALL.page_size * SMALL.token_bytes // program.core.granule
    addresses = [e.place[1] for e in run.events if e.place is not None and e.place[0] == cache]
    assert not any(address % page for address in addresses)
    pages = -(-SMALL.context_lens // SMALL.page_size)
    needed = [table[:n] for table, n in zip(cases.tables(SMALL), pages, strict=True)]
    return sorted(a // page for a in addresses), sorted(np.concatenate(needed).tolist())


def stale_reads_of(topology: str, kernel: str) -> list[str]:
    """Those in the program of a kernel and in what XLA puts around it."""
    mesh = worker.one_device(topology)
    compile_kernels(cases.subject(kernel, SMALL, mesh, "off"), mesh, worker.dump())
    texts = (path.read_text(errors="replace") for path in bundles.dumps(worker.dump()).values())
    return [line for text in texts for line in stale_reads(text)]


def stale_reads(text: str) -> list[str]:
    """Bundles that read what a register held before the last write to it, some cycles ago.

    A core with loads under way could make use of such values; the executor, which writes at once,
    would be wrong. The compiler numbers values, so they show.
    """
    found = []
    written: dict[str, list[tuple[int, str]]] = {}
    for index, bundle in enumerate(re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).split("\n")):
        ops = [op.partition(" = ") for op in bundle.split(";;") if " = sphi " not in op]
        for value, register in _SCALAR.findall(" ".join(read for _, _, read in ops)):
            match written.get(register, [])[-2:]:
                case [(_, old), (last, new)] if old == value != new and index - last <= 8:
                    found.append(bundle.strip())
        for target, _, _ in ops:
            for value, register in _SCALAR.findall(target):
                written.setdefault(register, []).append((index, value))
    return found


def copy_kernel(count_ref, source_ref, out_ref, buffer, semaphore):
    """Adds up as many blocks as it is told."""
    out_ref[...] = jnp.zeros_like(out_ref)

    def add(index, carry):
        copy = pltpu.make_async_copy(source_ref.at[index], buffer, semaphore)
        copy.start()
        copy.wait()
        out_ref[...] += buffer[...]
        return carry

    jax.lax.fori_loop(0, count_ref[0], add, 0)


def subject():
    """A kernel of a user's: 7 copies of 4 MiB in all, one after the other."""

    def add_up(count, source):
        return pl.pallas_call(
            copy_kernel,
            out_shape=jax.ShapeDtypeStruct((1024, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((1024, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(count, source)

    source = jax.ShapeDtypeStruct((1024, 1024, 128), jnp.float32)
    return add_up, (np.array([7], np.int32), source)
