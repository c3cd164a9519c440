#!/bin/sh
# Runs the tests of the CUDA kernels on the emulated device: tools/emulated.sh PYTHON [pytest arguments], or a script:
# tools/emulated.sh PYTHON --run SCRIPT [arguments].
# The kernels of the ordinary build serve CPU tensors then; CUDASIM_ARCH=90 takes those of Hopper where there are such.
# Every race, missing wait and uninitialised read fails the launch that makes it, unless the environment says otherwise
# (tools/cudasim/README.md).
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
make -s extension PY="$python"
if [ ! -e python/moduleformer_ext/libmoduleformer_ext_cuda.so ]; then
  echo 'emulated tests: skipped, this build has no CUDA kernels (docs/build.md)'
  exit 0
fi

export CUDASIM_ARCH="${CUDASIM_ARCH-80}" MFX_CUDA_DISPATCH=CPU
emulator=$(tools/cudasim/run)
make -s -C tools/cudasim BUILD="$emulator" PYTHON="$python" torch
export CUDASIM_RACE="${CUDASIM_RACE-2}" CUDASIM_RACE_WARP="${CUDASIM_RACE_WARP-1}" CUDASIM_UNINIT="${CUDASIM_UNINIT-1}"
export PYTHONPATH="$root/python:$root/tools/cudasim"
if [ "${1:-}" = --run ]; then
  shift
  exec tools/cudasim/run "$python" "$@"
fi
# The emulated device is slow and runs on one core: a process per core.
exec tools/cudasim/run "$python" -m pytest -p no:cacheprovider -n "${MAX_JOBS:-2}" @tests/cuda_tests.args "$@"
