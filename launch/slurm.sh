#!/usr/bin/env bash
# Runs `salt` on GPU nodes through SLURM, one process a GPU, and queues it again when it was
# interrupted (exit code 75: preempted, or the time limit came) or failed. Makes .venv and a copy of
# the last commit first, in folders that all nodes must see.
#
#   launch/slurm.sh --name=NAME [FLAGS] -- salt train --output_dir=FOLDER …
#
#   --name=NAME            of the job
#   --folder=FOLDER        for the copy, the log, how tasks ended and the count of failures; runs/slurm/NAME by default
#   --nodes=1
#   --gpus-per-node=8
#   --time=LIMIT           as 24:00:00; the partition's by default
#   --partition=PARTITION  the cluster's by default
#   --cuda=13              CUDA of the wheels: 13 (driver 580 or newer) or 12 (525 or newer)
#   --save-seconds=300     SIGTERM so long before the time limit
#   --extra=FLAG           one more flag for sbatch, as --extra=--account=TEAM; repeat it
#   --max-failures=3       failures in a row after which it is started again; an interruption
#                          --min-run-seconds after the start, or later, begins the count anew
#   --min-run-seconds=600  an interruption sooner after the start counts as a failure
#   --dry-run              print the commands, run none
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
flag+=([name]='' [folder]='' [nodes]=1 [gpus-per-node]=8 [time]='' [partition]='' [cuda]=13 [save-seconds]=300)
flag+=([extra]='' [max-failures]=3 [min-run-seconds]=600)
needed=(name)
numbers=(nodes gpus-per-node save-seconds max-failures min-run-seconds)
read_flags "$@"
command[0]=${VENV:-$root/.venv}/bin/salt
among_several
jax=$(cuda_extra)
commit=$(commit_to_send)

folder=${flag[folder]:-$root/runs/slurm/${flag[name]}}
[[ $folder == /* ]] || folder=$PWD/$folder
limits=()
[ -z "${flag[time]}" ] || limits+=(--time="${flag[time]}")
[ -z "${flag[partition]}" ] || limits+=(--partition="${flag[partition]}")

if ! is_dry && [ -n "$(squeue --noheader --me --name="${flag[name]}")" ]; then
  refuse "a job called ${flag[name]} is queued or running, from the same folder: cancel it, or change --name."
fi
run_line "source $(quoted "$root/launch/environment.sh")"
run make_environment "$jax"
run rm -rf "$folder/salt_jax" "$folder/failures"
run mkdir -p "$folder/salt_jax"
run_line "$(quoted git -C "$root" archive "$commit") | $(quoted tar --extract --directory="$folder/salt_jax")"
# JAX takes a process a GPU under SLURM.
run sbatch --job-name="${flag[name]}" --nodes="${flag[nodes]}" --gpus-per-node="${flag[gpus-per-node]}" \
  --ntasks-per-node="${flag[gpus-per-node]}" "${limits[@]}" --requeue --signal="TERM@${flag[save-seconds]}" \
  --open-mode=append --output="$folder/log" "${extra[@]}" \
  "$folder/salt_jax/launch/slurm_job.sh" "$folder" "${flag[max-failures]}" "${flag[min-run-seconds]}" "${command[@]}"
say "what it says: $(quoted tail --follow=name --retry "$folder/log")"
