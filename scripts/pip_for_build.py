"""How pip is set up on this machine, as buildah's flags for an image's build: `pip_for_build.py FOLDER`, a flag a line.

Indexes and folders of wheels become a pip.conf (written to FOLDER) and volumes, a private certificate a secret. The
build sees them while it installs; nothing of them stays in the image. Where pip runs as it comes, there are no flags.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PLACES = ("find-links", "index-url", "extra-index-url")


def pip_settings(listed: str) -> dict[str, str]:
    """`pip config list` as {setting: value}; what the environment says wins over files, as in pip itself."""
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = shlex.split(value.replace("\\n", " "))[0]
    return settings


def folders(settings: dict[str, str]) -> list[Path]:
    """Folders on this machine that the settings name and that exist."""
    named: set[Path] = set()
    for place in (word for setting in PLACES for word in settings.get(setting, "").split()):
        if place.startswith("file://"):
            named.add(Path(place.removeprefix("file://")).parent)  # an index points at files beside itself
        elif place.startswith("/"):
            named.add(Path(place))
    return sorted(folder for folder in named if folder.is_dir())


def flags(settings: dict[str, str], work: Path) -> list[str]:
    """buildah's flags; writes `work`/pip.conf if there is anything to say."""
    conf = [
        f"{name} = " + "\n    ".join(settings[name].split()) for name in (*PLACES, "trusted-host") if name in settings
    ]
    out = []
    for folder in folders(settings):
        out += ["--volume", f"{folder}:{folder}:ro"]
        if any(folder.glob("torch-*+cpu-*.whl")):  # torch for CPUs lies here: its own index is not needed
            out += ["--build-arg", "TORCH_INDEX="]
    if certificate := settings.get("cert"):
        conf.append("cert = /run/secrets/pip_cert")
        out += ["--secret", f"id=pip_cert,src={certificate}"]
    if conf:
        (work / "pip.conf").write_text("\n".join(["[global]", *conf, ""]), encoding="utf-8")
        out += ["--secret", f"id=pip_conf,src={work / 'pip.conf'}"]
    return out


if __name__ == "__main__":
    if find_spec("pip"):  # a Python without pip has no settings of it either
        said = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
        )
        for flag in flags(pip_settings(said.stdout), Path(sys.argv[1])):
            print(flag)
