"""An approval belongs to one rollout with one decision, and with deploy.approvers to one person who signed it.

The signatures are made by ssh-keygen. Whoever may write to the store plays the attacker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clincot.cli.app import main
from clincot.config import DeployConfig
from clincot.deployment.approval import (
    NAMESPACE,
    Approval,
    InvalidApproval,
    build_statement,
    check_signature,
    parse_approvers,
    sign_statement,
)
from clincot.deployment.deployment import approve_rollout, resume_rollout, start_rollout
from clincot.deployment.journal import RolloutJournal, RolloutPlan, read_journal
from clincot.errors import InvalidInput
from clincot.registry import champion
from tests.support.deployment_builders import LINE, published
from tests.support.kube_api_server import Script
from tests.support.rollout_world import FAST, SERVICE, World, answering, kinds

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
REASON = "reviewed with radiology"


@dataclass(frozen=True)
class Person:
    """A person with an SSH key."""

    name: str
    key: Path

    @property
    def line(self) -> str:
        """The person's line in deploy.approvers; ssh-keygen adds a comment to the public key."""
        return f"{self.name} {self.key.with_suffix('.pub').read_text().strip()}"


def make_person(folder: Path, name: str, *options: str) -> Person:
    key = folder / name
    command = ["ssh-keygen", "-q", "-N", "", "-C", "at work", "-f", str(key), *(options or ("-t", "ed25519"))]
    subprocess.run(command, check=True)
    return Person(name, key)


@pytest.fixture
def doctor(tmp_path: Path) -> Person:
    return make_person(tmp_path, "doctor")


@pytest.fixture
def nurse(tmp_path: Path) -> Person:
    return make_person(tmp_path, "nurse")


def ask_approval_of(*people: Person) -> DeployConfig:
    changes = {"approval": True, "approvers": [person.line for person in people]}
    return DeployConfig.model_validate(FAST.model_dump() | changes)


def start(world: World, settings: DeployConfig) -> RolloutJournal:
    """A rollout of the challenger, begun by ann, that awaits approval."""
    journal = start_rollout(world.store, world.challenger, settings, target="kserve", service=SERVICE, by="ann")
    assert resume(world, journal, settings) == "awaiting approval"
    return journal


def resume(world: World, journal: RolloutJournal, settings: DeployConfig) -> str:
    """Go on as another process does, with the journal as it is in the store."""
    journal = read_journal(world.store, LINE, journal.plan.number, by="deployer")
    target = world.target(world.challenger)
    return resume_rollout(world.store, journal, target, settings=settings, wait=lambda _: None)


def read_approval(world: World, plan: RolloutPlan) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(world.store.read(f"approvals/{LINE}/{plan.id}.json").content)
    return content


def write_approval(world: World, plan: RolloutPlan, content: dict[str, Any]) -> None:
    """As somebody may who can write to the store: the approval, and the journal's event."""
    key = f"approvals/{LINE}/{plan.id}.json"
    fields = {name: value for name, value in content.items() if name != "id"}
    encoded = Approval.model_validate(fields).model_dump_json().encode()
    try:
        world.store.write_new(key, encoded)
    except Exception:  # exists
        world.store.replace(key, encoded, world.store.read(key).tag)
    journal = read_journal(world.store, LINE, plan.number, by="attacker")
    if "approved" not in kinds(journal):
        journal.add_event("approved", f"{content['by']}: {content['reason']}")


def test_a_signed_approval_starts_the_rollout(world: World, doctor: Person, nurse: Person) -> None:
    """The journal has the fingerprint of the key, and the store the signature."""
    world.deploy(world.base)
    settings = ask_approval_of(doctor, nurse)
    journal = start(world, settings)
    approve_rollout(
        world.store,
        journal.plan.decision,
        by="doctor",
        reason=REASON,
        key=doctor.key,
        approvers=settings.approvers,
    )
    shown = subprocess.run(["ssh-keygen", "-l", "-f", doctor.key], capture_output=True, text=True, check=True).stdout
    event = read_journal(world.store, LINE, journal.plan.number).last
    assert (event.kind, event.detail) == ("approved", f"doctor ({shown.split()[1]}): {REASON}")
    assert read_approval(world, journal.plan)["signature"].startswith("-----BEGIN SSH SIGNATURE-----")
    assert resume(world, journal, settings) == "finished"
    assert world.champion == world.challenger.sha256


@pytest.mark.parametrize(
    "options",
    [
        ("-t", "rsa", "-b", "2048"),
        ("-t", "ecdsa", "-b", "256"),
        ("-t", "ecdsa", "-b", "384"),
        ("-t", "ecdsa", "-b", "521"),
    ],
    ids=["rsa", "p256", "p384", "p521"],
)
def test_other_kinds_of_keys_sign_too(world: World, tmp_path: Path, options: tuple[str, ...]) -> None:
    person = make_person(tmp_path, "other", *options)
    plan, approval = start(world, FAST.model_copy(update={"approval": True})).plan, build_approval(world, "other")
    signature = sign_statement(build_statement(plan, approval), person.key)
    signed = approval.model_copy(update={"signature": signature})
    assert check_signature(plan, signed, parse_approvers([person.line])).name == "other"
    other = signed.model_copy(update={"reason": "seen by nobody"})
    with pytest.raises(InvalidApproval, match="a signature of something else"):
        check_signature(plan, other, parse_approvers([person.line]))


def build_approval(world: World, by: str) -> Approval:
    decision = world.challenger.decision
    assert decision is not None
    return Approval(rollout="rollout-0", decision=decision.id, by=by, reason=REASON)


def test_an_approval_without_a_signature_is_refused(world: World, doctor: Person) -> None:
    settings = ask_approval_of(doctor)
    journal = start(world, settings)
    with pytest.raises(InvalidApproval, match=r"by doctor has no signature; .* asks for one \(clincot approve --key\)"):
        approve_rollout(world.store, journal.plan.decision, by="doctor", reason=REASON, approvers=settings.approvers)
    assert kinds(read_journal(world.store, LINE, journal.plan.number))[-1] == "awaiting approval"


def test_the_approver_is_the_person_of_the_key(world: World, doctor: Person, nurse: Person) -> None:
    settings = ask_approval_of(doctor)
    journal = start(world, settings)
    for by, person, why in (
        ("doctor", nurse, "signed with a key that deploy.approvers does not list"),
        ("nurse", doctor, "is signed with the key of doctor"),
    ):
        with pytest.raises(InvalidApproval, match=why):
            approve_rollout(
                world.store,
                journal.plan.decision,
                by=by,
                reason=REASON,
                key=person.key,
                approvers=settings.approvers,
            )


def test_whoever_begins_a_rollout_cannot_sign_its_approval(world: World, tmp_path: Path) -> None:
    ann = make_person(tmp_path, "ann")
    settings = ask_approval_of(ann)
    journal = start(world, settings)
    with pytest.raises(InvalidInput, match="was begun by ann; another person must approve it"):
        approve_rollout(
            world.store, journal.plan.decision, by="ann", reason=REASON, key=ann.key, approvers=settings.approvers
        )


def test_an_approval_that_was_written_into_the_store_does_not_count(world: World, doctor: Person) -> None:
    """An attacker writes a well-formed approval with the doctor's name; without approvers it would count."""
    settings = ask_approval_of(doctor)
    journal = start(world, settings)
    forged = {"rollout": journal.plan.id, "decision": journal.plan.decision, "by": "doctor", "reason": "fine"}
    write_approval(world, journal.plan, forged)
    world.server.history.clear()
    with pytest.raises(InvalidApproval, match="by doctor has no signature"):
        resume(world, journal, settings)
    assert world.server.history == []  # nothing was started


def test_an_approval_of_another_decision_cannot_be_used_again(world: World, doctor: Person, tmp_path: Path) -> None:
    """The doctor approved the challenger's rollout. The attacker uses the signature for the next checkpoint."""
    world.deploy(world.base)
    settings = ask_approval_of(doctor)
    first = start(world, settings)
    approve_rollout(
        world.store, first.plan.decision, by="doctor", reason=REASON, key=doctor.key, approvers=settings.approvers
    )
    assert resume(world, first, settings) == "finished"
    seen = read_approval(world, first.plan)

    world.challenger = published(world.store, tmp_path, 3.0, over=world.challenger)
    world.server.scripts[world.challenger.sha256] = Script(chat=answering(world.challenger.golden))
    second = start(world, settings)
    write_approval(world, second.plan, seen)  # as it is: of another rollout
    assert resume(world, second, settings) == "awaiting approval"
    write_approval(world, second.plan, seen | {"rollout": second.plan.id, "decision": second.plan.decision})
    with pytest.raises(InvalidApproval, match="has a signature of something else"):
        resume(world, second, settings)
    assert champion.read_champion(world.store, LINE).now.sha256 == first.plan.sha256


def test_an_approval_holds_for_the_plan_that_was_seen(world: World, doctor: Person) -> None:
    """The attacker lets the approved rollout accept every error: the journal's first event contains the plan."""
    world.deploy(world.base)
    settings = ask_approval_of(doctor)
    journal = start(world, settings)
    approve_rollout(
        world.store, journal.plan.decision, by="doctor", reason=REASON, key=doctor.key, approvers=settings.approvers
    )
    lines = world.store.read(journal.key).content.decode().splitlines()
    planned = json.loads(lines[0])
    del planned["id"]
    planned["plan"]["settings"]["max_error_rate"] = 1.0
    world.store.replace(
        journal.key, "\n".join([json.dumps(planned), *lines[1:]]).encode(), world.store.read(journal.key).tag
    )
    changed = read_journal(world.store, LINE, journal.plan.number).plan
    assert resume(world, journal, settings) == "awaiting approval"  # the plan's id, and so its approval, is another
    seen = read_approval(world, journal.plan)
    write_approval(world, changed, seen | {"rollout": changed.id})
    with pytest.raises(InvalidApproval, match="has a signature of something else"):
        resume(world, journal, settings)


def test_the_store_cannot_say_that_no_approval_is_needed(world: World, doctor: Person) -> None:
    """The plan in the store asks for none; whoever rolls out asks for one of the doctor."""
    journal = start_rollout(world.store, world.challenger, FAST, target="kserve", service=SERVICE, by="eve")
    assert resume(world, journal, ask_approval_of(doctor)) == "awaiting approval"


def test_a_signature_for_another_purpose_does_not_count(world: World, doctor: Person) -> None:
    """Git signs commits in the namespace `git`, with the same keys."""
    plan, approval = start(world, ask_approval_of(doctor)).plan, build_approval(world, "doctor")
    statement = build_statement(plan, approval)
    command = ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", str(doctor.key)]
    signature = subprocess.run(command, input=statement, capture_output=True, check=True).stdout.decode()
    with pytest.raises(InvalidApproval, match=f"has a signature for 'git'; expected '{NAMESPACE}'"):
        check_signature(plan, approval.model_copy(update={"signature": signature}), parse_approvers([doctor.line]))


@pytest.mark.parametrize("text", ["yes", "-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----"])
def test_an_unreadable_signature_is_named(world: World, doctor: Person, text: str) -> None:
    plan, approval = start(world, ask_approval_of(doctor)).plan, build_approval(world, "doctor")
    with pytest.raises(InvalidApproval, match="has no readable SSH signature"):
        check_signature(plan, approval.model_copy(update={"signature": text}), parse_approvers([doctor.line]))


@pytest.mark.parametrize(
    "line",
    [
        "doctor",
        "doctor ssh-ed25519 ****",
        "doctor ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIJ",
        "doctor sk-ssh-ed25519@openssh.com AAAA",
    ],
)
def test_a_wrong_line_of_the_approvers_is_named(doctor: Person, line: str) -> None:
    with pytest.raises(InvalidInput, match="line 2: expected NAME KEYTYPE KEY"):
        parse_approvers([doctor.line, line])


def test_approvers_need_the_approval_that_they_give() -> None:
    with pytest.raises(ValidationError, match="has an effect only with deploy"):
        DeployConfig(approvers=("doctor ssh-ed25519 AAAA",))


def test_a_key_that_cannot_sign_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"ssh-keygen cannot sign with {tmp_path / 'none'}: .*No such file"):
        sign_statement(b"x", tmp_path / "none")


def test_the_command_signs(world: World, doctor: Person, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`clincot approve --key` with the approvers of a parameter file; the local target then starts."""
    settings = ask_approval_of(doctor)
    journal = start_rollout(world.store, world.challenger, settings, target="local", service=None, by="ann")
    journal.add_event("awaiting approval")
    (tmp_path / "params.yaml").write_text(json.dumps({"deploy": settings.model_dump(mode="json")}))
    command = ["approve", journal.plan.decision, "--reason", REASON, "--by", "doctor", "--store", world.store.url]
    command += ["--name", LINE, "--params", str(tmp_path / "params.yaml"), "--target", "local"]
    command += ["--state", str(tmp_path / "state"), "--serve-command", "false {checkpoint} {port} {name}"]
    assert main(command) == 1
    assert "by doctor has no signature" in capsys.readouterr().err
    assert main([*command, "--key", str(doctor.key)]) == 1  # it is approved, and the server does not start
    assert "approved" in kinds(read_journal(world.store, LINE, journal.plan.number))
