"""The end of the log of a task's pod, from the API server of Kubeflow Pipelines or from its UI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from clincot.pipelines.client import REQUEST_S, Connection, kfp_errors
from clincot.pipelines.run_record import TaskRow

_MAX_NODES = 3
_DEFAULT_NAMESPACE = "kubeflow"


def read_log_tail(connection: Connection, run_id: str, row: TaskRow, *, lines: int) -> list[str]:
    """Return the last lines of the log of a failed task; [] if no pod of it has a log any more.

    The API server reads the log of a pod by the pod's name, or else the archived one by the id of Argo's node
    (kubeflow/pipelines 2.17.0, backend/src/apiserver/resource/resource_manager.go: ReadLog). Kubeflow's gateway leads
    to the UI, which does not pass that request on but has one of its own (frontend/server/app.ts: k8s/pod/logs).
    Raises PipelinesFailed if the server does not answer.
    """
    for node in row.nodes[:_MAX_NODES]:
        for url in _list_addresses(connection, run_id, node, row):
            text = _fetch_text(connection, url)
            if text:
                return text.splitlines()[-lines:]
    return []


def _list_addresses(connection: Connection, run_id: str, node: str, row: TaskRow) -> Iterator[str]:
    workflow, _, digits = node.rpartition("-")
    pod = f"{workflow}-{row.task.template}-{digits}"  # Argo's names of pods: workflow, template, hash of the node
    for name in (pod, node):
        yield f"{connection.endpoint}/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(name)}/log"
    namespace = connection.namespace or _DEFAULT_NAMESPACE
    query = urlencode({"podname": pod, "runid": run_id, "podnamespace": namespace})
    yield f"{connection.endpoint}/k8s/pod/logs?{query}"


def _fetch_text(connection: Connection, url: str) -> str:
    """Return the text at an address; "" if there is none.

    The API server answers HTTP 200 before it looks for the log, and then writes an error as JSON behind it
    (kubeflow/pipelines 2.17.0, backend/src/apiserver/server/run_log_server.go).
    """
    api = connection.client._run_api.api_client
    headers: dict[str, str] = {}
    api.update_params_for_auth(headers, [], ["Bearer"])
    with kfp_errors(connection.endpoint):
        reply: Any = api.rest_client.pool_manager.request(
            "GET", url, headers=headers, timeout=urllib3.Timeout(total=REQUEST_S)
        )
    text = reply.data.decode(errors="replace").strip()
    if reply.status != 200 or text.startswith("<") or _is_error(text):
        return ""
    return str(text)


def _is_error(text: str) -> bool:
    start = text.rfind('{"error_message"')
    if start < 0:
        return False
    try:
        return "error_message" in json.loads(text[start:])
    except ValueError:
        return False
