#!/bin/sh
# Builds the package apart from the ordinary build: tools/build_flavour.sh PYTHON DIR, with the variables of docs/build.md
# in the environment. DIR/python then holds the package, to be put on PYTHONPATH.
set -eu
cd "$(dirname "$0")/.."
PATH="$(dirname "$1"):$PATH" MFX_BUILD_DIR="$2" "$1" setup.py -q build --build-base "$2" --build-lib "$2/python"
