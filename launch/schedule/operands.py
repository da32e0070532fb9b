"""The integers that a traced program gives to its Pallas kernels, computed on the CPU.

A kernel's branches, trip counts and copies follow from its integer operands: plans, tables and
lengths. They are found by evaluating the program around the kernels, as far as it depends on the
integers among its arguments. What depends on anything else stays unknown: None.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

Value = np.ndarray | None

# These change no value.
_IDENTITIES = (
    "sharding_constraint", "pvary", "pcast", "reshard", "layout_constraint", "device_put",
)  # fmt: skip
# What comes from other devices is not known.
_COLLECTIVES = (
    "psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all", "ppermute",
    "psum_scatter", "reduce_scatter",
)  # fmt: skip
# Where an equation that calls keeps what it calls.
_CALLED = ("jaxpr", "call_jaxpr", "call", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a kernel.

    Attributes:
      name: of the kernel; "kernel" if it has none.
      operands: in order; None for what is not known.
    """

    name: str
    operands: tuple[Value, ...]


def kernel_calls(closed: Any, arguments: Sequence[Value]) -> list[Call]:
    """The calls in a traced program, in order; of a loop's, those of its first pass.

    Args:
      closed: its `ClosedJaxpr`.
      arguments: a value for each of its inputs, or None.
    """
    calls: list[Call] = []
    with jax.default_device(jax.devices("cpu")[0]):
        _evaluate(closed, arguments, calls)
    return calls


def integers(value: Any) -> Value:
    """The value of an array of integers; None for others, and for descriptions of arrays."""
    if isinstance(value, jax.ShapeDtypeStruct) or np.dtype(value.dtype).kind not in "iub":
        return None
    return np.asarray(value)


def _evaluate(called: Any, arguments: Sequence[Value], calls: list[Call]) -> list[Value]:
    """Evaluates a Jaxpr, closed or not; adds the calls in it."""
    jaxpr, consts = getattr(called, "jaxpr", called), getattr(called, "consts", ())
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(integers, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda atom: np.asarray(atom.val) if isinstance(atom, Literal) else known[atom]
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _outputs(equation, values, calls), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, values: list[Value], calls: list[Call]) -> Sequence[Value]:
    primitive, params = equation.primitive, equation.params
    unknown = [None] * len(equation.outvars)
    match primitive.name:
        case "pallas_call":
            calls.append(Call(params.get("name") or "kernel", tuple(values)))
            return unknown
        case "axis_index":
            return [np.zeros((), np.int32)]
        case "platform_index":
            return [np.asarray(_tpu_branch(params["platforms"]), np.int32)]
        case name if name in _IDENTITIES:
            return values
        case name if name in _COLLECTIVES:
            return unknown
    inside = _inside(equation, values, calls)
    if inside is not None:
        return inside
    if any(value is None for value in values):
        return unknown
    outputs = primitive.bind(*values, **params)
    return [integers(x) for x in (outputs if primitive.multiple_results else [outputs])]


def _inside(equation: Any, values: list[Value], calls: list[Call]) -> Sequence[Value] | None:
    """What an equation that calls, branches or loops gives; None for others."""
    params = equation.params
    match equation.primitive.name:
        case "cond" if values[0] is not None:
            return _evaluate(params["branches"][int(values[0])], values[1:], calls)
        case "cond" | "scan" | "while" if _has_kernel(equation):
            _evaluate(*_first_pass(equation, values), calls)
            return [None] * len(equation.outvars)
        case "scan" if all(value is not None for value in values):
            return _scan(params, values, calls)
        case "cond" | "scan" | "while" | "reduce" | "reduce_window":
            return None
        case "shard_map":
            return _shard_map(params, values, calls)
    called = next((params[key] for key in _CALLED if key in params), None)
    return None if called is None else _evaluate(called, values, calls)


def _scan(params: dict[str, Any], values: list[Value], calls: list[Call]) -> list[Value]:
    """All passes of a `scan` without a kernel. (As a primitive it would check mesh axes, too.)"""
    kept, num_carry = _scan_counts(params)
    consts, carry, rows = values[:kept], values[kept : kept + num_carry], values[kept + num_carry :]
    collected: list[list[Value]] = []
    order = range(params["length"])
    for index in reversed(order) if params["reverse"] else order:
        row = [None if value is None else value[index] for value in rows]
        outputs = _evaluate(params["jaxpr"], [*consts, *carry, *row], calls)
        carry = outputs[:num_carry]
        collected.append(outputs[num_carry:])
    if params["reverse"]:
        collected.reverse()
    columns = list(zip(*collected, strict=True))
    return [*carry, *(None if c[0] is None else np.stack(c) for c in columns)]


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants, and values carried, a `scan` has; later JAX keeps them as a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _first_pass(equation: Any, values: list[Value]) -> tuple[Any, list[Value]]:
    """What a loop with a kernel runs first, or the last of branches not known; and its inputs."""
    params = equation.params
    if equation.primitive.name == "cond":
        return params["branches"][-1], values[1:]
    if equation.primitive.name == "while":
        return params["body_jaxpr"], values[params["cond_nconsts"] :]
    kept = sum(_scan_counts(params))
    index = -1 if params["reverse"] else 0
    first = [None if value is None else value[index] for value in values[kept:]]
    return params["jaxpr"], values[:kept] + first


def _shard_map(params: dict[str, Any], values: list[Value], calls: list[Call]) -> list[Value]:
    """What the first device does. Its results stand for those of all, so that it finds its own."""
    sizes = params["mesh"].shape

    def shards(value: np.ndarray, spec: Any) -> list[int]:
        names = [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]
        counts = [math.prod(sizes[axis] for axis in each) for each in names]
        return counts + [1] * (value.ndim - len(counts))

    def first(value: Value, spec: Any) -> Value:
        if value is None:
            return None
        parts = zip(value.shape, shards(value, spec), strict=True)
        return value[tuple(slice(size // count) for size, count in parts)]

    firsts = [first(*each) for each in zip(values, params["in_specs"], strict=True)]
    outputs = _evaluate(params["jaxpr"], firsts, calls)
    return [
        None if value is None else np.tile(value, shards(value, spec))
        for value, spec in zip(outputs, params["out_specs"], strict=True)
    ]


def _has_kernel(equation: Any) -> bool:
    if equation.primitive.name == "pallas_call":
        return True
    inner = [value for value in jax.tree.leaves(list(equation.params.values())) if _is_jaxpr(value)]
    return any(_has_kernel(e) for jaxpr in inner for e in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _tpu_branch(platforms: Sequence[Any]) -> int:
    """Which branch of `lax.platform_dependent` a TPU takes; None stands for all others."""
    return next(i for i, names in enumerate(platforms) if names is None or "tpu" in names)
