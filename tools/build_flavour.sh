#!/bin/sh
# Builds the extension apart from the ordinary one: tools/build_flavour.sh PYTHON DIR [CMake options].
# DIR/python then holds the package with it, to be put on PYTHONPATH.
set -eu
python=$1
build=$2
shift 2
cd "$(dirname "$0")/.."
PATH="$(dirname "$python"):$PATH"
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" "$@"
cmake --build "$build" --parallel "${MAX_JOBS:-2}"
mkdir -p "$build/python/moduleformer_ext"
cp -r python/moduleformer_ext/. "$build/python/moduleformer_ext"
rm -f "$build/python/moduleformer_ext"/*.so  # the ordinary build's, if there is one
cmake --install "$build" --prefix "$build/python/moduleformer_ext"
