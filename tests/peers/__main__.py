"""Runs another library's own tests on our adapter: `python -m tests.peers PEER CHECKOUT [...]`.

PEER is one of `PEERS`; CHECKOUT is a checkout of it, of which nothing is copied or changed; what
follows goes to pytest (`-k basic`, `-x`).
"""

import os
import sys
from pathlib import Path

import jax
import pytest

from .hooks import Hooks
from .peers import PEERS


def main() -> int:
    """Parses the command line and runs pytest in the checkout; returns its exit status."""
    if len(sys.argv) < 3 or sys.argv[1] not in PEERS:
        print(f"usage: python -m tests.peers {{{','.join(PEERS)}}} CHECKOUT [pytest's arguments]")
        return 2
    peer, checkout = PEERS[sys.argv[1]], Path(sys.argv[2]).resolve()
    files = [str(checkout / name) for name in peer.tests]
    if missing := [name for name in files if not Path(name).exists()]:
        print(f"{checkout} has no {', '.join(missing)}; is it a checkout of {sys.argv[1]}?")
        return 2
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", peer.devices)
    rest, sys.argv[1:] = sys.argv[3:], []  # absl reads what is left
    options = ["-c", os.devnull, f"--rootdir={checkout}", "-p", "no:cacheprovider", "--noconftest"]
    options += ["--import-mode=importlib"]
    return pytest.main([*options, "-q", *rest, *files], plugins=[Hooks(peer, checkout)])


if __name__ == "__main__":
    sys.exit(main())
