#!/bin/sh
# Makes the development environment: tools/make_venv.sh DIR [uses $PYTHON, $TORCH_INDEX_URL].
#
# Wants a Python >= 3.10 with headers; venv makes the environment where it can, else uv does. Where no Python has
# headers, uv brings a private one (no root needed); where that cannot be had, stops with the packages to install.
set -eu
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)

stop() {
  echo "$1" >&2
  exit 1
}

has_headers() { # a Python that can compile an extension
  command -v "$1" >/dev/null 2>&1 && "$1" - <<'PY' >/dev/null 2>&1
import os, sys, sysconfig
assert sys.version_info >= (3, 10)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PY
}

find_python() {
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if has_headers "$python"; then
      echo "$python"
      return
    fi
  done
  [ -z "${PYTHON:-}" ] || stop "PYTHON=$PYTHON must be Python >= 3.10 with its headers (Python.h)."
}

find_uv() {
  if command -v uv >/dev/null 2>&1; then
    echo uv
  elif python3 -m pip --version >/dev/null 2>&1 && python3 -m pip install -q --upgrade --target "$root/.python/uv" uv >&2; then
    echo "$root/.python/uv/bin/uv"
  fi
}

command -v g++ >/dev/null 2>&1 || stop 'No C++ compiler was found. On Debian: apt-get install g++'

make_environment() {
  python=$(find_python)
  if [ -n "$python" ] && "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  else
    echo "No Python here has both venv and headers; trying uv" >&2
    uv=$(find_uv)
    export UV_PYTHON_INSTALL_DIR="$root/.python"
    # As pip does: trust the system's certificates, a company's own among them, where there are any.
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] || export UV_SYSTEM_CERTS=true
    [ -n "$uv" ] && "$uv" venv --clear --seed --python "${python:-3.12}" "$venv" ||
      stop 'No usable Python >= 3.10. On Debian: apt-get install python3-venv python3-dev  (or install uv), then again.'
  fi
  realpath "$venv" >"$venv/.made-by-make_venv"
  echo "Made $venv with $("$venv/bin/python" --version)"
}

# What an earlier run made is brought up to date, or made anew if it no longer works or was copied here with its folder:
# its scripts still name the original. VENV may also name an environment that somebody else cares for.
if [ -e "$venv/.made-by-make_venv" ]; then
  if grep -qvxF "$(realpath "$venv")" "$venv/.made-by-make_venv" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_environment
  fi
elif [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
  stop "$venv exists and was not made by tools/make_venv.sh; remove it, or set VENV to another directory."
else
  make_environment
fi

pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install -q ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r "$root/requirements-dev.txt"
if command -v nvcc >/dev/null 2>&1; then
  # A reader of SASS, for tools/cuda_report.py; headers that the sm_90a kernels are built on.
  $pip install -q --no-deps nvidia-cuda-nvdisasm nvidia-cutlass==4.2.0.0
fi
