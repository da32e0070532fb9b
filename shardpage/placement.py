"""Brings arrays to the sharding that a call needs, and refuses to move a cache behind your back."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Arrays = TypeVar("Arrays", bound=tuple)


def place(
    arrays: Arrays, specs: Arrays, mesh: Mesh | AbstractMesh, *, caches: tuple[str, ...]
) -> Arrays:
    """Returns the arrays of a call in the shardings that it needs.

    Arrays on one device or on the host are placed. Small arrays placed otherwise are resharded. A
    cache that is spread otherwise is refused: moving it would cost its size in traffic each call.
    Under `jax.jit` on Auto axes shardings cannot be seen; there the compiler reshards.

    Args:
      arrays: a NamedTuple of arrays or tracers; None stays None.
      specs: the same NamedTuple, of PartitionSpecs.
      mesh: the mesh of the call.
      caches: names of the fields that are caches.

    Raises:
      ValueError: if a cache is spread over devices in another way.
    """
    names: tuple[str, ...] = type(arrays)._fields  # pyright: ignore[reportAttributeAccessIssue]
    placed = [
        _place(name, array, mesh, spec, name in caches)
        for name, array, spec in zip(names, arrays, specs, strict=True)
    ]
    return type(arrays)(*placed)  # pyright: ignore[reportArgumentType]


def _place(name: str, array: Any, mesh: Mesh | AbstractMesh, spec: PartitionSpec, cache: bool):
    if array is None:
        return None
    if isinstance(array, Tracer):
        return _place_traced(name, array, mesh, spec, cache)
    if isinstance(mesh, AbstractMesh):
        return array
    target = NamedSharding(mesh, spec)
    actual: Any = getattr(array, "sharding", None)
    if actual == target:
        return array
    if actual is None or len(actual.device_set) == 1:
        return jax.device_put(array, target)
    if cache and not actual.is_equivalent_to(target, array.ndim):
        raise _misplaced(name, actual, spec)
    return jax.device_put(array, target)


def _place_traced(name, array, mesh, spec, cache):
    if AxisType.Explicit not in mesh.axis_types:
        return array
    actual = jax.typeof(array).sharding
    wanted = NamedSharding(mesh.abstract_mesh, spec)
    if actual.mesh.empty or actual.is_equivalent_to(wanted, array.ndim):
        return jax.sharding.reshard(array, wanted) if actual != wanted else array
    if cache and any(axis is not None for axis in actual.spec):
        raise _misplaced(name, actual, spec)
    return jax.sharding.reshard(array, wanted)


def _misplaced(name: str, actual: Any, spec: PartitionSpec) -> ValueError:
    return ValueError(
        f"{name} is spread over devices as {actual}, this call needs {spec}; moving a cache each "
        "call would cost its size in traffic. Make it with PagedKVCache.zeros(..., mesh=, "
        "layout=), or jax.device_put it once"
    )


def as_int32(array: Any) -> jax.Array:
    """Integers as int32; what does not fit becomes -1, an id or length that is refused."""
    # JAX would silently cut NumPy's int64 to its lower half, which could be a valid id.
    numpy = jnp if isinstance(array, jax.Array) else np
    array = numpy.asarray(array)
    limit = np.iinfo(np.int32).max
    if np.iinfo(array.dtype).max > limit:
        fits = (array >= 0) & (array <= limit)
        array = numpy.where(fits, array.astype(np.int32), np.int32(-1))
    return jnp.asarray(array.astype(np.int32))


def platform_of(mesh: Mesh | AbstractMesh | None, array: Any) -> str:
    """The platform a call runs on: its mesh's, else its array's, else JAX's default."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        return next(iter(array.devices())).platform
    return jax.default_backend()
