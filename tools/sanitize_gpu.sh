#!/bin/sh
# Runs the tests of the CUDA kernels on this machine's GPU under compute-sanitizer: tools/sanitize_gpu.sh PYTHON [pytest
# arguments], or one call of every op in a minute: tools/sanitize_gpu.sh PYTHON --once. Wrong accesses, races in shared
# memory, misused barriers, reads of what was never written: each is a tool of its own and a run of its own. With
# MFX_LINEINFO=1 (docs/build.md) it names source lines.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
sanitizer=$(command -v compute-sanitizer || "$python" -c '
import glob, importlib.util
folders = getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or []
print(next((path for folder in folders for path in glob.glob(f"{folder}/*/bin/compute-sanitizer")), ""))')
if [ -z "$sanitizer" ]; then
  echo 'sanitize-gpu: no compute-sanitizer; it comes with CUDA, or: pip install nvidia-cuda-sanitizer-api' >&2
  exit 1
fi
"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "sanitize-gpu: this torch sees no GPU")'

tools='memcheck racecheck synccheck initcheck'
sanitize() { # TOOL COMMAND...
  tool=$1
  shift
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" "$@"
}

if [ "${1:-}" = --once ]; then # all at once, each into a file, for their start alone takes long
  logs=$(mktemp -d)
  for tool in $tools; do
    { sanitize $tool tests/cuda/steps.py && echo "$tool passed" || echo "$tool FAILED"; } >"$logs/$tool" 2>&1 &
  done
  wait
  (cd "$logs" && cat $tools && tail -q -n 1 $tools | paste -sd, && ! tail -q -n 1 $tools | grep -q FAILED) || status=1
  rm -r "$logs"
  exit ${status:-0}
fi
for tool in $tools; do
  sanitize $tool -m pytest -p no:cacheprovider @tests/cuda_tests.args "$@"
done
