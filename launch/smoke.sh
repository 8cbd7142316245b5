#!/usr/bin/env bash
# SALT end to end on real text, on this machine, in some minutes. Makes .venv first if there is none.
#
#   launch/smoke.sh [OUTPUT_DIR]                    on this machine's own text: Python's library
#   SALT_TEXT='notes/**/*.md' launch/smoke.sh       on files of your own
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
output=${1:-$root/runs/smoke}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec salt smoke --output_dir="$output" ${SALT_TEXT:+--text="$SALT_TEXT"}
