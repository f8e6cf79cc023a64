"""Run the release here as far as it goes: `release_dry_run.py FOLDER HELM [HELM …]`, in the repository's root.

STEPS holds every step of .github/workflows/release.yaml, with what runs in its place on this machine, or with the
reason why it cannot run here. Both are printed at the end. The exit code is 1 if a command failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REGISTRY = "registry.example/clincot"
RELEASE = "scripts/release.sh"
# No image is pushed here, so no digest is known; these have the right form.
DIGESTS = tuple(f"{name}=sha256:{digit * 64}" for name, digit in (("cpu", "1"), ("serve", "2"), ("cuda", "3")))
TREE = "the working tree is what would be checked out"
SIGNING = "cosign signs with the identity of the workflow (OIDC), which only a run on GitHub has"
RUNNER = "prepares GitHub's machine"


class Step(NamedTuple):
    """A step of the workflow, and what is done for it here.

    commands: run one after the other, with {folder} and {bin} (of this Python) filled in. reason: why the step itself
    is not run; it may be set beside commands that do a part of it.
    """

    job: str
    title: str
    commands: tuple[tuple[str, ...], ...] = ()
    reason: str = ""


STEPS: Sequence[Step] = (
    Step("wheel", "actions/checkout", reason=TREE),
    Step("wheel", "actions/setup-python", reason=RUNNER),
    Step("wheel", "sigstore/cosign-installer", reason=SIGNING),
    Step("wheel", 'scripts/release.sh check "$TAG"', ((RELEASE, "check"),)),
    Step("wheel", "choose torch's build for CPUs", reason=RUNNER),
    Step("wheel", "make setup", reason="make release-dry-run depends on it"),
    Step("wheel", "build and try the wheel", ((RELEASE, "wheel", "{folder}"),)),
    Step("wheel", "write the SBOM", ((RELEASE, "sbom", "{folder}"),)),
    Step("wheel", "sign the wheel", reason=SIGNING),
    Step("wheel", "actions/upload-artifact", reason="the files stay in the folder"),
    Step("image", "actions/checkout", reason=TREE),
    Step("image", "sigstore/cosign-installer", reason=SIGNING),
    Step("image", "free disk space for the images", reason=RUNNER),
    Step("image", "log in", reason="nothing is pushed"),
    Step(
        "image",
        "build and push, with SBOM and provenance",
        (("{bin}/hadolint", "Dockerfile"),),
        "needs Docker with buildx and a registry; make test-image CONFIRM=yes builds cpu and serve with buildah",
    ),
    Step("image", "sign the digest", reason=SIGNING),
    Step("image", "set the address for the scan", reason="there is no image in a registry"),
    Step("image", "aquasecurity/trivy-action", reason="there is no image in a registry"),
    Step("image", "actions/upload-artifact", reason="there is no image in a registry"),
    Step("chart", "actions/checkout", reason=TREE),
    Step("chart", "sigstore/cosign-installer", reason=SIGNING),
    Step("chart", "fetch the wheel and the digests of the images", reason="made-up digests stand for those of images"),
    Step("chart", "package the chart with the digests", ((RELEASE, "chart", "{folder}", REGISTRY, *DIGESTS),)),
    Step("chart", "push and sign the chart", reason=f"nothing is pushed; {SIGNING}"),
    Step("chart", "create the release", reason="needs a tag on GitHub"),
)


def name_step(step: dict[str, Any]) -> str:
    """Return the title of a step of a workflow: its name, the action that it uses, or its command."""
    return str(step.get("name") or step.get("uses", "").partition("@")[0] or step["run"])


def run_step(step: Step, folder: Path, helms: Sequence[str]) -> bool:
    """Run the commands of a step, once for each Helm if it packages the chart; return whether they succeeded."""
    for command in step.commands:
        words = [word.format(folder=folder, bin=Path(sys.executable).parent) for word in command]
        for helm in helms if "chart" in command else helms[:1]:
            print(f"\n== {step.job}: {step.title}: {' '.join(words[:3])}", flush=True)
            environment = os.environ | {"PYTHON": sys.executable, "HELM": helm}
            if subprocess.run(words, env=environment, check=False).returncode:
                return False
    return True


def describe_steps(results: Sequence[tuple[Step, bool | None]]) -> str:
    """One line for every step of the workflow. None: nothing was run for it."""
    words = {True: "ran", False: "FAILED", None: "not here"}
    lines = []
    for step, result in results:
        partly = "in part" if result and step.reason else words[result]
        lines.append(f"{partly:<9} {step.job:<6} {step.title}" + (f": {step.reason}" if step.reason else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run all steps, and say at the end what became of each."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder, *helms = arguments
    Path(folder).mkdir(parents=True, exist_ok=True)
    results = [(step, run_step(step, Path(folder), helms) if step.commands else None) for step in STEPS]
    print(f"\n== steps of .github/workflows/release.yaml\n{describe_steps(results)}")
    return int(any(result is False for _, result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
