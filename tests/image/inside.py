"""Run within an image: only what constraints.txt (standard input) pins is installed, and the SBOM names all of it."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

SITE = "/opt/venv/lib/python3.11/site-packages"
SBOM = Path("/opt/venv/share/sbom/clincot.cdx.json")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


lines = [line.strip().split("==") for line in sys.stdin if "==" in line and not line.startswith("#")]
pins = {plain(name): version for name, version in lines}
here = {plain(distribution.name): distribution.version for distribution in distributions(path=[SITE])}
sbom = json.loads(SBOM.read_text())
named = {plain(part["name"]): part["version"] for part in sbom["components"]} | {
    plain(sbom["metadata"]["component"]["name"]): sbom["metadata"]["component"]["version"]
}
if missing := {name: version for name, version in here.items() if named.get(name) != version}:
    sys.exit(f"not in the SBOM: {missing}")
if here.pop("clincot") != sys.argv[1]:
    sys.exit(f"clincot is not {sys.argv[1]}")
# torch for CPUs calls itself 2.13.0+cpu
if loose := {name: version for name, version in here.items() if version.partition("+")[0] != pins.get(name)}:
    sys.exit(f"not as constraints.txt has it: {loose}")
print(f"{len(here)} distributions, all pinned, all in the SBOM")
