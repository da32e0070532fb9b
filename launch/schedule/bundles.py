"""Reads the compiler's schedule of a TPU kernel: loops, and how many bundles each has.

A TensorCore issues one bundle of instructions a cycle. libtpu writes the final bundles of every
kernel as text, one per line, with the depth of the loop that it is in:

    0x2c LB: >> { %113 = dma.hbm_to_vmem ...  ;;  ... }

`LB` begins a loop body, `>>` says that it is two loops deep. Bundles count once however often
they run, on both sides of a branch, and stalls are not in them: a bound from below on time.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Self

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)$")
_OPERATIONS = {
    "dma_in": re.compile(r"= dma\.hbm_to_vmem"),
    "dma_out": re.compile(r"= dma\.vmem_to_hbm"),
    "matmul": re.compile(r"= vmatmul"),
}
# Kernels that libtpu adds to every program; they are not looked into.
_INTERNAL = ("<", "TLP")


@dataclasses.dataclass
class Loop:
    """A loop, or at depth 0 the kernel.

    Attributes:
      address: of its first bundle, as the compiler writes it.
      depth: loops around it, itself included.
      own: bundles of its own, not those of the loops inside.
      operations: how many of each kind its own bundles hold.
      children: the loops inside, in order.
    """

    address: str
    depth: int
    own: int = 0
    operations: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    children: list[Self] = dataclasses.field(default_factory=list)

    @property
    def bundles(self) -> int:
        """Its own and those of the loops inside."""
        return self.own + sum(child.bundles for child in self.children)

    def count(self, operation: str) -> int:
        """How often an operation stands in it or in the loops inside."""
        return self.operations[operation] + sum(child.count(operation) for child in self.children)

    def walk(self) -> Iterator[Self]:
        yield self
        for child in self.children:
            yield from child.walk()


def parse(text: str) -> Loop:
    """Reads the text of a final_bundles dump into a tree of loops.

    Raises:
      ValueError: if there is no bundle in it: the compiler's format has changed.
    """
    kernel = current = Loop("kernel", 0)
    opened = [kernel]  # the loop opened last, at each depth
    for line in text.splitlines():
        if (match := _BUNDLE.match(line)) is not None:
            address, tag, arrows, line = match.groups()
            if tag == "LB":
                loop = Loop(address, len(arrows))
                del opened[loop.depth :]
                opened[-1].children.append(loop)
                opened.append(loop)
            # A line of fewer arrows does not end a loop: more of its lines may follow.
            current = opened[min(len(arrows), len(opened) - 1)]
            current.own += 1
        for name, pattern in _OPERATIONS.items():
            current.operations[name] += len(pattern.findall(line))
    if not kernel.bundles:
        raise ValueError("no bundle found; this libtpu writes its schedule in another format")
    return kernel


def block_loop(kernel: Loop) -> tuple[Loop, Loop]:
    """The loop over blocks, and the outermost loop that it is in: that over sequences.

    The block loop is the innermost that both fetches pages and multiplies, itself or inside. A
    kernel whose blocks are grid steps has no such loop: all of it runs once per block.
    """
    block = sequences = kernel
    for outer in kernel.children:
        for loop in outer.walk():
            if loop.depth > block.depth and loop.count("dma_in") and loop.count("matmul"):
                block, sequences = loop, outer
    return block, sequences


def read_dump(folder: pathlib.Path) -> dict[str, Loop]:
    """The kernels of a program, by name, from the folder that the compiler wrote to."""
    kernels = {}
    for path in sorted(folder.glob("*final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        # 1795...-NAME-71-final_bundles.txt
        name = path.name.partition("-")[2].rsplit("-", 2)[0]
        if not name.startswith(_INTERNAL):
            kernels[name] = parse(path.read_text(errors="replace"))
    return kernels
