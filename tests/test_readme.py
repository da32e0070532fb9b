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


@pytest.mark.parametrize("example", EXAMPLES, ids=["one device", "mesh", "step", "quantised"])
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


def test_what_quantised_caches_cost_agrees_with_the_report():
    rows = publish.load("kv_quality")["rows"]
    found = {(row["dtype"], row["scale"]): row for row in rows}
    perplexity = {kind: f"{row['perplexity']:.2f}" for kind, row in found.items()}
    same = {kind: f"{100 * row['same_likeliest']:.1f}" for kind, row in found.items()}
    formats = ("int8", "float8_e4m3fn", "float8_e5m2")
    int8, e4m3fn, e5m2 = ((dtype, "token") for dtype in formats)
    for claim in (
        f"{perplexity['float32', '']} with a cache of float32",
        f"and {perplexity['bfloat16', '']} with bfloat16",
        f"{perplexity[int8]} with int8, {perplexity[e4m3fn]} with e4m3fn and {perplexity[e5m2]}",
        f"in {same[int8]}, {same[e4m3fn]} and {same[e5m2]} per cent of the places",
        f"(int8: {perplexity['int8', 'head']}, {same['int8', 'head']} per cent)",
    ):
        assert claim in " ".join(README.split())
    for dtype in formats:
        by_token, by_head = found[dtype, "token"], found[dtype, "head"]
        for loss in ("perplexity", "mean_logit_error", "largest_logit_error"):
            assert by_token[loss] < by_head[loss]
        assert by_token["same_likeliest"] > by_head["same_likeliest"]
        assert by_token["equal_median"] > by_head["equal_median"]


@pytest.mark.parametrize(("document", "link"), LINKS)
def test_links_lead_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        assert anchor in slugs
