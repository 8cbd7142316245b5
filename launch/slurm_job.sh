#!/usr/bin/env bash
# The batch job of slurm.sh: FOLDER MAX_FAILURES COMMAND…. Runs the command as one task a GPU and
# queues the job again when the exit codes of all say so.
folder=$1
# shellcheck source=common.sh
source "$folder/salt_jax/launch/common.sh"
flag[max-failures]=$2
shift 2
# SLURM runs a copy of this file under another name.
program=slurm_job.sh
# The environment was installed from the clone; what runs is the copy.
export PYTHONPATH=$folder/salt_jax

rm -rf "$folder/codes"
srun --kill-on-bad-exit=0 "$folder/salt_jax/launch/worker.sh" record "$folder/codes" "$@" || true
mapfile -t codes < <(cat "$folder"/codes/* 2>/dev/null)
if [ ${#codes[@]} -lt "${SLURM_NTASKS:-1}" ]; then
  codes+=(137) # killed together with what was to write its code
fi
failures=$(cat "$folder/failures" 2>/dev/null || echo 0)
again_after "${codes[@]}"
echo "$failures" >"$folder/failures"
exec scontrol requeue "$SLURM_JOB_ID"
