"""Our adapters called as ejkernel's kernels are, which its tests call and its users do not."""

import functools
import inspect

from shardpage.adapters import ejkernel

# They tune a kernel; a user has them chosen by the module around it.
_KNOBS = {"chunk_prefill_size", "num_kv_pages_per_block", "num_queries_per_block"}
# As some of its tests still call an argument.
RENAMED = {"attention_sink": "softmax_aux"}


def kernel(call, **options):
    """`call`, where all arguments may be named and some only tune; `options` are added."""
    parameters = inspect.signature(call).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]

    @functools.wraps(call)
    def as_kernel(*args, **named):
        named = {RENAMED.get(k, k): value for k, value in named.items() if k not in _KNOBS}
        args += tuple(named.pop(name, None) for name in positional[len(args) :])
        return call(*args, **named, **options)

    return as_kernel


# As ejkernel's tests name theirs. The caches of their tests fit two layouts: say which.
XLA_PAGE = {"page_attention": kernel(ejkernel.page_attention, kv_layout="blocks_first")}
TPU_PAGE = {"page_attention": kernel(ejkernel.page_attention, kv_layout="heads_first")}
V2 = {"ragged_page_attention_v2": kernel(ejkernel.ragged_page_attention_v2)}
V3 = {"ragged_page_attention_v3": kernel(ejkernel.ragged_page_attention_v3)}
TRITON_V3 = {"triton_ragged_page_attention_v3": V3["ragged_page_attention_v3"]}
UNIFIED = {"unified_attention": kernel(ejkernel.unified_attention)}
