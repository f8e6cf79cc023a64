#!/usr/bin/env bash
# Within an image's build. Without an argument: the project's own dependencies, into /opt/venv. With the name of an
# extra: what that adds to them, into /added, so that images share the layer of the former.
set -euo pipefail
install() { /opt/tools/bin/pip --python /opt/venv/bin/python install --quiet --no-compile --use-pep517 "$@"; }

python3.11 requirements.py "$@" > requirements.txt
if [ $# = 0 ]; then
  install --requirement requirements.txt
  install --no-deps radlabels # its names alone: it asks for an older torch
  ./bytecode.sh /opt/venv
else
  install --root /added --no-warn-script-location --requirement requirements.txt
  ./bytecode.sh /added/opt/venv
  cp -a /added/opt/venv/. /opt/venv/
fi
