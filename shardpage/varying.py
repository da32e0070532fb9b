"""What `shard_map(check_vma=True)` needs of loops: marks of the axes that an array varies over."""

from typing import Any

import jax
from jax import lax


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """Marks pytrees as varying over the union of their varying manual axes.

    A loop's carry must vary over the axes that its body's result varies over, and a custom
    gradient must vary as its primal does. Outside a `shard_map` this does nothing.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda array: vary_over(array, axes), arrays)


def varying_axes(*arrays: Any) -> frozenset[str]:
    """The union of the varying manual axes of all leaves."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    )


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks an array as varying over `axes`, in addition to its own."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array
