"""The commands about versions of preference data: data init, data log, data diff."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clincot.cli.data_commands import DATA_PANEL
from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.options import ParamsArguments, read_params
from clincot.config import VersionConfig
from clincot.text import align_columns

if TYPE_CHECKING:
    from clincot.preferences.versions.version_history import ChangeSummary, PairDiff
    from clincot.records import DataVersion


def add_version_commands(commands: Commands) -> None:
    """Add `data` and its commands."""
    about, data = "Manage versions of preference data in a data repository (git and DVC).", Commands()
    add_command(data, "init", create_repository, InitArguments)
    add_command(data, "log", print_versions, HistoryArguments)
    add_command(data, "diff", print_diff, DiffArguments)
    commands["data"] = Entry(DATA_PANEL, about, lambda: build_group(data, about))


@dataclass(frozen=True, kw_only=True)
class InitArguments:
    """Which repository, and where its files go."""

    repository: Annotated[
        str,
        typer.Argument(
            help="Git address of an empty repository; a folder that does not exist becomes a bare repository."
        ),
    ]
    remote: Annotated[
        str, typer.Option("--remote", help="Where DVC stores the files: s3://bucket/prefix, or a folder.")
    ]
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint", metavar="URL", help="Endpoint of an S3 other than Amazon's (default: $AWS_ENDPOINT_URL_S3)."
        ),
    ] = ""


def create_repository(args: InitArguments) -> int:
    """Turn an empty git repository into a data repository."""
    from clincot.preferences.versions.init import init_repository

    init_repository(args.repository, args.remote, endpoint=args.endpoint)
    print(f"{args.repository}: its files go to {args.remote}\nset version.repository to this address")
    return 0


@dataclass(frozen=True, kw_only=True)
class HistoryArguments(ParamsArguments):
    """Whose versions, and in which form."""

    repository: Annotated[
        str | None,
        typer.Option(
            "--repository", metavar="ADDRESS", help="Git address of the repository (default: version.repository)."
        ),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False


@dataclass(frozen=True, kw_only=True)
class DiffArguments(HistoryArguments):
    """Which two versions."""

    a: Annotated[str, typer.Argument(help="The earlier version: a round's number, a tag or a commit.")]
    b: Annotated[str, typer.Argument(help="The later version: a round's number, a tag or a commit.")]


def print_versions(args: HistoryArguments) -> int:
    """List every version with its pairs, size, judges, agreement and policy."""
    from clincot.preferences.versions.version_history import list_versions

    with tempfile.TemporaryDirectory() as scratch:
        versions = list_versions(_read_config(args), Path(scratch))
    if args.json:
        print(json.dumps([version.model_dump(mode="json") for version in versions], indent=2))
    else:
        print(render_version_log(versions))
    return 0


def print_diff(args: DiffArguments) -> int:
    """Show the pairs added, removed and scored again between two versions."""
    from clincot.preferences.versions.version_history import diff_versions

    with tempfile.TemporaryDirectory() as scratch:
        a, b, between = diff_versions(_read_config(args), args.a, args.b, Path(scratch))
    if args.json:
        versions = {"a": a.model_dump(mode="json"), "b": b.model_dump(mode="json")}
        print(json.dumps({**versions, "pairs": between.model_dump(mode="json")}, indent=2))
    else:
        print(render_version_diff(a, b, between))
    return 0


def _read_config(args: HistoryArguments) -> VersionConfig:
    config = read_params(args).version
    return config if args.repository is None else config.model_copy(update={"repository": args.repository})


def render_version_log(versions: list[DataVersion]) -> str:
    """One line for each version, the newest last."""
    if not versions:
        return "no version yet"
    rows = [("version", "commit", "run", "pairs", "questions", "size", "agreement", "judges", "policy", "sha256")]
    for version in versions:
        alpha = "–" if version.alpha is None else f"{version.alpha:.3f}"
        judges = ", ".join(f"{name} {digest[:8]}" for name, digest in sorted(version.judges.items()))
        policies = ", ".join(digest[:12] for digest in version.policies)
        rows.append(
            (
                version.tag,
                version.revision[:10],
                version.run or "–",
                f"{version.pairs}",
                f"{version.questions}",
                f"{version.size / 1e6:.2f} MB",
                alpha,
                judges,
                policies,
                version.sha256[:12],
            )
        )
    return "\n".join(align_columns(rows))


def render_version_diff(a: DataVersion, b: DataVersion, between: PairDiff) -> str:
    """The difference between two versions in words."""
    lines = [
        f"{a.tag} ({between.in_a} pairs) -> {b.tag} ({between.in_b} pairs)",
        f"  added     {between.added} ({between.added_of_new_questions} of questions that only the later one has)",
        f"  removed   {between.removed} ({between.removed_of_gone_questions} of questions that only the first one has)",
        f"  re-scored {between.rescored}, {between.turned} of them the other way round",
        f"  unchanged {between.unchanged}",
        f"  mean gap  {_format_number(between.mean_gap_a)} -> {_format_number(between.mean_gap_b)}",
    ]
    moved = {
        "gap": between.gap,
        "chosen score": between.chosen_score,
        "rejected score": between.rejected_score,
        "spread": between.spread,
    }
    for name, change in moved.items():
        if change is not None and between.rescored:
            lines.append(f"  {name}: {_describe_change(change)}")
    judges = [f"{side.tag.removeprefix('preferences/')} {', '.join(sorted(side.judges))}" for side in (a, b)]
    if a.judges != b.judges:
        lines.append(f"  other judges: {judges[0]}; {judges[1]}")
    if a.policies != b.policies:
        lines.append("  other policies answered: a candidate is of one policy, so no pair can be in both")
    return "\n".join(lines)


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _describe_change(change: ChangeSummary) -> str:
    return (
        f"moved by {change.mean:+.3f} on average ({change.mean_absolute:.3f} in size), from {change.lowest:+.3f} over "
        f"{change.median:+.3f} to {change.highest:+.3f}"
    )
