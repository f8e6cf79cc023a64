"""The checks of Pod Security "restricted", on one pod, as an API server of Kubernetes 1.34 makes them.

The checks are those of policy/check_*.go in kubernetes/pod-security-admission v0.34.0, in their versions for 1.34.
Reasons and details are worded as there. Pods of Windows are not considered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Json = dict[str, Any]
Violation = tuple[str, str]  # (reason, detail)
VOLUMES = frozenset(  # restrictedVolumes
    (
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    )
)
SELINUX_TYPES = frozenset(("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"))
SYSCTLS = frozenset(
    (
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_wmem",
    )
)
APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def explain_denial(pod: Json, annotations: dict[str, str] | None = None) -> str:
    """Return what the API server answers for a pod spec, without the pod's name, or "" if it is admitted."""
    found = [violation for check in CHECKS for violation in check(pod)]
    found += _check_apparmor_annotations(annotations or {})
    if not found:
        return ""
    return 'violates PodSecurity "restricted:latest": ' + ", ".join(f"{reason} ({detail})" for reason, detail in found)


def list_containers(pod: Json) -> list[Json]:
    return [*pod.get("initContainers", ()), *pod["containers"], *pod.get("ephemeralContainers", ())]


def _security(part: Json) -> Json:
    found: Json = part.get("securityContext") or {}
    return found


def _name_containers(names: Sequence[str]) -> str:
    return f"{'container' if len(names) == 1 else 'containers'} {_quote(names)}"


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _select(pod: Json, refused: Callable[[Json], bool]) -> list[str]:
    """Return the names of the containers whose securityContext is refused."""
    return [one["name"] for one in list_containers(pod) if refused(_security(one))]


def _check_host(pod: Json) -> Iterator[Violation]:
    if shared := [f"{key}=true" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]:
        yield "host namespaces", ", ".join(shared)
    for one in list_containers(pod):
        if [port for port in one.get("ports", ()) if port.get("hostPort")]:
            yield "hostPort", _name_containers([one["name"]])
        probes = [one.get(f"{kind}Probe") or {} for kind in ("liveness", "readiness", "startup")]
        probes += [(one.get("lifecycle") or {}).get(kind) or {} for kind in ("postStart", "preStop")]
        if [probe for probe in probes for kind in ("httpGet", "tcpSocket") if (probe.get(kind) or {}).get("host")]:
            yield "probe or lifecycle host", _name_containers([one["name"]])


def _check_privileged(pod: Json) -> Iterator[Violation]:
    if names := _select(pod, lambda own: own.get("privileged") is True):
        yield "privileged", f"{_name_containers(names)} must not set securityContext.privileged=true"


def _check_proc_mount(pod: Json) -> Iterator[Violation]:
    if names := _select(pod, lambda own: own.get("procMount", "Default") != "Default"):
        yield "procMount", f"{_name_containers(names)} must not set securityContext.procMount"


def _check_profiles(pod: Json) -> Iterator[Violation]:
    """SELinux, AppArmor (fields) and sysctls."""
    for name, own in [("pod", _security(pod)), *((one["name"], _security(one)) for one in list_containers(pod))]:
        selinux = own.get("seLinuxOptions") or {}
        if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
            yield "seLinuxOptions", name
        if (own.get("appArmorProfile") or {"type": "Localhost"})["type"] not in ("RuntimeDefault", "Localhost"):
            yield "forbidden AppArmor profile", name
    if names := [one["name"] for one in _security(pod).get("sysctls", ()) if one["name"] not in SYSCTLS]:
        yield "forbidden sysctls", ", ".join(names)


def _check_apparmor_annotations(annotations: dict[str, str]) -> list[Violation]:
    allowed = ("runtime/default", "localhost/")
    mine = {key: value for key, value in annotations.items() if key.startswith(APPARMOR_ANNOTATION)}
    return [
        ("forbidden AppArmor profile", key) for key, value in mine.items() if value and not value.startswith(allowed)
    ]


def _check_windows(pod: Json) -> Iterator[Violation]:
    both = [_security(pod), *map(_security, list_containers(pod))]
    if any((own.get("windowsOptions") or {}).get("hostProcess") for own in both):
        yield "hostProcess", "securityContext.windowsOptions.hostProcess=true"


def _check_escalation(pod: Json) -> Iterator[Violation]:
    if names := _select(pod, lambda own: own.get("allowPrivilegeEscalation") is not False):
        detail = f"{_name_containers(names)} must set securityContext.allowPrivilegeEscalation=false"
        yield "allowPrivilegeEscalation != false", detail


def _check_capabilities(pod: Json) -> Iterator[Violation]:
    def keeps(own: Json) -> bool:
        return "ALL" not in ((own.get("capabilities") or {}).get("drop") or ())

    def adds(own: Json) -> bool:
        return bool(set((own.get("capabilities") or {}).get("add") or ()) - {"NET_BIND_SERVICE"})

    details = []
    if names := _select(pod, keeps):
        details.append(f'{_name_containers(names)} must set securityContext.capabilities.drop=["ALL"]')
    if names := _select(pod, adds):
        details.append(f"{_name_containers(names)} must not include more in securityContext.capabilities.add")
    if details:
        yield "unrestricted capabilities", "; ".join(details)


def _check_volumes(pod: Json) -> Iterator[Violation]:
    kinds = {one["name"]: set(one) - {"name"} for one in pod.get("volumes", ())}
    if names := [name for name, kind in kinds.items() if not kind & VOLUMES]:
        used = sorted(kind for name in names for kind in kinds[name])
        yield "restricted volume types", f"volumes {_quote(names)} use restricted volume types {_quote(used)}"


def _check_user(pod: Json) -> Iterator[Violation]:
    reason = "runAsNonRoot != true"
    pod_value = _security(pod).get("runAsNonRoot")
    explicit = _select(pod, lambda own: own.get("runAsNonRoot") is False)
    missing = _select(pod, lambda own: own.get("runAsNonRoot") is None)
    if explicit or pod_value is False:
        setters = [*(["pod"] if pod_value is False else []), *([_name_containers(explicit)] if explicit else [])]
        yield reason, f"{' and '.join(setters)} must not set securityContext.runAsNonRoot=false"
    elif missing and pod_value is not True:
        yield reason, f"pod or {_name_containers(missing)} must set securityContext.runAsNonRoot=true"
    roots = [*(["pod"] if _security(pod).get("runAsUser") == 0 else [])]
    if names := _select(pod, lambda own: own.get("runAsUser") == 0):
        roots.append(_name_containers(names))
    if roots:
        yield "runAsUser=0", f"{' and '.join(roots)} must not set runAsUser=0"


def _check_seccomp(pod: Json) -> Iterator[Violation]:
    def read_type(own: Json) -> str | None:
        return (own.get("seccompProfile") or {}).get("type")

    allowed = ("RuntimeDefault", "Localhost")
    wrong = _select(pod, lambda own: read_type(own) not in (None, *allowed))
    missing = _select(pod, lambda own: read_type(own) is None)
    of_pod = read_type(_security(pod))
    if wrong or of_pod not in (None, *allowed):
        yield (
            "seccompProfile",
            f"pod or {_name_containers(wrong)} must not set another securityContext.seccompProfile.type",
        )
    elif missing and of_pod is None:
        wanted = 'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        yield "seccompProfile", f"pod or {_name_containers(missing)} must set {wanted}"


# the baseline's checks, then those of "restricted", in the order of an API server's message
CHECKS: tuple[Callable[[Json], Iterator[Violation]], ...] = (
    _check_host,
    _check_privileged,
    _check_proc_mount,
    _check_profiles,
    _check_windows,
    _check_escalation,
    _check_capabilities,
    _check_volumes,
    _check_user,
    _check_seccomp,
)
