#!/usr/bin/env bash
# Within an image's build: bytecode for the packages under FOLDER. It is not tied to the files' times, so it holds
# whatever a builder makes of those, and does not differ for them. bytecode.sh FOLDER
set -euo pipefail
folder=$1
# A file that this Python cannot compile (a template, a test for a newer one) cannot be imported by it either.
/opt/venv/bin/python -m compileall -qq -j 0 -s "${folder%/opt/venv}" --invalidation-mode unchecked-hash "$folder/lib" \
  || echo "some files have no bytecode" >&2
