"""A program for the tests of `launch`: sums over all processes step by step, and at step 3 fails.

    python misbehave.py RANK FAULT

Rank 0 prints a line each step; the rank that is named does as the fault says.
"""

import os
import signal
import sys
import time

from launch import bootstrap, guard

NUM_STEPS, FAULTY_STEP = 5, 3


def kill():
    time.sleep(0.3)  # the others are in the collective by then
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def sleep():
    time.sleep(1000)


def fail():
    raise ValueError("no such page")


def leave():
    sys.exit(3)


FAULTS = {f.__name__: f for f in (kill, stop, term, sleep, fail, leave)}


def main(faulty_rank: int, fault: str) -> None:
    if fault == "missing" and os.environ["SHARDPAGE_PROCESS_ID"] == str(faulty_rank):
        time.sleep(1000)
    if fault == "absent" and os.environ["SHARDPAGE_PROCESS_ID"] == str(faulty_rank):
        return
    processes = bootstrap.initialize()
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import meshes

    mesh = meshes.make("data=-1", processes.devices())
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    ones = jax.jit(lambda: jax.numpy.ones(mesh.size), out_shardings=split)()
    add = jax.jit(lambda x: x.sum(), out_shardings=whole)
    faulty = processes.rank == faulty_rank
    if fault == "barrier":
        if faulty:
            time.sleep(1000)
        guard.barrier("here", 1.0)
    for step in range(NUM_STEPS):
        guard.step()
        if faulty and step == FAULTY_STEP and fault in FAULTS:
            FAULTS[fault]()
        print(f"step {step} sum {float(add(ones))}")
        if processes.is_main:
            sys.stdout.flush()
    guard.disarm()
    if faulty and fault == "late":
        raise ValueError("after the last collective")
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
