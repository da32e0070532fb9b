"""Which tests are slow: all said here. `-m "not slow"` leaves them out."""

import itertools
import re
from pathlib import Path

import pytest

from .backends import INTERPRETED

# By what a test is given: interpreted kernels, and two axes at once where all three are quick.
RULES = {"backend": INTERPRETED, "mesh_spec": ("data=4,kv=2", "data=2,context=4", "kv=2,context=4")}

# By name, one or more lines per reason: `*` is any text, `{a,b}` is one pattern per word, and `!`
# excepts from what the lines before it say. `test_slow.py` finds a pattern without a test.
NAMES = """
# Kernels interpreted without a `backend` to tell it by; each shows one quick example.
test_pallas_tpu.py::test_shapes[*]
!test_pallas_tpu.py::test_shapes[g5k2]
test_pallas_tpu.py::test_packed_rows_see_no_token_of_another[*]
!test_pallas_tpu.py::test_packed_rows_see_no_token_of_another[64-16-fused]
test_pallas_tpu.py::test_packed_rows_with_any_number_of_queries[{64-9,64-71,32-5,16-3}]
test_pallas_tpu.py::test_many_blocks_of_a_sequence[*]
test_pallas_tpu.py::test_sequences_that_share_a_step_share_no_nan[*]
test_pallas_tpu.py::TestPagedTables::test_matches_the_oracle[*]
test_pallas_tpu.py::TestRuns::test_match*[*]
test_pallas_tpu.py::TestRuns::{test_with_tables*,test_ids_that*}
!test_pallas_tpu.py::TestRuns::test_match_the_oracle[bf16-*]
test_pallas_tpu.py::TestMegacore::{test_two_cores[*],test_one_sequence*,test_splits_and_cores*}
test_pallas_tpu.py::test_write_puts_what_xla_puts[{float32-128,bfloat16-64,bfloat16-80,float32-192}-*]
test_pallas_tpu.py::test_write_puts_what_xla_puts[bfloat16-256-*-{random,swapped}]
test_pallas_tpu.py::test_write_puts_what_xla_puts[*-heads_first-{prompt,swapped}]
test_pallas_tpu.py::test_write_puts_what_xla_puts[float8*]
test_pallas_tpu.py::test_write_puts_what_xla_puts[int8-*-{random,swapped}]
test_pallas_gpu.py::TestInterpreted::test_attend[*]
test_pallas_gpu_quantised.py::TestInterpreted::{test_written*,test_what_is*}
!test_pallas_gpu_quantised.py::TestInterpreted::test_written*[int8-token-*]
test_pallas_gpu.py::TestLowersForCuda::test_attend[*]
!test_pallas_gpu.py::TestLowersForCuda::test_attend[decode-*]
test_pallas_gpu_parts.py::TestTiles::test_hold_each_query_once[{1,2,3}]

# More of what one quick example shows: other layouts, dtypes, meshes, drawn shapes.
test_attention.py::test_matches_the_oracle[xla-{plain,bf16,page1,window}-{heads_first,fused}]
test_attention.py::test_matches_the_oracle[xla-one_long_sequence-{heads_first,fused}]
test_attention.py::test_matches_the_oracle[xla-everything-{blocks_first,fused}]
test_attention.py::test_as_formulated_for_gpus[{1-float32,9-bfloat16}]
test_attention.py::TestAnyInput::test_shapes_and_options[*]
test_attention.py::TestMemory::test_of_a_serving_batch_fits_96_mb[float32-*]
test_cache.py::test_each_device_writes_its_own_pages[*]
!test_cache.py::test_each_device_writes_its_own_pages[*-data=2,kv=2,context=2]
test_fuzz.py::test_drawn_calls[xla-data=2,kv=2,context=2]
test_contexts.py::TestSettings::test_that_concern_types[*-kv=2,context=2-xla]
test_extremes.py::TestExtremeOptions::*[*kv=2,context=2-xla]
!test_extremes.py::TestExtremeOptions::test_logits_near*[kv=2,context=2-xla]
test_extremes.py::TestWhatGrows::test_columns_past*[context=2]
test_jit.py::test_an_eager_call_is_one_program_and_moves_nothing[decodes-*]
test_attention.py::TestMemory::test_follows_the_work[many sequences-*]
test_attention.py::TestMemory::test_follows_the_work[{many splits,a window in it}-*-context=2]
test_files.py::test_control_tokens_in_a_prompt_are_text_unless_raw
test_sharding.py::test_every_mesh_gives_the_oracles_numbers[*-Explicit-plain]
test_sharding.py::test_pages_may_lie_on_any_context_shard[window-*]
test_sharding.py::test_gradients_do_not_depend_on_the_mesh
test_sharding.py::test_small_partials_merge_in_one_collective_on_gpus[data=2,kv=2,context=2]
test_sharding.py::test_large_partials_merge_in_two_on_gpus
test_transfer.py::test_running_sequences_go_on_elsewhere[mixed-*]
test_meshes.py::TestPlanHeads::test_works_end_to_end[{heads1,heads2}-*]
test_meshes.py::TestPlanHeads::test_eight_heads_on_sixteen_devices
test_step.py::test_every_mesh_gives_the_oracles_numbers[*]
!test_step.py::test_every_mesh_gives_the_oracles_numbers[data=2,context=2,kv=2-mixed]
test_step.py::test_pages_may_lie_on_any_context_shard[*]
!test_step.py::test_pages_may_lie_on_any_context_shard[contiguous-chunk]
test_step.py::test_any_lengths_masks_and_places
test_step.py::test_gradients_are_those_of_finite_differences[*]
!test_step.py::test_gradients_are_those_of_finite_differences[None-mixed]
test_tpu_token_major.py::{test_written*,test_quantised,test_cores*,test_a_nan*}[*]
test_tpu_token_major.py::test_on_a_mesh
!test_tpu_token_major.py::test_written*[{interleaved_words-window,tokens_first-bf16}-*]
test_step.py::test_interpreted_kernels[*]
!test_step.py::test_interpreted_kernels[prompt-*]
test_tpu_prompts.py::test_packed_rows_are_those_of_other_backends[*]
test_step.py::test_heads_of_the_output_may_stay_split_over_context[context=4]
test_step.py::test_pages_as_other_libraries_keep_them[*]
!test_step.py::test_pages_as_other_libraries_keep_them[data=2,context=2,kv=2-interleaved_words-64]
test_adapters.py::TestJax::test_ragged[*]
!test_adapters.py::TestJax::test_ragged[{decoding,window}]
test_adapters.py::TestTpuInference::{test_v3,test_hd64}[*]
!test_adapters.py::TestTpuInference::{test_v3[one_head],test_v3[window],test_hd64[sinks]}
test_adapters.py::TestSglangJax::test_matches_the_oracle[*]
!test_adapters.py::TestSglangJax::test_matches_the_oracle[pages_of_one_token]
test_adapters.py::TestEjkernel::{test_v2[window],test_v3[sinks],test_v3[padded_rows]}
test_adapters.py::TestEjkernel::{test_v2[decoding],test_v3[window],test_unified[window]}
test_adapters.py::TestEjkernel::{test_v2[cap_and*],test_v3[float16],test_v3[shared_with*],test_v3[dim80]}
test_adapters.py::TestEjkernel::test_unified[all_options]
test_adapters_gradients.py::*[{jax,ejkernel_v2,tpu_inference,hd64,sglang}]
test_layers.py::test_layers_of_a_scan_are_caches_of_their_own[*]
!test_layers.py::test_layers_of_a_scan_are_caches_of_their_own[None-blocks_first]
test_layers.py::test_a_scan_copies_no_cache_and_plans_nothing[*-mixed-*]
test_layers.py::test_interpreted_kernels_know_layers[*]
test_invariance.py::test_shards_of_sequences_and_heads_change_no_bit[*]
!test_invariance.py::test_shards_of_sequences_and_heads_change_no_bit[kv=4]
test_quantised.py::test_written_and_attended_to[*]
!test_quantised.py::test_written_and_attended_to[int8-token-{fused,blocks_first}-*]
!test_quantised.py::test_written_and_attended_to[float8_e4m3fn-head-interleaved-*]
!test_quantised.py::test_written_and_attended_to[float8_e5m2-head-interleaved_words-*]
test_quantised.py::test_chips_that_multiply_other_dtypes[{int8-head,float8}*]
test_quantised.py::test_interpreted_kernels[*]
!test_quantised.py::test_interpreted_kernels[int8-token-fused-False-None]
!test_quantised.py::test_one_token_a_sequence[{int8-token,float8_e4m3fn-head}-page64-pallas_tpu]
test_quantised.py::test_every_mesh_gives_the_oracles_numbers[*]
!test_quantised.py::test_every_mesh*[*-data=2,context=2,kv=2-*]
test_quantised.py::test_layers_of_a_scan_are_caches_of_their_own[*]
!test_quantised.py::test_layers_of_a_scan_are_caches_of_their_own[int8-*]
test_quantised_cache.py::test_attending_widens_no_cache[256-*]
test_step.py::test_gradients_go_through_a_write[1]

# Compiled for every generation of TPU, for whole slices, or measured.
test_tpu_aot.py::test_attention_compiles_without_a_copy_of_the_cache[*]
!test_tpu_aot.py::test_attention_compiles*[{g8k1-v6e,g4k8-tpu7x,dim64-v4,dim80-v5p}:*]
test_tpu_aot.py::test_prompts_compile_without_a_copy_of_the_cache[*]
!test_tpu_aot.py::test_prompts_compile_without_a_copy_of_the_cache[g8k1-v6e:2x2-*]
test_tpu_aot.py::test_write_updates_the_cache_in_place[*]
!test_tpu_aot.py::test_write_updates_the_cache_in_place[{page8-tpu7x,dim64-v5p,dim80-v4}:*]
test_tpu_aot.py::test_tables_that_do_not_fit_scalar_memory[1024-*]
test_tpu_quantised.py::test_a_step_compiles*[*]
!test_tpu_quantised.py::test_a_step_compiles*[v6e:2x2-int8-*]
test_tpu_aot.py::test_a_step_of_generate*[*]
!test_tpu_aot.py::test_a_step_of_generate*[v5e:*]
test_tpu_aot.py::test_megacore_compiles[*]
test_tpu_token_major.py::TestExecuted::test_decode*[tpu7x*]
test_schedule.py::TestCompiled::*
!test_schedule.py::TestCompiled::test_the_kernel_fetches_each_page_of_each_sequence_once[v5e*]
!test_schedule.py::TestCompiled::test_defaults_compile[{5,10,13}]
test_plan.py::TestEstimate::{test_the_largest_batch_fits*,test_too_much_for_one_layer*}
test_plan.py::TestIssue::{test_agrees_with*,test_of_many_tokens*,test_both_cores_of_a_chip*,test_quantised*}
test_plan.py::TestIssue::{test_chunks_of_prompts,test_of_a_chunk_only*}
test_plan_command.py::TestSearch::test_stops_when_no_other_can_win_and_is_right
test_plan_command.py::TestPod::*
test_bench.py::TestDecode::test_calls_of_one_program_have_tables_of_their_own
test_bench.py::TestSharded::test_a_split_is_as_exact_as_one_device[*]
test_bench.py::TestCommand::*
test_bench.py::TestSteps::{test_right_answers*,test_a_program*[shardpage*]}

# A model that answers prompts, in one process or several; processes that wait for each other.
test_generate.py::test_all_prompts_a_row_each_give_the_tokens_of_an_outside_implementation
test_generate.py::test_any_mesh_gives_the_answers_of_a_dense_model[*]
test_generate.py::test_page_and_chunk_sizes_do_not_change_answers[*]
test_generate.py::{test_prompts_wait_for_pages*,test_samples_depend_on_the_seed*,test_running_answers_move*}
test_cli.py::{test_a_prompt_too_long*,test_a_signal_ends_the_run*,test_verify_is_exact*}
test_launch_generate.py::*
test_launch_cluster.py::test_mpirun[fail-1]
test_launch_faults.py::test_{kill_rank_1*,exception_in_one_rank*,stopped_rank,sigterm_to_a_rank}
test_launch_faults.py::test_rank_{that_sleeps*,missing_at_start,that_ends_before*,failing_after*}
test_launch_faults.py::test_{barrier_names_the_missing_rank,plain_sys_exit_in_one_rank*}
"""


def _expand(line: str) -> list[str]:
    """The patterns that one with `{a,b}` stands for."""
    parts = re.split(r"\{(.*?)\}", line)
    words = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*words)]


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.removeprefix("!").split("*"))))


_LINES = [line for line in NAMES.splitlines() if line and not line.startswith("#")]
_PATTERNS = {pattern: _compiled(pattern) for line in _LINES for pattern in _expand(line)}

STALE = pytest.StashKey[list[str] | None]()  # patterns without a test; None: not all are collected


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files, used = set(), set()
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        files.add(name.partition("::")[0])
        call = getattr(item, "callspec", None)
        slow = call is not None and any(call.params.get(key) in RULES[key] for key in RULES)
        for pattern, compiled in _PATTERNS.items():
            if slow == pattern.startswith("!") and compiled.fullmatch(name):
                slow = not slow
                used.add(pattern)
        if slow:
            item.add_marker(pytest.mark.slow)
    config.stash[STALE] = _stale(files, used) if _all_collected(config) else None


def _all_collected(config: pytest.Config) -> bool:
    here = Path(__file__).parent
    narrowed = ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise")
    paths = {(config.invocation_params.dir / arg).resolve() for arg in config.args}
    return paths <= {here, here.parent} and not any(config.getoption(o, None) for o in narrowed)


def _stale(files: set[str], used: set[str]) -> list[str]:
    """A file that is there and has no test was skipped, for what is not installed."""
    skipped = {path.name for path in Path(__file__).parent.glob("test_*.py")} - files
    unused = [pattern for pattern in _PATTERNS if pattern not in used]
    return [pattern for pattern in unused if pattern.strip("!").split("::")[0] not in skipped]
