"""Accounts and Roles can be another's: none is created then, and every pod refers to the accounts that are named."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.chart.permissions import ACCOUNTS, RBAC_KINDS, granted
from tests.chart.rendering import CHART, PROFILES, Json, of_kind, pods, rendered, settings_of, template

NAMES = {which: f"team-{which}" for which in ACCOUNTS}
NAMED = ("--set-json", f"serviceAccounts.names={json.dumps(NAMES)}")
EXISTING = (*NAMED, "--set", "serviceAccounts.create=false")
EVERYTHING = (
    *("--set", "server.first.enabled=true,server.first.checkpoint=assets/policy,monitoring.serviceMonitor=true"),
    *("--set", "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany"),
    *("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]'),
)


def list_references(objects: tuple[Json, ...]) -> set[str]:
    """Return the accounts of all pods and of those that runs, rollouts and TrainJobs make."""
    settings = {name: yaml.safe_load(text) for name, text in settings_of(objects).items()}
    found = {pod["serviceAccountName"] for _, pod in pods(objects)}
    found |= {settings["cluster.yaml"]["service_account"], settings["service.yaml"]["service_account"]}
    return found | {settings["launch.yaml"].get("job", {}).get("service_account", "")} - {""}


@pytest.mark.parametrize("profile", PROFILES)
def test_existing_accounts_are_used_everywhere(profile: str) -> None:
    objects = rendered(profile, *EVERYTHING, *EXISTING)
    assert of_kind(objects, "ServiceAccount") == []
    expected = set(NAMES.values()) - ({"team-bucket"} if profile == "production" else set())
    assert list_references(objects) == expected


def test_created_accounts_may_have_names_of_ones_own() -> None:
    objects = rendered("trial", *EVERYTHING, *NAMED)
    created = {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}
    assert created == list_references(objects) == set(NAMES.values())


@pytest.mark.parametrize("flags", [NAMED, EXISTING], ids=["created", "existing"])
def test_bindings_follow_the_names(flags: tuple[str, ...]) -> None:
    """Each account has the same permissions under its other name, and the Roles keep their names."""
    multi_user = ("--set", "kfp.multiUser=true")
    usual, named = rendered("trial", *EVERYTHING, *multi_user), rendered("trial", *EVERYTHING, *multi_user, *flags)
    for which, name in NAMES.items():
        assert granted(named, name) == granted(usual, f"clincot-{which}")
        assert granted(named, f"clincot-{which}") == set()
    roles = [
        {(one["kind"], one["metadata"]["name"]) for one in all_ if "Role" in one["kind"]} for all_ in (usual, named)
    ]
    assert roles[0] == roles[1]


def test_one_existing_account_may_do_everything() -> None:
    """Only accounts that the chart creates need different names; a binding names it once."""
    names = json.dumps(dict.fromkeys(ACCOUNTS, "platform"))
    flags = (
        "--set",
        "serviceAccounts.create=false,kfp.runNamespace=clincot",
        "--set-json",
        f"serviceAccounts.names={names}",
    )
    objects = rendered("trial", *EVERYTHING, *flags)
    assert list_references(objects) == {"platform"}
    for binding in (*of_kind(objects, "RoleBinding"), *of_kind(objects, "ClusterRoleBinding")):
        subjects = [json.dumps(one, sort_keys=True) for one in binding["subjects"]]
        assert len(subjects) == len(set(subjects)), binding["metadata"]["name"]


@pytest.mark.parametrize("profile", PROFILES)
def test_without_rbac_no_role_or_binding_is_rendered(profile: str) -> None:
    """All else is rendered as before."""
    usual = rendered(profile, *EVERYTHING)
    without = rendered(profile, *EVERYTHING, "--set", "rbac.create=false")
    assert [one for one in usual if one["kind"] not in RBAC_KINDS] == list(without)
    assert {one["kind"] for one in usual} >= set(RBAC_KINDS)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            "serviceAccounts.create=false",
            "serviceAccounts.create is false, so set serviceAccounts.names to existing accounts for deployer (in "
            "clincot), runner (in kubeflow), scheduler (in clincot), server (in clincot)",
        ),
        (
            "serviceAccounts.names.server=clincot-deployer",
            "serviceAccounts.names: deployer and server are both clincot-deployer in the namespace clincot, which "
            "would be created twice; expected two names, or serviceAccounts.create=false",
        ),
        (
            "serviceAccounts.names.server=default",
            "serviceAccounts.names.server is default, the account of every pod that names none; expected an account of "
            "its own",
        ),
        (
            "serviceAccounts.create=false,serviceAccounts.annotations.server.role=x",
            "serviceAccounts.annotations.server is set, but the chart creates no account with "
            "serviceAccounts.create=false; annotate the existing one instead",
        ),
        (
            "rbac.create=false,kfp.extraClusterRole=more",
            "kfp.extraClusterRole is more, but the chart binds no role with rbac.create=false; bind it yourself "
            "instead",
        ),
    ],
)
def test_names_that_cannot_work_are_refused_with_a_sentence(values: str, sentence: str) -> None:
    done = template("--set", f"store.existingSecret=s3,{values}")
    assert done.returncode != 0
    assert f"- {sentence}\n" in done.stderr


def test_the_same_name_in_two_namespaces_is_two_accounts() -> None:
    names = "serviceAccounts.names.runner=platform,serviceAccounts.names.server=platform"
    accounts = of_kind(rendered("default", "--set", names), "ServiceAccount", "platform")
    assert {one["metadata"]["namespace"] for one in accounts} == {"kubeflow", "clincot"}


def test_every_account_is_described() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["serviceAccounts"]
    assert list(values["names"]) == list(values["annotations"]) == list(ACCOUNTS)
