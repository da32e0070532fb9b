"""The backends under test, and one way to call them all."""

import jax.numpy as jnp
import numpy as np

import shardpage

from .cases import Inputs

# Every suite that is parametrised with these runs on each of them.
BACKENDS = ("xla",)


def attend(inputs: Inputs, backend: str = "xla", **changes):
    """`page_attention` on the arrays and options of a case; returns NumPy (out, lse).

    `changes` are arguments that differ from the case's.
    """
    arguments = {
        "query": inputs.query,
        "key_cache": inputs.key_cache,
        "value_cache": inputs.value_cache,
        "context_lens": inputs.context_lens,
        "block_tables": inputs.block_tables,
        "sinks": inputs.sinks,
        "kv_layout": inputs.kv_layout,
        "backend": backend,
        **inputs.case.options,
        **changes,
    }
    arguments = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    out, lse = shardpage.page_attention(**arguments, return_lse=True)
    return np.asarray(out), np.asarray(lse)
