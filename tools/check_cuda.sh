#!/bin/sh
# Checks the CUDA kernels at length, without a GPU: tools/check_cuda.sh PYTHON. Compiles every instance to machine code
# for each architecture with ptxas, fails on spills, then runs all emulated tests, slow ones and the CPU's own included.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
command -v "${CUDACXX:-nvcc}" >/dev/null || { echo 'check-cuda needs nvcc' >&2; exit 1; }

"$python" tools/cuda_report.py --check
tools/emulated.sh "$python" -m '' tests/cuda tests/ops/test_route_topk.py
