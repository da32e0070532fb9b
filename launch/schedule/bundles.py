"""Reads what libtpu writes of a compiled kernel: one bundle of instructions a cycle, as text.

    0x26   : > { %131 = sbr.rel (%p9367_p0) target bundleno = 140 (0x8c), region = 72  ;;  ... }

The pass `packed-bundles-post-ra` is the last that still has the EMPTY bundles: the cycles in which
nothing can issue because a result is not there yet. (`final_bundles` leaves them out; the hardware
waits all the same.) With source annotations each instruction says where it comes from:

    %s24_s3 = sshll.u32 %s13_s20, 8 /* loc("kernel.py":109:12 to :94) */
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

PASS = "packed-bundles-post-ra"
# What libtpu must be told before it loads, to write that pass (of some 60) to a folder.
FLAGS = (
    f"--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*{PASS} "
    "--xla_mosaic_enable_llo_source_annotations=true"
)
# Parts that libtpu adds to every program; they are no kernels.
_INTERNAL = ("<", "TLP")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:\s*>*\s*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*(.*?)\*/", re.DOTALL)
_PLACE = re.compile(r'loc\("([^"]+)":(\d+):')
_NAMED = re.compile(r"/\*(\w+)=\*/([^,/]+)")
_DEFINED = re.compile(r"^%(\w+) = (\S+) ?(.*)$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction.

    Attributes:
      name: e.g. "sadd.s32".
      register: the scalar or predicate register ("s3", "p0") that it sets, or None.
      arguments: the rest of its text, without comments.
      named: the arguments that the compiler names, those of copies.
      place: (file, line) that it comes from, or None.
      note: its comments, as the compiler wrote them.
    """

    name: str
    register: str | None
    arguments: str
    named: dict[str, str]
    place: tuple[str, int] | None
    note: str


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What issues in one cycle; without ops the core waits for a result."""

    address: int
    ops: tuple[Op, ...]


def parse(text: str) -> list[Bundle]:
    """The bundles of a dump, in order.

    Raises:
      ValueError: if there is none in it: the compiler's format has changed.
    """
    starts = list(_BUNDLE.finditer(text))
    if not starts:
        raise ValueError("no bundle found; this libtpu writes its schedule in another format")
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [
        Bundle(int(match[1], 16), tuple(_ops(text[match.end() : end])))
        for match, end in zip(starts, ends, strict=True)
    ]


def _ops(text: str) -> Iterator[Op]:
    # Comments are hidden while the text is cut, since they may hold what it is cut at.
    comments: list[str] = []

    def hide(match: re.Match[str]) -> str:
        comments.append(match[0])
        return f"\0{len(comments) - 1}\0"

    hidden = _COMMENT.sub(hide, text)
    body = hidden[: hidden.rfind("}")]
    show = lambda part: re.sub(r"\0(\d+)\0", lambda match: comments[int(match[1])], part)
    for part in body.split(";;"):
        if part.strip():
            yield _op(show(part).strip())


def _op(text: str) -> Op:
    place = _PLACE.search(text)
    defined = _DEFINED.match(_COMMENT.sub("", text).strip())
    if defined is None:
        raise ValueError(f"not an instruction: {text[:100]!r}")
    value, name, arguments = defined.groups()
    register = value.rpartition("_")[2]
    is_scalar = "_" in value and register[0] in "sp"
    return Op(
        name,
        register if is_scalar else None,
        arguments.strip(),
        {key: value.strip() for key, value in _NAMED.findall(text)},
        (place[1], int(place[2])) if place else None,
        " ".join(_COMMENT.findall(text)),
    )


def dumps(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of this pass that libtpu wrote to a folder, by the name of the kernel or fusion."""
    found = {}
    for path in sorted(folder.glob(f"*-{PASS}.txt")):
        # 1795...-NAME-64-packed-bundles-post-ra.txt
        name = path.name.removesuffix(f"-{PASS}.txt").partition("-")[2].rpartition("-")[0]
        if not name.startswith(_INTERNAL):
            found[name] = path
    return found
