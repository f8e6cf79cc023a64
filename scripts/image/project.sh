#!/usr/bin/env bash
# Within an image's build: what the project's wheel adds to /opt/venv, in /project, with the SBOM of the whole.
# project.sh VERSION
set -euo pipefail
version=$1
python=/opt/venv/bin/python

/opt/tools/bin/pip --python $python install --quiet --no-index --no-deps --no-compile --no-warn-script-location \
  --root /project /wheel/*.whl
./bytecode.sh /project/opt/venv
cp -a /project/opt/venv/. /opt/venv/

installed=$($python -c 'from importlib.metadata import version; print(version("clincot"))')
if [ "$installed" != "$version" ]; then
  echo "pyproject.toml says $installed, the build says $version: pass --build-arg VERSION=$installed" >&2
  exit 1
fi
mkdir -p /project/opt/venv/share/sbom
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON --pyproject pyproject.toml \
  --mc-type application --output-file /project/opt/venv/share/sbom/clincot.cdx.json $python
