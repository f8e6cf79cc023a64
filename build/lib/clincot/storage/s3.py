"""A bucket of any S3 endpoint as a Store.

Uses botocore because the minio client cannot send If-None-Match and If-Match, which every write here needs.

Atomic: each object appears as a whole. write_new, replace and upload are conditional requests, so of several
concurrent writers of a key only one succeeds; a multipart upload checks its condition when the parts are joined.
Not atomic: several keys together. A killed multipart upload leaves invisible parts, which a lifecycle rule of the
bucket should remove.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from botocore.session import get_session

from clincot.storage.store import (
    BLOCK_BYTES,
    KeyExists,
    KeyNotFound,
    StoredObject,
    StoreFailed,
    StoreUnavailable,
    VersionConflict,
    validate_key,
)

PART_BYTES = 64 << 20  # size of a part of a multipart upload; smaller files are sent in one request
MAX_PARTS = 10_000  # S3's limit of parts per upload
ATTEMPTS = 4  # of a request, by botocore
_CONDITION_FAILED_CODES = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_NOT_FOUND_CODES = {"NoSuchKey", "404", "NotFound"}


class S3Store:
    """The store `s3://bucket/prefix`. Requests time out and are retried.

    If the reply to write_new or replace is lost, the retry fails on the condition; the store then recognises its own
    content and reports success.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        session = get_session()
        config = Config(
            connect_timeout=10,
            read_timeout=120,
            retries={"mode": "standard", "max_attempts": ATTEMPTS},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},  # endpoints other than Amazon's need it
        )
        region = session.get_config_variable("region") or "us-east-1"
        with self._map_store_errors("open the store"):
            self._s3: Any = session.create_client("s3", region_name=region, config=config)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def create_bucket(self) -> bool:
        """Create the bucket; return False if this account has it already. Raises StoreFailed."""
        with self._map_store_errors(f"create the bucket {self.bucket}"):
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

    def read(self, key: str) -> StoredObject:
        with self._map_store_errors(f"read {key}"), self._map_not_found(key):
            reply = self._s3.get_object(Bucket=self.bucket, Key=self._object_key(key))
            return StoredObject(reply["Body"].read(), reply["ETag"])

    def write_new(self, key: str, content: bytes) -> str:
        try:
            with self._map_store_errors(f"write {key}"):
                return str(self._put_object(key, content, IfNoneMatch="*"))
        except _ConditionFailed as lost:
            if (tag := self._find_own_write(key, content, lost)) is not None:
                return tag
            raise KeyExists(f"{self.url}: {key} exists already; nothing is overwritten") from None

    def replace(self, key: str, content: bytes, tag: str) -> str:
        try:
            with self._map_store_errors(f"replace {key}"), self._map_not_found(key):
                return str(self._put_object(key, content, IfMatch=tag))
        except KeyNotFound:
            raise VersionConflict(f"{self.url}: {key} was removed by someone else since it was read") from None
        except _ConditionFailed as lost:
            if (landed := self._find_own_write(key, content, lost)) is not None:
                return landed
            raise VersionConflict(f"{self.url}: {key} was replaced by someone else since it was read") from None

    def upload(self, key: str, path: Path) -> None:
        size = path.stat().st_size
        try:
            with self._map_store_errors(f"upload {key}"):
                if size <= PART_BYTES:
                    with path.open("rb") as file:
                        self._put_object(key, file, IfNoneMatch="*", ContentLength=size)
                else:
                    self._upload_parts(key, path, size)
        except _ConditionFailed:
            raise KeyExists(f"{self.url}: {key} exists already; nothing is overwritten") from None

    def stream(self, key: str) -> Iterator[bytes]:
        with self._map_store_errors(f"read {key}"), self._map_not_found(key):
            body = self._s3.get_object(Bucket=self.bucket, Key=self._object_key(key))["Body"]
            while block := body.read(BLOCK_BYTES):
                yield block

    def keys(self, prefix: str) -> Iterator[str]:
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix ends with '/', got {prefix!r}")
        with self._map_store_errors(f"list {prefix}"):
            names: list[str] = []
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
            for page in pages:
                names += [item["Key"] for item in page.get("Contents", ())]
        yield from sorted(name.removeprefix(self.prefix) for name in names if not name.endswith("/"))

    def delete(self, key: str) -> None:
        with self._map_store_errors(f"delete {key}"):
            self._s3.delete_object(Bucket=self.bucket, Key=self._object_key(key))

    def _object_key(self, key: str) -> str:
        return self.prefix + validate_key(key)

    def _put_object(self, key: str, body: Any, **condition: Any) -> str:
        return str(self._s3.put_object(Bucket=self.bucket, Key=self._object_key(key), Body=body, **condition)["ETag"])

    def _upload_parts(self, key: str, path: Path, size: int) -> None:
        """Upload in parts, which are joined on the condition that the key does not exist by then."""
        target = {"Bucket": self.bucket, "Key": self._object_key(key)}
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        upload = self._s3.create_multipart_upload(**target)["UploadId"]
        try:
            parts: list[dict[str, Any]] = []
            with path.open("rb") as file:
                while block := file.read(part_bytes):
                    number = len(parts) + 1
                    tag = self._s3.upload_part(**target, UploadId=upload, PartNumber=number, Body=block)["ETag"]
                    parts.append({"ETag": tag, "PartNumber": number})
            self._s3.complete_multipart_upload(
                **target, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            with contextlib.suppress(ClientError, BotoCoreError):  # the first error is the one to report
                self._s3.abort_multipart_upload(**target, UploadId=upload)
            raise

    def _find_own_write(self, key: str, content: bytes, lost: _ConditionFailed) -> str | None:
        """Return the tag of our own write, if its reply was lost and the retry failed on the condition; else None."""
        if lost.retries == 0:
            return None
        stored = self.read(key)
        return stored.tag if stored.content == content else None

    @contextlib.contextmanager
    def _map_not_found(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if _get_error_code(error) in _NOT_FOUND_CODES:
                raise KeyNotFound(f"{self.url}: nothing is stored under {key}") from None
            raise

    @contextlib.contextmanager
    def _map_store_errors(self, what: str) -> Iterator[None]:
        """Raise botocore's errors as errors of the store. botocore's messages contain no credentials."""
        try:
            yield
        except ClientError as error:
            code, status = _get_error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _CONDITION_FAILED_CODES:
                raise _ConditionFailed(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) from None
            hint = ""
            if status == 403:
                hint = "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their permissions in this bucket"
            elif code == "NoSuchBucket":
                hint = "; create the bucket, or name another store"
            kind = StoreUnavailable if status >= 500 else StoreFailed
            raise kind(f"{self.url}: could not {what}: HTTP {status} {code}{hint}") from None
        except (BotoCoreError, HTTPClientError, ValueError) as error:
            if isinstance(error, (KeyExists, VersionConflict)):
                raise
            unreachable = isinstance(error, (HTTPClientError, ConnectionError))
            kind = StoreUnavailable if unreachable else StoreFailed  # otherwise: no credentials, a malformed address
            raise kind(f"{self.url}: could not {what}: {type(error).__name__}: {error}") from None


class _ConditionFailed(Exception):
    """A conditional write was refused. retries: how often botocore had retried it."""

    def __init__(self, retries: int) -> None:
        super().__init__(retries)
        self.retries = retries


def _get_error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
