"""Who approved a rollout, and the signature that shows it.

Without signatures an approval is what somebody wrote into the store: a name that the person typed, which everybody who
may write there can type as well. With `deploy.approvers` (names and public SSH keys, from the parameters of whoever
rolls out, never from the store) an approval counts only with a signature of one of these keys. It covers the whole plan
of one rollout, its decision and its checkpoint, so it cannot be used for another one, and nobody without the private
key can make it.

`ssh-keygen -Y sign` makes the signatures, also with keys in an agent. Their format is OpenSSH's (PROTOCOL.sshsig of
openssh-portable); keys on a security token (sk-…) are not supported.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from clincot.deployment.journal import RolloutPlan
from clincot.errors import InvalidInput, require_extra
from clincot.fields import NonEmptyStr
from clincot.records import Record, hash_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import hashes

NAMESPACE = "clincot-approval"  # of the signatures, so that one for a file or a git commit does not count
_KEY_TYPES = ("ssh-ed25519", "ssh-rsa", *(f"ecdsa-sha2-nistp{bits}" for bits in (256, 384, 521)))
_MAGIC = b"SSHSIG"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_SIGN_S = 120  # for the person to enter a passphrase


class Approval(Record):
    """Who approved a rollout, and why."""

    prefix: ClassVar[str] = "approval"
    provenance: ClassVar[frozenset[str]] = frozenset({"at", "signature"})

    rollout: NonEmptyStr
    decision: str
    by: NonEmptyStr
    reason: NonEmptyStr
    at: str = ""  # UTC
    signature: Annotated[str, Field(exclude_if=lambda value: not value)] = ""  # "": anybody could have written this


class InvalidApproval(InvalidInput):
    """The store has an approval of the rollout that does not count."""


@dataclass(frozen=True)
class Approver:
    """A person who may approve, with a public key."""

    name: str
    key_type: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint, as `ssh-keygen -l` shows it."""
        digest = base64.b64encode(hashlib.sha256(self.key).digest()).decode().rstrip("=")
        return f"SHA256:{digest}"


def parse_approvers(lines: Sequence[str]) -> list[Approver]:
    """Parse lines `NAME KEYTYPE KEY`, as in OpenSSH's file allowed_signers without options.

    Raises InvalidInput naming the line.
    """
    approvers = []
    for number, line in enumerate(lines, start=1):
        name, key_type, encoded, *_ = [*line.split(), "", "", ""]
        try:
            key = base64.b64decode(encoded, validate=True)
            stated = _Reader(key).read_text()
        except (binascii.Error, ValueError):
            stated = ""
        if key_type not in _KEY_TYPES or stated != key_type:
            raise InvalidInput(
                f"deploy.approvers: line {number}: expected NAME KEYTYPE KEY, for instance "
                f"'ann@example.org ssh-ed25519 AAAA…'; key types: {', '.join(_KEY_TYPES)}"
            )
        approvers.append(Approver(name, key_type, key))
    return approvers


def build_statement(plan: RolloutPlan, approval: Approval) -> bytes:
    """What a signature covers: the approval with everything that is rolled out, where and how."""
    content = {
        "approval": approval.model_dump(mode="json", exclude={"signature"}),
        "checkpoint": plan.sha256,
        "line": plan.line,
        "plan": hash_json(plan.model_dump(mode="json")),
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def sign_statement(statement: bytes, key: Path) -> str:
    """Sign with `ssh-keygen`. key: a private key, or the public key of one in the agent. Raises InvalidInput."""
    command = ["ssh-keygen", "-Y", "sign", "-n", NAMESPACE, "-f", str(key)]
    try:
        done = subprocess.run(command, input=statement, capture_output=True, timeout=_SIGN_S, check=False)
    except FileNotFoundError:
        raise InvalidInput("--key needs ssh-keygen, which OpenSSH's client brings") from None
    except subprocess.TimeoutExpired:
        raise InvalidInput(f"ssh-keygen did not sign with {key} within {_SIGN_S} s") from None
    if done.returncode:
        raise InvalidInput(f"ssh-keygen cannot sign with {key}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode("ascii")


def check_signature(plan: RolloutPlan, approval: Approval, approvers: Sequence[Approver]) -> Approver:
    """Return the person whose signature the approval has.

    Raises InvalidApproval unless it is one of `approvers`, the one that the approval names, and the signature is of
    this very approval and rollout.
    """
    where = f"the approval of {plan.id} by {approval.by}"
    if not approval.signature:
        raise InvalidApproval(f"{where} has no signature; deploy.approvers asks for one (clincot approve --key)")
    try:
        signature = _parse_signature(approval.signature)
    except (ValueError, binascii.Error) as error:
        raise InvalidApproval(f"{where} has no readable SSH signature: {error}") from None
    signers = [approver for approver in approvers if approver.key == signature.key]
    if not signers:
        raise InvalidApproval(f"{where} is signed with a key that deploy.approvers does not list")
    if approval.by not in [signer.name for signer in signers]:
        raise InvalidApproval(f"{where} is signed with the key of {signers[0].name}")
    if signature.namespace != NAMESPACE:
        raise InvalidApproval(f"{where} has a signature for {signature.namespace!r}; expected {NAMESPACE!r}")
    if not signature.verify(build_statement(plan, approval)):
        raise InvalidApproval(f"{where} has a signature of something else; expected one of this approval and rollout")
    return next(signer for signer in signers if signer.name == approval.by)


class _Reader:
    """Reads the fields of SSH's binary format, each of which follows its length (4 bytes, big endian)."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def take(self, size: int) -> bytes:
        """The next bytes. Raises ValueError if there are fewer."""
        taken = self._content[self._position : self._position + size]
        if len(taken) != size:
            raise ValueError("it is cut off")
        self._position += size
        return taken

    def read_number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def read_field(self) -> bytes:
        return self.take(self.read_number())

    def read_text(self) -> str:
        return self.read_field().decode("ascii")


@dataclass(frozen=True)
class _Signature:
    key: bytes  # public
    namespace: str
    reserved: bytes
    hash_name: str
    blob: bytes  # algorithm and signature

    def verify(self, statement: bytes) -> bool:
        """Whether it is a signature of the statement by the key."""
        with require_extra("cluster", "the check of a signed approval"):
            from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        if self.hash_name not in ("sha256", "sha512"):
            return False
        digest = hashlib.new(self.hash_name, statement).digest()
        signed = _MAGIC
        for field in (self.namespace.encode(), self.reserved, self.hash_name.encode(), digest):
            signed += len(field).to_bytes(4, "big") + field
        try:
            _verify_blob(self.key, self.blob, signed)
        except (InvalidSignature, UnsupportedAlgorithm, ValueError):
            return False
        return True


def _parse_signature(text: str) -> _Signature:
    lines = text.strip().splitlines()
    if len(lines) < 3 or (lines[0], lines[-1]) != (_BEGIN, _END):
        raise ValueError(f"expected {_BEGIN}")
    reader = _Reader(base64.b64decode("".join(lines[1:-1]), validate=True))
    if reader.take(len(_MAGIC)) != _MAGIC or reader.read_number() != 1:
        raise ValueError("expected version 1 of the format SSHSIG")
    return _Signature(
        key=reader.read_field(),
        namespace=reader.read_text(),
        reserved=reader.read_field(),
        hash_name=reader.read_text(),
        blob=reader.read_field(),
    )


def _verify_blob(key: bytes, blob: bytes, signed: bytes) -> None:
    """Check a signature blob of RFC 4253 (RSA: RFC 8332). Raises InvalidSignature, UnsupportedAlgorithm, ValueError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    key_type = _Reader(key).read_text()
    public: Any = serialization.load_ssh_public_key(f"{key_type} {base64.b64encode(key).decode()}".encode())
    reader = _Reader(blob)
    algorithm, signature = reader.read_text(), reader.read_field()
    if isinstance(public, ed25519.Ed25519PublicKey) and algorithm == key_type:
        public.verify(signature, signed)
    elif isinstance(public, ec.EllipticCurvePublicKey) and algorithm == key_type:
        numbers = _Reader(signature)
        r, s = (int.from_bytes(numbers.read_field(), "big") for _ in range(2))
        public.verify(encode_dss_signature(r, s), signed, ec.ECDSA(_choose_curve_hash(public.key_size)))
    elif isinstance(public, rsa.RSAPublicKey) and algorithm in ("rsa-sha2-256", "rsa-sha2-512"):
        public.verify(signature, signed, padding.PKCS1v15(), _choose_rsa_hash(algorithm))
    else:
        raise ValueError(f"expected another algorithm than {algorithm} for a key of type {key_type}")


def _choose_curve_hash(bits: int) -> hashes.HashAlgorithm:
    """The hash of an ECDSA key (RFC 5656, section 6.2.1)."""
    from cryptography.hazmat.primitives import hashes

    if bits <= 256:
        return hashes.SHA256()
    return hashes.SHA384() if bits <= 384 else hashes.SHA512()


def _choose_rsa_hash(algorithm: str) -> hashes.HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA512() if algorithm == "rsa-sha2-512" else hashes.SHA256()
