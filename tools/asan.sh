#!/bin/sh
# Runs the tests of ops and core and the fuzzer on a build of the C++ code with AddressSanitizer and UndefinedBehaviorSanitizer:
# tools/asan.sh PYTHON [pytest arguments]. The build lies in build-asan/, apart from the ordinary one.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
MFX_CUDA=OFF MFX_SANITIZE=address,undefined tools/build_flavour.sh "$python" build-asan

[ $# -gt 0 ] || set -- tests/core tests/ops tests/fuzz
# The interpreter itself is not instrumented, so the runtimes come first; libstdc++ with them, or its exceptions pass
# the interceptors by. Python never frees some things: leaks are not looked for.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH="$root/build-asan/python" \
MFX_BUILD_DIR="$root/build-asan" "$python" -m pytest -p no:cacheprovider -m 'not slow' "$@"
