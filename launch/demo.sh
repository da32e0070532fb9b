#!/usr/bin/env bash
# A real language model answers three prompts, its attention paged and sharded over eight simulated
# devices. Needs Python 3.11 to 3.13 and pip, nothing else; the first start takes a few minutes to
# install (about 700 MB in .venv), later ones are running in seconds.
#
#   bash launch/demo.sh                                        the demo
#   bash launch/demo.sh --prompt "Why is the sky blue?"        your own prompts
#   bash launch/demo.sh --mesh data=2,kv=3 --json out.json     any option of shardpage generate
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_project demo
# Compiled programs are kept: the second start does not compile.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$VENV/compiled}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

arguments=("$@")
[[ " $* " == *" --mesh"* ]] || arguments=(--mesh "data=2,context=4" "${arguments[@]}")
if [[ " $* " != *" --prompt"* && " $* " != *" -p "* ]]; then
  arguments+=(
    --prompt "What is the capital of France?"
    --prompt "Write a haiku about the sea."
    --prompt "Explain in two sentences why the sky is blue."
  )
fi
say "shardpage generate ${arguments[*]}"
exec "$VENV/bin/shardpage" generate "${arguments[@]}"
