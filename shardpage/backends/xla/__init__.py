"""The portable backend: XLA operations only, for CPUs, GPUs and TPUs alike."""

from .attend import attend as attend
from .walk import prepare as prepare
from .write import prepare_writes as prepare_writes
from .write import write as write
