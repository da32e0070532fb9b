"""The README's claims that a machine can check: its example runs, its figures are the kept ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench import readme

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_example_runs_as_it_stands(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 16, 128) P('data', 'kv', None)\n"


def test_figures_are_those_of_the_kept_results():
    assert readme.generated(README) == README, "run: python -m launch.bench.readme"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (Path(__file__).parents[1] / link).exists()
