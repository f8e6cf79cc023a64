#!/usr/bin/env bash
# dependencies.sh [EXTRA]: installs dependencies, during an image's build.
#
# Without an argument, the project's own dependencies go into /opt/venv. With the name of an extra, the packages that it
# adds go into /added, so that several images share the layer of the project's own ones.
set -euo pipefail
install() { /opt/tools/bin/pip --python /opt/venv/bin/python install --quiet --no-compile --use-pep517 "$@"; }

python3.11 requirements.py "$@" > requirements.txt
if [ $# = 0 ]; then
  install --requirement requirements.txt
  install --no-deps radlabels # without dependencies: it requires an older torch, but only its list of findings is used
  ./bytecode.sh /opt/venv
else
  install --root /added --no-warn-script-location --requirement requirements.txt
  ./bytecode.sh /added/opt/venv
  cp -a /added/opt/venv/. /opt/venv/
fi
