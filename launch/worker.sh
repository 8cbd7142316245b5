#!/usr/bin/env bash
# What tpu_vm.sh and slurm_job.sh call on the machines that run `salt`.
#
#   launch/worker.sh install [BUCKET]    makes the environment; mounts gs://BUCKET at /mnt/BUCKET
#   launch/worker.sh start COMMAND…      starts it in the background, ending what an earlier start left;
#                                        what it says is sent to --output_dir/logs if that is in gs://
#   launch/worker.sh follow LINES        prints what it says until it ends: +1 all, 20 the last 20 and on
#   launch/worker.sh state               one line: salt_worker HOST idle, running or ended EXIT_CODE SECONDS
#   launch/worker.sh record FOLDER COMMAND…   runs it; EXIT_CODE SECONDS go into a file of the folder
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
folder=$HOME/salt_worker

# Its number may be another's since, after a restart of the machine.
is_running() { [ -f "$folder/pid" ] && grep --quiet --text worker.sh "/proc/$(cat "$folder/pid")/cmdline" 2>/dev/null; }

install() {
  local bucket=${1:-}
  VENV=$HOME/salt_venv
  source "$root/launch/environment.sh"
  # The images of TPU VMs have Python 3.10.
  if ! find_python >/dev/null 2>&1; then
    python3 -m pip install --quiet --user uv
    "$HOME/.local/bin/uv" python install --quiet 3.12
    PYTHON=$("$HOME/.local/bin/uv" python find 3.12)
  fi
  make_environment tpu
  if [ -n "$bucket" ] && ! mountpoint --quiet "/mnt/$bucket"; then
    mount_bucket "$bucket"
  fi
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl --fail --silent --show-error "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release --codename --short) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get --quiet update
    sudo apt-get --quiet --yes install gcsfuse
  fi
  sudo mkdir -p "/mnt/$1"
  sudo chown "$(id --user)" "/mnt/$1"
  # Nothing cached: the processes read each other's files to know who lives.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=1000000 "$1" "/mnt/$1"
}

start() {
  local tries=60
  if is_running; then
    kill -TERM "$(cat "$folder/pid")"
    while is_running && [ $((tries -= 1)) -gt 0 ]; do sleep 1; done
    kill -KILL -- "-$(cat "$folder/pid")" 2>/dev/null || true
  fi
  rm -rf "$folder"
  mkdir -p "$folder"
  export PATH=$HOME/salt_venv/bin:$PATH
  cd "$HOME"
  local output
  output=$(output_dir_of "$@")
  [[ $output != gs://* ]] || export SALT_LOG_URL=${output%/}/logs/$(hostname)-$(date --utc +%Y%m%dT%H%M%S).log
  # A session of its own, so that the end of this connection is not the end of it.
  setsid "$root/launch/worker.sh" record "$folder/endings" "$@" </dev/null >"$folder/log" 2>&1 &
  echo $! >"$folder/pid"
}

follow() {
  if [ -f "$folder/pid" ]; then
    tail --lines="$1" --pid="$(cat "$folder/pid")" --follow "$folder/log"
  fi
}

state() {
  local what=idle
  if is_running; then
    what=running
  elif [ -f "$folder/pid" ]; then
    # None: killed together with what was to write it.
    what="ended $(cat "$folder"/endings/* 2>/dev/null || echo 137 0)"
  fi
  echo "salt_worker $(hostname) $what"
}

record() {
  local endings=$1 code=0 sender=''
  shift
  mkdir -p "$endings"
  if [ -n "${SALT_LOG_URL:-}" ]; then
    send_log_on &
    sender=$!
  fi
  supervise "$@" || code=$?
  echo "$code $SECONDS" >"$endings/$(hostname)-${SLURM_PROCID:-0}"
  if [ -n "${SALT_LOG_URL:-}" ]; then
    kill "$sender"
    wait "$sender" || true
    send_log
  fi
  exit "$code"
}

# What gcloud says of it stays out of the log.
send_log() { timeout 60 gcloud storage cp --quiet "$folder/log" "$SALT_LOG_URL" >/dev/null 2>&1 || true; }

# Sends the log again and again, until SIGTERM.
send_log_on() {
  trap 'kill $!; exit' TERM
  while sleep "${SALT_LOG_SECONDS:-60}" & wait $!; do send_log; done
}

case ${1:-} in
  install | start | follow | state | record) "$@" ;;
  *) refuse "'${1:-}' is not one of install, start, follow, state and record." ;;
esac
