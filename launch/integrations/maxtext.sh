#!/usr/bin/env bash
# Decodes with MaxText 0.2.5's model on shardpage, against MaxText's own engine, and with a plain
# flax.nnx loop whose cache orbax saves; on one and on four simulated devices. The first time it makes
# an environment of its own (minutes), with Python 3.12, which MaxText needs. Arguments go to pytest.
#
#   bash launch/integrations/maxtext.sh -k context2_tensor2
set -euo pipefail
VENV=${VENV:-.venv-maxtext}
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

cd "$ROOT"
CANDIDATES=python3.12
PINS=launch/integrations/maxtext.txt
export PIP_CONSTRAINT=$PINS # relative, since pip splits it at spaces
install_project test
if [[ ! -f $VENV/.maxtext ]]; then
  say "adding MaxText (minutes)"
  pip_install "$VENV/install.log" --requirement "$PINS"
  pip_install "$VENV/install.log" --no-deps maxtext==0.2.5
  touch "$VENV/.maxtext"
fi
# Its imports and its code warn: without the settings of the suite.
exec "$VENV/bin/python" -m pytest -c /dev/null --rootdir . \
  launch/integrations/test_maxtext.py launch/integrations/test_flax.py "$@"
