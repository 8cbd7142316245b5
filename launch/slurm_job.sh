#!/usr/bin/env bash
# The batch job of slurm.sh: FOLDER MAX_FAILURES MIN_RUN_SECONDS COMMAND…. Runs the command as one
# task a GPU and queues the job again when the endings of all say so. The count of failures is in a
# file of the folder, from one start to the next.
folder=$1
# shellcheck source=common.sh
source "$folder/salt_jax/launch/common.sh"
flag[max-failures]=$2 flag[min-run-seconds]=$3
shift 3
# SLURM runs a copy of this file under another name.
program=slurm_job.sh
# The environment was installed from the clone; what runs is the copy.
export PYTHONPATH=$folder/salt_jax
# What `salt plan` takes for usable; JAX's own 75% leaves much of a card idle.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

rm -rf "$folder/endings"
srun --kill-on-bad-exit=0 "$folder/salt_jax/launch/worker.sh" record "$folder/endings" "$@" || true
mapfile -t endings < <(cat "$folder"/endings/* 2>/dev/null)
if [ ${#endings[@]} -lt "${SLURM_NTASKS:-1}" ]; then
  endings+=("137 0") # killed together with what was to write its ending
fi
failures=$(cat "$folder/failures" 2>/dev/null || echo 0)
again_after "${endings[@]}"
echo "$failures" >"$folder/failures"
exec scontrol requeue "$SLURM_JOB_ID"
