"""Backends, which run the policy.

It runs in this process or, on a cluster, behind an endpoint with OpenAI's protocol. Both offer a chain the same
`Policy`. A checkpoint is checked before it is loaded; pickled weights, missing or truncated shards, and files that
differ from the checkpoint's manifest are refused by name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from opentelemetry.trace import SpanKind

from clincot.clients.http import FAIL_AT_ONCE, HttpFailure, limit_requests, read_api_key
from clincot.config.server_settings import ServeSettings
from clincot.errors import PromptTooLong
from clincot.jsonl import InvalidRecord
from clincot.models.checkpoint import (
    MANIFEST,
    WEIGHTS_INDEX,
    UnsupportedCheckpoint,
    check_weight_files,
    hash_checkpoint_files,
)
from clincot.models.endpoint import EndpointModel
from clincot.models.protocols import Generation, Policy, PolicyWrapper
from clincot.prompts import Conversation, PromptFormat, Turn, collect_views, load_prompt_format
from clincot.serving.request_batching import Batcher
from clincot.serving.request_context import RequestContext
from clincot.serving.spool import open_spool
from clincot.serving.tracing import build_trace_headers, trace_call
from clincot.storage.artifacts import ChecksumMismatch, download_files, verify_files
from clincot.storage.open import open_store
from clincot.storage.store import KeyNotFound

_HEALTH_CACHE_S = 5.0  # how long the result of a health check of the predictor is reused
_ONE_TOKEN_S = 3.0  # for the answer that shows that a predictor does not hang
# vllm-project/vllm@017638d, vllm/renderers/params.py, TokenizeParams._token_len_check
_VLLM_TOO_LONG = re.compile(
    r"You passed (\d+) input tokens and requested (\d+) output tokens\. "
    r"However, the model's context length is only (\d+)"
)
_VLLM_METRIC = re.compile(r"(# (HELP|TYPE) )?vllm:")
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # protocols 2 to 5
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes pickles into a zip archive


class Backend(Protocol):
    """Runs the policy for the requests of a server."""

    @property
    def digest(self) -> str:
        """Digest of the policy's checkpoint."""
        ...

    def open_policy(self, context: RequestContext) -> AbstractContextManager[Policy]:
        """The policy for one request.

        Its calls fail once the request is cancelled or past its deadline.
        """
        ...

    def check_health(self) -> bool:
        """Whether the policy can answer."""
        ...

    def check_alive(self) -> bool:
        """False if the policy cannot answer until this process is restarted."""
        ...

    def read_metrics(self) -> str:
        """Metrics of a predictor beside this server, in Prometheus' text format."""
        ...

    def close(self) -> None:
        """Release what the backend holds."""
        ...


class InProcessBackend:
    """A policy in this process; concurrent requests share its calls.

    observe: called with the kind of call, the size and the seconds of each batch.
    """

    def __init__(self, policy: Policy, settings: ServeSettings, observe: Callable[[str, int, float], None]) -> None:
        self.digest = policy.digest
        self._batcher = Batcher(
            policy,
            max_batch=settings.max_batch,
            gather_s=settings.gather_s,
            hang_s=settings.hang_s,
            observe=observe,
            is_fatal=is_device_error,
        )

    def open_policy(self, context: RequestContext) -> AbstractContextManager[Policy]:
        return self._batcher.open_policy(context)

    def check_health(self) -> bool:
        return self._batcher.check_health()

    def check_alive(self) -> bool:
        """A model that has stopped, or hangs, comes back only with a new process."""
        return self._batcher.check_health()

    def read_metrics(self) -> str:
        return ""

    def close(self) -> None:
        self._batcher.close()


class LocalBackend(InProcessBackend):
    """A checkpoint in this process. The constructor raises UnsupportedCheckpoint."""

    def __init__(self, checkpoint: Path, settings: ServeSettings, observe: Callable[[str, int, float], None]) -> None:
        from clincot.models.precision import choose_device, choose_dtype
        from clincot.models.vlm import VisionLanguageModel

        check_checkpoint_files(checkpoint)
        device = choose_device()
        model = VisionLanguageModel(
            checkpoint, device=device, dtype=choose_dtype(settings.dtype, device), batch_size=settings.max_batch
        )
        model.refuses_long_prompts = True
        super().__init__(model, settings, observe)

    @contextmanager
    def open_policy(self, context: RequestContext) -> Iterator[Policy]:
        with super().open_policy(context) as policy:
            yield _RenderingPolicy(policy)


class _RenderingPolicy(PolicyWrapper):
    """Renders the views of large images in the request's own thread; other requests' batches need not wait for it."""

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        self._render_views(conversations)
        return super().generate(conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self._render_views(conversations)
        return super().p_yes(conversations)

    def _render_views(self, conversations: Sequence[Conversation]) -> None:
        from clincot.models.encoding import render_ahead

        for conversation in conversations:
            render_ahead(collect_views(conversation))


@dataclass(frozen=True)
class PredictorAddress:
    """How a predictor is reached.

    KServe passes the host; the OpenAI routes are under `path`.
    """

    host: str  # host, host:port or URL
    path: str = "/v1"
    model: str = ""  # name of the model at the predictor; "": the only one that it serves
    api_key_env: str = ""  # environment variable that contains the API key

    @property
    def base(self) -> str:
        """The predictor's URL without `path`."""
        return (self.host if "://" in self.host else f"http://{self.host}").rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the predictor runs beside this server, as the vLLM of a collocated transformer does."""
        return httpx.URL(self.base).host in ("localhost", "127.0.0.1", "::1")

    @property
    def url(self) -> str:
        """The address under which the predictor's OpenAI routes are."""
        return self.base + "/" + self.path.strip("/")


class RemoteBackend:
    """A predictor with OpenAI's routes.

    The predictor does the batching (vLLM batches continuously). Deadline and disconnection are checked between calls.
    After a call without a reply in time, the predictor is ready only once it answers: vLLM's /health stays 200 while
    its engine hangs.

    digest: of the checkpoint that the predictor serves; "" if it is not known, and answers then have a digest of the
    predictor's name and prompts.
    """

    def __init__(
        self,
        predictor: PredictorAddress,
        *,
        views: PromptFormat,
        timeout_s: float = 60.0,
        yes_no: Sequence[int] = (),
        digest: str = "",
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._digest = digest
        self.url, self._health_url = predictor.url, f"{predictor.base}/health"
        self._model = EndpointModel(
            self.url,
            name="predictor",
            model=predictor.model,
            api_key_env=predictor.api_key_env,
            views=views,
            timeout_s=timeout_s,
            concurrency=16,
            yes_no=yes_no,
            retry=FAIL_AT_ONCE,  # the client of this server decides whether to ask again
        )
        self._observe = observe
        self._metrics_url = f"{predictor.base}/metrics" if predictor.is_local else ""
        key = read_api_key(env=predictor.api_key_env, what="predictor")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._health: tuple[float, bool] = (-_HEALTH_CACHE_S, False)
        self._may_hang = (
            False  # the last call that ended had no reply in time, and the predictor has not answered since
        )

    @property
    def digest(self) -> str:
        return self._digest or self._model.digest

    @contextmanager
    def open_policy(self, context: RequestContext) -> Iterator[Policy]:
        yield _CancellablePolicy(self, self._model, context)

    def observe_call(self, call: str, size: int, seconds: float) -> None:
        """Record a call, as the batches of a model in this process are."""
        self._observe(call, size, seconds)

    def note_call(self, timed_out: bool) -> None:
        """Remember whether the last call that ended had no reply in time."""
        if timed_out != self._may_hang:
            self._may_hang = timed_out
            self._health = (-_HEALTH_CACHE_S, False)  # the next health check looks again

    def check_alive(self) -> bool:
        """A predictor has probes of its own; a restart of this process would not mend it."""
        return True

    def check_health(self) -> bool:
        """Whether the predictor lists its models and its engine runs; the result is cached for a few seconds."""
        now = time.monotonic()
        if now - self._health[0] >= _HEALTH_CACHE_S:
            self._health = (now, self._probe_predictor())
        return self._health[1]

    def _probe_predictor(self) -> bool:
        try:
            if httpx.get(f"{self.url}/models", timeout=3.0, headers=self._headers).status_code != 200:
                return False
            # vLLM lists its models even if its engine has died; then /health is 503 (vllm-project/vllm, main,
            # vllm/entrypoints/serve/instrumentator/health.py). Other servers may not have the route.
            if httpx.get(self._health_url, timeout=3.0).status_code == 503:
                return False
        except httpx.HTTPError:
            return False
        return not self._may_hang or self._answers_one_token()

    def _answers_one_token(self) -> bool:
        """Whether the predictor answers a question of one token within a few seconds."""
        try:
            with limit_requests(time.monotonic() + _ONE_TOKEN_S, {}):
                self._model.generate([(Turn("user", "yes or no?"),)], max_new_tokens=1, temperature=0.0, seeds=[0])
        except HttpFailure as error:
            if error.timed_out:
                return False
        self._may_hang = False
        return True

    def read_metrics(self) -> str:
        """vLLM's metrics, if vLLM runs beside this server.

        In the pod of a service, vLLM's port is closed to all others, because vLLM checks no key. Its metrics of Python
        and of the process are left out, because this server has the same ones. A predictor in pods of its own is
        scraped itself.
        """
        if not self._metrics_url:
            return ""
        try:
            reply = httpx.get(self._metrics_url, timeout=3.0, headers={"Accept": "text/plain"})
        except httpx.HTTPError:
            return ""
        lines = reply.text.splitlines() if reply.status_code == 200 else []
        return "".join(f"{line}\n" for line in lines if _VLLM_METRIC.match(line))

    def close(self) -> None:
        pass


class _CancellablePolicy(PolicyWrapper):
    """A policy that is called only while its request is alive."""

    def __init__(self, backend: RemoteBackend, policy: Policy, context: RequestContext) -> None:
        super().__init__(policy)
        self._backend, self._context = backend, context

    @property
    def digest(self) -> str:
        return self._backend.digest

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        try:
            with self._call_predictor("write", len(conversations)):
                return super().generate(
                    conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds
                )
        except HttpFailure as error:
            if too_long := _read_prompt_too_long(error):
                raise too_long from None
            raise

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        with self._call_predictor("p_yes", len(conversations)):
            return super().p_yes(conversations)

    @contextmanager
    def _call_predictor(self, call: str, size: int) -> Iterator[None]:
        """A call that ends at the request's deadline and belongs to its trace."""
        self._context.check_alive()
        began = time.monotonic()
        try:
            with (
                trace_call(f"predictor {call}", SpanKind.CLIENT),  # `observe_call` has the metric
                limit_requests(self._context.deadline, build_trace_headers()),
            ):
                yield
            self._backend.note_call(False)
        except HttpFailure as error:
            self._backend.note_call(error.timed_out)
            self._context.check_alive()  # at the deadline, the request gets 504 and not the predictor's failure
            raise
        finally:
            self._backend.observe_call(call, size, time.monotonic() - began)
        self._context.check_alive()


def is_device_error(error: Exception) -> bool:
    """Whether the device has failed, after which every call of this process fails.

    Examples are a device-side assert and an illegal memory access. torch.OutOfMemoryError is another type (torch 2.13).
    """
    import torch

    return isinstance(error, torch.AcceleratorError)


def _read_prompt_too_long(error: HttpFailure) -> PromptTooLong | None:
    """The numbers in vLLM's refusal of a long prompt; None for other failures."""
    numbers = _VLLM_TOO_LONG.search(error.body) if error.status == 400 else None
    return PromptTooLong(*map(int, numbers.groups())) if numbers else None


def check_checkpoint_files(folder: Path) -> None:
    """Check all files of a checkpoint.

    Raises UnsupportedCheckpoint, naming a file that is missing, truncated, changed or pickled.
    """
    if not folder.is_dir():
        raise UnsupportedCheckpoint(
            f"{folder}: the folder does not exist; expected a checkpoint (config.json, *.safetensors, …)"
        )
    check_weight_files(folder)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        _check_file_format(path)
    manifest = folder / MANIFEST
    if manifest.is_file():
        check_manifest_files(folder, manifest)


def check_manifest_files(folder: Path, manifest: Path, *, only: frozenset[str] = frozenset()) -> None:
    """Check all files (or those in `only`) against the manifest's digests.

    Raises UnsupportedCheckpoint, naming the first file that differs.
    """
    files = _read_manifest_files(manifest)
    try:
        verify_files(folder, {name: digest for name, digest in files.items() if not only or name in only})
    except ChecksumMismatch as error:
        raise UnsupportedCheckpoint(f"{error}; fetch the checkpoint again") from None
    added = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in files)
    if added:
        raise UnsupportedCheckpoint(f"{folder / added[0]}: is not in {manifest.name}; nothing may be added")


def _read_manifest_files(manifest: Path) -> dict[str, str]:
    """The sha256 of each file that a manifest lists. Raises UnsupportedCheckpoint."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {str(file["path"]): str(file["sha256"]) for file in files}
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedCheckpoint(f"{manifest}: not a manifest of files with their sha256 ({error!r})") from None


def read_published_digest(folder: Path) -> str:
    """The digest of a published checkpoint, by its manifest, whether its weights are in the folder or not.

    Returns "" for a checkpoint without a manifest. Raises UnsupportedCheckpoint if the manifest cannot be read.
    """
    manifest = folder / MANIFEST
    return hash_checkpoint_files(_read_manifest_files(manifest)) if manifest.is_file() else ""


def _check_file_format(path: Path) -> None:
    """Refuse a pickle under any name, and a safetensors file of the wrong size.

    A safetensors file consists of the header's length (8 bytes, little endian), the header (JSON with the byte offsets
    of each tensor), and the tensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix != ".safetensors":
            if start.startswith((*_PICKLE_MAGIC, _ZIP_MAGIC)):
                raise UnsupportedCheckpoint(
                    f"{path}: is pickled (or an archive); expected only safetensors and text files"
                )
            return
        header = int.from_bytes(start, "little")
        size = path.stat().st_size
        try:
            tensors = json.loads(file.read(header)) if 8 + header <= size else None
        except ValueError:
            tensors = None
    if not isinstance(tensors, dict):
        raise UnsupportedCheckpoint(f"{path}: is cut off or not a safetensors file (its header cannot be read)")
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    expected = 8 + header + max(ends, default=0)
    if expected != size:
        raise UnsupportedCheckpoint(f"{path}: has {size} bytes, but its tensors need {expected}; it was cut off")


@contextmanager
def open_checkpoint_folder(given: str, *, views_only: bool = False) -> Iterator[Path]:
    """Open a checkpoint's folder by its path or `s3://bucket/…/<digest>` address.

    Downloaded files are removed at the end.
    views_only: download only the prompt format and other small files, which are all that a transformer needs.
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
    with open_spool() as spool:
        folder = spool.folder / digest
        try:
            download_files(store, dict.fromkeys(names), folder, prefix=prefix)
        except KeyNotFound as error:
            raise UnsupportedCheckpoint(f"{given}: a file was removed during the download: {error}") from None
        yield folder


def load_served_prompt_format(folder: Path) -> PromptFormat:
    """Load the prompt format, after checking it against the manifest, if any.

    It is the only part of a checkpoint that a transformer needs.
    """
    if not folder.is_dir():
        raise InvalidRecord(
            f"{folder}: the folder does not exist; expected the checkpoint's folder with its clincot.json"
        )
    if (folder / MANIFEST).is_file():
        check_manifest_files(folder, folder / MANIFEST, only=frozenset({"clincot.json"}))
    return load_prompt_format(folder)
