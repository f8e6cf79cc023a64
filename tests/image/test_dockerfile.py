"""Check the Dockerfile without building it; `make test-image` builds the images."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ("cpu", "serve", "cuda")
Stage = list[tuple[str, str]]  # (instruction, arguments)


def tool(name: str) -> str:
    """Return the path of a linter from the extra `dev`."""
    return str(Path(sys.executable).parent / name)


def read_stages(text: str) -> dict[str, tuple[str, Stage]]:
    """Return every stage's parent and instructions.

    Comments are removed and continued lines are joined.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, tuple[str, Stage]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = arguments.partition(" AS ")
            stages[name] = (parent, [])
        elif instruction and name:
            stages[name][1].append((instruction, arguments))
    return stages


STAGES = read_stages((ROOT / "Dockerfile").read_text())


def lineage(name: str) -> Stage:
    """Return a stage's instructions, after those of the stages it is built on."""
    parent, own = STAGES[name]
    return [*(lineage(parent) if parent in STAGES else []), *own]


def of(stage: Stage, instruction: str) -> list[str]:
    return [arguments for name, arguments in stage if name == instruction]


def project_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def test_all_images_are_built_on_the_chosen_base() -> None:
    assert STAGES["base"][0] == "${BASE_IMAGE}"
    for image in IMAGES:
        assert ("FROM", image) not in STAGES[image][1]
        assert lineage(image)[0] == STAGES["base"][1][0]


def test_images_and_chart_have_the_projects_version() -> None:
    defaults = [value for _, own in STAGES.values() for value in of(own, "ARG") if value.startswith("VERSION")]
    assert set(defaults) == {f"VERSION={project_version()}"}
    assert len(defaults) == 2 * len(IMAGES)  # one in the project's stage and one in the image
    chart = ROOT / "charts" / "clincot" / "Chart.yaml"
    if not chart.exists():
        pytest.skip("this tree has no chart")
    assert yaml.safe_load(chart.read_text())["appVersion"] == project_version()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_does_not_run_as_root(image: str) -> None:
    assert of(STAGES[image][1], "USER") == ["10001:10001"]
    after = [name for name, _ in STAGES[image][1]]
    assert "RUN" not in after[after.index("USER") :]
    assert "COPY" not in after[after.index("USER") :]
    commands = " ".join(of(lineage(image), "RUN"))
    assert "groupadd --gid 10001" in commands
    assert "useradd --uid 10001 --gid 10001" in commands


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_only_writes_below_tmp(image: str) -> None:
    words = " ".join(of(lineage(image), "ENV")).split()
    env = dict(word.split("=", 1) for word in words)
    places = ["HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "DVC_SITE_CACHE_DIR", "CLINCOT_CACHE"]
    assert {name: env[name] for name in places if not f"{env[name]}/".startswith("/tmp/")} == {}
    assert env["PATH"].startswith("/opt/venv/bin:")
    assert of(STAGES[image][1], "WORKDIR") == ["/app"]  # params.yaml has paths relative to it


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_asks_for_no_gpu(image: str) -> None:
    """NVIDIA_VISIBLE_DEVICES=all would give every container all GPUs of its node, whatever it requests."""
    assert "NVIDIA_VISIBLE_DEVICES" not in " ".join(of(lineage(image), "ENV"))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_contains_no_build_tools(image: str) -> None:
    """pip and its caches are in other stages, and apt leaves no lists."""
    runs = of(lineage(image), "RUN")
    assert not any("pip" in run for run in runs)
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in runs if "apt-get" in run)
    packages = {word for run in runs if "apt-get" in run for word in run.split()}
    compilers = packages & {"build-essential", "clang", "g++", "gcc", "make", "python3-dev"}
    assert compilers == ({"gcc"} if image == "cuda" else set())  # Triton compiles launchers at run time


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_labels_including_its_sbom(image: str) -> None:
    labels = " ".join(of(STAGES[image][1], "LABEL"))
    names = re.findall(r"([\w.]+)=", labels)
    oci = [f"org.opencontainers.image.{name}" for name in ("title", "description", "version", "revision", "licenses")]
    assert set(names) == {*oci, "io.clincot.sbom"}
    assert 'version="$VERSION"' in labels
    assert 'revision="$REVISION"' in labels
    assert "/opt/venv/share/sbom/clincot.cdx.json" in labels
    assert "sbom/clincot.cdx.json" in (ROOT / "scripts" / "image" / "project.sh").read_text()


def test_dependencies_come_before_source() -> None:
    """A dependency layer is copied before anything that depends on the source."""
    about_dependencies = {"constraints.txt", "requirements-cuda.txt"}
    for name in ("cluster-dependencies", "serve-dependencies", "cuda-dependencies"):
        copied = {word for words in of(lineage(name), "COPY") for word in words.split()[:-1]}
        others = {path for path in copied if not path.startswith(("scripts/image/", "locks/"))}
        assert others <= about_dependencies
    for image in IMAGES:
        copies = of(lineage(image), "COPY")
        dependencies = [number for number, copy in enumerate(copies) if "-dependencies " in copy]
        assert dependencies
        assert max(dependencies) < copies.index("params.yaml /app/")
        assert copies[-1] == f"--from={image}-project /project /"


def list_installations() -> list[str]:
    """Return every `pip install` of the Dockerfile and of the scripts that it runs, one line each."""
    commands = [run for _, own in STAGES.values() for run in of(own, "RUN")]
    scripts = [path for path in (ROOT / "scripts" / "image").glob("*.sh") if any(path.name in run for run in commands)]
    texts = [*commands, *(re.sub(r"\\\n\s*", "", path.read_text()) for path in scripts)]
    return [found for text in texts for found in re.findall(r"/bin/pip\b[^\n;&|]*? install [^\n;&|]*", text)]


def test_every_installation_is_pinned_by_hashes() -> None:
    """Except torch's build for CPUs, whose index PyPI is not, and the project's own wheel; nothing comes from a URL."""
    found = list_installations()
    without = [one for one in found if "--no-deps --require-hashes" not in one]
    assert len(found) - len(without) == 3  # tools, the locks of cpu and serve, and cuda
    assert ["--no-index" in one for one in without if not one.rstrip().endswith(" torch")] == [True]
    constrained = [name for name, (_, own) in STAGES.items() if "PIP_CONSTRAINT=" in " ".join(of(own, "ENV"))]
    assert constrained == ["tools"]  # so that what pip calls to build a package is pinned, too
    assert all("tools" in ancestors(name) for name in STAGES if name.endswith("-dependencies"))
    assert "PIP_CONSTRAINT=/build/requirements-cuda.txt" in " ".join(of(STAGES["cuda-dependencies"][1], "RUN"))
    assert not [words for _, own in STAGES.values() for words in of(own, "ADD")]


def test_the_images_install_their_own_locks() -> None:
    installed = {
        name: [run.rpartition(" ")[2] for run in of(own, "RUN") if "dependencies.sh" in run]
        for name, (_, own) in STAGES.items()
    }
    assert {name: locks for name, locks in installed.items() if locks} == {
        "dependencies": ["base.txt"],
        "cluster-dependencies": ["cpu.txt"],
        "serve-dependencies": ["serve.txt"],
    }
    for image, stage in (("cpu", "cluster-dependencies"), ("serve", "serve-dependencies")):
        assert f"--from={stage} /added /" in of(STAGES[image][1], "COPY")
        assert STAGES[f"{image}-project"][0] == stage


def test_torch_is_checked_right_after_its_installation() -> None:
    """The layer with torch is the first of all dependencies, so another build ends the image's build early."""
    runs = of(STAGES["dependencies"][1], "RUN")
    assert ["torch.sh" in run for run in runs] == [True, False]
    script = (ROOT / "scripts" / "image" / "torch.sh").read_text()
    assert script.index("install") < script.index("torch_build.py")
    assert "--no-deps --retries 1" in script
    assert "--extra-index-url" not in script
    (cuda,) = of(STAGES["cuda-dependencies"][1], "RUN")
    assert cuda.index("pip_conf") < cuda.index("torch_build.py cuda") < cuda.index("bytecode.sh")


def ancestors(name: str) -> list[str]:
    parent = STAGES[name][0]
    return [parent, *ancestors(parent)] if parent in STAGES else []


def test_the_build_context_has_only_needed_files() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    included = {line[1:] for line in lines if line.startswith("!")}
    context = [
        word
        for _, own in STAGES.values()
        for words in of(own, "COPY")
        if not words.startswith("--from")
        for word in words.split()[:-1]
        if word != "."
    ]
    # the sources of the wheel, and the paths that the Dockerfile names
    assert included == {
        "README.md",
        "src",
        "components",
        "pipelines",
        "recipes",
        *(_context_path(word) for word in context),
    }


def _context_path(path: str) -> str:
    return "scripts/image" if path.startswith("scripts/image/") else path


def test_hadolint_finds_no_error() -> None:
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
