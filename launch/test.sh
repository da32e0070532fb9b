#!/usr/bin/env bash
# Runs the tests, installing what they need first. Arguments go to pytest.
#
#   bash launch/test.sh                                        everything, slow tests too
#   bash launch/test.sh -m "not slow"                          the quick ones
#   bash launch/test.sh -n 0 tests/test_cache.py               one file, in one process
#   VENV=.venv312 SHARDPAGE_PYTHON=python3.12 bash launch/test.sh     the newest JAX: Python 3.12
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_project test
# Compiling for TPUs needs libtpu, which exists for Linux on x86-64; without it those tests skip.
install_optional tpu
cd "$ROOT"
# What takes their time is compilation, a thread each: two processes.
say "pytest -n 2 --dist worksteal $*"
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal "$@"
