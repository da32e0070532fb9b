"""What changed between two reports, beyond noise."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from .report import Row

# Even on a quiet machine two runs differ by this much.
SMALLEST = 0.05

Verdict = Literal["same", "faster", "slower", "new", "gone", "no time"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One row in both reports.

    Attributes:
      ratio: new time over old time; None if one of them is missing.
      low, high: the range of the ratio if both medians lie within their quartiles.
    """

    key: tuple[str, str, str]
    verdict: Verdict
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """One change per row of either report: new rows in their order, then those that are gone."""
    before = {row.key: row for row in old}
    after = {row.key: row for row in new}
    found = [_change(before.get(key), row) for key, row in after.items()]
    return found + [Change(key, "gone") for key in before if key not in after]


def _change(old: Row | None, new: Row) -> Change:
    if old is None:
        return Change(new.key, "new")
    if old.timing is None or new.timing is None:
        return Change(new.key, "no time")
    ratio = new.timing.median_us / old.timing.median_us
    low = new.timing.low_us / old.timing.high_us
    high = new.timing.high_us / old.timing.low_us
    verdict: Verdict = "same"
    if low > 1 and ratio > 1 + SMALLEST:
        verdict = "slower"
    elif high < 1 and ratio < 1 - SMALLEST:
        verdict = "faster"
    return Change(new.key, verdict, ratio, low, high)


def table(found: Sequence[Change]) -> list[list[str]]:
    """A row of cells per change, after a header."""
    cells = [["bench", "shape", "", "time, new/old", "may be", "verdict"]]
    for change in found:
        ratio, may_be = "", ""
        if change.ratio is not None:
            ratio, may_be = f"{change.ratio:.2f}", f"{change.low:.2f} .. {change.high:.2f}"
        cells.append([*change.key, ratio, may_be, change.verdict])
    return cells
