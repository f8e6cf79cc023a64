#!/usr/bin/env bash
# Unpacks the image archive Orthanc with its DICOMweb plugin into a folder: `scripts/get-orthanc.sh FOLDER`. They come from
# Debian's or Ubuntu's packages `orthanc` and `orthanc-dicomweb` with the libraries that are missing. Nothing is
# installed: apt keeps its lists and the packages in a folder that is removed, so root is not needed.
set -euo pipefail
target=${1:?usage: scripts/get-orthanc.sh FOLDER}
if [ -x "$target/usr/sbin/Orthanc" ]; then exit 0; fi
if ! command -v apt-get > /dev/null || ! command -v dpkg-deb > /dev/null; then
  echo "Orthanc could not be had: this is neither Debian nor Ubuntu" >&2
  exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/lists/partial" "$folder/archives/partial"
apt=(apt-get -q -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder" -o Debug::NoLocking=1 -o APT::Sandbox::User=)
get_packages() {
  "${apt[@]}" update
  "${apt[@]}" --simulate --no-install-recommends install orthanc orthanc-dicomweb > "$folder/plan"
  # a package that is installed already is not part of the plan
  awk '/^Inst / {print $2}' "$folder/plan" > "$folder/names"
  if ! grep -qx orthanc "$folder/names"; then printf '%s\n' orthanc orthanc-dicomweb >> "$folder/names"; fi
  (cd "$folder/archives" && xargs "${apt[@]}" download < "$folder/names")
}
if ! get_packages > "$folder/log" 2>&1; then
  cat "$folder/log" >&2
  echo "Orthanc could not be had: apt-get could not download its packages" >&2
  exit 1
fi
mkdir -p "$(dirname "$target")"
for package in "$folder"/archives/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done
rm -rf "$target.partial"
mv "$folder/root" "$target.partial"
mv "$target.partial" "$target"
