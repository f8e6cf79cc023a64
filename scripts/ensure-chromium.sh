#!/usr/bin/env bash
# Installs Debian's Chromium if no Chromium or Chrome is installed; the page's tests drive it. Needs root for that.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "install Chromium or Chrome first; the tests of the server's page need it" >&2
  exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
