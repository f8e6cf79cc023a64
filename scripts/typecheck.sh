#!/usr/bin/env bash
# Runs mypy on the package as it is installed. mypy finds modules by their path, but pipelines/ and components/ are not
# below src/clincot, so this creates a folder of links in which they are.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=.mypy_cache/tree
rm -rf "$tree"
mkdir -p "$tree/clincot"
for entry in src/clincot/* pipelines components; do
  case "$entry" in *__pycache__) ;; *) ln -s "$PWD/$entry" "$tree/clincot/" ;; esac
done
MYPYPATH="$tree" "${MYPY:-.venv/bin/mypy}" --explicit-package-bases -p clincot "$@"
