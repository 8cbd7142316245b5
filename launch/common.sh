# shellcheck shell=bash
# Sourced by tpu_vm.sh, gke_xpk.sh, slurm.sh and gpu.sh: flags, what is printed, the copy of the
# repository that is sent, and what an exit code of `salt` means.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(basename "$0")

say() { echo "$program: $1" >&2; }

# refuse SENTENCE: ends like `salt` does on bad input.
refuse() { say "$1"; exit 2; }

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  refuse "this is bash $BASH_VERSION, and 4.4 or newer is needed: install one (brew install bash on a Mac) and put it first on PATH."
fi

# What a launcher sets before it calls read_flags. A flag's value here is its default.
declare -A flag=([dry-run]=no)
switches=(dry-run) # flags without a value: yes or no
needed=()          # flags that have to be given
numbers=()         # flags that are whole numbers
# What read_flags sets beside `flag`.
extra=()   # all of --extra=…: handed on to gcloud, xpk or sbatch
variables=() # all of --env=NAME=VALUE
command=() # salt VERB …
output_dir=''

usage() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//p}}' "$0"; }

# read_flags FLAGS -- salt VERB …
read_flags() {
  local argument name
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    argument=$1 name=${1#--}
    name=${name%%=*}
    shift
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
      usage
      exit 0
    elif [[ $argument == --extra=* && -v flag[extra] ]]; then
      extra+=("${argument#*=}")
    elif [[ $argument == --env=* && -v flag[env] ]]; then
      [[ $argument =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "$argument names no variable: write --env=NAME=VALUE."
      variables+=("${argument#*=}")
    elif [[ $argument != --* || ! -v flag[$name] ]]; then
      refuse "there is no flag $argument: choose from $(printf '%s\n' "${!flag[@]}" | sort | sed 's/^/--/' | xargs), and put -- before salt."
    elif [[ " ${switches[*]} " == *" $name "* ]]; then
      [ "$argument" = "--$name" ] || refuse "--$name takes no value: write --$name or leave it out."
      flag[$name]=yes
    elif [[ $argument != *=?* ]]; then
      refuse "--$name has no value: write --$name=VALUE."
    else
      flag[$name]=${argument#*=}
    fi
  done
  for name in "${needed[@]}"; do
    [ -n "${flag[$name]}" ] || refuse "--$name is missing: add --$name=VALUE before --."
  done
  for name in "${numbers[@]}"; do
    [[ ${flag[$name]} =~ ^[0-9]+$ ]] || refuse "--$name is '${flag[$name]}', expected a whole number: change --$name."
  done
  [ "${1:-}" != -- ] || shift
  [ "${1:-}" != salt ] || shift
  [[ ${1:-} =~ ^[a-z] ]] || refuse "the command to run is missing: end with -- salt train --output_dir=FOLDER …"
  command=(salt "$@")
  [ -f "$root/salt_jax/commands/$1.py" ] || refuse "there is no verb $1: see salt --help."
  output_dir=$(output_dir_of "$@")
  [ -n "$output_dir" ] || refuse "--output_dir is missing: add --output_dir=FOLDER to the command."
  [[ ${flag[bucket]:-} != */* ]] || refuse "--bucket is '${flag[bucket]}', expected the name alone: write --bucket=$(basename "${flag[bucket]}")."
}

# output_dir_of WORD…: prints the last --output_dir among a command's words.
output_dir_of() {
  local found=
  while [ $# -gt 0 ]; do
    case $1 in
      --output_dir) found=${2:-} ;;
      --output_dir=*) found=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$found"
}

# The same command among several processes, which JAX finds, on hosts that share a folder.
among_several() {
  local verb=${command[1]}
  grep --quiet 'several_processes=True' "$root/salt_jax/commands/$verb.py" ||
    refuse "salt $verb runs in one process, and this starts several: run it on one machine, without a launcher."
  [[ $output_dir == @(/*|gs://*) || $verb == evaluate && $output_dir == s3://* ]] ||
    refuse "--output_dir is '$output_dir', expected the whole path of a folder that all hosts share, or gs://BUCKET/FOLDER (for salt evaluate also s3://)."
  [[ " ${command[*]}" == *" --multi_process="* ]] || command+=(--multi_process=True)
}

# quoted WORD…: the words as one line of shell that means them.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=${line:+ }$word
  done
  printf '%s\n' "$line"
}

# run WORD… and run_line LINE: print a command, and run it unless --dry-run.
run() { run_line "$(quoted "$@")"; }
run_line() {
  if is_dry; then
    printf '%s\n' "$1"
  else
    printf '$ %s\n' "$1"
    eval "$1"
  fi
}
is_dry() { [ "${flag[dry-run]}" = yes ]; }

# Prints the extra of jax for --cuda.
cuda_extra() {
  [[ ${flag[cuda]} =~ ^1[23]$ ]] || refuse "--cuda is '${flag[cuda]}', expected 12 or 13: change --cuda."
  echo "cuda${flag[cuda]}"
}

# Prints what is sent to other machines, later ones too: the last commit as it is now.
commit_to_send() {
  git -C "$root" rev-parse HEAD
  if [ -n "$(git -C "$root" status --porcelain)" ]; then
    say "the clone has changes that are not committed; what is sent is the last commit, without them."
  fi
}

# supervise WORD…: runs a command, passes SIGTERM on to it and waits until it has saved. Returns its
# exit code; `stopped` says whether this script was asked to stop, SECONDS how long the command ran.
stopped=no
supervise() {
  local child='' code=0
  SECONDS=0
  # The terminal sends Ctrl-C to both.
  trap 'stopped=yes' INT
  trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  "$@" &
  child=$!
  [ "$stopped" = no ] || kill -TERM "$child" 2>/dev/null || true
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || code=$?
  trap - INT TERM
  return "$code"
}

# again_after ENDING…: returns when the command is to be started again, after the endings of all its
# processes, each "EXIT_CODE SECONDS" with the time that it ran; ends the script otherwise.
# `failures` counts towards --max-failures. An interruption that comes soon is one: what interrupts
# every start would be paid for without end. A later one is taken for progress, and the count begins
# anew. What failed counts however long it ran: every start may come as far and fail there.
failures=0
again_after() {
  local ending code seconds outcome=0 ran=0 what
  for ending; do
    read -r code seconds <<<"$ending"
    ((seconds <= ran)) || ran=$seconds
    # Who fails takes the others along: they save and end with 75, which says nothing then.
    case $outcome:$code in
      2:* | *:0) ;;
      *:75) [ "$outcome" != 0 ] || outcome=75 ;;
      *) outcome=$code ;;
    esac
  done
  case $outcome in
    0)
      say "finished."
      exit 0
      ;;
    2)
      say "salt refused its input (exit code 2), as it says above: change the command; it is not started again."
      exit 2
      ;;
    75)
      if [ "$ran" -ge "${flag[min-run-seconds]}" ]; then
        failures=0
        say "interrupted and saved (exit code 75): the same command is started again."
        return
      fi
      what="salt was interrupted (exit code 75) $ran seconds after its start, which counts as a failure before --min-run-seconds=${flag[min-run-seconds]}"
      ;;
    *) what="salt failed (exit code $outcome)" ;;
  esac
  failures=$((failures + 1))
  if [ "$failures" -gt "${flag[max-failures]}" ]; then
    say "$what, failure $failures in a row, more than --max-failures=${flag[max-failures]} allows: it is not started again; mend what is said above, or raise --max-failures."
    exit 1
  fi
  say "$what, failure $failures of the ${flag[max-failures]} in a row that --max-failures allows: the same command is started again."
}
