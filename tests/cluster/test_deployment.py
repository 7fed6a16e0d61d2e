"""What runs in the cluster has the rights that deploy/ argues for, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster, ClusterError

NAMESPACE = "ckpt-agent"
OVERLAY = Path(__file__).parents[2] / "deploy/overlays/dev/daemonset.yaml"
AGENT = f"system:serviceaccount:{NAMESPACE}:ckpt-agent-node"
# include/uapi/linux/capability.h, in the order of their numbers.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
    *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
    *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)


@pytest.fixture
def agent(cluster: Cluster, agents: None) -> str:
    """One of the agents' pods."""
    found = cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=ckpt-agent-node")
    assert len(found["items"]) == len(cluster.nodes)
    return str(found["items"][0]["metadata"]["name"])


def inside(cluster: Cluster, pod: str, *command: str) -> str:
    return cluster.kubectl("exec", "-n", NAMESPACE, pod, "-c", "node", "--", *command)


def may(cluster: Cluster, user: str, verb: str, resource: str, namespace: str = "") -> bool:
    """Ask the API server; ``resource`` is RESOURCE[/SUBRESOURCE][.GROUP]."""
    words, _, group = resource.partition(".")
    plural, _, sub = words.partition("/")
    attributes = {
        "verb": verb,
        "resource": plural,
        "subresource": sub,
        "group": group,
        "namespace": namespace,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": attributes},
    }
    said = cluster.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(review))
    return bool(json.loads(said)["status"]["allowed"])


def test_the_agent_has_the_listed_capabilities(cluster: Cluster, agent: str) -> None:
    patch = yaml.safe_load(OVERLAY.read_text())
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    listed = container["securityContext"]["capabilities"]["add"]
    wanted = sum(1 << CAPABILITIES.index(name) for name in listed)
    status = inside(cluster, agent, "grep", "-E", "^Cap(Eff|Bnd|Prm)", "/proc/self/status")
    assert {int(line.split()[1], 16) for line in status.splitlines()} == {wanted}


def test_the_agents_root_file_system_cannot_be_written(cluster: Cluster, agent: str) -> None:
    with pytest.raises(ClusterError, match="Read-only file system"):
        inside(cluster, agent, "touch", "/usr/local/lib/ckpt-agent/x")


def test_the_image_has_nothing_to_build_with(cluster: Cluster, agent: str) -> None:
    script = "command -v gcc cc musl-gcc ld as make pip pip3 git curl wget; true"
    assert inside(cluster, agent, "sh", "-c", script) == ""
    # Compiled modules are there, since nothing could write them later.
    lacking = (
        "import grpc, pathlib, pycriu, sys\n"
        "tag = sys.implementation.cache_tag\n"
        "print([str(p) for root in (grpc, pycriu)\n"
        "       for p in pathlib.Path(root.__file__).parent.rglob('*.py')\n"
        "       if not (p.parent / '__pycache__' / f'{p.stem}.{tag}.pyc').exists()])"
    )
    python = "/usr/local/lib/ckpt-agent/venv/bin/python"
    assert inside(cluster, agent, python, "-c", lacking).strip() == "[]"


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("list", "pods"),
        ("get", "namespaces"),
        ("create", "nodes/checkpoint"),
        ("create", "tokenreviews.authentication.k8s.io"),
        ("create", "subjectaccessreviews.authorization.k8s.io"),
        ("create", "events.events.k8s.io"),
    ],
)
def test_the_agent_may(cluster: Cluster, agents: None, verb: str, resource: str) -> None:
    assert may(cluster, AGENT, verb, resource)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("list", "namespaces"),
        ("watch", "namespaces"),
        ("patch", "namespaces"),
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "nodes/proxy"),
        ("get", "nodes/proxy"),
        ("get", "nodes/log"),
        ("create", "pods/exec"),
        ("create", "pods"),
        ("delete", "pods"),
        ("patch", "pods"),
        ("impersonate", "users"),
        ("restore", "images.ckpt-agent.dev"),
    ],
)
def test_the_agent_may_not(cluster: Cluster, agents: None, verb: str, resource: str) -> None:
    for where in ("", NAMESPACE, "kube-system"):
        assert not may(cluster, AGENT, verb, resource, where)


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        ("view", set()),
        ("edit", {"create", "get", "list", "delete"}),
        ("admin", {"create", "get", "list", "delete"}),
        ("ckpt-agent-restorer", {"restore"}),
        ("ckpt-agent-exporter", {"export"}),
    ],
)
def test_what_a_role_of_a_namespace_gives_on_its_images(
    cluster: Cluster, agents: None, namespace: str, role: str, allowed: set[str]
) -> None:
    user = f"{role}-user"
    cluster.kubectl(
        *("create", "rolebinding", "it", "-n", namespace),
        *(f"--clusterrole={role}", f"--user={user}"),
    )
    verbs = ("create", "get", "list", "delete", "restore", "export")
    resource = "images.ckpt-agent.dev"

    def given(where: str) -> set[str]:
        return {verb for verb in verbs if may(cluster, user, verb, resource, where)}

    cluster.wait_for("the role", lambda: given(namespace) == allowed, timeout_s=20)
    assert given("default") == set()
