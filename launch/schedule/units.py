"""How busy each unit of a core is: of the slots that a program ever gives it in one bundle."""

import re
from collections.abc import Sequence

from .bundles import Bundle

# The first that an instruction's name begins with. Values leave a unit (vpop) through a slot of it.
_UNITS = {
    "matrix": r"vmat|vpop\.\w+\.mr",
    "exponential": r"vpow|vlog|vrcp|vrsqrt|vtanh|verf|vpop\.eup",
    "lanes": r"\w+\.xlane|vpop\.(xlane|permute|trf)|vrot|vperm|vbroadcast|vxpose|vpop\.xlu",
    "loads": r"vld",
    "stores": r"vst\b|vst\.",
    "vectors": r"v",
    "copies": r"dma",
    "scalars": r"",
}
_UNIT = re.compile("|".join(f"(?P<{unit}>{names})" for unit, names in _UNITS.items()))


def unit_of(name: str) -> str:
    """The unit that executes an instruction."""
    match = _UNIT.match(name)
    assert match is not None
    assert match.lastgroup is not None
    return match.lastgroup


def shares(bundles: Sequence[Bundle], visits: Sequence[int]) -> dict[str, float]:
    """Of a run's cycles times a unit's slots, the part in which an instruction issues there.

    A unit has as many slots as it has instructions in any bundle. One with instructions that take
    several cycles, as the matrix units have, is busier than its share.
    """
    issued, slots = dict.fromkeys(_UNITS, 0), dict.fromkeys(_UNITS, 1)
    for bundle, times in zip(bundles, visits, strict=True):
        here = dict.fromkeys(_UNITS, 0)
        for op in bundle.ops:
            here[unit_of(op.name)] += 1
        for unit, count in here.items():
            issued[unit] += times * count
            slots[unit] = max(slots[unit], count)
    cycles = max(sum(visits), 1)
    return {unit: round(issued[unit] / (cycles * slots[unit]), 4) for unit in _UNITS}
