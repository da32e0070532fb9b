"""Device meshes for one host, one slice or many: from a line of text to a `jax.sharding.Mesh`.

Importing this package touches no device. See README.md for the grammar and the placement rules.
"""

from .collectives import Collective as Collective
from .collectives import collectives as collectives
from .heads import HeadPlan as HeadPlan
from .heads import plan_heads as plan_heads
from .make import make as make
from .simulate import simulate as simulate
from .slices import Chip as Chip
from .slices import PodSlice as PodSlice
from .slices import chips as chips
from .spec import MeshAxis as MeshAxis
from .spec import MeshSpec as MeshSpec
from .spec import factorings as factorings
from .topology import topology as topology
