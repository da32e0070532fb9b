"""What `shard_map(check_vma=True)` needs of loops: marks of the axes that an array varies over."""

from typing import Any

import jax
from jax import lax

_OLD = jax.__version_info__ < (0, 10)  # which has another name for it


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """Marks pytrees as varying over the union of their varying manual axes.

    A loop's carry must vary over the axes that its body's result varies over, and a custom
    gradient must vary as its primal does. Outside a `shard_map` this does nothing.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda array: vary_over(array, axes), arrays)


def varying_axes(*arrays: Any) -> frozenset[str]:
    """The union of the varying manual axes of all leaves."""
    return frozenset().union(*map(_axes_of, jax.tree.leaves(arrays)))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks an array as varying over `axes`, in addition to its own."""
    missing = tuple(sorted(axes - _axes_of(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def result_as(array: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result that varies as one of its arguments does."""
    kind: Any = jax.typeof(array)
    varying = {"vma": kind.vma} if _OLD else {"manual_axis_type": kind.manual_axis_type}
    return jax.ShapeDtypeStruct(shape, dtype, **varying)


def _axes_of(array: Any) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    return kind.vma if _OLD else kind.manual_axis_type.varying
