#!/usr/bin/env bash
# Runs every check: ruff, mypy and pytest. Makes .venv first if there is none.
#
#   launch/test.sh                          everything, on up to four cores
#   launch/test.sh --quick                  a part of every test file, in some minutes
#   launch/test.sh tests/distill -k oracle  arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment tests
cd "$root"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Halves what compiling takes, where XLA has this flag: with one that it doesn't know it ends the process.
quick_compiles="--xla_cpu_use_fusion_emitters=false ${XLA_FLAGS:-}"
if (XLA_FLAGS=$quick_compiles python -c 'import jax; jax.devices()') 2> /dev/null; then
  export XLA_FLAGS=$quick_compiles
fi
ruff check .
ruff format --check .
mypy
# A file's tests stay together: they share what is slow to make.
if [ $# -eq 0 ] || [ "$*" = --quick ]; then
  set -- "$@" --numprocesses=auto --maxprocesses=4 --dist=loadfile
fi
exec python -m pytest "$@"
