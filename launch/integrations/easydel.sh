#!/usr/bin/env bash
# Runs EasyDeL 0.3.0 on shardpage, on eight simulated devices: its attention operation against the tests'
# oracle (a minute), and its engine eSurge with SmolLM2-135M against transformers' tokens (three minutes a
# mesh). The first time it makes an environment of its own, with the JAX that EasyDeL pins (minutes).
# Arguments go to pytest.
#
#   bash launch/integrations/easydel.sh -k dp2_tp3
set -euo pipefail
VENV=${VENV:-.venv-easydel}
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

cd "$ROOT"
export PIP_CONSTRAINT=.ci/oldest.txt # jax 0.9.2; relative, since pip splits it at spaces
install_project test
if [[ ! -f $VENV/.easydel ]]; then
  say "adding EasyDeL (minutes)"
  pip_install "$VENV/install.log" easydel==0.3.0 ejkernel==0.0.78 pillow
  touch "$VENV/.easydel"
fi
# Its imports warn, and it mixes dtypes: without the settings of the suite.
exec "$VENV/bin/python" -m pytest -c /dev/null --rootdir . \
  launch/integrations/test_easydel.py launch/integrations/test_esurge.py "$@"
