"""Who may import whom: the stages stay light, and siblings do not know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clincot

SOURCE = Path(clincot.__file__).parent
SIBLINGS = ("datasets", "propose", "judge", "train", "bench", "deploy")
HEAVY = ("torch", "transformers", "kfp", "kubernetes")


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    check = f"import sys; {statement}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1].split()


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    """`torch` as an empty module of our own: loading the real one would take seconds."""
    (tmp_path / "torch.py").write_text("")
    assert loaded_by(f"sys.path.insert(0, {str(tmp_path)!r}); import torch") == ["torch"]


@pytest.mark.parametrize(
    "statement",
    [
        "import clincot.stages.catalog",
        "import clincot.cli.app; clincot.cli.app._parser()",
        "import clincot.rounds, clincot.reporting.page, clincot.reporting.lineage",
        "import clincot.judging.panel, clincot.preferences.pairs, clincot.promotion.gate",
        "import clincot.datasets.vqa_rad, clincot.datasets.slake, clincot.datasets.iu_xray, clincot.datasets.jsonl_vqa",
        "import clincot.registry.publication, clincot.deployment.deployment, clincot.deployment.targets.local, clincot.deployment.prune",
    ],
)
def test_nothing_heavy_comes_along(statement: str) -> None:
    assert loaded_by(statement) == []


def imported(path: Path) -> Iterator[str]:
    """Every clincot module that a file imports, inside functions too; `from clincot import x` as clincot.x."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("clincot"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; the house writes them out"
            module = node.module or ""
            if module == "clincot":
                yield from (f"clincot.{alias.name}" for alias in node.names)
            elif module.startswith("clincot."):
                yield module


def test_the_reader_of_imports_reads_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text("import os\nfrom clincot import judge\ndef f():\n    from clincot.training.sft import x\n")
    assert list(imported(path)) == ["clincot.judge", "clincot.training.sft"]


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_do_not_import_siblings(package: str) -> None:
    files = sorted((SOURCE / package).rglob("*.py"))
    assert len(files) > 1
    others = {f"clincot.{other}" for other in SIBLINGS if other != package}
    above = {
        "clincot.stages.catalog",
        "clincot.rounds",
        "clincot.cli.app",
        "clincot.evaluation.evaluator",
        "clincot.training.calibrate_judges",
        "clincot.synthetic.small_models",
        "clincot.demo.walkthrough",
        "clincot.demo.demo_endpoint",
        "clincot.registry.golden",
    }
    for path in files:
        for module in imported(path):
            top = ".".join(module.split(".")[:2])
            assert top not in others, f"{path.relative_to(SOURCE)} imports its sibling {module}"
            if path.name not in {"page.py", "gallery.py", "figures.py"}:  # a run's page reads what a run is made of
                assert top not in above, f"{path.relative_to(SOURCE)} imports {module}, which stands above it"


def test_kubernetes_is_imported_by_the_cluster_module_alone() -> None:
    found = [
        path.relative_to(SOURCE).as_posix()
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kubernetes")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "kubernetes" for alias in node.names))
    ]
    assert set(found) == {"cluster.py"}


def test_kfp_is_imported_by_pipelines_and_components_alone() -> None:
    """And by the command that runs them, when it is run (cli_pipeline.py)."""
    found = {
        path.relative_to(SOURCE).parts[0]
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("kfp"))
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0].startswith("kfp") for alias in node.names))
    }
    assert found <= {"pipelines", "components", "cli_pipeline.py"}


@pytest.mark.parametrize("package", ["datasets", "propose", "judge", "bench"])
def test_only_training_knows_more_of_models_than_the_protocols(package: str) -> None:
    for path in sorted((SOURCE / package).rglob("*.py")):
        models = {module for module in imported(path) if module.startswith("clincot.models")}
        assert models <= {"clincot.models.protocols"}, path.relative_to(SOURCE)


def test_the_answer_key_is_read_by_evaluation_and_teaching_alone() -> None:
    """Reference, or its reader, is named by none of the modules that make preference data."""
    for package in ("propose", "judge"):
        for path in sorted((SOURCE / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            names = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
            assert not names & {"Reference", "load_references", "REFERENCES"}, path.relative_to(SOURCE)
    stages = ast.parse((SOURCE / "stages.py").read_text(encoding="utf-8"))
    readers = {
        function.name
        for function in ast.walk(stages)
        if isinstance(function, ast.FunctionDef)
        and any(
            isinstance(n, ast.Name) and n.id in {"load_references", "read_benchmark", "deciding"}
            for n in ast.walk(function)
        )
    }
    assert readers == {"evaluate", "decide", "read_benchmark"}
