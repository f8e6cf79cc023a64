"""Where the policy runs: in this process (embedded), or behind an endpoint that speaks OpenAI's protocol (cluster).

Both shapes give a chain the same `Policy`. A checkpoint is checked before it is loaded: pickled weights, a missing or
cut-off shard, and files that are not what the manifest beside them says are refused by name.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import httpx

from clincot.errors import ModelFailed
from clincot.jsonl import InvalidRecord
from clincot.models.checkpoint import MANIFEST, WEIGHTS_INDEX, UnsupportedCheckpoint, check_weight_files
from clincot.models.endpoint import EndpointModel
from clincot.models.protocols import Generation, Policy
from clincot.prompts import Conversation, PromptFormat, load_prompt_format
from clincot.serving.request_batching import Batcher
from clincot.serving.request_context import RequestContext
from clincot.serving.server_settings import ServeSettings
from clincot.storage.artifacts import ChecksumMismatch, download_files, verify_files
from clincot.storage.open import open_store
from clincot.storage.store import KeyNotFound

_HEALTH_CACHE_S = 5.0  # how long an answer about the predictor's health is good for


class Backend(Protocol):
    """What answers conversations."""

    @property
    def digest(self) -> str: ...

    def open_policy(self, ticket: RequestContext) -> AbstractContextManager[Policy]:
        """The policy as one request sees it."""
        ...

    def check_health(self) -> bool: ...

    def close(self) -> None: ...


class LocalBackend:
    """The checkpoint in this process, its forward passes shared by the requests that are under way."""

    def __init__(self, checkpoint: Path, settings: ServeSettings, observe: Callable[[str, int], None]) -> None:
        from clincot.models.vlm import VisionLanguageModel

        check_checkpoint_files(checkpoint)
        model = VisionLanguageModel(checkpoint, device=_choose_device(), batch_size=settings.max_batch)
        self.digest = model.digest
        self._batcher = Batcher(model, max_batch=settings.max_batch, gather_s=settings.gather_s, observe=observe)

    def open_policy(self, ticket: RequestContext) -> AbstractContextManager[Policy]:
        return self._batcher.open_policy(ticket)

    def check_health(self) -> bool:
        return True

    def close(self) -> None:
        self._batcher.close()


class RemoteBackend:
    """A predictor: `host` as KServe gives it (host, host:port or URL), its OpenAI routes under `path`.

    Batching is the predictor's (vLLM batches continuously). Deadline and disconnection are looked at between calls.
    """

    def __init__(
        self,
        host: str,
        *,
        path: str = "/v1",
        model: str = "",
        views: PromptFormat,
        api_key_env: str = "",
        timeout_s: float = 60.0,
        yes_no: Sequence[int] = (),
        observe: Callable[[str, int], None],
    ) -> None:
        base = host if "://" in host else f"http://{host}"
        self.url = base.rstrip("/") + "/" + path.strip("/")
        self._model = EndpointModel(
            self.url,
            name="predictor",
            model=model,
            api_key_env=api_key_env,
            views=views,
            timeout_s=timeout_s,
            concurrency=16,
            yes_no=yes_no,
        )
        self._observe = observe
        self._health: tuple[float, bool] = (-_HEALTH_CACHE_S, False)

    @property
    def digest(self) -> str:
        return self._model.digest

    @contextmanager
    def open_policy(self, ticket: RequestContext) -> Iterator[Policy]:
        yield _CancellablePolicy(self._model, ticket, self._observe)

    def check_health(self) -> bool:
        """Whether the predictor lists its models."""
        now = time.monotonic()
        if now - self._health[0] >= _HEALTH_CACHE_S:
            self._health = (now, self._probe_predictor())
        return self._health[1]

    def _probe_predictor(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models", timeout=3.0).status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        pass


class _CancellablePolicy:
    """A policy that is asked only while the request lives."""

    def __init__(self, model: Policy, ticket: RequestContext, observe: Callable[[str, int], None]) -> None:
        self._model, self._ticket, self._observe = model, ticket, observe

    @property
    def digest(self) -> str:
        return self._model.digest

    @property
    def views(self) -> PromptFormat:
        return self._model.views

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        self._ticket.check_alive()
        self._observe("write", len(conversations))
        replies = self._model.generate(
            conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds
        )
        self._ticket.check_alive()
        return replies

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self._ticket.check_alive()
        self._observe("p_yes", len(conversations))
        odds = self._model.p_yes(conversations)
        self._ticket.check_alive()
        return odds


def check_checkpoint_files(folder: Path) -> None:
    """Raise UnsupportedCheckpoint, naming the file, for one that is not whole, not as published, or pickled."""
    if not folder.is_dir():
        raise UnsupportedCheckpoint(f"{folder}: no such folder; expected a checkpoint (config.json, *.safetensors, …)")
    check_weight_files(folder)
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        _check_file_format(path)
    manifest = folder / MANIFEST
    if manifest.is_file():
        check_manifest_files(folder, manifest)


def check_manifest_files(folder: Path, manifest: Path, *, only: frozenset[str] = frozenset()) -> None:
    """Every file that the manifest lists (or those of `only`) has the digest that it says."""
    try:
        files = [(file["path"], file["sha256"]) for file in json.loads(manifest.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedCheckpoint(f"{manifest}: not a manifest of files with their sha256 ({error!r})") from None
    try:
        verify_files(folder, {name: digest for name, digest in files if not only or name in only})
    except ChecksumMismatch as error:
        raise UnsupportedCheckpoint(f"{error}; fetch the checkpoint again") from None
    listed = {name for name, _ in files}
    added = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in listed)
    if added:
        raise UnsupportedCheckpoint(f"{folder / added[0]}: is not in {manifest.name}; nothing may be added")


def _check_file_format(path: Path) -> None:
    """A pickle under any name, and a safetensors file whose tensors do not fill it."""
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix != ".safetensors":
            if (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or start[
                :4
            ] == b"PK\x03\x04":
                raise UnsupportedCheckpoint(f"{path}: is pickled (or an archive); expected safetensors and text alone")
            return
        header = int.from_bytes(start, "little")
        size = path.stat().st_size
        try:
            tensors = json.loads(file.read(header)) if 8 + header <= size else None
        except ValueError:
            tensors = None
    if not isinstance(tensors, dict):
        raise UnsupportedCheckpoint(f"{path}: is cut off or no safetensors file (its header cannot be read)")
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    if 8 + header + max(ends, default=0) != size:
        raise UnsupportedCheckpoint(
            f"{path}: has {size} bytes, its tensors need {8 + header + max(ends, default=0)}; it was cut off"
        )


@contextmanager
def open_checkpoint_folder(given: str, *, views_only: bool = False) -> Iterator[Path]:
    """The folder of a path or `s3://bucket/…/<digest>` address; what is fetched is removed in the end.

    views_only: a transformer needs how its checkpoint wants to be shown images, not the weights.
    """
    if "://" not in given:
        yield Path(given)
        return
    parent, _, digest = given.rstrip("/").rpartition("/")
    store, prefix = open_store(parent), f"{digest}/"
    names = [key.removeprefix(prefix) for key in store.keys(prefix)]
    if views_only:
        names = [name for name in names if name.endswith((".json", ".jinja")) and name != WEIGHTS_INDEX]
    if not names:
        raise UnsupportedCheckpoint(f"{given}: nothing is stored there; expected a checkpoint's files")
    with tempfile.TemporaryDirectory(prefix="clincot-checkpoint-") as temporary:
        folder = Path(temporary) / digest
        try:
            download_files(store, dict.fromkeys(names), folder, prefix=prefix)
        except KeyNotFound as error:
            raise UnsupportedCheckpoint(f"{given}: a file was removed during the download: {error}") from None
        yield folder


def load_served_prompt_format(folder: Path) -> PromptFormat:
    """A transformer's part of a checkpoint; what its manifest says about it is checked."""
    if not folder.is_dir():
        raise InvalidRecord(f"{folder}: no such folder; expected the checkpoint's folder, for its clincot.json")
    if (folder / MANIFEST).is_file():
        check_manifest_files(folder, folder / MANIFEST, only=frozenset({"clincot.json"}))
    return load_prompt_format(folder)


def redact_failure(error: ModelFailed) -> str:
    """What may be logged of a failure: what was asked and expected, not what came, which may quote the request."""
    return str(error).partition(", got ")[0]


def _choose_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
