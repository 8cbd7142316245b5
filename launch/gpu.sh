#!/usr/bin/env bash
# Runs `salt` on all GPUs of this machine, in one process, and starts it again when it was
# interrupted (exit code 75) or failed. Makes .venv first.
#
#   launch/gpu.sh [FLAGS] -- salt train --gin_file=hardware/h100x8.gin … --output_dir=FOLDER
#
#   --cuda=13               CUDA of the wheels: 13 (driver 580 or newer) or 12 (525 or newer)
#   --max-failures=3        failures in a row after which it is started again; an interruption
#                           --min-run-seconds after the start, or later, begins the count anew
#   --min-run-seconds=600   an interruption sooner after the start counts as a failure
#   --poll-seconds=10       pause before a start
#   --dry-run               print the commands, run none
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
flag+=([cuda]=13 [max-failures]=3 [min-run-seconds]=600 [poll-seconds]=10)
numbers=(max-failures min-run-seconds poll-seconds)
read_flags "$@"
jax=$(cuda_extra)
# What `salt plan` takes for usable; JAX's own 75% leaves much of a card idle.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

run_line "source $(quoted "$root/launch/environment.sh")"
run make_environment "$jax"
if is_dry; then
  run "${command[@]}"
  exit 0
fi
while true; do
  code=0
  printf '$ %s\n' "$(quoted "${command[@]}")"
  supervise "${command[@]}" || code=$?
  if [ "$stopped" = yes ]; then
    say "stopped; the same command goes on."
    exit "$code"
  fi
  again_after "$code $SECONDS"
  sleep "${flag[poll-seconds]}"
done
