"""Print this machine's pip settings as buildah flags: `pip_for_build.py FOLDER`.

Each line is one flag for an image's build. Indexes and folders of wheels become a pip.conf (written to FOLDER) and
volumes; a private certificate becomes a secret. Only the build sees them, and nothing of them stays in the image. If
pip has no settings, nothing is printed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PLACES = ("find-links", "index-url", "extra-index-url")


def pip_settings(listed: str) -> dict[str, str]:
    """Parse `pip config list` into {setting: value}.

    As in pip itself, the environment overrides files.
    """
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = shlex.split(value.replace("\\n", " "))[0]
    return settings


def folders(settings: dict[str, str]) -> list[Path]:
    """List the existing folders on this machine that the settings name."""
    paths: set[Path] = set()
    for place in (word for setting in PLACES for word in settings.get(setting, "").split()):
        if place.startswith("file://"):
            paths.add(Path(place.removeprefix("file://")).parent)  # an index refers to files in sibling folders
        elif place.startswith("/"):
            paths.add(Path(place))
    return sorted(folder for folder in paths if folder.is_dir())


def flags(settings: dict[str, str], work: Path) -> list[str]:
    """Return buildah's flags, and write `work`/pip.conf if pip has settings."""
    conf = [
        f"{name} = " + "\n    ".join(settings[name].split()) for name in (*PLACES, "trusted-host") if name in settings
    ]
    out = []
    for folder in folders(settings):
        out += ["--volume", f"{folder}:{folder}:ro"]
        if any(folder.glob("torch-*+cpu-*.whl")):  # this folder has torch for CPUs, so torch's own index is not needed
            out += ["--build-arg", "TORCH_INDEX="]
    if certificate := settings.get("cert"):
        conf.append("cert = /run/secrets/pip_cert")
        out += ["--secret", f"id=pip_cert,src={certificate}"]
    if conf:
        (work / "pip.conf").write_text("\n".join(["[global]", *conf, ""]), encoding="utf-8")
        out += ["--secret", f"id=pip_conf,src={work / 'pip.conf'}"]
    return out


if __name__ == "__main__":
    if find_spec("pip"):  # without pip there are no settings to pass on
        listing = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
        )
        for flag in flags(pip_settings(listing.stdout), Path(sys.argv[1])):
            print(flag)
