#!/usr/bin/env bash
# Runs `salt` on a Cloud TPU: asks for it, copies and installs the last commit on all workers, starts
# the command there, shows what it says, starts it again when it was interrupted (exit code 75) or
# failed, and asks for a new TPU when this one was taken away. The command goes on without this
# script; the same script with the same flags finds it again.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --accelerator-type=TYPE [FLAGS] -- salt train …
#
#   --name=NAME              of the queued resource; its nodes are called after it
#   --zone=ZONE              us-west4-b
#   --accelerator-type=TYPE  v5litepod-256, v6e-256, v5p-256, v4-256
#   --slices=1               so many of them (multi-slice)
#   --runtime-version=NAME   the image; by default the one for JAX on that type
#   --project=PROJECT        by default gcloud's
#   --bucket=BUCKET          mount gs://BUCKET at /mnt/BUCKET on every worker
#   --profile=FIRST:LAST     steps to profile: --profile_steps of `salt train`
#   --env=NAME=VALUE         an environment variable of the command on every worker; repeat it
#   --spot                   cheaper, and may be taken away
#   --extra=FLAG             one more flag for `queued-resources create`, as --extra=--reserved; repeat it
#   --max-failures=3         failures in a row after which it is started again; an interruption
#                            --min-run-seconds after the start, or later, begins the count anew
#   --min-run-seconds=600    an interruption sooner after the start counts as a failure
#   --max-recreations=20     new TPUs after one was taken away, before giving up
#   --poll-seconds=30        between two looks, and before a start after an end
#   --delete-at-end          delete the TPU when this script ends, however it ends
#   --dry-run                print the commands, run none
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
flag+=([name]='' [zone]='' [accelerator-type]='' [slices]=1 [runtime-version]='' [project]='' [bucket]='' [profile]='' [spot]=no)
flag+=([extra]='' [env]='' [max-failures]=3 [min-run-seconds]=600 [max-recreations]=20 [poll-seconds]=30 [delete-at-end]=no)
switches+=(spot delete-at-end)
needed=(name zone accelerator-type)
numbers=(slices max-failures min-run-seconds max-recreations poll-seconds)
read_flags "$@"
among_several
[ -z "${flag[profile]}" ] || command+=(--profile_steps="${flag[profile]}")
[ ${#variables[@]} = 0 ] || command=(env "${variables[@]}" "${command[@]}")
commit=$(commit_to_send)

name=${flag[name]}
queue=(gcloud compute tpus queued-resources)
place=(--zone="${flag[zone]}")
[ -z "${flag[project]}" ] || place+=(--project="${flag[project]}")
delete=("${queue[@]}" delete "$name" "${place[@]}" --force --quiet)
# A worker that was taken away doesn't close its connections.
alive=(--ssh-flag="-o ServerAliveInterval=30" --ssh-flag="-o ServerAliveCountMax=4")
all_workers=("${queue[@]}" ssh "$name" "${place[@]}" --node=all --worker=all "${alive[@]}")
worker=salt_jax/launch/worker.sh
worker_states=("${all_workers[@]}" --command="if [ -x $worker ]; then $worker state; else echo salt_worker new idle; fi")

runtime_version() {
  case ${flag[accelerator-type]} in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local nodes=(--node-id="$name")
  [ "${flag[slices]}" -le 1 ] || nodes=(--node-count="${flag[slices]}" --node-prefix="$name")
  [ "${flag[spot]}" = no ] || nodes+=(--spot)
  run "${queue[@]}" create "$name" "${place[@]}" "${nodes[@]}" --accelerator-type="${flag[accelerator-type]}" \
    --runtime-version="${flag[runtime-version]:-$(runtime_version)}" "${extra[@]}"
}

# Prints the state of the queued resource, nothing if there is none.
machine_state() {
  "${queue[@]}" list "${place[@]}" --filter="name~/$name\$" --format="value(state.state)"
}

# Returns when the TPU is there; asks for it, and again when it was taken away.
wait_for_machine() {
  local state='' before
  while true; do
    before=$state
    if ! state=$(machine_state); then
      # What goes wrong at once is a wrong flag or login, and later the network.
      [ "$asked" = yes ] || exit 1
      say "gcloud did not say how $name is; it is asked again."
      state=unknown
    fi
    case $state in
      ACTIVE)
        asked=yes seen=yes
        return
        ;;
      '')
        if [ "$seen" = yes ]; then
          asked=no
          say "$name was deleted, not by this script: giving up."
          exit 1
        elif [ "$asked" = no ]; then
          asked=yes
          create
        fi
        ;;
      SUSPENDED | FAILED)
        recreations=$((recreations + 1))
        if [ "$recreations" -gt "${flag[max-recreations]}" ]; then
          say "$name is $state again and was made anew ${flag[max-recreations]} times, as --max-recreations allows: giving up."
          exit 1
        fi
        say "$name is $state (taken away, or never given): it is deleted and asked for again."
        asked=yes seen=no
        run "${delete[@]}"
        create
        ;;
      "$before" | unknown) ;;
      *)
        asked=yes seen=yes
        say "$name is $state."
        ;;
    esac
    sleep "${flag[poll-seconds]}"
  done
}

set_up() {
  local archive=${TMPDIR:-/tmp}/salt_jax-$name.tar.gz
  run git -C "$root" archive --format=tar.gz --prefix=salt_jax/ --output="$archive" "$commit" &&
    run "${queue[@]}" scp "$archive" "$name:salt_jax.tar.gz" "${place[@]}" --node=all --worker=all &&
    run "${all_workers[@]}" --command="rm -rf salt_jax && tar --extract --gzip --file=salt_jax.tar.gz && $(quoted "$worker" install ${flag[bucket]:+"${flag[bucket]}"})"
}

start() { run "${all_workers[@]}" --command="$worker start $(quoted "${command[@]}")"; }

# follow LINES: shows what the first worker says, until it ends or the connection does.
follow() { run "${queue[@]}" ssh "$name" "${place[@]}" --node=0 --worker=0 "${alive[@]}" --command="$worker follow $1"; }

at_end() {
  [ "$asked" = yes ] || return 0
  if [ "${flag[delete-at-end]}" = yes ]; then
    run "${delete[@]}"
  else
    say "$name is still there, and paid for; delete it with: $(quoted "${delete[@]}")"
  fi
}

asked=no seen=no recreations=0 started=no set_up_failures=0
trap at_end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if is_dry; then
  asked=yes
  create
  set_up
  start
  follow +1
  run "${worker_states[@]}"
  exit 0
fi
while true; do
  wait_for_machine
  if ! answer=$("${worker_states[@]}" | grep '^salt_worker '); then
    say "not all workers of $name answer; they are asked again."
  elif grep --quiet ' running$' <<<"$answer"; then
    [ "$started" = yes ] || say "$name runs a command already, which is followed; to give it another, end that one first."
    started=yes
    follow 20 || true
  else
    prepared=no
    if [ "$started" = yes ] && ! grep --quiet ' idle$' <<<"$answer"; then
      mapfile -t endings < <(sed -n 's/.* ended //p' <<<"$answer")
      again_after "${endings[@]}"
      # An ending is judged once, though the next start may not succeed.
      prepared=yes started=no
      sleep "${flag[poll-seconds]}"
    fi
    if { [ "$prepared" = yes ] || set_up; } && start; then
      started=yes set_up_failures=0
      follow +1 || true
      continue
    fi
    set_up_failures=$((set_up_failures + 1))
    if [ "$set_up_failures" -gt "${flag[max-failures]}" ]; then
      say "the workers of $name could not be set up $set_up_failures times, more than --max-failures=${flag[max-failures]} allows: giving up."
      exit 1
    fi
    say "the workers of $name could not be set up; this is tried again."
  fi
  sleep "${flag[poll-seconds]}"
done
