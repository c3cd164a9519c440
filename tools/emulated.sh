#!/bin/sh
# Runs the tests of the CUDA kernels on the emulated device: tools/emulated.sh PYTHON [pytest arguments], or a script:
# tools/emulated.sh PYTHON --run SCRIPT [arguments].
# The build in build-emulated/ has PTX alone and serves CPU tensors with the CUDA kernels. Every race, missing wait and
# uninitialised read fails the launch that makes it, unless the environment says otherwise (tools/cudasim/README.md).
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
if ! command -v "${CUDACXX:-nvcc}" >/dev/null; then
  echo 'emulated tests: skipped, no nvcc was found to compile the CUDA kernels with'
  exit 0
fi
MFX_CUDA=ON MFX_CUDA_DISPATCH=CPU MFX_CUDA_ARCHS=80-virtual MFX_CPU_ISAS=baseline CUDAFLAGS=--no-compress \
  tools/build_flavour.sh "$python" build-emulated

export CUDASIM_ARCH=80
emulator=$(tools/cudasim/run)
make -s -C tools/cudasim BUILD="$emulator" PYTHON="$python" torch
export CUDASIM_RACE="${CUDASIM_RACE-2}" CUDASIM_RACE_WARP="${CUDASIM_RACE_WARP-1}" CUDASIM_UNINIT="${CUDASIM_UNINIT-1}"
export PYTHONPATH="$root/build-emulated/python:$root/tools/cudasim"
if [ "${1:-}" = --run ]; then
  shift
  exec tools/cudasim/run "$python" "$@"
fi
exec tools/cudasim/run "$python" -m pytest -p no:cacheprovider -m 'not slow' -o testpaths=tests/cuda "$@"
