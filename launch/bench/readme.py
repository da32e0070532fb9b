"""`python -m launch.bench.readme`: puts the kept figures into the README, between its markers.

<!-- figures: cpu_against_seed -->   ...generated...   <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def _cpu_against_seed(report: dict[str, Any]) -> str:
    lines = [
        "| shapes | seed | shardpage | NumPy copy of as many bytes | times faster (asked) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['name']} | {row['seed_ms']:.0f} | {row['ours_ms']:.0f} | "
            f"{row['copy_ms']:.0f} | {row['ratio']:.1f} ({row['asked']:.0f}) |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"({versions}, {report['machine']}, two cores)"])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"cpu_against_seed": _cpu_against_seed}


def generated(text: str) -> str:
    """The README with every table made anew from its JSON file."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        report = json.loads((RESULTS / f"{name}.json").read_text())
        return f"<!-- figures: {name} -->\n{TABLES[name](report)}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(generated(path.read_text()))
