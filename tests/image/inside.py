"""Check in an image that all packages are pinned and that the SBOM lists them.

The pins are constraints.txt on standard input.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

SITE = "/opt/venv/lib/python3.11/site-packages"
SBOM = Path("/opt/venv/share/sbom/clincot.cdx.json")


def normalize_name(name: str) -> str:
    """Return a distribution's name in its canonical spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


lines = [line.strip().split("==") for line in sys.stdin if "==" in line and not line.startswith("#")]
pins = {normalize_name(name): version for name, version in lines}
installed = {normalize_name(distribution.name): distribution.version for distribution in distributions(path=[SITE])}
sbom = json.loads(SBOM.read_text())
listed = {normalize_name(part["name"]): part["version"] for part in sbom["components"]} | {
    normalize_name(sbom["metadata"]["component"]["name"]): sbom["metadata"]["component"]["version"]
}
if missing := {name: version for name, version in installed.items() if listed.get(name) != version}:
    sys.exit(f"not in the SBOM: {missing}")
if installed.pop("clincot") != sys.argv[1]:
    sys.exit(f"expected clincot {sys.argv[1]}")
# torch for CPUs has the version 2.13.0+cpu
if unpinned := {name: version for name, version in installed.items() if version.partition("+")[0] != pins.get(name)}:
    sys.exit(f"versions that constraints.txt does not pin: {unpinned}")
print(f"{len(installed)} distributions are pinned and in the SBOM")
