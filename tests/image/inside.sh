#!/bin/bash
# Run within an image: who it runs as, where it can write, and that nothing of its making was left behind.
set -u
fail() { echo "$*"; exit 1; }

[ "$(id -u):$(id -g)" = 10001:10001 ] || fail "runs as $(id -u):$(id -g)"
grep -qE '^[^ ]+ / [^ ]+ ro[, ]' /proc/mounts || fail "the root is not read-only"
for place in / /app /opt/venv /usr /var/tmp; do
  ! touch "$place/probe" 2> /dev/null || fail "$place can be written"
done
touch /tmp/probe || fail "/tmp cannot be written"
for tool in cc gcc g++ clang ld as make pip pip3; do
  ! command -v "$tool" > /dev/null || fail "there is a $tool"
done
for place in /opt/tools /build /source /wheel /root/.cache /root/.config /etc/pip.conf /run/secrets/pip_cert \
  /var/cache/apt; do
  [ ! -e "$place" ] || fail "$place was left behind"
done
left=$(find / -xdev \( -name '*.whl' -o -name '*.deb' \) -not -path '/usr/share/python-wheels/*' \
  -not -path '*/ensurepip/*' 2> /dev/null)
[ -z "$left" ] || fail "left behind: $left"
