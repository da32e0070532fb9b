"""A core that runs the scalar side of a kernel: how many cycles issue, and which copies start.

What a kernel issues does not depend on when its copies arrive, only on its scalars. So it runs
once, and leaves a record of copies, signals and waits, which `timing` replays with any memory.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .program import BASE_BITS, BASE_SHIFT, Exit, Operand, Program

_LANES = 128
_MOST_CYCLES = 200_000_000


@dataclasses.dataclass(frozen=True)
class Event:
    """What a core does to memory or a semaphore.

    Attributes:
      time: the cycle, if nothing is ever waited for.
      bundle: index of the bundle that does it.
      kind: "copy", "signal" (adds), "reset" (sets) or "wait".
      semaphore: which; amount: how much.
      path: of a copy: from where to where, e.g. "hbm_to_vmem".
      num_bytes: of a copy.
      place: of a copy: the operand in HBM and granules behind its start; None within the chip.
    """

    time: int
    bundle: int
    kind: str
    semaphore: int
    amount: int
    path: str = ""
    num_bytes: int = 0
    place: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What a core did.

    Attributes:
      cycles: in which something issued or a result was waited for; not what copies take.
      visits: how often each bundle was issued.
      events: in order.
      guessed: loads of scalars that the program did not write and nobody gave: taken as 0.
    """

    cycles: int
    visits: Sequence[int]
    events: Sequence[Event]
    guessed: int


class Machine:
    """One core. `operands`: the kernel's inputs in order, None for those that are no integers."""

    def __init__(self, program: Program, operands: Sequence[np.ndarray | None], core: int = 0):
        self.program, self.operands = program, operands
        self.granule = program.core.granule
        self.memory: dict[int, int] = {}
        self.events: list[Event] = []
        self.guessed = 0
        self.now, self.start = 0, 0
        names = "wrap", "load", "store", "copy", "fill", "wait", "signal", "reset"
        self.namespace: dict[str, Any] = {name: getattr(self, name) for name in names}
        self.namespace["core"] = core
        self.memory.update(dict.fromkeys(program.core_addresses, core))
        self.namespace["unsigned"] = lambda value: value if value >= 0 else value + 2**32
        self.pieces, self.exits = program.compile(self.namespace)
        self._inputs = {}
        for register, operand in program.operands.items():
            self._give(register, operand)

    def _give(self, register: str, operand: Operand) -> None:
        self._inputs[operand.base] = operand
        value = self._words(operand)
        self.namespace[register] = operand.base
        if operand.space == "value":
            self.namespace[register] = 0 if value is None else int(value[0])
        elif operand.space == "smem" and value is not None:
            self.memory.update(enumerate(map(int, value), operand.base))

    def _words(self, operand: Operand) -> np.ndarray | None:
        """An operand as it lies in memory: rows of several dimensions are padded to 128."""
        if operand.is_output or operand.index >= len(self.operands):
            return None
        value = self.operands[operand.index]
        if value is None:
            return None
        if value.ndim > 1:
            pad = [(0, 0)] * (value.ndim - 1) + [(0, -value.shape[-1] % _LANES)]
            value = np.pad(value, pad)
        return value.reshape(-1)

    # -- what the code of a program calls

    @staticmethod
    def wrap(value: int) -> int:
        """To 32 bits with a sign, unless it is an address."""
        if -(2**31) <= value < 2**31 or value >> BASE_SHIFT > 0:
            return value
        return (value + 2**31) % 2**32 - 2**31

    def load(self, address: int) -> int:
        value = self.memory.get(address)
        if value is None:
            self.guessed += address >> BASE_SHIFT not in self.program.dummies
            return 0
        return value

    def store(self, address: int, value: int) -> None:
        self.memory[address] = value

    def copy(self, time: int, path: str, size: int, address: int, semaphore: int) -> None:
        operand, offset = self._place(address)
        place = (operand.index, offset) if operand else None
        self._record(time, "copy", semaphore, size, path, place)

    def fill(self, time: int, source: int, size: int, target: int, semaphore: int) -> None:
        """A copy to scalar memory, the contents of which matter."""
        operand, offset = self._place(source)
        space = operand.space if operand else "vmem"
        self._record(time, "copy", semaphore, size, f"{space}_to_smem")
        words = self._words(operand) if operand else None
        if operand is None or words is None:
            return  # loads of it are guessed, and counted
        first = offset * self.granule // 4
        part = words[first : first + size * self.granule // 4]
        self.memory.update(enumerate(map(int, part), target))

    def _place(self, address: int) -> tuple[Operand | None, int]:
        """The operand that an address points into, and how many granules; None for scratch."""
        # Programs count in larger units before, and shift sums to granules in the end.
        shift = max(0, address.bit_length() - BASE_SHIFT - BASE_BITS)
        base = (address >> shift) >> BASE_SHIFT << BASE_SHIFT
        return self._inputs.get(base), address - (base << shift)

    def wait(self, time: int, semaphore: int, amount: int) -> None:
        self._record(time, "wait", semaphore, amount)

    def signal(self, time: int, semaphore: int, amount: int) -> None:
        self._record(time, "signal", semaphore, amount)

    def reset(self, time: int, semaphore: int, amount: int) -> None:
        self._record(time, "reset", semaphore, amount)

    def _record(self, time, kind, semaphore, amount, path="", place=None) -> None:
        bundle = self.start + time - self.now - 1
        num_bytes = amount * self.granule if kind == "copy" else 0
        self.events.append(Event(time, bundle, kind, semaphore, amount, path, num_bytes, place))

    # -- running

    def run(self) -> Run:
        """Runs the program to its end.

        Raises:
          RuntimeError: if it does not come to an end.
        """
        passed = [0] * len(self.exits)
        end = len(self.program.bundles)
        while self.start < end:
            number = self.pieces[self.start](self.now)
            passed[number] += 1
            taken: Exit = self.exits[number]
            self.now += taken.cycles
            self.start = taken.target
            if self.now > _MOST_CYCLES:
                raise RuntimeError(f"the program runs for more than {_MOST_CYCLES} cycles")
        visits = np.zeros(end + 1, np.int64)
        for count, taken in zip(passed, self.exits, strict=True):
            visits[taken.first] += count
            visits[taken.last + 1] -= count
        return Run(self.now, np.cumsum(visits)[:-1].tolist(), self.events, self.guessed)
