#!/bin/sh
# Builds and tests the package with other releases of torch: tools/check_torch.sh [VERSION...], by default the lowest and
# the highest that are served. Each gets an environment and a build of its own under build/torch-VERSION, several GB for
# a CUDA build of torch; $PYTHON makes the environments, $TORCH_INDEX_URL is an extra index, of CPU builds, say.
#
# The tests of ops and models run, CUDA kernels are built and opened where nvcc is found.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.11.0 2.14.1

for version; do
  folder=$PWD/build/torch-$version
  python=$folder/venv/bin/python
  echo "== torch $version"
  if [ ! -e "$folder/.installed" ]; then
    "${PYTHON:-python3}" -m venv --clear "$folder/venv"
    pip="$python -m pip --disable-pip-version-check install -q"
    $pip ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "torch==$version"
    # The rest of the development environment; the pin of torch in it is not ours here.
    grep -v '^torch==' requirements-dev.txt >"$folder/requirements.txt"
    echo "torch==$version" >"$folder/constraints.txt"
    $pip -r "$folder/requirements.txt" -c "$folder/constraints.txt"
    touch "$folder/.installed"
  fi
  MFX_NATIVE=1 MFX_CUDA=$(command -v "${CUDACXX:-nvcc}" >/dev/null && echo ON || echo OFF) \
    MFX_CUDA_ARCHS=${MFX_CUDA_ARCHS:-80-virtual} tools/build_flavour.sh "$python" "$folder"
  PYTHONPATH=$folder/python "$python" - <<'PY'
import torch
from moduleformer_ext._extension import build_info, cuda_kernels
kernels = cuda_kernels() if build_info()["cuda"] else []
print(f"torch {torch.__version__}: built, registered, {len(kernels)} CUDA kernels")
PY
  PYTHONPATH=$folder/python MFX_BUILD_DIR=$folder \
    "$python" -m pytest -p no:cacheprovider -n "${MAX_JOBS:-2}" -m 'not slow' tests/ops tests/models
done
