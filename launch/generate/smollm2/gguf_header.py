"""Reads the header of a GGUF file from anywhere: nothing in it is believed before it is checked."""

import math
import mmap
import reprlib
import struct
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

# The scalar types of GGUF metadata by number, as struct reads them; 8 is text, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# The fewest bytes of a text, a field and a tensor's description; the most of a header, several
# times those of a vocabulary of 256k tokens.
_TEXT_BYTES, _FIELD_BYTES, _TENSOR_BYTES = 8, 13, 32
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_DIMS = 4
_LENGTH = struct.Struct("<Q")
_WORDS = {
    int: "a whole number",
    float: "a floating-point number",
    list: "texts",
    np.ndarray: "numbers",
}


class BadGGUF(ValueError):
    """A GGUF file is damaged, or no model of this kind; the message says where and why."""

    def __init__(self, path: Path, at: int | None, why: str):
        super().__init__(f"{path}{'' if at is None else f', byte {at}'}: {why}")


class Tensor(NamedTuple):
    """The description of a tensor."""

    at: int  # at which byte it is
    shape: tuple[int, ...]
    quantization: int
    offset: int  # of the tensor, from where the first one begins


class Header:
    """What a GGUF file says of itself.

    Attributes:
      fields: metadata values by name; of arrays, texts are a list and numbers are NumPy's.
      field_at: at which byte each of them is.
      tensors: where each tensor is, and what it is.
      start: where the first of them begins.
      data: the whole file, mapped into memory.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          BadGGUF: if it is no GGUF file of a version that is understood, or damaged.
        """
        self._path, self._at = path, 0
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: nothing is in it
            self.fail(str(error))
        self._end = min(len(self.data), _MAX_HEADER_BYTES)
        if self.data[:4] != b"GGUF" or self._unpack("4sI")[1] not in (2, 3):
            self.fail("is no GGUF file of version 2 or 3", 0)
        num_tensors, num_fields = self._unpack("QQ")
        self._fit(num_fields, _FIELD_BYTES, "fields")
        self.field_at: dict[str, int] = {}
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            at, name = self._at, self._name(self.fields)
            self.fields[name], self.field_at[name] = self._value(*self._unpack("I")), at
        self._fit(num_tensors, _TENSOR_BYTES, "tensors")
        self.tensors: dict[str, Tensor] = {}
        for _ in range(num_tensors):
            name = self._name(self.tensors)
            self.tensors[name] = self._tensor()
        self._place_tensors()

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        """Refuses the file, for what is at this byte of it."""
        raise BadGGUF(self._path, at, why)

    def field(self, name: str, kind: type) -> Any:
        """A metadata value that must be there, and of this type."""
        if name not in self.fields:
            self.fail(f"has no field {name!r}")
        value = self.fields[name]
        if type(value) is not kind:
            what = f"{name} = {reprlib.repr(value)} must be {_WORDS[kind]}"
            self.fail(what, self.field_at[name])
        return value

    def _fit(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses what cannot lie between here and the end of the header, or of the file."""
        left = self._end - self._at
        if count * least_bytes > left:
            why = (
                f"{count} {what} do not fit in the {left} bytes left of the file, or of a header's"
            )
            self.fail(f"{why} {_MAX_HEADER_BYTES}", self._at)

    def _unpack(self, format: str) -> tuple[Any, ...]:
        format = "<" + format
        num_bytes = struct.calcsize(format)
        self._fit(num_bytes, 1, "bytes")
        self._at += num_bytes
        return struct.unpack_from(format, self.data, self._at - num_bytes)

    def _text(self) -> str:
        self._fit(1, _TEXT_BYTES, "texts")
        (length,) = _LENGTH.unpack_from(self.data, self._at)
        at = self._at + _TEXT_BYTES
        self._at = at
        self._fit(length, 1, "bytes of text")
        self._at += length
        try:
            return self.data[at : self._at].decode()
        except UnicodeDecodeError as error:
            self.fail(f"is no UTF-8 ({error.reason})", at + error.start)

    def _name(self, taken: dict[str, Any]) -> str:
        at, name = self._at, self._text()
        if name in taken:
            self.fail(f"{reprlib.repr(name)} is there twice", at)
        return name

    def _value(self, kind: int) -> Any:
        """The metadata value that comes next."""
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        at = self._at
        if kind != _ARRAY:
            self.fail(f"a value of the unknown type {kind}", at)
        kind, count = self._unpack("IQ")
        if kind == _TEXT:
            self._fit(count, _TEXT_BYTES, "texts")
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(f"an array of type {kind} is neither one of numbers nor of texts", at)
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        self._fit(count, dtype.itemsize, "numbers")
        at, self._at = self._at, self._at + count * dtype.itemsize
        return np.frombuffer(self.data, dtype, count, at)

    def _tensor(self) -> Tensor:
        at = self._at
        (num_dims,) = self._unpack("I")
        if not 0 < num_dims <= _MAX_DIMS:
            self.fail(f"a tensor of {num_dims} dimensions; it must have 1 to {_MAX_DIMS}", at)
        shape = self._unpack(f"{num_dims}Q")
        quantization, offset = self._unpack("IQ")
        return Tensor(at, shape[::-1], quantization, offset)

    def _place_tensors(self) -> None:
        """Finds where they begin, and that each lies behind the one before it, as they must."""
        from gguf.constants import GGML_QUANT_SIZES

        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            what = f"general.alignment = {reprlib.repr(alignment)} must be a power of two"
            self.fail(what, self.field_at["general.alignment"])
        aligned = lambda at: -(-at // alignment) * alignment
        self.start, end = aligned(self._at), 0
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for name, (at, shape, quantization, offset) in self.tensors.items():
            what = f"tensor {reprlib.repr(name)}"
            if quantization not in sizes:
                self.fail(f"{what} is quantised in an unknown way, {quantization}", at)
            block, block_bytes = sizes[quantization]
            if shape[-1] % block:
                self.fail(f"{what} has rows of {shape[-1]}; it must be a multiple of {block}", at)
            if offset != aligned(end):
                self.fail(f"{what} begins at {offset}, not {aligned(end)} behind the others", at)
            end = offset + math.prod(shape) // block * block_bytes
            if 0 in shape or self.start + end > len(self.data):
                left = len(self.data) - self.start - offset
                self.fail(f"{what} of shape {shape} is not in the {left} bytes left for it", at)
