#!/usr/bin/env bash
# dependencies.sh LOCK: installs the pins of a lock, during an image's build.
#
# base.txt goes into /opt/venv. The others hold what an image adds to it, which goes into /added, so that several images
# share the layer of base.txt. A lock is complete but for torch, which torch.sh has installed, hence --no-deps.
set -euo pipefail
lock=$1
install() {
  /opt/tools/bin/pip --python /opt/venv/bin/python install --quiet --no-compile --use-pep517 --no-deps --require-hashes \
    --requirement "$lock" "$@"
}

if [ "$lock" = base.txt ]; then
  install
  ./bytecode.sh /opt/venv
else
  install --root /added --no-warn-script-location
  ./bytecode.sh /added/opt/venv
  cp -a /added/opt/venv/. /opt/venv/
fi
