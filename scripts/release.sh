#!/usr/bin/env bash
# The steps of a release. .github/workflows/release.yaml runs them for a tag, `make release-dry-run` on any machine.
#
#   release.sh check [TAG]                 version of project, chart, images and CHANGELOG agree (and are those of the tag)
#   release.sh wheel FOLDER                build the wheel, install it into an empty folder and run it
#   release.sh chart FOLDER REGISTRY [NAME=sha256:DIGEST ...]
#                                          package the chart with the addresses and digests of its images
#   release.sh targets                     the targets of the Dockerfile that are released
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
HELM=${HELM:-helm}
VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
TARGETS=(cpu serve cuda)

fail() { printf 'release: %s\n' "$*" >&2; exit 1; }

check() { # check [TAG]
  local chart app tag=${1:-v$VERSION} argument
  chart=$(sed -nE 's/^version: "?([^"]*)"?$/\1/p' charts/clincot/Chart.yaml)
  app=$(sed -nE 's/^appVersion: "?([^"]*)"?$/\1/p' charts/clincot/Chart.yaml)
  [ "$chart" = "$VERSION" ] || fail "Chart.yaml has the version $chart, pyproject.toml $VERSION"
  [ "$app" = "$VERSION" ] || fail "Chart.yaml has the appVersion $app, pyproject.toml $VERSION"
  [ "$tag" = "v$VERSION" ] || fail "the tag is $tag, but pyproject.toml has the version $VERSION"
  while read -r argument; do
    [ "$argument" = "$VERSION" ] || fail "the Dockerfile has ARG VERSION=$argument, pyproject.toml $VERSION"
  done < <(sed -nE 's/^ARG VERSION=(.*)$/\1/p' Dockerfile | sort -u)
  if [ $# -gt 0 ]; then
    grep -qE "^## \[?$VERSION\]?" CHANGELOG.md || fail "CHANGELOG.md has no section $VERSION"
  fi
  for target in "${TARGETS[@]}"; do
    grep -qE "^FROM .* AS $target\$" Dockerfile || fail "the Dockerfile has no target $target"
  done
  echo "check: $VERSION"
}

wheel() { # wheel FOLDER
  local folder=$1 trial
  "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" .
  trial=$(mktemp -d)
  trap 'rm -rf "$trial"' RETURN
  # Beside the packages of this environment, so that nothing but the wheel is new.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
    --target "$trial/site" "$folder/clincot-$VERSION-py3-none-any.whl"
  (cd "$trial" && PYTHONPATH="$trial/site" "$PYTHON" -c '
import pathlib, clincot, clincot.components, clincot.pipelines
site = pathlib.Path(clincot.__file__).parents[1]
for package in (clincot, clincot.components, clincot.pipelines):
    assert site in pathlib.Path(package.__file__).parents, package.__file__
assert (site / "clincot/assets/policy").is_dir() and list((site / "clincot/recipes").glob("*.yaml"))
from clincot.cli import main
raise SystemExit(main(["recipes"]))' > /dev/null)
  echo "wheel: $folder/clincot-$VERSION-py3-none-any.whl"
}

chart() { # chart FOLDER REGISTRY [NAME=sha256:DIGEST ...]
  local folder=$1 registry=$2 work name digest
  shift 2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  cp -R charts/clincot "$work/clincot"
  for name in "${TARGETS[@]}"; do
    digest=
    for given in "$@"; do [ "${given%%=*}" != "$name" ] || digest=${given#*=}; done
    [[ "$digest" =~ ^(sha256:[0-9a-f]{64})?$ ]] || fail "$name: expected sha256: and 64 hexadecimal digits, got $digest"
    # The lines of one image in values.yaml: repository, then the first empty digest.
    sed -i -E "s|^(    repository: )clincot-$name\$|\1$registry/clincot-$name|
      /repository: .*clincot-$name\$/,/^    digest: \"\"/ s|^(    digest: )\"\"\$|\1\"$digest\"|" "$work/clincot/values.yaml"
    grep -q "repository: $registry/clincot-$name" "$work/clincot/values.yaml" || fail "values.yaml has no image clincot-$name"
  done
  "$HELM" package "$work/clincot" --destination "$folder" > /dev/null
  echo "chart: $folder/clincot-$VERSION.tgz"
}

case ${1:-} in
  check | wheel | chart) "$@" ;;
  targets) printf '%s\n' "${TARGETS[@]}" ;;
  *) sed -nE '2,/^[^#]/ s/^# ?//p' "$0"; exit 2 ;;
esac
