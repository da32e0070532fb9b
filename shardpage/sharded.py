"""The one way onto a mesh: `place` brings arrays to their devices, `run` runs a function there.

A *body* is one device's part of a call: `body(options, split, *inputs)`, where `options` are static
and inputs are arrays, pytrees of them, or None. Without a mesh it runs as it is, on one device or
in a `shard_map` of the caller's.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from . import backends
from .cache import PagedKVCache
from .options import Tuning
from .shard_layout import Split, platform_of_device


def resolve(tuning: Tuning, split: Split | None, cache: PagedKVCache) -> Tuning:
    """Decides what `tuning` leaves open: the platform, the backend, and whether to interpret.

    That stays open, for the compiler to decide, where only it knows the platform.

    Raises:
      NotImplementedError: if the named backend does not have what is asked for.
    """
    device = _device_of(split, cache.key)
    known = tuning.platform or (None if device is None else platform_of_device(device))
    platform = known or jax.default_backend()
    kind = (device or jax.devices()[0]).device_kind
    default = "xla" if tuning.invariant else backends.default_for(platform, kind, cache.format)
    backend = tuning.backend or default
    backends.check_jax(backend)
    if tuning.invariant and backend != "xla":
        raise NotImplementedError(
            f"invariant=True: in which order {backend} adds up depends on the batch; use "
            "backend='xla', or None"
        )
    interpret = tuning.interpret
    if backend not in backends.INTERPRETABLE:
        interpret = interpret or False
    elif interpret is None and known:
        interpret = platform != backends.INTERPRETABLE[backend]
    return dataclasses.replace(tuning, platform=platform, backend=backend, interpret=interpret)


def platform_of(split: Split | None, array: Any) -> str | None:
    """The platform of the mesh, of the array, or of the mesh around the call; None where none is
    known, as inside a `jax.jit` on one device."""
    device = _device_of(split, array)
    return None if device is None else platform_of_device(device)


def _device_of(split: Split | None, array: Any) -> Any:
    """A device, or what is known of an abstract mesh's."""
    if split is not None and split.device is not None:
        return split.device
    if split is None and isinstance(array, jax.Array) and not isinstance(array, Tracer):
        return next(iter(array.devices()))
    return jax.sharding.get_abstract_mesh().abstract_device


def as_int32(array: Any) -> jax.Array:
    """Integers as int32; what does not fit becomes -1, an id or length that is refused."""
    if isinstance(array, jax.Array) and array.dtype == np.int32:
        return array  # even casting nothing is a program of its own
    # JAX would silently cut NumPy's int64 to its lower half, which could be a valid id.
    numpy = jnp if isinstance(array, jax.Array) else np
    array = numpy.asarray(array)
    limit = np.iinfo(np.int32).max
    if np.iinfo(array.dtype).max > limit:
        fits = (array >= 0) & (array <= limit)
        array = numpy.where(fits, array.astype(np.int32), np.int32(-1))
    return jnp.asarray(array.astype(np.int32))


def run(
    body: Callable[..., Any],
    options: Hashable,
    split: Split | None,
    inputs: Sequence[Any],
    input_dims: Sequence[Any],
    output_dims: Sequence[Any] | None = None,
    *,
    donate: bool = False,
) -> Any:
    """Places the arrays of a call, and runs its body on every device, compiled.

    Arrays on one device or on the host are placed. Small arrays placed otherwise are resharded. A
    cache that is spread otherwise is refused: moving it would cost its size in traffic per call.
    Under `jax.jit` on Auto axes shardings cannot be seen; there the compiler reshards.

    Args:
      body: a function of a module, since compiled programs are kept by it.
      inputs: arrays, pytrees of them, or None.
      input_dims: for each input, what the axes of its arrays are: ("seqs", "heads", None). None
        for a cache, which knows itself.
      output_dims: the same for each result; None for a body that returns its first input, a cache.
      donate: reuse that cache's memory for the result.

    Raises:
      ValueError: if the cache is spread over devices in another way.
    """
    in_specs = out_specs = formats = None
    if split is not None:
        layout = split.layout
        pairs = list(zip(inputs, input_dims, strict=True))
        in_specs = tuple(
            x.specs(layout) if dims is None else layout.spec(*dims) for x, dims in pairs
        )
        inputs = [
            _placed(x, spec, split, movable=bool(dims))
            for (x, dims), spec in zip(pairs, in_specs, strict=True)
        ]
        out_specs = in_specs[0]
        if output_dims is not None:
            out_specs = tuple(layout.spec(*dims) for dims in output_dims)
    if donate and not isinstance(inputs[0].key, Tracer):
        on_tpu = platform_of(split, inputs[0].key) == "tpu"
        formats = inputs[0].array_formats if on_tpu else None
    call = _Call(body, options, split, in_specs, out_specs)
    return _program(call, donate, formats)(*inputs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call: everything but its arrays."""

    body: Callable[..., Any]
    options: Hashable
    split: Split | None
    in_specs: Any
    out_specs: Any

    def __call__(self, *inputs: Any) -> Any:
        here = functools.partial(self.body, self.options, self.split)
        if self.split is not None:
            specs = {"in_specs": self.in_specs, "out_specs": self.out_specs}
            here = jax.shard_map(here, mesh=self.split.mesh, check_vma=True, **specs)
        with jax.numpy_rank_promotion("allow"):  # whatever the caller's session forbids itself
            return here(*inputs)


@functools.cache
def _program(call: _Call, donate: bool, formats: PagedKVCache | None) -> Callable[..., Any]:
    donated = 0 if donate else ()
    if formats is None:
        return jax.jit(call, donate_argnums=donated)
    return jax.jit(call, donate_argnums=donated, out_shardings=formats)


def _placed(inputs: Any, spec: Any, split: Split, *, movable: bool) -> Any:
    """All arrays of an input, by one spec for all, or one for each."""
    place = functools.partial(_place, split=split, movable=movable)
    if isinstance(spec, PartitionSpec):
        return jax.tree.map(lambda array: place(array, spec=spec), inputs)
    return jax.tree.map(lambda array, spec: place(array, spec=spec), inputs, spec)


def _place(array: Any, *, spec: PartitionSpec, split: Split, movable: bool) -> Any:
    """The array in its sharding; one that is not movable must not be spread otherwise."""
    mesh = split.mesh
    if isinstance(array, Tracer):
        if AxisType.Explicit not in mesh.axis_types:
            return array
        actual, wanted = jax.typeof(array).sharding, NamedSharding(mesh.abstract_mesh, spec)
        spread = not actual.mesh.empty and any(axis is not None for axis in actual.spec)
        move = jax.sharding.reshard
    elif isinstance(mesh, AbstractMesh):
        return array
    else:
        wanted = NamedSharding(mesh, spec)
        actual = getattr(array, "sharding", wanted)  # NumPy has none
        spread, move = len(actual.device_set) > 1, jax.device_put
    equivalent = actual == wanted or (spread and actual.is_equivalent_to(wanted, array.ndim))
    as_it_is = actual == wanted if isinstance(array, Tracer) else equivalent
    if as_it_is and isinstance(array, jax.Array):
        return array
    if spread and not movable and not equivalent:
        raise ValueError(
            f"the cache is spread over devices as {actual}, this call needs {spec}; moving it "
            "would cost its size in traffic per call. Make it with PagedKVCache.zeros(..., mesh=, "
            "layout=), or jax.device_put it once"
        )
    return move(array, wanted)
