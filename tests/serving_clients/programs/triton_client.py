"""tritonclient over HTTP and gRPC, with binary tensors and with JSON.

Arguments: key, HTTP host, gRPC host, image file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

key, http_host, grpc_host, image = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
headers = {"authorization": f"Bearer {key}"}
found = {}


def build_inputs(package, **options):
    inputs = []
    for name, content in (("question", b"Is there a nodule?"), ("image", image.read_bytes())):
        tensor = package.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], dtype=np.object_), **options)
        inputs.append(tensor)
    return inputs


def read_result(result):
    return {
        "answer": result.as_numpy("answer")[0].decode(),
        "confidence": float(result.as_numpy("confidence")[0]),
        "abstained": bool(result.as_numpy("abstained")[0]),
        "regions": len(json.loads(result.as_numpy("chain")[0])["regions"]),
    }


for kind, package, host in (("http", http_client, http_host), ("grpc", grpc_client, grpc_host)):
    client = package.InferenceServerClient(host)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("policy")
    metadata = client.get_model_metadata("policy", headers=dict(headers))
    names = [output["name"] for output in metadata["outputs"]] if kind == "http" else [o.name for o in metadata.outputs]
    found[f"{kind} outputs"] = names
    found[kind] = read_result(client.infer("policy", build_inputs(package), headers=dict(headers), request_id="17"))
    selected = [package.InferRequestedOutput("confidence"), package.InferRequestedOutput("answer")]
    result = client.infer("policy", build_inputs(package), outputs=selected, headers=dict(headers))
    found[f"{kind} selected"] = [result.as_numpy("answer")[0].decode(), result.as_numpy("chain") is None]
    client.close()

client = http_client.InferenceServerClient(http_host)
question = http_client.InferInput("question", [1], "BYTES")
question.set_data_from_numpy(np.array(["Is there a nodule?"], dtype=np.object_), binary_data=False)
picture = build_inputs(http_client)[1]
found["mixed"] = read_result(client.infer("policy", [question, picture], headers=dict(headers)))
try:
    client.infer("policy", build_inputs(http_client), headers=dict(headers), priority=1)
except http_client.InferenceServerException as error:
    found["refusal"] = error.message()
print(json.dumps(found))
