#!/usr/bin/env bash
# Installs Debian's Chromium if no Chromium or Chrome is installed; the page's tests drive it. Needs root for that;
# without it, or without Debian's mirror, the page's tests are skipped and say so.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no Chromium or Chrome is installed, so the tests of the server's page are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; }; then
  echo "Chromium could not be installed, so the tests of the server's page are skipped" >&2
fi
