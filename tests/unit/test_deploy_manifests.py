"""deploy/: what is installed asks for no more than is argued there, and names what the program
names.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import services, settings
from agent.admission import keeper
from agent.model import access, jobset, optin, storage
from tests.cluster.cluster import cache_directory

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy/daemonset"
OVERLAYS = sorted(path.name for path in (ROOT / "deploy/overlays").iterdir())

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def base() -> list[Object]:
    (kustomization,) = documents(BASE / "kustomization.yaml")
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    return [found for name in kustomization["resources"] for found in documents(BASE / name)]


def kubectl() -> str:
    found = shutil.which("kubectl", path=f"{os.environ['PATH']}:{cache_directory() / 'bin'}")
    if not found:
        pytest.skip("needs kubectl: tests/cluster/build compiles it")
    return found


def rendered(folder: str) -> list[Object]:
    return copy.deepcopy(_rendered(folder))


@functools.cache
def _rendered(folder: str) -> list[Object]:
    done = subprocess.run(
        [kubectl(), "kustomize", str(ROOT / "deploy" / folder)], capture_output=True, check=True
    )
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def daemonset(objects: list[Object]) -> Object:
    return one(objects, "DaemonSet", "ckpt-agent-node")


def pod(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def node(objects: list[Object]) -> Object:
    (container,) = pod(daemonset(objects))["containers"]
    found: Object = container
    return found


def workloads(objects: list[Object]) -> Iterator[Object]:
    return (o for o in objects if o["kind"] in ("DaemonSet", "Deployment"))


def argued(text: str, item: str) -> list[str]:
    """The lines of list items like ``item`` that no comment stands before."""
    lines = text.splitlines()
    return [
        line.strip()
        for above, line in itertools.pairwise(lines)
        if re.fullmatch(item, line) and not above.strip().startswith("#")
    ]


# --- rights at the API server ---


def test_the_agents_rights_are_these_and_no_others() -> None:
    objects = base()
    rules = one(objects, "ClusterRole", "ckpt-agent-node")["rules"]
    assert {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } == {
        ("", "pods", "list"),
        ("", "pods", "watch"),
        ("", "namespaces", "get"),
        ("", "nodes/checkpoint", "create"),
        ("events.k8s.io", "events", "create"),
        ("authentication.k8s.io", "tokenreviews", "create"),
        ("authorization.k8s.io", "subjectaccessreviews", "create"),
    }
    bound = [
        (o["kind"], o["metadata"].get("namespace"), o["roleRef"]["kind"], o["roleRef"]["name"])
        for o in objects
        if o["kind"].endswith("RoleBinding")
        and any(subject["name"] == "ckpt-agent-node" for subject in o["subjects"])
    ]
    assert sorted(bound, key=str) == [
        ("ClusterRoleBinding", None, "ClusterRole", "ckpt-agent-node"),
        ("RoleBinding", "kube-system", "Role", "extension-apiserver-authentication-reader"),
    ]


def test_nobody_is_given_everything_of_something() -> None:
    for found in base():
        for rule in found.get("rules", ()) if found["kind"].endswith("Role") else ():
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            assert not {"nodes/proxy", "pods/exec", "pods/attach"} & set(rule["resources"])
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
            if "secrets" in rule["resources"]:
                # By name; only a creation cannot be.
                assert found["kind"] == "Role"
                assert found["metadata"]["name"] == "ckpt-agent-admission"
                assert rule["verbs"] == ["create"] or rule["resourceNames"]


def test_the_coordinators_rights_are_these_and_no_others() -> None:
    objects = base()

    def granted(kind: str) -> set[tuple[str, str, str]]:
        return {
            (group, resource, verb)
            for rule in one(objects, kind, "ckpt-agent-coordinator")["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    assert granted("ClusterRole") == {
        *((access.API_GROUP, "images", verb) for verb in ("create", "get", "list", "restore")),
        ("", "pods", "list"),
        ("", "pods", "create"),
        *((jobset.API_GROUP, "jobsets", verb) for verb in ("get", "patch", "create", "delete")),
        ("", "nodes", "get"),
        ("authentication.k8s.io", "tokenreviews", "create"),
        ("authorization.k8s.io", "subjectaccessreviews", "create"),
    }
    assert granted("Role") == {
        *(("coordination.k8s.io", "leases", verb) for verb in ("create", "get", "update")),
        *(("", "configmaps", verb) for verb in ("create", "get", "list", "update", "delete")),
    }


def test_what_rbac_cannot_say_of_the_coordinator_a_policy_says() -> None:
    """Above all that the pods it may create are never made."""
    spec = one(base(), "ValidatingAdmissionPolicy", "ckpt-agent-coordinator")["spec"]
    assert spec["failurePolicy"] == "Fail"
    (condition,) = spec["matchConditions"]
    account = one(base(), "ServiceAccount", "ckpt-agent-coordinator")["metadata"]
    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert condition["expression"] == f'request.userInfo.username == "{user}"'
    writes = {
        (resource, operation)
        for rule in spec["matchConstraints"]["resourceRules"]
        for resource in rule["resources"]
        for operation in rule["operations"]
    }
    assert writes == {
        ("pods", "CREATE"),
        *(("configmaps", operation) for operation in ("CREATE", "UPDATE", "DELETE")),
        *(("jobsets", operation) for operation in ("CREATE", "UPDATE", "DELETE")),
    }
    bound = one(base(), "ValidatingAdmissionPolicyBinding", "ckpt-agent-coordinator")["spec"]
    assert bound["policyName"] == "ckpt-agent-coordinator"
    assert bound["validationActions"][0] == "Deny"


@pytest.mark.parametrize("file", ["rbac.yaml", "coordinator.yaml"])
def test_every_rule_is_argued(file: str) -> None:
    assert argued((BASE / file).read_text(), r"  - apiGroups: .*") == []


def test_restore_is_nobodys_by_default_and_a_right_of_its_own() -> None:
    roles = [o for o in base() if o["kind"] == "ClusterRole"]
    givers = {}
    for role in roles:
        for rule in role["rules"]:
            if access.API_GROUP in rule["apiGroups"]:
                givers[role["metadata"]["name"]] = (
                    sorted(rule["verbs"]),
                    [key for key in role["metadata"]["labels"] if "aggregate-to" in key],
                )
    edit = "rbac.authorization.k8s.io/aggregate-to-edit"
    admin = "rbac.authorization.k8s.io/aggregate-to-admin"
    assert givers == {
        "ckpt-agent-user": (["create", "delete", "get", "list"], [edit, admin]),
        "ckpt-agent-restorer": (["restore"], []),
        "ckpt-agent-exporter": (["export"], []),
        "ckpt-agent-operator": (["get"], []),
        # Nobody's but the coordinator's own, which asks what its callers may.
        "ckpt-agent-coordinator": (["create", "get", "list", "restore"], []),
    }


# --- rights on the node ---


def test_the_agent_is_not_privileged_and_shares_only_pids_with_the_node() -> None:
    spec = pod(daemonset(base()))
    assert spec["hostPID"] is True
    assert not {"hostNetwork", "hostIPC", "shareProcessNamespace"} & set(spec)
    security = node(base())["securityContext"]
    assert "privileged" not in security
    assert security["capabilities"]["drop"] == ["ALL"]
    assert "ALL" not in security["capabilities"]["add"]
    assert len(set(security["capabilities"]["add"])) == len(security["capabilities"]["add"])


def test_every_root_file_system_is_read_only() -> None:
    for workload in workloads(base()):
        spec = pod(workload)
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_service_without_a_node_has_no_privileges_on_it() -> None:
    for workload in workloads(base()):
        if workload["kind"] != "Deployment":
            continue
        spec = pod(workload)
        assert not {"hostPID", "hostNetwork", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
        (budget,) = [
            o
            for o in base()
            if o["kind"] == "PodDisruptionBudget"
            and o["spec"]["selector"] == workload["spec"]["selector"]
        ]
        assert budget["spec"]["minAvailable"] < workload["spec"]["replicas"]


def test_every_mount_is_argued_and_every_volume_mounted() -> None:
    text = (BASE / "daemonset.yaml").read_text()
    mounts = text[text.index("volumeMounts:") : text.index("\n      volumes:")]
    assert argued(mounts, r"            - name: .*") == []
    spec = pod(daemonset(base()))
    mounted = {mount["name"] for mount in node(base())["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


# What a runtime gives a container that asks for nothing (containerd's and CRI-O's common default).
DEFAULT_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
    *("NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}


def test_every_capability_beyond_a_containers_default_is_argued() -> None:
    added = set(node(base())["securityContext"]["capabilities"]["add"])
    # A restored process can only be given back what the agent has.
    assert added > DEFAULT_CAPABILITIES
    text = (BASE / "daemonset.yaml").read_text()
    listed = text[text.index("              add:") : text.index("terminationMessagePolicy")]
    bare = {line.removeprefix("- ") for line in argued(listed, r"                - [A-Z_]+")}
    assert bare < DEFAULT_CAPABILITIES


def test_no_path_of_the_node_gives_away_its_identity() -> None:
    spec = pod(daemonset(base()))
    paths = {v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
    assert paths == {
        "/etc/criu",
        "/run/containerd",
        "/run/ckpt-agent",
        "/sys/fs/cgroup",
        "/var/lib/ckpt-agent/work",
        "/var/lib/containerd",
        "/var/lib/kubelet/checkpoints",
    }
    writable = {m["mountPath"] for m in node(base())["volumeMounts"] if not m.get("readOnly")}
    assert not writable & {"/run/containerd", "/var/lib/containerd", "/etc/ckpt-agent/tls"}


def test_the_store_is_the_agents_alone() -> None:
    users = [
        workload["metadata"]["name"]
        for workload in workloads(base())
        for volume in pod(workload).get("volumes", ())
        if "persistentVolumeClaim" in volume
    ]
    assert users == ["ckpt-agent-node"]


def test_a_memory_limit_never_kills_criu_inside_a_job() -> None:
    assert "limits" not in node(base())["resources"]
    assert pod(daemonset(base()))["priorityClassName"] == "system-node-critical"


# --- one name for one thing ---


def test_the_manifests_mean_what_the_program_means() -> None:
    default = settings.Settings()
    objects = base()
    found = daemonset(objects)
    spec, container = pod(found), node(objects)
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert default.agent_selector in [f"{key}={value}" for key, value in labels.items()]
    assert {o["metadata"].get("namespace", default.agent_namespace) for o in objects} == {
        default.agent_namespace,
        "kube-system",
    }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "token": default.token_port,
        "certificate": default.certificate_port,
        "probe": default.probe_port,
    }
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {default.store.path, default.work_dir, default.tls_dir} <= mounts
    assert posixpath.dirname(default.runtime_socket) in mounts
    assert spec["terminationGracePeriodSeconds"] > default.shutdown_grace_s
    for variable in container["env"]:
        assert variable["name"].removeprefix("CKPT_AGENT_").lower() in settings.KEYS


def test_the_coordinators_manifest_means_what_the_program_means() -> None:
    default = settings.Settings()
    objects = base()
    found = one(objects, "Deployment", "ckpt-agent-coordinator")
    (container,) = pod(found)["containers"]
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert default.coordinator_selector in [f"{key}={value}" for key, value in labels.items()]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {default.tls_dir}
    (volume,) = pod(found)["volumes"]
    assert volume["secret"]["secretName"] == keeper.LEAF_NAME
    assert pod(found)["terminationGracePeriodSeconds"] > default.shutdown_grace_s
    account = one(objects, "ServiceAccount", pod(found)["serviceAccountName"])["metadata"]
    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert user == services.COORDINATOR.format(default.agent_namespace)
    service = one(objects, "Service", "ckpt-agent-coordinator")
    assert service["spec"]["clusterIP"] == "None", "callers look which replica serves"
    assert f"{service['metadata']['name']}.{default.agent_namespace}.svc" in keeper.names(
        default.agent_namespace
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == {
        name: ports[name] for name in ("token", "certificate")
    }


def test_services_and_accounts_are_there() -> None:
    objects = base()
    for workload in workloads(objects):
        account = pod(workload)["serviceAccountName"]
        assert one(objects, "ServiceAccount", account)
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
        service = one(objects, "Service", workload["metadata"]["name"])
        assert service["spec"]["selector"].items() <= labels.items()
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        names = {p["name"] for c in pod(workload)["containers"] for p in c["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_policy_knows_the_keys_that_the_program_knows() -> None:
    policy = yaml.safe_dump(one(base(), "ValidatingAdmissionPolicy", "ckpt-agent-keys"))
    known = {
        *(optin.RESTORE, optin.CONTAINERS, optin.ENTRYPOINT, optin.STORAGE),
        *(optin.NOT_HELD, optin.HOOKS, optin.LABEL),
    }
    mentioned = set(re.findall(r"ckpt-agent\.dev/[a-z-]+", policy))
    assert mentioned == known
    reserved = yaml.safe_dump(one(base(), "ValidatingAdmissionPolicy", "ckpt-agent-restore"))
    assert set(re.findall(r"ckpt-agent\.dev/[a-z-]+", reserved)) == {optin.RESTORE}
    assert (
        one(base(), "ValidatingAdmissionPolicy", "ckpt-agent-restore")["spec"]["failurePolicy"]
        == "Fail"
    )


def test_hooks_of_a_pod_are_changed_by_nobody_who_may_not_exec() -> None:
    spec = one(base(), "ValidatingAdmissionPolicy", "ckpt-agent-hooks")["spec"]
    assert spec["failurePolicy"] == "Fail"
    assert set(re.findall(r"ckpt-agent\.dev/[a-z-]+", yaml.safe_dump(spec))) == {optin.HOOKS}
    (rule,) = spec["matchConstraints"]["resourceRules"]
    # Annotations change through the status as well.
    assert set(rule["resources"]) == {"pods", "pods/status"}
    bound = one(base(), "ValidatingAdmissionPolicyBinding", "ckpt-agent-hooks")["spec"]
    assert (bound["policyName"], bound["validationActions"][0]) == ("ckpt-agent-hooks", "Deny")


def test_the_namespace_admits_what_the_agents_need() -> None:
    labels = one(base(), "Namespace", "ckpt-agent")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


def test_the_image_carries_what_pods_and_agents_look_for() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"ENV home={posixpath.dirname(optin.HOLD_IN_IMAGE)}\n" in text
    assert f'hold/build "/made$home/{posixpath.basename(optin.HOLD_IN_IMAGE)}"' in text
    final = text[text.rindex("\nFROM ") :]
    assert not re.search(r"gcc|musl|pip|-dev\b", final)
    assert "USER" not in final


# --- overlays and components ---


def test_the_base_renders_as_it_is_written() -> None:
    assert sorted((o["kind"], o["metadata"]["name"]) for o in rendered("daemonset")) == sorted(
        (o["kind"], o["metadata"]["name"]) for o in base()
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_only_workloads(overlay: str) -> None:
    def others(objects: list[Object]) -> list[str]:
        return [yaml.safe_dump(o) for o in objects if o not in list(workloads(objects))]

    assert others(rendered(f"overlays/{overlay}")) == others(rendered("daemonset"))


def test_dev_lacks_only_what_its_nodes_lack() -> None:
    plain, dev = node(rendered("daemonset")), node(rendered("overlays/dev"))
    lost = set(plain["securityContext"]["capabilities"]["add"]) - set(
        dev["securityContext"]["capabilities"]["add"]
    )
    assert lost == {"SYS_RESOURCE"}
    assert set(dev["securityContext"]["capabilities"]["add"]) < set(
        plain["securityContext"]["capabilities"]["add"]
    )
    for workload in workloads(rendered("overlays/dev")):
        assert {c["imagePullPolicy"] for c in pod(workload)["containers"]} == {"Never"}
    dev["securityContext"]["capabilities"] = plain["securityContext"]["capabilities"]
    del dev["imagePullPolicy"]
    assert dev == plain


def test_privileged_is_the_one_overlay_that_is() -> None:
    for overlay in OVERLAYS:
        security = node(rendered(f"overlays/{overlay}"))["securityContext"]
        assert security.get("privileged", False) is (overlay == "privileged")
        assert security["readOnlyRootFilesystem"] is True


def test_a_second_store_is_a_claim_a_mount_and_a_setting(tmp_path: Path) -> None:
    copy_of = tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", copy_of)
    overlay = copy_of / "overlays/both"
    overlay.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../dev"],
        "components": ["../../components/second-store"],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(
        [kubectl(), "kustomize", str(overlay)], capture_output=True, check=True, text=True
    )
    objects = [found for found in yaml.safe_load_all(done.stdout) if found]
    (variable,) = [e for e in node(objects)["env"] if e["name"] == "CKPT_AGENT_STORES"]
    said = settings.merge({}, {variable["name"]: variable["value"]}, None, cwd="/")
    places = storage.configured(said.store.path, said.stores)
    assert set(places) == {"default", "fast"}
    mounts = {mount["mountPath"]: mount for mount in node(objects)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(daemonset(objects))["volumes"]}
    claims = [
        volumes[mounts[path]["name"]]["persistentVolumeClaim"]["claimName"]
        for path in places.values()
    ]
    assert len(set(claims)) == 2
    for claim in claims:
        found = one(objects, "PersistentVolumeClaim", claim)
        assert found["spec"]["accessModes"] == ["ReadWriteMany"]
    # Nothing else has changed.
    before = rendered("overlays/dev")
    assert len(node(objects)["env"]) == len(node(before)["env"]) + 1
    assert len(objects) == len(before) + 1


def test_cri_o_nodes_need_nothing_of_containerd() -> None:
    text = yaml.safe_dump(pod(daemonset(rendered("overlays/cri-o"))))
    paths = {m["mountPath"] for m in node(rendered("overlays/cri-o"))["volumeMounts"]}
    assert {"/run/crio", "/var/lib/containers/storage"} <= paths
    assert "containerd" not in text
