#!/bin/sh
# Makes the development environment: tools/make_venv.sh DIR [uses $PYTHON, $TORCH_INDEX_URL].
#
# Wants a Python >= 3.10 that has venv and headers. Where the system's lacks them, uv brings a private one (no root
# needed); where that cannot be had either, stops with the packages to install.
set -eu
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)

usable() { # a Python that can make an environment and compile an extension
  command -v "$1" >/dev/null 2>&1 && "$1" - <<'PY' >/dev/null 2>&1
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 10)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PY
}

find_uv() {
  if command -v uv >/dev/null 2>&1; then
    echo uv
  elif python3 -m pip --version >/dev/null 2>&1 &&
    python3 -m pip install -q --target "$root/.python/uv" uv >&2; then
    echo "$root/.python/uv/bin/uv"
  fi
}

stop() {
  echo "$1" >&2
  exit 1
}

command -v g++ >/dev/null 2>&1 || stop 'No C++ compiler was found. On Debian: apt-get install g++'

if [ -n "${PYTHON:-}" ]; then
  usable "$PYTHON" || stop "PYTHON=$PYTHON must be Python >= 3.10 with venv and headers (Python.h)."
  "$PYTHON" -m venv --clear "$venv"
else
  made=
  for python in python3 python3.13 python3.12 python3.11 python3.10; do
    if usable "$python"; then
      echo "Making $venv with $(command -v "$python")"
      "$python" -m venv --clear "$venv"
      made=yes
      break
    fi
  done
  if [ -z "$made" ]; then
    echo 'python3 lacks venv, headers or version 3.10; trying a private Python through uv' >&2
    uv=$(find_uv)
    if [ -z "$uv" ] || ! UV_PYTHON_INSTALL_DIR="$root/.python" "$uv" venv --clear --seed --managed-python \
      --python 3.12 "$venv"; then
      stop 'No usable Python >= 3.10. On Debian: apt-get install python3-venv python3-dev  (or install uv), then make again.'
    fi
  fi
fi

pip="$venv/bin/python -m pip"
$pip install -q --disable-pip-version-check ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
  -r "$root/requirements-dev.txt"
# CUTLASS headers for the CUDA kernels; the dependencies of its Python side are not wanted.
if command -v nvcc >/dev/null 2>&1; then
  $pip install -q --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
fi
