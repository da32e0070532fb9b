"""Everything one starts from a shell: `shardpage JOB ...`, also as `python -m launch`.

Importing this package touches no device and does not import JAX. Scripts of one's own use
`launch.bootstrap` and `launch.guard`, which are modules of `launch.processes`.
"""

import sys

from .processes import bootstrap as bootstrap
from .processes import guard as guard

# `import launch.guard` gives the same module, not a second one with its own state.
sys.modules["launch.bootstrap"], sys.modules["launch.guard"] = bootstrap, guard
