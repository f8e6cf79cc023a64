#!/usr/bin/env bash
# locks.sh [check]: writes locks/*.txt, pins with the hashes of their files on PyPI. Needs uv and the network.
#
#   locks/base.txt                the project's dependencies, which the images cpu and serve share
#   locks/cpu.txt, serve.txt      what the extras cluster and serve add to them
#   locks/tools.txt               what builds the images
#   locks/cuda.txt, …             requirements-NAME.txt
#
# `locks.sh check` writes nothing: it asks whether PyPI still has every pin of the project, of the images and of the
# environments of `make setup` and `make test-*`, and whether they satisfy pyproject.toml.
#
# Without hashes are torch of cpu and serve, whose build comes from an index with builds for CPUs (its version and build
# are checked, scripts/image/torch_build.py), and requirements-vllm.txt and requirements-families.txt, whose torch or
# torchvision may come from there, too.
set -euo pipefail
cd "$(dirname "$0")/.."
NAMES=(checkov clients cuda)
NO_LOCK=(vllm families label-studio)
# The CUDA build of torch, which PyPI has, needs these; the build for CPUs does not.
OF_CUDA='^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='
OPTIONS=(--no-annotate --no-header --quiet --python-version 3.11.9 --python-platform x86_64-manylinux_2_36)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

compile() { # compile FILE [uv's options]
  "${UV:-uv}" pip compile "${OPTIONS[@]}" "$@"
}

resolve() { # resolve [EXTRA …]: the pins of the project with extras, without torch
  python3 scripts/requirements.py "$@" > "$WORK/requirements.in"
  compile "$WORK/requirements.in" --constraint constraints.txt | grep -vE "$OF_CUDA"
}

lock() { # lock NAME PINS HEADING: the pins of a file, with hashes
  {
    echo "# Written by make locks from $3; installed with --require-hashes and without dependencies."
    compile "$2" --no-deps --generate-hashes
  } > "locks/$1.txt"
}

write_locks() {
  local name
  {
    resolve
    # without its dependencies: it requires an older torch, but only its list of findings is used
    grep -E '^radlabels==' constraints.txt
  } | sort > "$WORK/base.in"
  lock base "$WORK/base.in" "pyproject.toml and constraints.txt"
  resolve cluster | sort | comm -13 "$WORK/base.in" - > "$WORK/cpu.in"
  lock cpu "$WORK/cpu.in" "the extra cluster of pyproject.toml and constraints.txt"
  resolve serve | sort | comm -13 "$WORK/base.in" - > "$WORK/serve.in"
  lock serve "$WORK/serve.in" "the extra serve of pyproject.toml and constraints.txt"
  printf '%s\n' cyclonedx-bom setuptools > "$WORK/names.in"
  compile "$WORK/names.in" --constraint constraints.txt > "$WORK/tools.in"
  lock tools "$WORK/tools.in" constraints.txt
  for name in "${NAMES[@]}"; do
    lock "$name" "requirements-$name.txt" "requirements-$name.txt"
  done
}

check_pins() {
  local name
  resolve dev serve cluster > /dev/null
  for name in constraints.txt "${NAMES[@]/#/requirements-}" "${NO_LOCK[@]/#/requirements-}"; do
    compile "${name%.txt}.txt" --no-deps > /dev/null
    echo "PyPI has every pin of ${name%.txt}.txt"
  done
}

case ${1:-} in
  "") write_locks ;;
  check) check_pins ;;
  *) sed -nE '2,/^[^#]/ s/^# ?//p' "$0"; exit 2 ;;
esac
