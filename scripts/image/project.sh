#!/usr/bin/env bash
# project.sh VERSION: installs the project's wheel, during an image's build.
#
# The files that it adds to /opt/venv go into /project, with the SBOM of the whole image.
set -euo pipefail
version=$1
python=/opt/venv/bin/python

/opt/tools/bin/pip --python $python install --quiet --no-index --no-deps --no-compile --no-warn-script-location \
  --root /project /wheel/*.whl
./bytecode.sh /project/opt/venv
cp -a /project/opt/venv/. /opt/venv/

installed=$($python -c 'from importlib.metadata import version; print(version("clincot"))')
if [ "$installed" != "$version" ]; then
  echo "expected the version $version, got $installed from pyproject.toml: pass --build-arg VERSION=$installed" >&2
  exit 1
fi
mkdir -p /project/opt/venv/share/sbom
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON --pyproject pyproject.toml \
  --mc-type application --output-file /project/opt/venv/share/sbom/clincot.cdx.json $python
