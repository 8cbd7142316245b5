#!/usr/bin/env bash
# Runs `salt` on TPU slices of a GKE cluster, through xpk. Kubernetes starts it again when it was
# interrupted (exit code 75), killed, or a node was taken away; any other failure ends it. Each such
# start counts towards --max-restarts (failurePolicy.maxRestarts of the JobSet), however long the one
# before ran, and nothing sets that count back: it is what bounds a loop of interruptions.
#
#   launch/gke_xpk.sh --cluster=CLUSTER --workload=NAME --tpu-type=TYPE --image=IMAGE [FLAGS] -- salt train …
#
#   --cluster=CLUSTER     made by `xpk cluster create`
#   --workload=NAME       of this run
#   --tpu-type=TYPE       v5litepod-256, v6e-256, v5p-256, v4-256
#   --image=IMAGE         a container made of launch/Dockerfile: REGION-docker.pkg.dev/PROJECT/REPOSITORY/salt_jax:TAG
#   --build               make the container from the last commit, and push it, first
#   --slices=1            so many of them (multi-slice)
#   --project=PROJECT     by default gcloud's
#   --zone=ZONE           by default gcloud's
#   --extra=FLAG          one more flag for `xpk workload create`, as --extra=--storage=NAME; repeat it
#   --max-restarts=100    such starts, before giving up
#   --grace-seconds=120   time to save after SIGTERM
#   --detach              do not wait for the end
#   --dry-run             print the commands, run none
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
flag+=([cluster]='' [workload]='' [tpu-type]='' [image]='' [build]=no [slices]=1 [project]='' [zone]='')
flag+=([extra]='' [max-restarts]=100 [grace-seconds]=120 [detach]=no)
switches+=(build detach)
needed=(cluster workload tpu-type image)
numbers=(slices max-restarts grace-seconds)
read_flags "$@"
among_several

place=(--cluster="${flag[cluster]}")
[ -z "${flag[project]}" ] || place+=(--project="${flag[project]}")
[ -z "${flag[zone]}" ] || place+=(--zone="${flag[zone]}")

if [ "${flag[build]}" = yes ]; then
  commit=$(commit_to_send)
  run_line "$(quoted git -C "$root" archive "$commit") | $(quoted docker build --platform=linux/amd64 --file=launch/Dockerfile --build-arg=JAX=tpu --tag="${flag[image]}" -)"
  run docker push "${flag[image]}"
fi

# xpk puts it into `( … ) &` of a shell: with exec, SIGTERM reaches salt. Kubernetes reads $$ as $.
line="exec $(quoted "${command[@]}")"
run xpk workload create "${place[@]}" --workload="${flag[workload]}" --tpu-type="${flag[tpu-type]}" --num-slices="${flag[slices]}" \
  --docker-image="${flag[image]}" --restart-on-exit-codes=75 --max-restarts="${flag[max-restarts]}" \
  --termination-grace-period-seconds="${flag[grace-seconds]}" "${extra[@]}" --command="${line//\$/\$\$}"

say "it goes on without this script; end it with: $(quoted xpk workload delete "${place[@]}" --workload="${flag[workload]}")"
say "what it says: $(quoted kubectl logs --follow --prefix --selector="jobset.sigs.k8s.io/jobset-name=${flag[workload]}")"
if [ "${flag[detach]}" = no ]; then
  run xpk workload list "${place[@]}" --wait-for-job-completion="${flag[workload]}"
fi
