"""The TPU backend: Pallas kernels, one persistent program per TensorCore. See README.md."""

from .attend import attend as attend
from .attend import prepare as prepare
from .config import has as has
from .write import prepare_writes as prepare_writes
from .write import write as write
