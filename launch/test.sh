#!/usr/bin/env bash
# Runs every check: ruff, mypy and pytest. Makes .venv first if there is none.
#
#   launch/test.sh                          everything
#   launch/test.sh tests/distill -k oracle  arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment tests
cd "$root"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
