"""Registration of a published checkpoint in a Kubeflow Model Registry, for the people who look for models there.

The store of this project stays the source of truth: a registry entry names the checkpoint's address and digest, and
what the gate measured. A model line becomes a RegisteredModel, a checkpoint a ModelVersion named by its digest, with
one ModelArtifact. The registry has no aliases, so `champion` is a custom property of the RegisteredModel.

Requests follow the REST API v1alpha3 (kubeflow/model-registry at c6ac741e, api/openapi/src/model-registry.yaml). Its
Python client brings an HTTP stack of its own (aiohttp) and reads tokens from a user's home folder; six requests do not
need it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from clincot.clients.http import HttpFailure, JsonClient, read_api_key, validate_url
from clincot.registry.champion import NoChampion, read_champion
from clincot.registry.manifest import Manifest
from clincot.storage.store import Store

_log = logging.getLogger(__name__)

TOKEN_ENV, TOKEN_FILE_ENV = "CLINCOT_MODEL_REGISTRY_TOKEN", "CLINCOT_MODEL_REGISTRY_TOKEN_FILE"
_API = "/api/model_registry/v1alpha3"
_TIMEOUT_S = 30.0
_EXPECTED = "a resource of the Model Registry API v1alpha3"


class RegistryResource(BaseModel):
    """The part of a RegisteredModel, ModelVersion or artifact that is read back."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(min_length=1)
    name: str = ""
    customProperties: dict[str, dict[str, Any]] = {}  # as the API names them


class ModelRegistry:
    """One registry, to be used as a context manager. Raises HttpFailure for every request that it refuses.

    The token comes from the environment variable CLINCOT_MODEL_REGISTRY_TOKEN or the file that
    CLINCOT_MODEL_REGISTRY_TOKEN_FILE names; without either, requests carry none.
    """

    def __init__(self, address: str) -> None:
        self._base = validate_url(address, what="publish.model_registry").rstrip("/") + _API
        self._client = JsonClient(timeout_s=_TIMEOUT_S, key=_read_token())

    def __enter__(self) -> ModelRegistry:
        self._client.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._client.__exit__(*error)

    def register_manifest(self, manifest: Manifest) -> RegistryResource:
        """Register a checkpoint and return its ModelVersion; repeating it changes nothing."""
        model = self._find_or_create_model(manifest.line)
        version = self._find("model_version", name=manifest.sha256, parentResourceId=model.id)
        if version is None:
            version = self._create(
                f"registered_models/{model.id}/versions",
                {
                    "name": manifest.sha256,
                    "registeredModelId": model.id,
                    "description": f"Round {manifest.round} of {manifest.line}",
                    "customProperties": _describe_manifest(manifest),
                },
                find=("model_version", {"name": manifest.sha256, "parentResourceId": model.id}),
            )
        artifact = f"{manifest.line}-{manifest.sha256[:20]}"
        if self._find("artifact", name=artifact, parentResourceId=version.id) is None:
            body = {
                "artifactType": "model-artifact",
                "name": artifact,
                "uri": manifest.uri,
                "modelFormatName": "safetensors",
                "state": "LIVE",
            }
            wanted = ("artifact", {"name": artifact, "parentResourceId": version.id})
            self._create(f"model_versions/{version.id}/artifacts", body, find=wanted)
        return version

    def mark_champion(self, line: str, digest: str) -> None:
        """Set the property `champion` of a model line, keeping its other properties."""
        model = self._find_or_create_model(line)
        if model.customProperties.get("champion", {}).get("string_value") == digest:
            return
        properties = {**model.customProperties, "champion": _string(digest)}
        self._request("PATCH", f"registered_models/{model.id}", {"customProperties": properties})

    def _find_or_create_model(self, line: str) -> RegistryResource:
        found = self._find("registered_model", name=line)
        if found is not None:
            return found
        body = {"name": line, "description": "A model line of ClinCoT"}
        return self._create("registered_models", body, find=("registered_model", {"name": line}))

    def _find(self, path: str, **query: str) -> RegistryResource | None:
        try:
            return self._request("GET", f"{path}?{urlencode(query)}")
        except HttpFailure as error:
            if error.status == 404:
                return None
            raise

    def _create(self, path: str, body: dict[str, Any], *, find: tuple[str, dict[str, str]]) -> RegistryResource:
        """Create a resource; if another process did so in the meantime, return that one."""
        try:
            return self._request("POST", path, body)
        except HttpFailure as error:
            kind, query = find
            existing = self._find(kind, **query) if error.status == 409 else None
            if existing is None:
                raise
            return existing

    def _request(self, method: str, path: str, body: Any = None) -> RegistryResource:
        return self._client.request_json(
            method, f"{self._base}/{path}", RegistryResource, expected=_EXPECTED, payload=body
        )


def register_externally(address: str, store: Store, manifest: Manifest) -> None:
    """Register a published checkpoint, and the champion that the store names. Raises HttpFailure; can be repeated."""
    with ModelRegistry(address) as registry:
        registry.register_manifest(manifest)
        try:
            registry.mark_champion(manifest.line, read_champion(store, manifest.line).now.sha256)
        except NoChampion:
            return


def follow_champion(address: str, manifest: Manifest) -> str:
    """Mark a checkpoint as champion after a rollout; return "", or why the registry could not be told.

    The traffic has moved by then, so a registry that is away fails nothing.
    """
    try:
        with ModelRegistry(address) as registry:
            registry.register_manifest(manifest)
            registry.mark_champion(manifest.line, manifest.sha256)
    except HttpFailure as error:
        _log.warning("the Model Registry was not told of the new champion: %s", error)
        return str(error)
    return ""


def _read_token() -> str:
    if os.environ.get(TOKEN_ENV):
        return read_api_key(env=TOKEN_ENV, what="the Model Registry")
    file = os.environ.get(TOKEN_FILE_ENV)
    return read_api_key(file=Path(file), what="the Model Registry") if file else ""


def _describe_manifest(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The custom properties of a version: where it comes from and what the gate said."""
    texts = {
        "sha256": manifest.sha256,
        "parent": manifest.parent,
        "pairs": manifest.pairs,
        "data_revision": manifest.data_revision,
        "git": manifest.git,
        "licence": manifest.licence,
        "verdict": manifest.decision.verdict if manifest.decision else "",
        "decision": manifest.decision.id if manifest.decision else "",
        "metric": manifest.decision.metric if manifest.decision else "",
    }
    properties = {name: _string(text) for name, text in texts.items() if text}
    properties["round"] = {"metadataType": "MetadataIntValue", "int_value": str(manifest.round)}
    if manifest.decision and manifest.decision.difference.value is not None:
        gain = manifest.decision.difference.value
        properties["gain"] = {"metadataType": "MetadataDoubleValue", "double_value": gain}
    return properties


def _string(text: str) -> dict[str, Any]:
    return {"metadataType": "MetadataStringValue", "string_value": text}
