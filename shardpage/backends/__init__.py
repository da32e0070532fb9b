"""The per-device backends: one file each, one function each.

`attend(query, key_cache, value_cache, pages, spec) -> Partial` attends over the pages that
this device holds. A backend knows nothing of meshes, sinks, windows or invalid tables.
"""

import importlib
from collections.abc import Callable

from ..partial import Partial

Attend = Callable[..., Partial]

_MODULES = {"xla": ".xla", "pallas_tpu": ".pallas_tpu"}
_PLATFORM_DEFAULTS = {"tpu": "pallas_tpu"}

NAMES = tuple(_MODULES)


def default_for(platform: str) -> str:
    """The backend that a platform ("cpu", "gpu", "tpu") gets when none is named."""
    return _PLATFORM_DEFAULTS.get(platform, "xla")


def load(name: str) -> Attend:
    """Imports a backend by name; its imports are paid for on first use."""
    return importlib.import_module(_MODULES[name], __name__).attend
