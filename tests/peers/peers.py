"""The peers: whose functions are replaced by which of ours, in which of their test files."""

import dataclasses
import unittest
from collections.abc import Callable, Mapping

import numpy as np

from shardpage.adapters import jax_pallas, sglang_jax, tpu_inference

from . import kernels, stand_ins

_none = dict  # of what a peer does not need


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library. A function of theirs is "module:function".

    Attributes:
      tests: its test files, in its checkout, and in each the names that it gives their functions
        and ours in their place. What else it has from them stays theirs: to compare with.
      replaced: functions of theirs, and ours in their place wherever they are imported from.
      folder: where in the checkout its packages are.
      exact: functions of theirs, references, and the arguments that have them compute in float32:
        at its defaults one rounds bfloat16 logits of 32 to an eighth.
      widened: functions of theirs, references, and what gives them the numbers of a float8 cache in
        a wider dtype: they make weights, and queries, float8 of the cache's kind.
      renamed: functions of theirs, references, and arguments that tests call by an older name.
      stand_ins: functions of theirs that run on TPUs only, and what does the same.
      packages: those of its packages that are entered without running their `__init__`, which
        would import a server, and their folders in the checkout.
      stubs: modules that are not needed and would import a server or a compiler, and names that
        they must have.
      devices: how many CPU devices its tests are run on.
    """

    tests: Mapping[str, Mapping[str, Callable]]
    replaced: Mapping[str, Callable] = dataclasses.field(default_factory=_none)
    folder: str = ""
    exact: Mapping[str, dict] = dataclasses.field(default_factory=_none)
    widened: Mapping[str, Callable] = dataclasses.field(default_factory=_none)
    renamed: Mapping[str, dict[str, str]] = dataclasses.field(default_factory=_none)
    stand_ins: Mapping[str, Callable] = dataclasses.field(default_factory=_none)
    packages: Mapping[str, str] = dataclasses.field(default_factory=_none)
    stubs: Mapping[str, dict] = dataclasses.field(default_factory=_none)
    devices: int = 1


_JAX = "jax.experimental.pallas.ops.tpu."
_TPU = "tpu_inference.kernels.ragged_paged_attention.v3."
_SGL = "sgl_jax.srt."
_EJK_V3 = "ejkernel.kernels._pallas.tpu.ragged_page_attention_v3."

PEERS = {
    "jax": Peer(
        tests={
            "tests/pallas/tpu_ragged_paged_attention_test.py": {},
            "tests/pallas/tpu_paged_attention_kernel_test.py": {},
        },
        replaced={
            _JAX + "ragged_paged_attention:ragged_paged_attention": (
                jax_pallas.ragged_paged_attention
            ),
            _JAX + "paged_attention:paged_attention": jax_pallas.paged_attention,
            _JAX + "paged_attention.paged_attention_kernel:paged_attention": (
                jax_pallas.paged_attention
            ),
        },
        widened={
            _JAX + "ragged_paged_attention:ref_ragged_paged_attention": stand_ins.widened_pages
        },
    ),
    "tpu-inference": Peer(
        tests={
            "tests/kernels/ragged_paged_attention_kernel_v3_test.py": {},
            "tests/kernels/ragged_paged_attention_kernel_v3_hd64_test.py": {},
        },
        replaced={
            _TPU + "kernel:ragged_paged_attention": tpu_inference.ragged_paged_attention,
            _TPU + "kernel_hd64:ragged_paged_attention_hd64": (
                tpu_inference.ragged_paged_attention_hd64
            ),
        },
        exact={_TPU + "kernel:ref_ragged_paged_attention": {"out_dtype": np.float32}},
        widened={
            _TPU + "kernel:ref_ragged_paged_attention": stand_ins.widened,
            _TPU + "kernel_hd64:ref_ragged_paged_attention_hd64": stand_ins.widened,
        },
        packages={"tpu_inference": "tpu_inference"},
        stubs={"tpu_inference.logger": {}, "tpu_inference.utils": {}},
    ),
    "sglang-jax": Peer(
        tests={  # the last one changes the mesh that all of them set
            f"python/sgl_jax/test/test_flashattention_{name}.py": {}
            for name in ("gqa", "mha", "misc", "dp")
        },
        replaced={
            _SGL + "kernels.ragged_paged_attention.ragged_paged_attention_v3"
            ":ragged_paged_attention": sglang_jax.ragged_paged_attention
        },
        folder="python",
        stand_ins={
            _SGL + "mem_cache.memory_pool:kv_cache_update_impl": stand_ins.sglang_jax_cache_update
        },
        stubs={"sgl_jax.test.test_utils": {"CustomTestCase": unittest.TestCase}},
        devices=4,
    ),
    "ejkernel": Peer(
        tests={
            "test/kernels/_xla/test_page_attention.py": kernels.XLA_PAGE,
            "test/kernels/_xla/test_ragged_page_attention_v2.py": kernels.V2,
            "test/kernels/_xla/test_ragged_page_attention_v3.py": kernels.V3,
            "test/kernels/_xla/test_unified_attention.py": kernels.UNIFIED,
            "test/kernels/_pallas/tpu/test_page_attention.py": kernels.TPU_PAGE,
            "test/kernels/_pallas/tpu/test_ragged_page_attention_v2.py": kernels.V2,
            "test/kernels/_pallas/tpu/test_ragged_page_attention_v3.py": kernels.V3,
            "test/kernels/_triton/test_page_attention.py": kernels.XLA_PAGE,
            "test/kernels/_triton/test_ragged_page_attention_v2.py": kernels.V2,
            "test/kernels/_triton/test_ragged_page_attention_v3.py": kernels.TRITON_V3,
        },
        renamed={
            _EJK_V3 + "_pallas_impl_fwd:ref_ragged_paged_attention": kernels.RENAMED,
            _EJK_V3 + "_pallas_impl_fwd_h64:ref_ragged_paged_attention_hd64": kernels.RENAMED,
        },
        stand_ins={  # sizes for the TPU that is there, (pages, queries): in one block of all
            _EJK_V3 + "_pallas_impl_fwd_h64:get_tuned_block_sizes_h64": lambda *_: (1 << 10, 1)
        },
        stubs={"triton": {}, "triton.language": {}},
    ),
}
