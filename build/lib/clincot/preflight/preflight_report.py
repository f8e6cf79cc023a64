"""The preflight report: checks with their results, and remedies for those that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from clincot.errors import UserError
from clincot.fields import FrozenModel, NonEmptyStr
from clincot.text import markdown_table


class PreflightFailed(UserError, RuntimeError):
    """Something that the round needs is missing or broken; the message names every failed check."""


class PreflightCheck(FrozenModel):
    """One check: what was probed and the result.

    A failed check has a remedy. A skipped check says in `result` why it was skipped. The JSON keys of an older version
    stay: `tried` for probe, `found` for result, `mend` for remedy.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    name: NonEmptyStr
    state: Literal["pass", "fail", "skipped"]
    probe: NonEmptyStr = Field(alias="tried")
    result: str = Field(default="", alias="found")
    remedy: str = Field(default="", alias="mend")

    @model_validator(mode="after")
    def _require_remedy_and_result(self) -> PreflightCheck:
        if (self.state == "fail") != bool(self.remedy):
            raise ValueError(f"{self.name}: expected a remedy for a failed check and for no other, got {self.remedy!r}")
        if self.state != "pass" and not self.result:
            raise ValueError(f"{self.name}: expected a result of a {self.state} check, got none")
        return self


class PreflightReport(FrozenModel):
    """All checks, in the order of the table."""

    checks: tuple[PreflightCheck, ...] = Field(min_length=1)

    @property
    def failed(self) -> tuple[PreflightCheck, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.state == "fail")


def pass_check(name: str, probe: str, result: str = "") -> PreflightCheck:
    """Build a check that passed."""
    return PreflightCheck(name=name, state="pass", tried=probe, found=result)


def fail_check(name: str, probe: str, result: str, remedy: str) -> PreflightCheck:
    """Build a check that failed; both result and remedy must not be empty."""
    return PreflightCheck(name=name, state="fail", tried=probe, found=result, mend=remedy)


def skip_check(name: str, probe: str, reason: str) -> PreflightCheck:
    """Build a check that was skipped for `reason`."""
    return PreflightCheck(name=name, state="skipped", tried=probe, found=reason)


def render_check_table(checks: Sequence[PreflightCheck]) -> str:
    """Render the checks as a Markdown table; pipes and newlines in cells are escaped."""
    rows = []
    for check in checks:
        state = "**FAIL**" if check.state == "fail" else check.state
        cells = (check.name, state, check.probe, check.result, check.remedy)
        rows.append([" ".join(cell.split()) for cell in cells])
    return markdown_table(["Check", "", "Probe", "Result", "Remedy"], rows, layout="spaced") + "\n"
