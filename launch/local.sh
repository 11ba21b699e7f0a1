#!/usr/bin/env bash
# Trains, or evaluates, with several processes on this machine, which find one another on a free port.
#
#   bash launch/local.sh -n 2 -- --config=configs/quickstart.py --workdir=runs/two --config.optimizer.micro_batches=2
#   bash launch/local.sh -n 2 -- evaluate --workdir=runs/two
#   bash launch/local.sh -n 2 --devices 4 -- ...    each process with 4 CPU devices, to try a mesh of 8
#   bash launch/local.sh -n 2 --dry-run -- ...      prints the commands
#
# What follows -- goes to spt-jax train, unless it begins with evaluate. Lines begin with the number of their process.
# When one fails, or Ctrl-C or SIGTERM comes, all are asked to stop; the exit code is that of the first that failed, or
# 75 after a stop that saved: the same command then goes on. Costs nothing but this machine.
set -euo pipefail

fail() { echo "local: $1" >&2; exit 2; }
count="" devices="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    -n | --devices)
      case "${2:-}" in '' | *[!0-9]* | 0*) fail "$1 needs a number of 1 or more, not '${2:-}'" ;; esac
      if [ "$1" = "-n" ]; then count="$2"; else devices="$2"; fi
      shift 2
      ;;
    --dry-run) dry=1; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; allowed: -n COUNT, --devices COUNT, --dry-run, and flags of spt-jax train behind --" ;;
  esac
done
[ -n "$count" ] || fail "-n is missing; give the number of processes, as in -n 2"
[ $# -gt 0 ] || fail "nothing to train; give the flags of spt-jax train behind --"
door=train
if [ "$1" = evaluate ]; then door=evaluate; shift; fi
spt_jax="$(command -v spt-jax || true)"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ -n "$spt_jax" ] || spt_jax="$here/.venv/bin/spt-jax"
[ -x "$spt_jax" ] || fail "there is no spt-jax on the PATH nor in $here/.venv; launch/quickstart.sh installs it"
if [ -n "$devices" ]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi

if [ -n "$dry" ]; then
  for ((i = 0; i < count; i++)); do printf '%q ' "$spt_jax" "$door" "$@" "--distributed=127.0.0.1:PORT,$count,$i"; echo; done
  exit 0
fi
port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

# Each process gets a group of its own: Ctrl-C then reaches this script alone, which asks each of them once.
set -m
pids=() asked=""
ask_all() { asked=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true; }
trap ask_all INT TERM HUP
for ((i = 0; i < count; i++)); do
  "$spt_jax" "$door" "$@" "--distributed=127.0.0.1:$port,$count,$i" > >(sed -u "s/^/[$i] /") 2>&1 </dev/null &
  pids+=($!)
done
[ -z "$asked" ] || ask_all

first=0 deadline="" running=("${pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    if [ "$code" -ne 0 ] && [ "$first" -eq 0 ]; then
      first=$code deadline=$((SECONDS + 60))
      ask_all
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then kill -KILL "${running[@]}" 2>/dev/null || true; fi
  sleep 0.1 || true
done
exit "$first"
