# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv with everything that runs need, once.
#
#   PYTHON=python3.12 launch/test.sh     another Python (3.11 to 3.13; the newest one found by default)
#   VENV=FOLDER launch/test.sh           another place for the environment

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 "$HOME"/.pyenv/versions/3.1[123].*/bin/python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "launch: no Python 3.11, 3.12 or 3.13 was found; set PYTHON=/path/to/python." >&2
  return 2
}

# make_environment [tests|tpu|cuda12|cuda13]: with "tests" also what only tests need
# (requirements/tests-*.txt), with another word that extra of jax.
make_environment() {
  if [ ! -x "$venv/bin/python" ]; then
    local python
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  local version lock stamp wanted locks jax=''
  version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  lock=$root/requirements/lock-$version.txt
  stamp=$venv/.salt_jax_installed
  locks=("$lock")
  # Once there, they stay: the smoke run after the tests takes nothing away.
  if [ "${1:-}" = tests ] || grep -q '^tests-' "$stamp" 2>/dev/null; then
    locks+=("$root/requirements/tests-$version.txt")
  fi
  if [[ ${1:-} =~ ^(tpu|cuda) ]]; then
    jax="jax[$1]"
  fi
  wanted=$(cat "${locks[@]}" "$root/setup.py" | cksum; echo "$root"; basename -a "${locks[@]}"; echo "$jax")
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the exact versions of $(basename -a "${locks[@]}" | xargs) in requirements/ (some minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${locks[@]/#/--requirement=}" ${jax:+"$jax"}
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable "$root"
    echo "$wanted" > "$stamp"
  fi
  export PATH=$venv/bin:$PATH
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
}
