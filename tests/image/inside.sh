#!/bin/bash
# Runs in an image and checks its user, the folders that it can write to, and that no build files are left.
set -u
fail() { echo "$*"; exit 1; }

[ "$(id -u):$(id -g)" = 10001:10001 ] || fail "expected the user 10001:10001, got $(id -u):$(id -g)"
grep -qE '^[^ ]+ / [^ ]+ ro[, ]' /proc/mounts || fail "the root is not read-only"
for place in / /app /opt/venv /usr /var/tmp; do
  ! touch "$place/probe" 2> /dev/null || fail "$place is writable"
done
touch /tmp/probe || fail "/tmp is not writable"
for tool in cc gcc g++ clang ld as make pip pip3; do
  ! command -v "$tool" > /dev/null || fail "expected no $tool in the image"
done
for place in /opt/tools /build /source /wheel /root/.cache /root/.config /etc/pip.conf /run/secrets/pip_cert \
  /var/cache/apt; do
  [ ! -e "$place" ] || fail "$place was left by the build"
done
left=$(find / -xdev \( -name '*.whl' -o -name '*.deb' \) -not -path '/usr/share/python-wheels/*' \
  -not -path '*/ensurepip/*' 2> /dev/null)
[ -z "$left" ] || fail "left by the build: $left"
