#!/usr/bin/env bash
# Trains Selective Prompt Tuning on SmolLM2-135M-Instruct, evaluates it on held-out dialogues and shows the result.
#
#   bash launch/quickstart.sh                      the dialogues that ship with the package
#   bash launch/quickstart.sh --data FILE          92 dialogues of a ConvAI2 file; test dialogues are cut by persona
#   bash launch/quickstart.sh --workdir DIR        where the run goes (default: runs/quickstart, or runs/quickstart-NAME)
#
# Needs Python 3.11 or newer with pip; everything goes into .venv. A second run reuses what is there.
set -euo pipefail
here="$PWD"  # relative paths are the caller's
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

from_here() {
  case "$1" in
    /* | *://*) echo "$1" ;;
    \~/*) echo "$HOME/${1:2}" ;; # of --data=~/FILE the shell makes no path
    *) echo "$here/$1" ;;
  esac
}

workdir="runs/quickstart"
overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --data=* | --workdir=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --data)
      file="$(from_here "${2:-}")"
      [ -f "$file" ] || { echo "quickstart: --data needs a ConvAI2 file; there is no file '${2:-}'" >&2; exit 2; }
      overrides=("--config.data.train=$file" "--config.data.test=" "--config.data.limit=92")
      name="$(basename "$2")"
      [ "$workdir" != "runs/quickstart" ] || workdir="runs/quickstart-${name%.*}"
      shift 2
      ;;
    --workdir)
      [ -n "${2:-}" ] || { echo "quickstart: --workdir needs a folder" >&2; exit 2; }
      workdir="$(from_here "$2")"
      shift 2
      ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "quickstart: unknown argument '$1'; allowed: --data FILE, --workdir DIR, --help" >&2; exit 2 ;;
  esac
done

python="$(find_python python3 python3.13 python3.12 python3.11 .venv/bin/python)" || {
  echo "quickstart: no Python 3.11 or newer was found on the PATH" >&2
  exit 2
}
install .venv "$python" ""
fetch_smollm2 .venv

.venv/bin/spt-jax train --config=configs/quickstart.py --workdir="$workdir" ${overrides[@]+"${overrides[@]}"}
.venv/bin/spt-jax evaluate --workdir="$workdir" --reuse
command -v spt-jax >/dev/null || echo "(source .venv/bin/activate in $PWD puts spt-jax on the PATH)"
