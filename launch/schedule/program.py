"""The scalar side of a compiled kernel, as Python functions: one for each straight piece of code.

All registers are global names of one namespace (`s3`, `p0`), and so are the functions of the
machine that the code calls (`load`, `copy`, `wait`, ...). A bundle becomes one assignment: what is
on its right is evaluated before anything on its left changes, as on the core:

    s1, p0, taken14, _ = wrap(s2 + 1), s2 < s4, not p3, store(17592186044417, s2)

A branch takes effect some bundles after it was issued. Vector instructions only take their place.
"""

import collections
import dataclasses
import functools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .bundles import Bundle, Op
from .core import Core

# Addresses of operands and allocations: a number for each, far above any product of 32-bit numbers,
# all with the same highest bit, so that it can be seen how far the program shifted one.
BASE_SHIFT = 64
BASE_BITS = 11
_FIRST_BASE = 1 << BASE_BITS - 1

_OPERAND = re.compile(r"\[shape: (\w+\[[\d,]*\]).*?, index: (\d+), kind: (\w+)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?%p\d+_p\d+)(?:, ([^)]*))?\),?\s*")
_TARGET = re.compile(r"target bundleno = (\d+)")
_SCALAR = re.compile(r"^%\w+_([sp]\d+)$")
_ALLOCATION = re.compile(r"\[#(\w+)")
_LABEL = re.compile(r"^\[?#(\w+)(?: \+ (\S+?))?\]?$")
_POINTER = re.compile(r"^\[?(%\w+)(?: \+ (\S+?))?\]?$")
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {
    "sadd": "wrap({0} + {1})",
    "ssub": "wrap({0} - {1})",
    "smul": "wrap({0} * {1})",
    "smulhi": "wrap(unsigned({0}) * unsigned({1}) >> 32)",  # of a division by a constant
    "sshll": "wrap({0} << {1})",
    "sshllo": "wrap({0} << {1} | (1 << {1}) - 1)",  # ones come in, as masks of rows need them
    "sshrl": "wrap(unsigned({0}) >> {1})",
    "sshra": "({0} >> {1})",
    "sand": "wrap({0} & {1})",
    "sor": "wrap({0} | {1})",
    "sxor": "wrap({0} ^ {1})",
    "smin": "min({0}, {1})",
    "smax": "max({0}, {1})",
    "pand": "({0} and {1})",
    "por": "({0} or {1})",
    "pnand": "(not ({0} and {1}))",
    "pnor": "(not ({0} or {1}))",
    "pxor": "({0} != {1})",
    "pneg": "(not {0})",
    "pmov": "{0}",
    "smov": "{0}",
    "scalar_select": "({1} if {0} else {2})",
    "sclz": "(32 - unsigned({0}).bit_length())",
    "sc": "(unsigned({0}) + unsigned({1}) >> 32 != 0)",  # the carry of a sum
}
# Scalars that come out of the vector side, whose values are not known.
_FROM_VECTORS = ("vpop", "spop")
# These order memory, guard against programming errors or only describe; they take their place.
_NO_EFFECT = ("sphi", "pphi", "sfence", "shalt", "vsyncmov", "vsyncset", "reloc", "vsyncadd.remote")


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where a kernel finds an operand.

    Attributes:
      index: among inputs and outputs; is_output: whether it is one of those.
      shape: e.g. "s32[64]".
      space: "hbm", "vmem", "cmem", "smem", or "value" for a number that is in a register.
      base: the number that stands for its address.
    """

    index: int
    is_output: bool
    shape: str
    space: str
    base: int


@dataclasses.dataclass(frozen=True)
class Exit:
    """An end of a piece of code: the bundles that were issued, and the one that comes next."""

    first: int
    last: int
    target: int

    @property
    def cycles(self) -> int:
        return self.last + 1 - self.first


@dataclasses.dataclass
class Program:
    """A kernel that a `Machine` can run.

    Attributes:
      bundles: as compiled.
      core: what it was compiled for.
      cores_of_device: that run a program which asks on which it is.
      operands: by the register that holds their address.
      asks_core: whether it asks which of those runs it (`core`, a number); core_addresses: of
        scalar memory that says so, too.
      unknown: how often it holds an instruction whose value is not known, by name.
    """

    bundles: list[Bundle]
    core: Core
    cores_of_device: int = 1
    operands: dict[str, Operand] = dataclasses.field(default_factory=dict)
    asks_core: bool = False
    core_addresses: set[int] = dataclasses.field(default_factory=set)
    unknown: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._bases: dict[str, int] = {}
        self._exits: list[Exit] = []
        self._index = {bundle.address: i for i, bundle in enumerate(self.bundles)}
        self._slots = self.core.delay_slots
        self.statements = [list(self._statements(bundle)) for bundle in self.bundles]

    @property
    def num_cores(self) -> int:
        """TensorCores that run it at the same time."""
        return self.cores_of_device if self.asks_core else 1

    # -- from the text of an instruction to Python

    def base(self, name: str) -> int:
        """The number that stands for the address of an allocation or operand."""
        number = self._bases.setdefault(name, _FIRST_BASE + len(self._bases))
        assert number < 2 * _FIRST_BASE
        return number << BASE_SHIFT

    @functools.cached_property
    def dummies(self) -> frozenset[int]:
        """The numbers of allocations that an unwanted load loads from, instead of a branch."""
        selected, others = set[str](), set[str]()
        for op in (op for bundle in self.bundles for op in bundle.ops):
            names = _ALLOCATION.findall(" ".join((op.arguments, *op.named.values())))
            (selected if op.name == "scalar_select" else others).update(names)
        return frozenset(self._bases[name] for name in selected - others)

    def _statements(self, bundle: Bundle) -> Iterator["Statement"]:
        for op in bundle.ops:
            try:
                statement = self._statement(op)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                where = f"bundle {bundle.address:#x} of {self.core.device_kind}"
                raise ValueError(f"cannot execute {op.name} {op.arguments} ({where})") from error
            if statement is not None:
                yield statement

    def _statement(self, op: Op) -> "Statement | None":
        if op.name.startswith("inlined_call_operand"):
            assert op.register is not None
            self._operand(op)
            return None
        if op.name.startswith(_NO_EFFECT):
            return None
        predicate, otherwise, rest = self._predicate(op.arguments)
        if op.name.startswith("sbr"):
            if op.name != "sbr.rel" or not (target := _TARGET.search(rest)):
                raise ValueError("a branch without a target")
            return Statement("branch", predicate or "True", target=int(target[1]))
        if (effect := self._effect(op, rest)) is not None:
            return Statement(
                "effect", f"{effect} if {predicate} else None" if predicate else effect
            )
        if op.register is None:
            return None  # a vector instruction
        value = self._value(op, rest)
        if value == op.register:
            return None  # only another type, of what the same bundle may have written
        if predicate:
            value = f"{value} if {predicate} else {otherwise or op.register}"
        return Statement("set", value, register=op.register)

    def _operand(self, op: Op) -> None:
        match = _OPERAND.search(op.arguments)
        if match is None or op.register is None:
            raise ValueError("an operand without a shape")
        shape, index, kind = match.groups()
        space = op.name.partition(".")[2]
        space = space if space.isalpha() else "value"
        base = self.base(f"operand {index}")
        self.operands[op.register] = Operand(int(index), kind != "input", shape, space, base)

    def _predicate(self, arguments: str) -> tuple[str | None, str | None, str]:
        """Takes `(!%p1_p0, otherwise)`, which may stand anywhere, out of the arguments."""
        match = _PREDICATE.search(arguments)
        if match is None:
            return None, None, arguments
        predicate, otherwise = match.groups()
        rest = f"{arguments[: match.start()]}{arguments[match.end() :]}".strip()
        return self._atom(predicate), otherwise and self._atom(otherwise), rest

    def _effect(self, op: Op, rest: str) -> str | None:
        """The call for an instruction that changes more than a register; None for all others."""
        if op.name == "sst":
            address, _, value = rest.removeprefix("[smem:").partition("] ")
            return f"store({self._address(address)}, {self._atom(value)})"
        if op.name.startswith("dma.done"):
            semaphore, amount = map(self._atom, _split(rest))
            return f"wait(t, {semaphore}, {amount})"
        if op.name.startswith("dma."):
            return self._copy(op)
        if op.name in ("vsyncpa", "vsyncadd", "vsyncadd.tile"):
            semaphore, amount = map(self._atom, _split(rest))
            return f"{'reset' if op.name == 'vsyncpa' else 'signal'}(t, {semaphore}, {amount})"
        return None

    def _copy(self, op: Op) -> str:
        source, _, target = op.name.partition(".")[2].partition("_to_")
        arguments = {name: self._atom(text) for name, text in op.named.items()}
        size, semaphore = arguments["size_in_granules"], arguments["dst_syncflagno"]
        if target.startswith("smem"):
            return f"fill(t, {arguments[source]}, {size}, {arguments['smem']}, {semaphore})"
        address = arguments.get("hbm", "0")
        return f"copy(t, {op.name.partition('.')[2]!r}, {size}, {address}, {semaphore})"

    def _value(self, op: Op, rest: str) -> str:
        """The expression for what an instruction writes to its register."""
        base = op.name.partition(".")[0]
        if base == "sld":
            address = self._address(rest.removeprefix("[smem:").removesuffix("]"))
            if "core id" in op.note:
                self.asks_core = True
                if "s" not in address:  # not a register
                    self.core_addresses.add(int(address.strip("()")))
                return "core"
            return f"load({address})"
        if base == "scalar_lea":
            # Behind the sum stands the allocation that the pointer is already in.
            first, second = _split(re.sub(r"(\S) \[#\w+\]$", r"\1", rest))
            return f"wrap({self._atom(first)} + {self._atom(second)})"
        if base == "int_to_ptr":
            return self._atom(rest.rpartition("] ")[2])
        if base in _FROM_VECTORS or ".f32" in op.name:
            self.unknown[op.name] += 1
            return "0"
        atoms = [self._atom(atom) for atom in _split(rest)]
        if base == "scmp":
            sign = _COMPARE[op.name.split(".")[1]]
            return f"({_unsigned(op, atoms[0])} {sign} {_unsigned(op, atoms[1])})"
        if base in ("smin", "smax"):
            atoms = [_unsigned(op, atom) for atom in atoms]
        return _BINARY[base].format(*atoms)

    def _address(self, text: str) -> str:
        """`#allocation3 + %s1_s2`, `%s1_s2 + $0x4`, in brackets or not."""
        match = _LABEL.match(text) or _POINTER.match(text)
        if match is None:
            raise ValueError(f"not an address: {text}")
        pointer = match[1] if match[1].startswith("%") else f"[#{match[1]}]"
        return self._atom(pointer) + (f" + {self._atom(match[2])}" if match[2] else "")

    def _atom(self, text: str) -> str:
        """A register, a number or an address."""
        text = text.strip()
        if text.startswith("!"):
            return f"(not {self._atom(text[1:])})"
        if match := _SCALAR.match(text):
            return match[1]
        if text.startswith("["):
            match = _LABEL.match(text)
            if match is None:
                return self._address(text)
            offset = f" + {self._atom(match[2])}" if match[2] else ""
            return f"({self.base(match[1])}{offset})"
        if text.startswith("$0x"):
            return str(int(text[1:], 16))
        try:
            number = int(text)  # unsigned in the text
        except ValueError:
            (number,) = struct.unpack("I", struct.pack("f", float(text)))  # its bits
        return str((number + 2**31) % 2**32 - 2**31)

    def loops(self) -> list[tuple[int, int]]:
        """First and last bundle of each loop, as indices."""
        return [
            (self._index[statement.target], index + self._slots)
            for index, statements in enumerate(self.statements)
            for statement in statements
            if statement.kind == "branch" and self._index.get(statement.target, index + 1) <= index
        ]

    # -- straight pieces of code

    def compile(
        self, namespace: dict[str, Any]
    ) -> tuple[dict[int, Callable[[int], int]], Sequence[Exit]]:
        """Makes the pieces run in a namespace, which has the machine's functions.

        Returns:
          For the index of each first bundle a function from the time to the number of an exit; and
          the exits.
        """
        starts = {0} | {
            self._index.get(statement.target, len(self.bundles))
            for statements in self.statements
            for statement in statements
            if statement.kind == "branch"
        }
        starts.discard(len(self.bundles))
        registers = {s.register for statements in self.statements for s in statements if s.register}
        namespace.update(dict.fromkeys(registers, 0))
        written = f"global {', '.join(sorted(registers))}" if registers else "pass"
        pieces = {}
        for start in sorted(starts):
            body = "\n    ".join([written, *self._piece(start, starts)])
            exec(f"def piece(now):\n    {body}", namespace)
            pieces[start] = namespace["piece"]
        return pieces, self._exits

    def _piece(self, start: int, starts: set[int]) -> Iterator[str]:
        """The lines from a bundle on to where all that follows is another piece."""
        branches: dict[int, int] = {}  # the bundle after which one is taken: its target
        index = start
        while index < len(self.bundles):
            yield from self._lines(index, index - start)
            for statement in self.statements[index]:
                if statement.kind == "branch":
                    target = self._index.get(statement.target, len(self.bundles))
                    branches[index + self._slots] = target
            if index in branches:
                exit_taken = self._exit(start, index, branches.pop(index))
                yield f"if taken{index - self._slots}: return {exit_taken}"
            index += 1
            if index in starts and not branches:
                break
        yield f"return {self._exit(start, index - 1, index)}"

    def _exit(self, first: int, last: int, target: int) -> int:
        self._exits.append(Exit(first, last, target))
        return len(self._exits) - 1

    def _lines(self, index: int, offset: int) -> Iterator[str]:
        names, values, effects = [], [], []
        for statement in self.statements[index]:
            if statement.kind == "effect":
                effects.append(statement.code)
                continue
            names.append(statement.register or f"taken{index}")
            values.append(statement.code)
        if not values and not effects:
            return
        names += ["_"] * len(effects)
        # Effects come last, when the registers still hold what they held before the bundle.
        if effects:
            yield f"t = now + {offset + 1}"
        yield f"{', '.join(names)}, = {', '.join([*values, *effects])},"


@dataclasses.dataclass(frozen=True)
class Statement:
    """What an instruction does, as Python: it sets a register, branches, or has another effect."""

    kind: str
    code: str
    register: str | None = None
    target: int = -1


def _split(arguments: str) -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", arguments)
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _unsigned(op: Op, atom: str) -> str:
    return f"unsigned({atom})" if ".u32" in op.name else atom
