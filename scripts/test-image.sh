#!/usr/bin/env bash
# Builds the images cpu and serve on a Debian base that it creates, runs them as a cluster does (own uid, read-only
# root, no capabilities) and checks their content. It needs no registry and no Docker daemon: `make test-image
# CONFIRM=yes`.
set -euo pipefail
cd "$(dirname "$0")/.."

PACKAGES=(buildah podman runc debootstrap curl)
MIRROR=${MIRROR:-http://deb.debian.org/debian}
PYTHON=${PYTHON:-python3}
WORK=$PWD/runs/image
STORAGE=(--root "$WORK/storage" --runroot "$WORK/run")
VERSION=$(sed -nE 's/^version = "(.*)"$/\1/p' pyproject.toml)
read -r -a TARGETS <<< "${TARGETS:-cpu serve}"
SERVER=clincot-test-$$

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'test-image: %s\n' "$*" >&2; exit 1; }

consent() {
  cat <<EOF
This needs root on Debian or Ubuntu. It will
  - install the Debian packages ${PACKAGES[*]}, if they are missing
  - download Debian packages from $MIRROR, and Python packages with this machine's pip settings
  - write a Debian base, the images and their layers to $WORK (about 12 GB)
  - run containers; during the test, the server listens on 127.0.0.1
To undo this: rm -rf $WORK, and apt-get remove the packages that it reports as installed.
EOF
  [ "${CONFIRM:-}" = yes ] || fail "nothing was done; set CONFIRM=yes to continue"
  [ "$(id -u)" = 0 ] || fail "this must run as root"
  command -v apt-get > /dev/null || fail "this needs Debian or Ubuntu (apt-get)"
}

install_packages() {
  local missing=() package
  for package in "${PACKAGES[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2> /dev/null | grep -qx installed \
      || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > "$WORK/apt.log"
}

make_base() {
  podman "${STORAGE[@]}" image exists localhost/clincot-base && return
  local begun=$SECONDS
  say "base: Debian bookworm with python3.11"
  rm -rf "$WORK/base"
  debootstrap --variant=minbase --include=python3.11,python3.11-venv,python3-distutils bookworm "$WORK/base" "$MIRROR" \
    > "$WORK/debootstrap.log" || fail "debootstrap failed, see $WORK/debootstrap.log"
  rm -rf "$WORK"/base/var/cache/apt/archives/*.deb "$WORK"/base/var/lib/apt/lists/*
  tar -C "$WORK/base" --numeric-owner -c . | podman "${STORAGE[@]}" import --quiet - localhost/clincot-base
  rm -rf "$WORK/base"
  echo "base: created in $((SECONDS - begun)) s"
}

build() { # build TARGET
  local begun=$SECONDS pip
  say "$1: build"
  "$PYTHON" scripts/pip_for_build.py "$WORK" > "$WORK/pip.flags"
  mapfile -t pip < "$WORK/pip.flags"
  buildah "${STORAGE[@]}" bud --isolation chroot --network host --layers --format docker \
    --target "$1" --tag "localhost/clincot-$1:$VERSION" --build-arg BASE_IMAGE=localhost/clincot-base \
    --build-arg "VERSION=$VERSION" --build-arg "REVISION=$(git rev-parse HEAD 2> /dev/null || echo unknown)" \
    "${pip[@]}" . > "$WORK/build-$1.log" 2>&1 || { tail -30 "$WORK/build-$1.log" >&2; fail "building $1 failed"; }
  echo "$1: built in $((SECONDS - begun)) s, $(inspect "$1" '{{.Size}}' | awk '{printf "%.2f GB", $1 / 1e9}')"
}

inspect() { podman "${STORAGE[@]}" image inspect "localhost/clincot-$1:$VERSION" --format "$2"; }

run() { # run TARGET ENTRYPOINT [podman's flags] -- ARGUMENTS: run a container as a cluster does
  local target=$1 entrypoint=$2 flags=()
  shift 2
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  shift
  podman "${STORAGE[@]}" --runtime runc run --rm --network host --read-only --read-only-tmpfs=false \
    --tmpfs /tmp:rw,mode=0777 --cap-drop ALL --security-opt no-new-privileges --memory 4g \
    --ulimit nofile=20000:20000 --ulimit nproc=4096:4096 --entrypoint "$entrypoint" "${flags[@]}" \
    "localhost/clincot-$target:$VERSION" "$@"
}

check_content() { # check_content TARGET
  local target=$1 label
  say "$target: content"
  run "$target" /bin/bash --volume "$PWD/tests/image:/checks:ro" -- /checks/inside.sh || fail "$target: see above"
  run "$target" python --volume "$PWD/tests/image:/checks:ro" --interactive -- /checks/inside.py "$VERSION" \
    < constraints.txt || fail "$target: see above"
  [ "$(inspect "$target" '{{.Config.User}}')" = 10001:10001 ] || fail "$target: USER is not 10001:10001"
  for label in title description version revision licenses; do
    [ -n "$(inspect "$target" "{{index .Labels \"org.opencontainers.image.$label\"}}")" ] || fail "$target: no label $label"
  done
  [ "$(inspect "$target" '{{index .Labels "org.opencontainers.image.version"}}')" = "$VERSION" ] || fail "$target: version"
  run "$target" /bin/bash -- -c "test -s $(inspect "$target" '{{index .Labels "io.clincot.sbom"}}')" || fail "$target: no SBOM"
  [ "$(run "$target" clincot -- --version)" = "clincot $VERSION" ] || fail "$target: clincot --version"
  echo "uid 10001, read-only root, no compiler, no pip, no cache; clincot $VERSION"
}

run_stages() { # run the stages prepare and propose on one image, and the programs that the stage version calls
  say "cpu: stages"
  local out=$WORK/stages
  rm -rf "$out"
  install -d -o 10001 -g 10001 "$out"
  cp docs/pair.png "$out/film.png"
  echo '{"image": "film.png", "question": "Is there a nodule in the left lung?", "answer": "yes", "patient": "p1"}' \
    > "$out/rows.jsonl"
  stage() { run cpu clincot --volume "$out:/work" -- "$@" 2> "$WORK/stages.log" || { cat "$WORK/stages.log"; fail "$1"; }; }
  stage ingest jsonl /work/rows.jsonl --out /work/data
  stage prepare --data /work/data --questions /work/questions.jsonl --set prepare.rounds=1
  stage propose --data /work/data --questions /work/questions.jsonl --policy assets/policy --regions /work/regions.jsonl
  [ "$(wc -l < "$out/regions.jsonl")" -ge 2 ] || fail "propose wrote fewer than two regions"
  local said
  said=$(run cpu clincot -- render --out /tmp/x --warps 0:1 --images 1 2>&1 || true)
  [[ "$said" == *CLINCOT_ANATOMY_WHEEL* ]] || fail "render does not say how to get its CT without pip: $said"
  run cpu /bin/bash -- -c 'set -e; git --version; cd /tmp; git init -q data; cd data; dvc init -q; touch x; dvc add -q x;
    dvc --version' || fail "git or dvc does not work in the image cpu"
}

ask_server() { # ask `clincot serve` one question over HTTP
  say "serve: a question"
  local port answer begun=$SECONDS
  port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  run serve clincot --detach --name "$SERVER" -- serve --checkpoint assets/policy --model-name policy \
    --host 127.0.0.1 --port "$port" > /dev/null
  trap 'podman "${STORAGE[@]}" rm --force --time 5 "$SERVER" > /dev/null 2>&1 || true' EXIT
  until curl --silent --fail "http://127.0.0.1:$port/v2/health/ready" > /dev/null; do
    [ $((SECONDS - begun)) -lt 180 ] || { podman "${STORAGE[@]}" logs "$SERVER" >&2; fail "not ready within 180 s"; }
    sleep 1
  done
  echo "ready after $((SECONDS - begun)) s"
  answer=$("$PYTHON" - << 'EOF' | curl --silent --fail --show-error --max-time 120 \
    --header 'Content-Type: application/json' --data-binary @- "http://127.0.0.1:$port/openai/v1/chat/completions"
import base64, json
image = "data:image/png;base64," + base64.b64encode(open("docs/pair.png", "rb").read()).decode()
parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Is there a nodule in the left lung?"}]
print(json.dumps({"model": "policy", "messages": [{"role": "user", "content": parts}]}))
EOF
  ) || { podman "${STORAGE[@]}" logs "$SERVER" >&2; fail "the server did not answer"; }
  "$PYTHON" -c 'import json, sys; print("answer:", json.loads(sys.argv[1])["choices"][0]["message"]["content"])' "$answer"
  podman "${STORAGE[@]}" stop --time 20 "$SERVER" > /dev/null
}

consent
mkdir -p "$WORK"
install_packages
make_base
for target in "${TARGETS[@]}"; do
  build "$target"
  check_content "$target"
  case $target in
    cpu) run_stages ;;
    serve) ask_server ;;
    *) fail "expected the targets cpu and serve, got $target" ;;
  esac
done
say "all checks passed"
