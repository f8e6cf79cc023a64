"""What a preflight says: checks with their mends, and the policy that the round starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from clincot.errors import UserError
from clincot.fields import FrozenModel, NonEmptyStr


class PreflightFailed(UserError, RuntimeError):
    """Something that the round needs is not there; names every check that failed. More is in the table."""


class PreflightCheck(FrozenModel):
    """One thing that was looked at. A failed check has a mend, a skipped one says in `found` why it was skipped."""

    name: NonEmptyStr
    state: Literal["pass", "fail", "skipped"]
    tried: NonEmptyStr
    found: str = ""
    mend: str = ""

    @model_validator(mode="after")
    def _require_remedy_and_result(self) -> PreflightCheck:
        if (self.state == "fail") != bool(self.mend):
            raise ValueError(f"{self.name}: a check has a mend if, and only if, it failed")
        if self.state != "pass" and not self.found:
            raise ValueError(f"{self.name}: a {self.state} check says what was found")
        return self


class PreflightReport(FrozenModel):
    """All checks, in the order of the table."""

    checks: tuple[PreflightCheck, ...] = Field(min_length=1)

    @property
    def failed(self) -> tuple[PreflightCheck, ...]:
        return tuple(check for check in self.checks if check.state == "fail")


def pass_check(name: str, tried: str, found: str = "") -> PreflightCheck:
    return PreflightCheck(name=name, state="pass", tried=tried, found=found)


def fail_check(name: str, tried: str, found: str, mend: str) -> PreflightCheck:
    return PreflightCheck(name=name, state="fail", tried=tried, found=found, mend=mend)


def skip_check(name: str, tried: str, why: str) -> PreflightCheck:
    return PreflightCheck(name=name, state="skipped", tried=tried, found=why)


def render_check_table(checks: Sequence[PreflightCheck]) -> str:
    """Markdown; what a cell may not hold (a bar, a line's end) is written so that it may."""
    rows = [("check", "", "what was tried", "what was found", "how to mend it"), ("---",) * 5]
    rows += [(c.name, {"fail": "**FAIL**"}.get(c.state, c.state), c.tried, c.found, c.mend) for c in checks]
    return "".join("| " + " | ".join(map(_escape_cell, row)) + " |\n" for row in rows)


def _escape_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
