"""How exact a result must be, in a peer's own tests: theirs allow errors of 0.05 to 0.2."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax._src import test_util

# error / max(1, |x|), by the bits of the less exact of two arrays.
TOLERANCES = {32: 5e-5, 16: 2.5e-2}


def tighten() -> None:
    """Puts ours beside every tolerance of theirs: both must hold.

    JAX's `assertAllClose` has ours only: at its defaults it is stricter than what it is called for.
    """
    mock.patch.object(test_util.JaxTestCase, "assertAllClose", _assert_all_close).start()
    for module, name in ((np, "allclose"), (jnp, "allclose"), (np.testing, "assert_allclose")):
        mock.patch.object(module, name, _both(getattr(module, name))).start()


def _both(theirs):
    """`theirs`, where also ours holds; it returns whether, or raises."""

    def compare(actual, desired, *args, **kwargs):
        answer = theirs(actual, desired, *args, **kwargs)
        if answer is None:  # it has raised if it does not hold
            return _assert_all_close(None, actual, desired)
        return bool(answer) and error(actual, desired) <= bound(actual, desired)

    return compare


def _assert_all_close(self, actual, desired, **_theirs) -> None:
    del self
    assert np.shape(actual) == np.shape(desired)
    off, allowed = error(actual, desired), bound(actual, desired)
    assert off <= allowed, f"off by {off:.2g}, {allowed:.2g} allowed"


def error(actual, desired) -> float:
    """The largest |actual - desired| / max(1, |desired|); equal infinities and NaN are no error."""
    actual, desired = (np.asarray(x).astype(np.float64) for x in (actual, desired))
    same = (actual == desired) | (np.isnan(actual) & np.isnan(desired))
    with np.errstate(invalid="ignore"):
        off = np.abs(actual - desired) / np.maximum(1.0, np.abs(desired))
    return float(np.where(same, 0.0, off).max(initial=0.0))


def bound(*arrays) -> float:
    """The tolerance of the least exact of these arrays."""
    return TOLERANCES[min(map(_bits, arrays))]


def _bits(array) -> int:
    """16 or 32. Tests compare in float32 what was rounded to 16 bits: its last 13 are zero."""
    array = np.asarray(array)
    if array.dtype.itemsize < 4:
        return 8 * array.dtype.itemsize
    low = array.astype(np.float32).view(np.uint32) & 0x1FFF
    return 32 if low.any() else 16
