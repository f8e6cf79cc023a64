"""Strict parsing of compiled pipelines as the API servers of several releases of Kubeflow Pipelines do it.

kfp_protos/ holds the compiled pipeline_spec.proto of releases as the wheels kfp-pipeline-spec on PyPI contain it
(Apache-2.0). Several releases of that package cannot be imported into one process, so each descriptor gets a pool of
its own. `python -m tests.support.kfp_specs WHEEL ...` writes the files from wheels that `pip download` fetched.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.rpc import status_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

FOLDER = Path(__file__).parent / "kfp_protos"
RELEASES = ("2.15.2", "2.16.1", "2.17.0")
INSTALLED = "installed"
NEEDED = ("any", "duration", "struct")  # of protobuf, which pipeline_spec.proto or status.proto imports


@cache
def load_message(release: str, name: str) -> Any:
    """Return the class of a message, such as PlatformSpec, as a release defines it. INSTALLED: of the environment."""
    if release == INSTALLED:
        return getattr(pipeline_spec_pb2, name)
    pool = descriptor_pool.DescriptorPool()
    needed = [descriptor_pool.Default().FindFileByName(f"google/protobuf/{one}.proto") for one in NEEDED]
    for file in (*needed, status_pb2.DESCRIPTOR):
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        pool.Add(proto)
    content = (FOLDER / f"pipeline_spec-{release}.binpb").read_bytes()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(content))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ml_pipelines.{name}"))


def parse_strictly(release: str, name: str, content: Any) -> Any:
    """Parse JSON into a message. Raises json_format.ParseError on any unknown field, as Go's protojson does."""
    return json_format.ParseDict(content, load_message(release, name)())


def choose_release(version: str) -> str:
    """Return the release whose messages a server of this version has; that of the newest for an unknown version."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    if numbers is None:
        return RELEASES[-1]
    minor = (int(numbers[1]), int(numbers[2]))
    known = [one for one in RELEASES if tuple(map(int, one.split(".")[:2])) <= minor]
    return known[-1] if known else RELEASES[0]


def read_document(release: str, documents: list[Any]) -> dict[str, Any]:
    """Return what a server stores of an uploaded pipeline: its spec, and the platform spec if it understood that.

    kubeflow/pipelines, backend/src/apiserver/template/v2_template.go at 2.15.0, 2.16.1 and 2.17.0: a document with
    pipelineInfo is the pipeline spec and parsed strictly; another is a platform spec if it can be parsed strictly and
    has settings for Kubernetes, and is ignored otherwise. Raises json_format.ParseError and ValueError.
    """
    stored: dict[str, Any] = {}
    for document in documents:
        if "pipelineInfo" in document:
            spec = parse_strictly(release, "PipelineSpec", document)
            stored["pipeline_spec"] = json_format.MessageToDict(spec)
            continue
        try:
            platform = parse_strictly(release, "PlatformSpec", document)
        except json_format.ParseError:
            continue
        if "kubernetes" in platform.platforms:
            stored["platform_spec"] = json_format.MessageToDict(platform)
    if "pipeline_spec" not in stored:
        raise ValueError("no pipeline spec is provided")
    return stored


def _write_descriptors(wheels: list[str]) -> None:
    for wheel in wheels:
        release = re.search(r"-(\d+\.\d+\.\d+)-", wheel)
        assert release is not None, wheel
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [one for one in archive.namelist() if one.endswith("pipeline_spec_pb2.py")]
            source = archive.read(name).decode()
        serialized = re.search(r"AddSerializedFile\((b(?:'|\").*(?:'|\"))\)", source)
        assert serialized is not None, wheel
        (FOLDER / f"pipeline_spec-{release[1]}.binpb").write_bytes(ast.literal_eval(serialized[1]))


if __name__ == "__main__":
    _write_descriptors(sys.argv[1:])
