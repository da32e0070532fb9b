"""Device meshes for one host, one slice or many: from a line of text to a `jax.sharding.Mesh`.

Importing this package touches no device. See README.md for the grammar and the placement rules.
"""

from .make import make as make
from .simulate import simulate as simulate
from .spec import MeshAxis as MeshAxis
from .spec import MeshSpec as MeshSpec
from .spec import factorings as factorings
