#!/usr/bin/env bash
# What would run on v5p:2x2x2: 2 hosts of 4 chips, 8 devices, played on this machine:
# as many processes, each with that many simulated devices, joined by jax.distributed.
#
#   bash launch/local.sh                               compare page attention with the oracle
#   bash launch/local.sh generate --prompt "Hello"     any job, or a command: python my.py
set -euo pipefail
(($#)) || set -- verify
exec "${PYTHON:-python3}" -m launch simulate \
  --processes 2 --devices-per-process 4 --mesh data=2,context=4 -- "$@"
