#!/usr/bin/env bash
# bytecode.sh FOLDER: compiles the packages below FOLDER to bytecode, during an image's build.
#
# The bytecode does not depend on the files' modification times, so it stays valid if the builder changes them, and
# equal sources give equal layers.
set -euo pipefail
folder=$1
# A file that this Python cannot compile (a template, a test for a newer version) cannot be imported by it either.
/opt/venv/bin/python -m compileall -qq -j 0 -s "${folder%/opt/venv}" --invalidation-mode unchecked-hash "$folder/lib" \
  || echo "some files have no bytecode" >&2
