#!/usr/bin/env bash
# torch.sh: installs torch, during an image's build, and fails if it is another build than the image needs.
#
#   TORCH_INDEX  index of the wanted build; if empty, pip's own index is used
#   TORCH_BUILD  the wanted build, cpu or cuda; if empty, any is accepted
#
# torch comes without its dependencies and from one index: pip would ask an additional index for every package, and if it
# cannot be reached, spend ten minutes on it and then take the build of PyPI.
set -euo pipefail
if ! /opt/tools/bin/pip --python /opt/venv/bin/python install --quiet --no-compile --no-deps --retries 1 --timeout 30 \
  ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch; then
  echo "torch cannot be installed from ${TORCH_INDEX:-pip\'s own index}; pass --build-arg TORCH_INDEX=URL of an index that" \
    "has it and can be reached from here, or an empty one for pip's own index" >&2
  exit 1
fi
/opt/venv/bin/python torch_build.py "${TORCH_BUILD:-}"
