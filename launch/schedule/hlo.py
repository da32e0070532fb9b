"""Reads the loop over layers of a compiled decode step, as text: which instructions take time."""

import dataclasses
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_NAME = re.compile(r'op_name="([^"]*)"')
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
# These move nothing.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name, opcode, result: e.g. "fusion.3", "fusion", "s32[64]{0}".
      operands: names.
      text: all of it behind the opcode.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of named scopes and transformations that made it; "" if the compiler did."""
        match = _NAME.search(self.text)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int | None:
        """What the compiler thinks that it takes."""
        match = _ESTIMATE.search(self.text)
        return int(match[1]) if match else None

    @property
    def is_kernel(self) -> bool:
        return "tpu_custom_call" in self.text

    @property
    def takes_time(self) -> bool:
        return self.opcode not in _FREE


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """All computations by name; the entry's name is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault("ENTRY" if match[1] else match[2], [])
        elif match := _INSTRUCTION.match(line):
            root, name, result, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition("), ")[0]))
            current.append(Instruction(name, opcode, result, operands, rest, bool(root)))
    return found


def loop(instruction: Instruction) -> tuple[str, int] | None:
    """The body of a `while` and how often it runs, once if that is not known; None for others."""
    body = re.search(r"body=%?([\w.\-]+)", instruction.text)
    if instruction.opcode != "while" or body is None:
        return None
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
    return body[1], int(trips[1]) if trips else 1


def varying(body: list[Instruction]) -> set[str]:
    """What follows from values that change from pass to pass, other than a scalar counter.

    The rest is equal in all passes, or known from the number of the pass.
    """
    by_name = {instruction.name: instruction for instruction in body}
    parameter = next(i.name for i in body if i.opcode == "parameter")
    root = next(i for i in body if i.is_root)
    changed: set[str] = set()
    for instruction in body:
        if instruction.opcode == "get-tuple-element" and instruction.operands == (parameter,):
            index = re.search(r"index=(\d+)", instruction.text)
            assert index is not None
            next_value = by_name[root.operands[int(index[1])]]
            kept = next_value is instruction or _element(next_value, parameter) == index[1]
            if not kept and not instruction.result.startswith("s32[]"):
                changed.add(instruction.name)
        elif changed.intersection(instruction.operands):
            changed.add(instruction.name)
    return changed


def _element(instruction: Instruction, parameter: str) -> str | None:
    match = re.search(r"index=(\d+)", instruction.text)
    of_parameter = instruction.operands == (parameter,)
    is_element = instruction.opcode == "get-tuple-element" and of_parameter
    return match[1] if match and is_element else None
