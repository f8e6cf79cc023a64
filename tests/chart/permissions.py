"""What the chart's Roles grant, read from rendered objects, and the page of docs/ that lists it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clincot.clients.kubernetes import Permission
from clincot.text import markdown_table
from tests.chart.rendering import Json, of_kind, rendered

RBAC_KINDS = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")


def granted(objects: Sequence[Json], account: str) -> set[Permission]:
    """Return the permissions that the bindings grant to an account.

    A rule without resource names has the name "".
    """
    roles = {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one for one in objects}
    out: set[Permission] = set()
    for binding in (*of_kind(objects, "RoleBinding"), *of_kind(objects, "ClusterRoleBinding")):
        if account not in {subject["name"] for subject in binding["subjects"]}:
            continue
        namespace = binding["metadata"].get("namespace", "")
        reference = binding["roleRef"]
        role = roles[reference["kind"], namespace if reference["kind"] == "Role" else "", reference["name"]]
        for rule in role["rules"]:
            out |= {
                Permission(verb, group, resource, namespace, name)
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for name in rule.get("resourceNames", [""])
            }
    return out


ACCOUNTS = {  # service account: (its pods, what it needs besides permissions)
    "runner": ("tasks of a run, and preflight of `helm test`", ""),
    "deployer": ("the rollout Job, and the question of `helm test`", ""),
    "server": (
        "the endpoint and the judges",
        "the store's Secret in its `secrets`, from which KServe reads the keys (not with `store.workloadIdentity`)",
    ),
    "scheduler": ("the hooks that upload the pipeline and keep its recurring run", ""),
    "store": ("the monitor and SeaweedFS", ""),
    "bucket": ("the hook that creates SeaweedFS's bucket", ""),
    "trainer": ("nodes of a TrainJob", "`automountServiceAccountToken: false`, which a TrainJob cannot set"),
}
NAMESPACES = {"runs": "of runs", "clincot": "of the release", "kserve": "of KServe", "": "the whole cluster"}
PLAIN = (
    "--set",
    "kfp.runNamespace=runs,pipeline.deploys=false,server.mode=blue-green,server.gatewayApi=no,kfp.defaultAccount.bind=false",
)
# value: flags that switch it on. Each is compared with the chart without any of them.
FEATURES = {
    "always": (),
    "`server.mode` or `server.gatewayApi` is `auto`": ("--set", "server.mode=auto"),
    "`pipeline.deploys`": ("--set", "pipeline.deploys=true"),
    "`pipeline.trainJobs`": ("--set", "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany"),
    "`kfp.multiUser`": ("--set", "kfp.multiUser=true"),
    "`seaweedfs.enabled`": (
        "--set",
        "seaweedfs.enabled=true,store.existingSecret=,store.accessKey=a,store.secretKey=b",
    ),
    "`monitoring.serviceMonitor`": ("--set", "monitoring.serviceMonitor=true"),
}


class Grant(NamedTuple):
    """The verbs that an account needs for one resource, and the value that makes it need them."""

    namespace: str
    group: str
    resource: str
    names: str  # "" means all
    verbs: str
    needed: str


def list_grants(account: str) -> Iterator[Grant]:
    """Yield what an account needs: always, and with each feature. The deployer's are not repeated for the runner."""
    before = granted(_render("always"), f"clincot-{account}")
    for feature in FEATURES:
        now = granted(_render(feature), f"clincot-{account}")
        new = now if feature == "always" else now - before
        if (account, feature) == ("runner", "`pipeline.deploys`"):
            assert new == granted(_render("always"), "clincot-deployer")
            continue
        yield from _group_permissions(new, feature)


def _render(feature: str) -> Sequence[Json]:
    return rendered("default", *PLAIN, *FEATURES[feature])


def _group_permissions(permissions: Iterable[Permission], needed: str) -> Iterator[Grant]:
    """Yield one grant for each resource: verbs that have the same objects together."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for one in sorted(permissions, key=lambda one: (one.namespace, one.group, one.resource, one.name, one.verb)):
        found.setdefault((one.namespace, one.group, one.resource, one.name), []).append(one.verb)
    for (namespace, group, resource, name), verbs in found.items():
        yield Grant(namespace, group, resource, name, ", ".join(verbs), needed)


def render_permission_tables() -> str:
    """Return the accounts and what each of them needs, in Markdown."""
    with_account = {account: _find_account(account) for account in ACCOUNTS}
    lines = [
        markdown_table(
            ["`serviceAccounts.names`", "namespace", "token in its pods", "its pods", "also needs"],
            [
                [f"`{account}`", NAMESPACES[one["metadata"]["namespace"]], _has_token(one), *ACCOUNTS[account]]
                for account, one in with_account.items()
            ],
        ),
        "",
    ]
    for account in ACCOUNTS:
        rows = [_render_row(grant) for grant in list_grants(account)]
        if account == "runner":
            rows.append(["", "", "all that the deployer may do", "", "", "`pipeline.deploys`"])
        lines += [f"## {account}", ""]
        if not rows:
            lines += ["It calls no API of Kubernetes.", ""]
            continue
        head = ["namespace", "API group", "resource", "objects", "verbs", "needed"]
        lines += [markdown_table(head, rows), ""]
    return "\n".join(lines)


def _find_account(account: str) -> Json:
    found = [of_kind(_render(feature), "ServiceAccount", f"clincot-{account}") for feature in FEATURES]
    return next(accounts[0] for accounts in found if accounts)


def _has_token(account: Json) -> str:
    return "yes" if account["automountServiceAccountToken"] else "no"


def _render_row(grant: Grant) -> list[str]:
    namespace = NAMESPACES[grant.namespace]
    # these names depend on the release and its values
    names = {
        "": "all",
        "runs": "the namespace",
        "clincot": "the namespace",
        "clincot-seaweedfs-0": "`FULLNAME-seaweedfs-0`",
        "mlpipeline-minio-artifact": "the value of `kfp.artifactSecret`",
    }
    cell = names.get(grant.names, f"`{grant.names}`")
    return [
        namespace,
        f"`{grant.group}`" if grant.group else "core",
        f"`{grant.resource}`",
        cell,
        grant.verbs,
        grant.needed,
    ]
