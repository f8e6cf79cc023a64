"""Stores without keys, proxies, cluster domains, IPv6 and addresses of models, in every object of a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from tests.chart.rendering import SHIPPED, containers, joined, of_kind, pods, rendered, settings_of, template

IDENTITY = ("--set", "store.existingSecret=,store.workloadIdentity=true")
ROLE = "eks\\.amazonaws\\.com/role-arn"
ACCOUNTS = ("runner", "deployer", "server", "scheduler", "store")


def test_identities_replace_keys() -> None:
    """No pod, run or account refers to a Secret with keys; every account takes the cloud's annotation."""
    roles = ",".join(f"serviceAccounts.annotations.{name}.{ROLE}=arn:{name}" for name in ACCOUNTS)
    objects = rendered("production", *IDENTITY, "--set", roles)
    assert "AWS_ACCESS_KEY_ID" not in yaml.safe_dump_all(objects)
    assert not of_kind(objects, "Secret", "clincot-store")
    accounts = {one["metadata"]["name"]: one for one in of_kind(objects, "ServiceAccount")}
    for name in ACCOUNTS:
        account = accounts[f"clincot-{name}"]
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] == f"arn:{name}"
        assert "secrets" not in account
    both = template("--set", "store.existingSecret=s3,store.workloadIdentity=true")
    assert "store.workloadIdentity needs no keys" in both.stderr


def test_every_account_takes_annotations() -> None:
    """Also those of the trial's store and of the nodes of a TrainJob."""
    switches = "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany,monitoring.serviceMonitor=true"
    names = ("runner", "deployer", "server", "scheduler", "store", "bucket", "trainer")
    roles = ",".join(f"serviceAccounts.annotations.{name}.{ROLE}=arn:{name}" for name in names)
    accounts = of_kind(rendered("trial", "--set", switches, "--set", roles), "ServiceAccount")
    found = {one["metadata"]["name"]: one["metadata"].get("annotations", {}) for one in accounts}
    own = {f"clincot-{name}": {"eks.amazonaws.com/role-arn": f"arn:{name}"} for name in names}
    assert own.items() <= found.items()
    without = {name for name, annotations in found.items() if not annotations}
    assert without <= {"clincot-seaweedfs"}  # a server, which calls no cloud


def test_kserve_knows_the_stores_address_before_its_first_pod() -> None:
    """From the ClusterStorageContainer that judges and policy name; annotations of a Secret might come too late."""
    objects = rendered("production")
    (container,) = of_kind(objects, "ClusterStorageContainer")
    env = {one["name"]: one["value"] for one in container["spec"]["container"]["env"]}
    assert (env["AWS_ENDPOINT_URL"], env["AWS_DEFAULT_REGION"]) == ("https://s3.hospital.example", "eu-central-1")
    name = container["metadata"]["name"]
    judges = of_kind(objects, "InferenceService")
    assert {one["spec"]["predictor"]["storageContainerName"] for one in judges} == {name}
    assert yaml.safe_load(settings_of(objects)["service.yaml"])["storage_container"] == name


def test_keys_of_an_existing_secret_have_any_name() -> None:
    names = "store.secretKeys.accessKey=username,store.secretKeys.secretKey=password"
    objects = rendered("production", "--set", names)
    (secret, *_) = yaml.safe_load(settings_of(objects)["cluster.yaml"])["secrets"]
    assert secret["env"] == {"username": "AWS_ACCESS_KEY_ID", "password": "AWS_SECRET_ACCESS_KEY"}
    for name, pod in pods(objects):
        for container in containers(pod):
            keys = [one for one in container.get("env", ()) if "ACCESS_KEY" in one["name"]]
            if container["name"] != "storage-initializer":  # KServe's
                assert {one["valueFrom"]["secretKeyRef"]["key"] for one in keys} <= {"username", "password"}, name


def test_the_proxy_is_not_asked_for_the_clusters_own_names() -> None:
    """Short names of Services and the API server's address, which Kubernetes fills in, are excepted everywhere."""
    objects = rendered("production", "--set", "proxy.https=http://proxy.hospital.example:3128")
    settings = settings_of(objects)
    excepted = {yaml.safe_load(settings["cluster.yaml"])["env"]["NO_PROXY"]}
    excepted.add(yaml.safe_load(settings["service.yaml"])["proxies"]["NO_PROXY"])
    for name, pod in pods(objects):
        variables = [{one["name"]: one.get("value") for one in container["env"]} for container in containers(pod)]
        assert all(one["HTTPS_PROXY"] == "http://proxy.hospital.example:3128" for one in variables), name
        excepted |= {str(one["NO_PROXY"]) for one in variables}
    (only,) = excepted
    assert {".svc", ".kubeflow", ".clincot", ".clincot-runs", "$(KUBERNETES_SERVICE_HOST)"} <= set(only.split(","))


@pytest.mark.parametrize("keys", ["store.existingSecret=s3", "store.existingSecret=,store.workloadIdentity=true"])
def test_the_private_ca_reaches_every_client(keys: str, tmp_path: Path) -> None:
    """KServe's download of a model too: the pods have the volume that the ClusterStorageContainer mounts.

    KServe merges its environment and mounts into the container (CommonStorageInitialization of kserve/kserve@aaac4e2),
    and boto3 and Hugging Face's client read these variables. With a runtime of one's own, judges bring the volume.
    """
    objects = rendered("production", "--set", f"customCA.configMap=ca,server.first.enabled=true,{keys}")
    (tmp_path / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    policy = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")
    found = [*pods(objects), ("policy", joined(policy["spec"]["predictor"], objects))]
    assert {name.partition(" ")[0] for name, _ in found} == {"Deployment", "InferenceService", "Job", "Pod", "policy"}
    for name, pod in found:
        assert {"name": "ca", "configMap": {"name": "ca"}} in pod["volumes"], name
        for container in containers(pod):
            env = {one["name"]: one.get("value") for one in container["env"]}
            trusted = {env.get(key) for key in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")}
            front = container["name"] == "transformer-container"  # it reads no store
            assert trusted - ({None} if front else set()) == {"/etc/clincot/ca/cabundle.crt"}, (name, container["name"])
            mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
            assert mounts["/etc/clincot/ca"] == "ca", (name, container["name"])
    own = rendered("production", "--set", "customCA.configMap=ca,servingRuntime.create=false,servingRuntime.name=mine")
    for judge in of_kind(own, "InferenceService"):
        assert {"name": "ca", "configMap": {"name": "ca"}} in judge["spec"]["predictor"]["volumes"]


def test_nothing_switches_the_check_of_certificates_off() -> None:
    """A switch for KServe's download would not reach the program's own clients; a private CA reaches all."""
    for value in ("store.verifyTLS=false", "customCA.verify=false"):
        done = template("--set", f"store.existingSecret=s3,{value}")
        assert done.returncode == 1
        assert "Additional property" in done.stderr
    for profile in SHIPPED:
        objects = rendered(profile)
        (container,) = of_kind(objects, "ClusterStorageContainer")
        env = {one["name"]: one["value"] for one in container["spec"]["container"]["env"]}
        assert env["S3_VERIFY_SSL"] == "1"
        for secret in of_kind(objects, "Secret", "clincot-store"):
            assert secret["metadata"]["annotations"]["serving.kserve.io/s3-verifyssl"] == "1"


def test_the_domain_of_the_cluster_is_a_value() -> None:
    domain = ("--set", "clusterDomain=corp.internal", "--set", "proxy.https=http://proxy:3128")
    for profile in ("trial", "production"):
        text = yaml.safe_dump_all(rendered(profile, *domain))
        assert "svc.corp.internal" in text
        assert "cluster.local" not in text


def test_servers_listen_on_ipv6() -> None:
    flags = ("--set", "listen=::", "--set", "monitoring.serviceMonitor=true")
    judge = ("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]')
    for engine in ("server.engine=vllm,server.gpus=1", "server.engine=clincot"):
        text = yaml.safe_dump_all(rendered("trial", *flags, *judge, "--set", engine))
        assert "0.0.0.0" not in text.replace("0.0.0.0/0", "")
        assert text.count("--host=::") >= 2


def test_models_come_from_every_kind_of_address() -> None:
    """KServe's storage initializer downloads s3, gs and hf; oci is an image and pvc a volume."""
    uris = {name: f"{name}://models/med" for name in ("s3", "gs", "hf", "oci", "pvc")}
    judges = [{"name": name, "modelUri": uri} for name, uri in uris.items()]
    objects = rendered("default", "--set-json", f"judges={json.dumps(judges)}")
    (container,) = of_kind(objects, "ClusterStorageContainer")
    prefixes = {one["prefix"] for one in container["spec"]["supportedUriFormats"]}
    for one in of_kind(objects, "InferenceService"):
        predictor = one["spec"]["predictor"]
        uri = predictor["model"]["storageUri"]
        downloaded = uri.partition("://")[0] in ("s3", "gs", "hf")
        assert ("storageContainerName" in predictor) is (uri in prefixes) is downloaded, uri
    assert len(of_kind(objects, "InferenceService")) == len(uris)
    assert template(
        "--set", "store.existingSecret=s3", "--set-json", 'judges=[{"name":"a","modelUri":"ftp://x"}]'
    ).stderr
