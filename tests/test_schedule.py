"""`shardpage schedule`: the parser on saved schedules; the job; the bounds on our kernels."""

import json
import pathlib

import pytest
import typer
from typer.testing import CliRunner

from launch.jobs import schedule
from launch.schedule import bundles, report
from launch.schedule.cases import CASES, limit
from launch.schedule.measure import Measured, measure

app = typer.Typer()
app.command()(schedule.schedule)
DUMPS = pathlib.Path(__file__).parent / "data" / "bundles"
TEXT = """\
notes that are no bundles
  0x0   :  { %1 = dma.hbm_to_vmem [thread:$0] }
  0x1 LB: > { %2 = vmatmul.mubr.bf16 %3  ;;  %4 = dma.hbm_to_vmem }
  0x2 LB: >> { %5 = vmatmul.mubr.bf16 %3 }
  0x3   : >> { %6 = dma.hbm_to_vmem  ;;  %7 = dma.hbm_to_vmem }
  0x4   :  {}
  0x5   : >> {}
  0x6   : > { %8 = dma.vmem_to_hbm }
  0x7 LB: >> {}
  0x8   :  {}
"""


class TestParse:
    def test_loops_nest(self):
        kernel = bundles.parse(TEXT)
        assert [(loop.address, loop.depth, loop.own) for loop in kernel.walk()] == [
            ("kernel", 0, 3),
            ("0x1", 1, 2),
            ("0x2", 2, 3),
            ("0x7", 2, 1),
        ]
        assert kernel.bundles == 9

    def test_operations_belong_to_their_loop(self):
        kernel = bundles.parse(TEXT)
        sequences = kernel.children[0]
        assert dict(sequences.operations) == {"dma_in": 1, "dma_out": 1, "matmul": 1}
        assert sequences.count("dma_in") == 3
        assert kernel.count("dma_in") == 4

    def test_the_block_loop_is_the_innermost_that_fetches_and_multiplies(self):
        block, sequences = bundles.block_loop(bundles.parse(TEXT))
        assert (block.address, sequences.address) == ("0x2", "0x1")

    def test_a_kernel_without_loops_is_a_block(self):
        kernel = bundles.parse("  0x0   :  { %1 = dma.hbm_to_vmem }")
        assert bundles.block_loop(kernel) == (kernel, kernel)

    def test_another_format_is_an_error(self):
        with pytest.raises(ValueError, match="no bundle found"):
            bundles.parse("bundle 17: nop")

    def test_saved_schedules(self):
        """Ours and JAX's, operands left out, of 4 sequences of 256 tokens on v6e."""
        kernels = bundles.read_dump(DUMPS)
        assert set(kernels) == {"shardpage_decode.1", "paged_attention.1"}  # not libtpu's own
        ours, sequences = bundles.block_loop(kernels["shardpage_decode.1"])
        assert (ours.bundles, ours.count("dma_in"), ours.count("matmul")) == (66, 2, 2)
        assert (sequences.bundles, kernels["shardpage_decode.1"].bundles) == (358, 672)


ROW = Measured(
    topology="v6e:2x2",
    device_kind="TPU v6 lite",
    case="G8 K1 page 16",
    kernel="fused",
    block_pages=128,
    block_bytes=1 << 20,
    issue_cycles=746,
    hbm_cycles=1120.0,
    per_sequence=400,
    per_call=500,
    around=600,
    copies=128,
    copy_bytes=8192,
    bytes_in_flight=4_200_000,
    bytes_needed=3_300_000,
    temp_bytes=0,
    compile_s=1.0,
    limit=0.6,
)


class TestReport:
    def test_a_ratio_over_its_limit_is_marked(self):
        text = report.table([ROW])
        assert "TPU v6 lite (v6e:2x2)" in text
        assert "0.67  0.60 over" in text
        assert "128 x 8" in text

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        report.draw([ROW], tmp_path / "schedule.png")
        assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_cases_are_refused_before_compiling():
    result = CliRunner().invoke(app, ["--case", "G9"])
    assert result.exit_code == 2
    assert "--case 'G9' is none of" in result.output


class TestCompiled:
    """Needs libtpu, no TPU."""

    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")

    def test_the_job(self, tmp_path):
        out = tmp_path / "schedule.json"
        arguments = ["--topology", "v5e:2x2", "--case", "G8 K1 page 64"]
        result = CliRunner().invoke(app, [*arguments, "--json", str(out)])
        assert result.exit_code == 0, result.output
        rows = {row["kernel"]: row for row in json.loads(out.read_text())["schedules"]}
        assert set(rows) == {"fused", "separate", "stock"}
        assert rows["fused"]["ratio"] < rows["stock"]["ratio"] / 3

    @pytest.mark.parametrize(
        "topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
    )
    def test_block_loops_stay_within_their_limits(self, topology):
        """The regression test of the kernel's speed."""
        limited = [case.name for case in CASES if case.limit]
        rows = measure(topology, limited, ("fused", "separate"))
        assert len(rows) == 2 * len(limited)
        slow = [(r.case, r.kernel, r.ratio, r.limit) for r in rows if not r.within_limit]
        assert not slow
        for row in rows:
            assert row.bytes_in_flight >= row.bytes_needed, row

    def test_limits_of_two_arrays(self):
        page16, page64 = CASES[0], CASES[1]
        assert limit(page16, "separate", newest=False) == 1.19
        assert limit(page64, "separate", newest=True) == 0.75
        assert limit(page16, "stock", newest=False) is None
