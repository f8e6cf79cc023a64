"""The commands about versions of preference data: data init, data log, data diff."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clincot.config import Params, VersionConfig

if TYPE_CHECKING:
    from clincot.preferences.versions.version_history import ChangeSummary, PairDiff
    from clincot.records import DataVersion

Command = Callable[..., argparse.ArgumentParser]


def add_versions(
    commands: Any,
    command: Command,
    add_params: Callable[[argparse.ArgumentParser], None],
    params: Callable[[argparse.Namespace], Params],
) -> None:
    """Add `data` to the parser's commands; `command` makes one."""
    data = command(commands, "data", "versions of preference data in a data repository", None)
    under = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    init = command(under, "init", "make a data repository of an empty git repository", _run_init)
    init.add_argument("repository", help="its git address; a folder that does not exist becomes a bare repository")
    init.add_argument("--remote", required=True, help="where DVC keeps the files: s3://bucket/prefix, or a folder")
    init.add_argument("--endpoint", default="", help="of an S3 that is not Amazon's (default: AWS_ENDPOINT_URL_S3)")
    for name, about, run in (
        ("log", "every version: pairs, size, judges, their agreement, policy", _run_log),
        ("diff", "pairs added, removed and re-scored from version A to B", _run_diff),
    ):
        one = command(under, name, about, run)
        if name == "diff":
            one.add_argument("a", help="a round's number, a tag or a commit")
            one.add_argument("b")
        one.add_argument("--repository", help="git address (default: version.repository)")
        one.add_argument("--json", action="store_true", help="as JSON")
        add_params(one)
        one.set_defaults(params_of=params)


def _run_init(args: argparse.Namespace) -> int:
    from clincot.preferences.versions.init import init_repository

    init_repository(args.repository, args.remote, endpoint=args.endpoint)
    print(f"{args.repository}: its files go to {args.remote}\nset version.repository to this address")
    return 0


def _run_log(args: argparse.Namespace) -> int:
    from clincot.preferences.versions.version_history import list_versions

    with tempfile.TemporaryDirectory() as scratch:
        found = list_versions(_section(args), Path(scratch))
    print(
        json.dumps([one.model_dump(mode="json") for one in found], indent=2) if args.json else render_version_log(found)
    )
    return 0


def _run_diff(args: argparse.Namespace) -> int:
    from clincot.preferences.versions.version_history import diff_versions

    with tempfile.TemporaryDirectory() as scratch:
        a, b, between = diff_versions(_section(args), args.a, args.b, Path(scratch))
    if args.json:
        versions = {"a": a.model_dump(mode="json"), "b": b.model_dump(mode="json")}
        print(json.dumps({**versions, "pairs": between.model_dump(mode="json")}, indent=2))
    else:
        print(render_version_diff(a, b, between))
    return 0


def _section(args: argparse.Namespace) -> VersionConfig:
    config: VersionConfig = args.params_of(args).version
    return config if args.repository is None else config.model_copy(update={"repository": args.repository})


def render_version_log(versions: list[DataVersion]) -> str:
    """One line a version, the newest last."""
    if not versions:
        return "no version yet"
    rows = [("version", "commit", "pairs", "questions", "size", "agreement", "judges", "policy", "sha256")]
    for one in versions:
        alpha = "–" if one.alpha is None else f"{one.alpha:.3f}"
        judges = ", ".join(f"{name} {digest[:8]}" for name, digest in sorted(one.judges.items()))
        policies = ", ".join(digest[:12] for digest in one.policies)
        rows.append(
            (
                one.tag,
                one.revision[:10],
                f"{one.pairs}",
                f"{one.questions}",
                f"{one.size / 1e6:.2f} MB",
                alpha,
                judges,
                policies,
                one.sha256[:12],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def render_version_diff(a: DataVersion, b: DataVersion, between: PairDiff) -> str:
    """The difference in words."""
    lines = [
        f"{a.tag} ({between.in_a} pairs) -> {b.tag} ({between.in_b} pairs)",
        f"  added     {between.added} ({between.added_of_new_questions} of questions that only the later one has)",
        f"  removed   {between.removed} ({between.removed_of_gone_questions} of questions that only the first one has)",
        f"  re-scored {between.rescored}, {between.turned} of them the other way round",
        f"  unchanged {between.unchanged}",
        f"  mean gap  {_number(between.mean_gap_a)} -> {_number(between.mean_gap_b)}",
    ]
    moved = {
        "gap": between.gap,
        "chosen score": between.chosen_score,
        "rejected score": between.rejected_score,
        "spread": between.spread,
    }
    lines += [f"  {name}: {_moved(one)}" for name, one in moved.items() if one is not None and between.rescored]
    judges = [f"{side.tag.rpartition('/')[2]} {', '.join(sorted(side.judges))}" for side in (a, b)]
    if a.judges != b.judges:
        lines.append(f"  other judges: {judges[0]}; {judges[1]}")
    if a.policies != b.policies:
        lines.append("  other policies answered: a candidate is of one policy, so no pair can be in both")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _moved(one: ChangeSummary) -> str:
    return (
        f"moved by {one.mean:+.3f} on average ({one.mean_absolute:.3f} in size), from {one.lowest:+.3f} over "
        f"{one.median:+.3f} to {one.highest:+.3f}"
    )
