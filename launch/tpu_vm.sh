#!/usr/bin/env bash
# Trains on a Cloud TPU: makes it or takes the one of this name, installs, trains on all its hosts, brings the logs,
# deletes it. A spot TPU that is preempted is made again and the run goes on from its bucket.
#
#   bash launch/tpu_vm.sh --name NAME --zone ZONE --type v5litepod-8 --workdir gs://BUCKET/RUN [options] -- --config=FILE
#
#   --nfs SERVER:/DIR  a share instead of a bucket: mounted on every host as /mnt/runs, with --workdir /mnt/runs/RUN
#   --spot             cheaper, and may be taken away at any time
#   --queued           wait in Google's queue until there is room
#   --runtime VERSION  the TPU software (default: v2-alpha-tpuv5-lite)
#   --retries N        how often a TPU that was preempted is made again, or tried for when there is no room for it, and
#                      how often a lost connection is tried again (default: 20)
#   --logs FOLDER      where the logs go (default: logs/NAME)
#   --keep             do not delete the TPU at the end: it goes on costing
#   --dry-run          print the commands and run none
#
# What follows -- goes to spt-jax train. Resume with the same command. Needs gcloud with a project and a login.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "tpu_vm: $1" >&2; exit 2; }
nfs="" name="" zone="" type="" workdir="" runtime="v2-alpha-tpuv5-lite" retries=20 logs="" spot="" queued="" keep="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --nfs | --name | --zone | --type | --workdir | --runtime | --retries | --logs)
      [ -n "${2:-}" ] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot | --queued | --keep) printf -v "${1#--}" 1; shift ;;
    --dry-run) dry=1; shift ;;
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; see --help; flags of spt-jax train go behind --" ;;
  esac
done
for needed in name zone type workdir; do [ -n "${!needed}" ] || fail "--$needed is missing; see --help"; done
case "${nfs:+nfs }$workdir" in
  gs://?* | "nfs /mnt/runs/"?*) ;;
  *) fail "--workdir is '$workdir'; allowed: gs://BUCKET/RUN, or /mnt/runs/RUN with --nfs, for a TPU's own disk goes with it" ;;
esac
case "$retries" in *[!0-9]*) fail "--retries is '$retries'; allowed: a whole number" ;; esac
[ $# -gt 0 ] || fail "nothing to train; give the flags of spt-jax train behind --"
logs="${logs:-logs/$name}"
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "there is no gcloud on the PATH; install the Google Cloud CLI"

# A signal is heard while bash waits, not while a command is in its foreground, as an ssh is for hours.
child=""
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@" <&0 & child=$!; wait "$child"; fi; }
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" --zone "$zone" "${@:2}"; }
copy() { run gcloud compute tpus tpu-vm scp "$1" "$2" --zone "$zone" --worker="$3"; }
queue() { run gcloud compute tpus queued-resources "$1" "$name" --zone "$zone" "${@:2}"; }
on_hosts() { tpu ssh --worker="$1" --command="$2"; }

pause() { sleep "${POLL_SECONDS:-${1:-30}}" & child=$!; wait "$child"; }

# What a question to gcloud is answered. No answer is not an absence: a TPU that cannot be asked may be training.
answer() {
  local said asked
  said="$(mktemp)"
  for ((asked = 0; asked <= retries; asked++)); do
    if "$@" 2>"$said"; then break; fi
    if grep -q NOT_FOUND "$said"; then echo ABSENT; break; fi
    cat "$said" >&2
    # What no waiting mends.
    if grep -qE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|auth login' "$said"; then asked=$retries; continue; fi
    pause
  done
  rm -f "$said"
  [ "$asked" -le "$retries" ] || { echo "tpu_vm: gcloud does not tell the state of $name" >&2; return 1; }
}

state() { if [ -n "$dry" ]; then echo "$dry_state"; else answer tpu describe --format="value(state)"; fi; }

delete() { if [ -n "$queued" ]; then queue delete --force --quiet; else tpu delete --quiet; fi; }

# Bash ignores failures in what stands before || or &&, so each step of create, ready and set_up says what becomes of
# its own. A gcloud that no longer answers ends the script: a TPU that is made again does not mend that.
create() {
  if [ -z "$queued" ]; then
    tpu create --accelerator-type "$type" --version "$runtime" ${spot:+--spot}
    return
  fi
  queue create --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" ${spot:+--spot} || return
  local seen
  while true; do
    seen="$(if [ -n "$dry" ]; then echo ACTIVE; else answer queue describe --format="value(state.state)"; fi)" || exit
    case "$seen" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | ABSENT) echo "tpu_vm: the queue gave $name up ($seen)" >&2; return 1 ;;
    esac
    pause
  done
}

ready() {
  local now
  now="$(state)" || exit
  case "$now" in
    READY) echo "tpu_vm: $name is there" >&2; return ;;
    # A spot TPU's request outlives what it was given.
    ABSENT) [ -z "$queued" ] || delete 2>/dev/null || true ;;
    *) echo "tpu_vm: $name is $now, so it is made again" >&2; delete || return ;;
  esac
  create
}

pack() {
  run mkdir -p "$logs"
  run tar -czf "$logs/spt_jax.tar.gz" --exclude=__pycache__ spt_jax configs launch pyproject.toml README.md LICENSE
}

set_up() {
  copy "$logs/spt_jax.tar.gz" "$name:spt_jax.tar.gz" all || return
  # The hosts' own Python is too old, and on newer runtimes takes no packages unless told to.
  on_hosts all 'set -euo pipefail; mkdir -p spt_jax; tar -xzf spt_jax.tar.gz -C spt_jax; cd spt_jax; rm -f train.exit
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; [ -d .venv ] || ~/.local/bin/uv venv --seed --python 3.12 .venv
    source launch/environment.sh; install .venv .venv/bin/python "[tpu,buckets]"; fetch_smollm2 .venv'
}

mount_share() {
  local source
  [ -n "$nfs" ] || return 0
  printf -v source '%q' "$nfs"
  on_hosts all "mountpoint -q /mnt/runs || {
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common && sudo mkdir -p /mnt/runs && sudo mount -t nfs $source /mnt/runs; }"
}

# Sets up until that is done or the TPU is gone: one that has just come may not take a connection yet.
prepare() {
  local tried failed
  for ((tried = 0; tried < 4; tried++)); do
    [ "$tried" -eq 0 ] || pause
    failed=0
    { set_up && mount_share; } || failed=$?
    [ "$failed" -gt 0 ] || return 0
    now="$(state)"
    [ "$now" = READY ] || return 0
    echo "tpu_vm: $name could not be set up (exit code $failed)" >&2
  done
  exit "$failed"
}

# One that is running already, after a connection that was lost, is waited for; the same command then finds it finished.
train() {
  local command
  printf -v command '%q ' .venv/bin/spt-jax train --distributed=auto "--workdir=$workdir" "$@"
  on_hosts all "cd spt_jax && flock train.lock sh -c 'rm -f train.exit; nohup \"\$@\" >>train.log 2>&1; echo \$? >train.exit' - $command"
}

exit_code() {
  if [ -n "$dry" ]; then echo 0; return; fi
  on_hosts 0 "cat spt_jax/train.exit" 2>/dev/null | tail -n 1
}

# Trains until the TPU is gone or there is an exit code; a connection that is lost leaves neither.
attend() {
  local lost
  for ((lost = 0; lost <= retries; lost++)); do
    train "$@" || true
    now="$(state)"
    [ "$now" = READY ] || return 0
    code="$(exit_code || true)"
    [ -z "$code" ] || return 0
    echo "tpu_vm: the connection to $name was lost; it is tried again" >&2
    pause
  done
}

bring_logs() {
  local count=1 worker
  if [ -z "$dry" ]; then count="$(tpu describe --format="value(networkEndpoints.len())" || true)"; fi
  [[ "$count" =~ ^[0-9]+$ ]] || count=1
  for ((worker = 0; worker < count; worker++)); do
    copy "$name:spt_jax/train.log" "$logs/worker-$worker.log" "$worker" || true
  done
}

# shellcheck disable=SC2329 # the trap calls it
finish() {
  if [ -n "$keep" ]; then
    echo "tpu_vm: $name is kept and costs until it is deleted" >&2
  else
    delete || echo "tpu_vm: $name could not be deleted; if it exists, it costs until you delete it" >&2
  fi
}

dry_state=ABSENT
trap finish EXIT
trap 'kill "$child" 2>/dev/null || true; exit 130' INT TERM HUP
errors=0
for ((attempt = 0; attempt <= retries; attempt++)); do
  made=0
  ready || made=$?
  if [ "$made" -gt 0 ]; then
    [ "$attempt" -gt 0 ] || exit "$made"
    echo "tpu_vm: $name could not be made again" >&2
    [ "$attempt" -eq "$retries" ] || pause 300
    continue
  fi
  dry_state=READY
  now=READY
  pack
  prepare
  if [ "$now" = READY ]; then attend "$@"; fi
  if [ "$now" != READY ]; then errors=0; echo "tpu_vm: $name was preempted" >&2; continue; fi
  bring_logs || true
  case "$code" in
    75) errors=0; echo "tpu_vm: the run was stopped and saved; it goes on" >&2 ;;
    # An error of the program, or a host that was lost, killed or never joined the others.
    1 | 137 | 143)
      errors=$((errors + 1))
      if [ "$errors" -gt 3 ] || [ "$attempt" -eq "$retries" ]; then exit "$code"; fi
      echo "tpu_vm: the run ended with exit code $code; it is tried again, $errors of 3 times" >&2
      pause
      ;;
    '' | *[!0-9]*) echo "tpu_vm: the run left no exit code; see $logs" >&2; exit 1 ;;
    *) exit "$code" ;;
  esac
done
echo "tpu_vm: $name was preempted or stopped more than $retries times; the same command goes on" >&2
exit 75
