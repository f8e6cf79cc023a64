#!/usr/bin/env bash
# The steps of a release. .github/workflows/release.yaml runs them for a tag, `make release-dry-run` on any machine.
#
#   release.sh check [TAG]                 version of project, chart, images and CHANGELOG agree (and are those of the tag)
#   release.sh wheel FOLDER                build the wheel from the tracked files, install it into a new environment, run it
#   release.sh sbom FOLDER                 write the SBOM of the wheel and the pins of its dependencies (needs PyPI)
#   release.sh chart FOLDER REGISTRY [NAME=sha256:DIGEST ...]
#                                          package the chart with the addresses and digests of its images, and try it
#   release.sh try-chart FOLDER            lint the packaged chart, and render it with its profiles ($HELM)
#   release.sh targets                     the targets of the Dockerfile that are released
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
HELM=${HELM:-helm}
VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
TARGETS=(cpu serve cuda)
# Kinds that a cluster must serve for the chart to be rendered.
APIS=(serving.kserve.io/v1beta1/InferenceService serving.kserve.io/v1alpha1/ServingRuntime
  serving.kserve.io/v1alpha1/ClusterStorageContainer argoproj.io/v1alpha1/Workflow
  monitoring.coreos.com/v1/ServiceMonitor monitoring.coreos.com/v1/PrometheusRule)

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

environment() { # environment FOLDER WHEEL: a new environment with the wheel, beside the packages of $PYTHON
  "$PYTHON" -m venv --without-pip "$1"
  # So that nothing but the wheel is new. A .pth file in a folder that a .pth file names is not read, so an editable
  # install of the project stays outside.
  "$PYTHON" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    > "$1/lib/$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')/site-packages/packages.pth"
  "$PYTHON" -m pip --python "$1/bin/python" install --quiet --disable-pip-version-check --no-deps --no-index \
    --force-reinstall "$2"
}

wheel() { # wheel FOLDER
  local folder=$1 work wheel
  mkdir -p "$folder"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  # From tracked files alone: setuptools would also pack what an earlier build has left in build/.
  mkdir "$work/source"
  git ls-files -z | tar --create --null --files-from - | tar --extract --touch --directory "$work/source"
  "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation \
    --wheel-dir "$folder" "$work/source"
  wheel=$folder/clincot-$VERSION-py3-none-any.whl
  environment "$work/new" "$wheel"
  (cd "$work" && new/bin/python -c '
import pathlib, sys, clincot, clincot.components, clincot.pipelines
site = pathlib.Path(sys.prefix) / "lib"
for package in (clincot, clincot.components, clincot.pipelines):
    assert site in pathlib.Path(package.__file__).parents, package.__file__
installed = pathlib.Path(clincot.__file__).parent
assert (installed / "assets/policy").is_dir() and list((installed / "recipes").glob("*.yaml"))')
  (cd "$work" && new/bin/clincot --version && new/bin/clincot --help && new/bin/clincot recipes) > "$work/said"
  [ "$(head -1 "$work/said")" = "clincot $VERSION" ] || fail "clincot --version says $(head -1 "$work/said")"
  grep -qi 'usage: clincot' "$work/said" || fail "clincot --help has no usage"
  echo "wheel: $wheel"
}

sbom() { # sbom FOLDER
  local folder=$1 work
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  "$PYTHON" -m venv --without-pip "$work/tools"
  "$PYTHON" -m pip --python "$work/tools/bin/python" install --quiet --disable-pip-version-check --no-deps \
    --require-hashes --requirement locks/tools.txt
  { cat locks/base.txt; grep -E '^torch==' constraints.txt; } > "$work/pins.txt"
  "$work/tools/bin/cyclonedx-py" requirements --output-reproducible --output-format JSON --pyproject pyproject.toml \
    --mc-type application --output-file "$folder/clincot.cdx.json" "$work/pins.txt"
  grep -q '"name": "clincot"' "$folder/clincot.cdx.json" || fail "the SBOM does not name clincot"
  echo "sbom: $folder/clincot.cdx.json"
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
  try-chart "$folder"
}

try-chart() { # try-chart FOLDER
  local package=$1/clincot-$VERSION.tgz work values profile given
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  tar --extract --touch --gzip --file "$package" --directory "$work"
  for values in "$work"/clincot/values-*.yaml; do
    profile=$(basename "$values" .yaml)
    case $profile in # what a profile leaves to the person who installs it
      values-trial) given=store.accessKey=trial,store.secretKey=dry-run ;;
      *) given= ;;
    esac
    [ "$profile" != values-kubeflow ] || given=store.existingSecret=s3
    "$HELM" lint "$package" --quiet --values "$values" --set "$given" > "$work/said" 2>&1 \
      || { cat "$work/said" >&2; fail "helm lint with $profile"; }
    "$HELM" template clincot "$package" --namespace clincot --values "$values" --set "$given" \
      "${APIS[@]/#/--api-versions=}" > "$work/$profile.out" 2> "$work/said" \
      || { cat "$work/said" >&2; fail "helm template with $profile"; }
    grep -q '^kind: ServingRuntime$' "$work/$profile.out" || fail "$profile renders no ServingRuntime"
  done
  echo "try-chart: $("$HELM" version --short), $(find "$work" -name '*.out' | wc -l) profiles"
}

case ${1:-} in
  check | wheel | sbom | chart | try-chart) "$@" ;;
  targets) printf '%s\n' "${TARGETS[@]}" ;;
  *) sed -nE '2,/^[^#]/ s/^# ?//p' "$0"; exit 2 ;;
esac
