#!/bin/sh
# Runs the tests of the CUDA kernels on this machine's GPU under compute-sanitizer: tools/sanitize_gpu.sh PYTHON [pytest
# arguments]. Wrong accesses, races in shared memory, misused barriers, reads of what was never written: each is
# a tool of its own and a run of its own.
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

for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m pytest -p no:cacheprovider -m cuda "$@"
done
