#!/bin/sh
# Checks the CUDA kernels at length, without a GPU: tools/check_cuda.sh PYTHON. Compiles every instance to machine code
# for each architecture, fails on spills, then runs all emulated tests, slow ones and the CPU's own included,
# and those of the kernels once more for each of two seeds of the scheduler, and for three on an emulated Hopper, on two
# multiprocessors, so that persistent kernels go round more than once.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
command -v "${CUDACXX:-nvcc}" >/dev/null || { echo 'check-cuda needs nvcc' >&2; exit 1; }

# What is released: every architecture of the ordinary build.
env -u MFX_CUDA_ARCHS MFX_CUDA=ON MFX_CPU_ISAS=baseline tools/build_flavour.sh "$python" build/released
"$python" tools/cuda_report.py --check
tools/emulated.sh "$python" -m cuda
tools/emulated.sh "$python" -m '' tests/ops/test_route_topk.py
export CUDASIM_APPROX_ERROR=1  # of ex2.approx and the like, as large as documented
for arch in 80 90; do
  for seed in 0 1 2; do  # other orders of warps, other times at which copies land
    [ $arch$seed = 800 ] || CUDASIM_ARCH=$arch CUDASIM_SEED=$seed CUDASIM_MULTIPROCESSORS=2 tools/emulated.sh "$python"
  done
done
