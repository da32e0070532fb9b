"""The claims of the READMEs that a machine can check: examples, figures, links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench import publish
from launch.bench.report import Row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCUMENTS = (
    "README.md",
    "meshes/README.md",
    "shardpage/MIGRATE.md",
    "launch/README.md",
    "launch/integrations/README.md",
)
LINKS = [
    (document, link)
    for document in (*DOCUMENTS, *(str(path) for path in publish.DOCUMENTS))
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text())
]


@pytest.mark.parametrize("example", EXAMPLES, ids=["one device", "mesh", "step"])
def test_examples_run_as_they_stand(example, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == re.search(r"print\(.*# (.*)", example).group(1)


@pytest.mark.parametrize("document", publish.DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_kept_reports(document):
    text = document.read_text()
    assert publish.generated(text) == text, "run: python -m launch.bench.publish"


def speed_ups(name, peer):
    """This library over a peer, ascending, for the shapes of a kept report."""
    rows = {(r.shape, r.name): r for r in map(Row.from_json, publish.load(name)["rows"])}
    ours = [row for (_, n), row in rows.items() if n == publish.OURS]
    return sorted(filter(None, (publish.speed_up(r, rows.get((r.shape, peer))) for r in ours)))


def test_sentences_agree_with_the_reports():
    text = " ".join(README.split())
    gather = speed_ups("gpu_decode", "gather")
    *even, skewed = speed_ups("gpu_decode", "flashinfer")
    kernel = speed_ups("gpu_decode", "jax paged_attention")
    cpu = speed_ups("cpu_decode", "ejkernel")
    splits = [Row.from_json(row) for row in publish.load("gpu_sharded")["rows"]]
    splits = [row for row in splits if row.efficiency and "work x" not in row.name]
    pages = sorted(row.efficiency for row in splits if row.name == "context=2")
    others = sorted(row.efficiency for row in splits if row.name != "context=2")
    for claim in (
        f"{gather[0]:.1f} to {gather[-1]:.1f} times as fast as a plain gather",
        f"{even[0]:.2f} to {even[-1]:.2f} times as fast as FlashInfer, and {skewed:.1f} times",
        f"{kernel[0]:.2f} to {kernel[-1]:.2f} times as fast as JAX's Triton kernel",
        f"of {others[0]:.2f} to {others[-1]:.2f} for a split of sequences or KV heads",
        f"of {pages[0]:.2f} to {pages[-1]:.2f} for a split of one sequence's pages",
        f"{cpu[0]:.1f} to {cpu[-1]:.0f} times as fast as ejkernel's",
    ):
        assert claim in text


@pytest.mark.parametrize(("document", "link"), LINKS)
def test_links_lead_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        assert anchor in slugs
