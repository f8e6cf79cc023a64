#!/usr/bin/env bash
# Writes promtool, which checks and tests the chart's alert rules, to the given path: `scripts/get-promtool.sh PATH`. It
# is a link to the installed one, or comes from Debian's or Ubuntu's package `prometheus`, of which nothing is installed:
# apt keeps its lists and the package in a folder that is removed, so root is not needed. PyPI and npm have no promtool.
set -euo pipefail
target=${1:?usage: scripts/get-promtool.sh PATH}
if [ -x "$target" ]; then exit 0; fi
mkdir -p "$(dirname "$target")"
if installed=$(command -v promtool); then
  ln -sf "$installed" "$target"
  exit 0
fi
if ! command -v apt-get > /dev/null || ! command -v dpkg-deb > /dev/null; then
  echo "promtool is not installed, and this is neither Debian nor Ubuntu; install Prometheus" >&2
  exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/lists/partial" "$folder/archives/partial"
apt=(apt-get -q -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder" -o Debug::NoLocking=1 -o APT::Sandbox::User=)
if ! { "${apt[@]}" update && (cd "$folder" && "${apt[@]}" download prometheus); } > "$folder/log" 2>&1; then
  cat "$folder/log" >&2
  echo "promtool could not be had: apt-get could not download the package prometheus" >&2
  exit 1
fi
dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar --extract --to-stdout ./usr/bin/promtool > "$target.partial"
chmod 755 "$target.partial"
mv "$target.partial" "$target"
