"""The per-device backends: one file each, one function each.

`attend(query, key_cache, value_cache, pages, spec) -> Partial` attends over the pages that
this device holds. A backend knows nothing of meshes, sinks, windows or invalid tables.

`write(kv, key_cache, value_cache, key, value, page_ids, slots) -> (key_cache, value_cache)` puts
tokens `[num_tokens, num_kv_heads, head_dim]` into slots of local pages, in place; a page id
outside the cache drops its token.
"""

import importlib
from collections.abc import Callable
from typing import Any

from ..partial import Partial

_ATTEND = {"xla": ".xla", "pallas_tpu": ".pallas_tpu"}
_WRITE = {"xla": ".xla_write", "pallas_tpu": ".pallas_tpu_write"}
_PLATFORM_DEFAULTS = {"tpu": "pallas_tpu"}

NAMES = tuple(_ATTEND)


def default_for(platform: str) -> str:
    """The backend that a platform ("cpu", "gpu", "tpu") gets when none is named."""
    return _PLATFORM_DEFAULTS.get(platform, "xla")


def load(name: str) -> Callable[..., Partial]:
    """The `attend` of a backend, imported on first use."""
    return importlib.import_module(_ATTEND[name], __name__).attend


def load_write(name: str) -> Callable[..., tuple[Any, Any]]:
    """The `write` of a backend, imported on first use."""
    return importlib.import_module(_WRITE[name], __name__).write
