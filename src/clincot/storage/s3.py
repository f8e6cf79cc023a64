"""A bucket of any S3 endpoint as a Store.

Uses botocore because the minio client cannot send If-None-Match and If-Match, which every write here needs. A store
that is away is waited for (waiting.py), so botocore itself sends each request once.

Atomic: each object appears as a whole. write_new, replace and upload are conditional requests, so of several
concurrent writers of a key only one succeeds; a multipart upload checks its condition when the parts are joined.
Not atomic: several keys together. A killed multipart upload leaves invisible parts, which a lifecycle rule of the
bucket should remove.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.session import get_session

from clincot.storage.boto_errors import find_store_outage
from clincot.storage.store import (
    BLOCK_BYTES,
    KeyExists,
    KeyNotFound,
    StoredObject,
    StoreFailed,
    StoreUnavailable,
    VersionConflict,
    redact_url,
    validate_key,
)
from clincot.waiting import Outage, get_waiting

T = TypeVar("T")

PART_BYTES = 64 << 20  # size of a part of a multipart upload; smaller files are sent in one request
MAX_PARTS = 10_000  # S3's limit of parts per upload
_CONDITION_FAILED_CODES = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_NOT_FOUND_CODES = {"NoSuchKey", "404", "NotFound"}


class S3Store:
    """The store `s3://bucket/prefix`. Requests time out, and are repeated while the store is away.

    If the reply to write_new or replace is lost, the next attempt fails on the condition; the store then recognises its
    own content and reports success. A download that is cut goes on where it was.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        session = get_session()
        session.register_component("data_loader", get_model_loader())
        config = Config(
            connect_timeout=10,
            read_timeout=120,
            retries={"mode": "standard", "total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},  # endpoints other than Amazon's need it
        )
        region = session.get_config_variable("region") or "us-east-1"
        with self._map_store_errors("open the store"):
            self._s3: Any = session.create_client("s3", region_name=region, config=config)
        self._service = f"store {redact_url(self._s3.meta.endpoint_url)}"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def create_bucket(self) -> bool:
        """Create the bucket; return False if this account has it already. Raises StoreFailed."""

        def create() -> bool:
            try:
                self._s3.create_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _get_error_code(error) != "BucketAlreadyOwnedByYou":
                    with contextlib.suppress(ClientError):  # SeaweedFS says BucketAlreadyExists of own buckets too
                        self._s3.head_bucket(Bucket=self.bucket)
                        return False
                    raise
                return False
            return True

        return self._request(f"create the bucket {self.bucket}", create)

    def read(self, key: str) -> StoredObject:
        def read_once() -> StoredObject:
            reply = self._s3.get_object(Bucket=self.bucket, Key=self._object_key(key))
            return StoredObject(reply["Body"].read(), reply["ETag"])

        with self._map_not_found(key):
            return self._request(f"read {key}", read_once)

    def write_new(self, key: str, content: bytes) -> str:
        try:
            return self._request(f"write {key}", lambda: self._put_object(key, content, IfNoneMatch="*"))
        except _ConditionFailed as lost:
            if (tag := self._find_own_write(key, content, lost)) is not None:
                return tag
            raise KeyExists(f"{self.url}: {key} exists already; nothing is overwritten") from None

    def replace(self, key: str, content: bytes, tag: str) -> str:
        try:
            with self._map_not_found(key):
                return self._request(f"replace {key}", lambda: self._put_object(key, content, IfMatch=tag))
        except KeyNotFound:
            raise VersionConflict(f"{self.url}: {key} was removed by someone else since it was read") from None
        except _ConditionFailed as lost:
            if (landed := self._find_own_write(key, content, lost)) is not None:
                return landed
            raise VersionConflict(f"{self.url}: {key} was replaced by someone else since it was read") from None

    def upload(self, key: str, path: Path) -> None:
        size = path.stat().st_size

        def upload_whole() -> None:
            with path.open("rb") as file:
                self._put_object(key, file, IfNoneMatch="*", ContentLength=size)

        try:
            if size <= PART_BYTES:
                self._request(f"upload {key}", upload_whole)
            else:
                self._upload_parts(key, path, size)
        except _ConditionFailed:
            raise KeyExists(f"{self.url}: {key} exists already; nothing is overwritten") from None

    def stream(self, key: str) -> Iterator[bytes]:
        target, received, body, tag = {"Bucket": self.bucket, "Key": self._object_key(key)}, 0, None, ""

        def read_block() -> bytes:
            nonlocal body, tag
            try:
                if body is None:  # the first block, or the first one after the connection was cut
                    condition = {"Range": f"bytes={received}-", "IfMatch": tag} if received else {}
                    reply = self._s3.get_object(**target, **condition)
                    body, tag = reply["Body"], reply["ETag"]
                return bytes(body.read(BLOCK_BYTES))
            except Exception:
                body = None
                raise

        try:
            with self._map_not_found(key):
                while block := self._request(f"read {key}", read_block):
                    received += len(block)
                    yield block
        except _ConditionFailed:
            raise VersionConflict(f"{self.url}: {key} was replaced while it was read") from None

    def keys(self, prefix: str) -> Iterator[str]:
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix ends with '/', got {prefix!r}")

        def list_names() -> list[str]:
            names: list[str] = []
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
            for page in pages:
                names += [item["Key"] for item in page.get("Contents", ())]
            return names

        names = self._request(f"list {prefix}", list_names)
        yield from sorted(name.removeprefix(self.prefix) for name in names if not name.endswith("/"))

    def delete(self, key: str) -> None:
        target = {"Bucket": self.bucket, "Key": self._object_key(key)}
        self._request(f"delete {key}", lambda: self._s3.delete_object(**target))

    def _request(self, what: str, send: Callable[[], T]) -> T:
        """Send a request until the store has answered it; raise its refusal, or StoreUnavailable."""
        attempts = itertools.count()

        def send_once() -> T:
            repeated = next(attempts) > 0
            with self._map_store_errors(what, repeated=repeated):
                return send()

        return get_waiting().call(self._service, send_once, _get_outage)

    def _object_key(self, key: str) -> str:
        return self.prefix + validate_key(key)

    def _put_object(self, key: str, body: bytes | IO[bytes], **condition: Any) -> str:
        """Write an object, with the digest of its content.

        Without the digest, SeaweedFS 4.48 stores an empty object if the connection is cut before the content comes.
        """
        target = {"Bucket": self.bucket, "Key": self._object_key(key), "ContentMD5": _encode_md5(body)}
        return str(self._s3.put_object(**target, Body=body, **condition)["ETag"])

    def _upload_parts(self, key: str, path: Path, size: int) -> None:
        """Upload in parts, which are joined on the condition that the key does not exist by then."""
        target = {"Bucket": self.bucket, "Key": self._object_key(key)}
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        what = f"upload {key}"
        upload = self._request(what, lambda: self._s3.create_multipart_upload(**target))["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            with path.open("rb") as file:
                while block := file.read(part_bytes):
                    part = {**target, "UploadId": upload, "PartNumber": len(parts) + 1, "Body": block}
                    part["ContentMD5"] = _encode_md5(block)
                    reply = self._request(what, partial(self._s3.upload_part, **part))
                    parts.append({"ETag": reply["ETag"], "PartNumber": part["PartNumber"]})
            joined = {**target, "UploadId": upload, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            self._request(what, partial(self._s3.complete_multipart_upload, **joined))
        except BaseException:
            with contextlib.suppress(ClientError, BotoCoreError):  # the first error is the one to report
                self._s3.abort_multipart_upload(**target, UploadId=upload)
            raise

    def _find_own_write(self, key: str, content: bytes, lost: _ConditionFailed) -> str | None:
        """Return the tag of our own write, if its reply was lost and the retry failed on the condition; else None."""
        if not lost.repeated:
            return None
        stored = self.read(key)
        return stored.tag if stored.content == content else None

    @contextlib.contextmanager
    def _map_not_found(self, key: str) -> Iterator[None]:
        try:
            yield
        except _ObjectNotFound:
            raise KeyNotFound(f"{self.url}: nothing is stored under {key}") from None

    @contextlib.contextmanager
    def _map_store_errors(self, what: str, *, repeated: bool = False) -> Iterator[None]:
        """Raise botocore's errors as errors of the store. botocore's messages contain no credentials.

        repeated: an earlier attempt of this request may have had its effect, although its reply was lost.
        """
        try:
            yield
        except ClientError as error:
            code, status = _get_error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _CONDITION_FAILED_CODES or (repeated and code == "NoSuchUpload"):  # the parts are joined already
                raise _ConditionFailed(repeated) from None
            message = f"{self.url}: could not {what}: HTTP {status} {code}"
            if code in _NOT_FOUND_CODES:
                raise _ObjectNotFound(message) from None
            if (outage := find_store_outage(error)) is not None:
                raise StoreUnavailable(message, outage) from None
            raise StoreFailed(f"{message}{_get_hint(status, code)}") from None
        except (BotoCoreError, HTTPClientError, ValueError) as error:
            if isinstance(error, (KeyExists, VersionConflict)):
                raise
            message = f"{self.url}: could not {what}: {type(error).__name__}: {error}"
            if (outage := find_store_outage(error)) is not None:
                raise StoreUnavailable(message, outage) from None
            raise StoreFailed(message) from None  # no credentials, an unknown host, a wrong certificate


@cache
def get_model_loader() -> Any:
    """Return botocore's loader of API descriptions, which keeps what it has parsed; each session has one of its own."""
    session = get_session()
    loader = session.get_component("data_loader")
    session.create_client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    return loader


class _ConditionFailed(Exception):
    """A conditional write was refused. repeated: an earlier attempt of it may have succeeded."""

    def __init__(self, repeated: bool) -> None:
        super().__init__(repeated)
        self.repeated = repeated


class _ObjectNotFound(StoreFailed):
    """The store has no such object."""


def _get_outage(error: BaseException) -> Outage | None:
    return error.outage if isinstance(error, StoreUnavailable) else None


def _get_error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _encode_md5(body: bytes | IO[bytes]) -> str:
    """Return the MD5 of a content as the header Content-MD5 has it; a file is then at its start again."""
    if isinstance(body, bytes):
        return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode("ascii")
    digest = hashlib.md5(usedforsecurity=False)
    while block := body.read(BLOCK_BYTES):
        digest.update(block)
    body.seek(0)
    return base64.b64encode(digest.digest()).decode("ascii")


def _get_hint(status: int, code: str) -> str:
    if status == 403:
        return "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their permissions in this bucket"
    return "; create the bucket, or name another store" if code == "NoSuchBucket" else ""
