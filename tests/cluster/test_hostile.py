"""Who may not, and what lies: callers with expired or no credentials, archives that are none, and a
kubelet that hands them out. Refused, told, logged, and nothing is done.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import gzip
import json
import tarfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from agent.cli import exits
from agent.host import namespaces, proc
from tests import archives
from tests.archives import Entry
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster, Node
from tests.cluster.pki import Authority
from tests.cluster.test_node_agent import (
    CHECKOUT,
    OWN,
    agent_pids,
    agent_pod,
    assert_clean,
    assert_goes_on,
    ckpt,
    images,
    listed,
    log,
    refused,
    start,
)
from tests.fakes import kubelet as fake

CHECKPOINTS = "var/lib/kubelet/checkpoints"
KUBELET_PORT = 10250


def words_of(token: str) -> list[dict[str, Any]]:
    parts = token.split(".")[:2]
    return [json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts]


def signed(cluster: Cluster, header: dict[str, Any], claims: dict[str, Any]) -> str:
    """A token as the cluster itself would issue it, by the key of its ServiceAccounts."""
    key = serialization.load_pem_private_key((cluster.pki / "sa.key").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)

    def encoded(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    body = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    return f"{body}.{encoded(key.sign(body.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def test_a_token_that_has_expired_is_nobodys(agents: Cluster, namespace: str) -> None:
    agents.kubectl("create", "serviceaccount", "robot", "-n", namespace)
    agents.kubectl(
        *("create", "rolebinding", "robot", "-n", namespace),
        *("--clusterrole=ckpt-agent-user", f"--serviceaccount={namespace}:robot"),
    )
    token = agents.kubectl("create", "token", "robot", "-n", namespace).strip()
    header, claims = words_of(token)
    # The same with this key and new times is good, so that it is the times that count.
    now = int(time.time())
    fresh = signed(agents, header, claims | {"iat": now - 60, "nbf": now - 60, "exp": now + 600})
    old = signed(agents, header, claims | {"iat": now - 900, "nbf": now - 900, "exp": now - 300})
    assert listed(agents, namespace, fresh) == "0 images"
    assert listed(agents, namespace, old) == "Unauthenticated"
    lines = [line for line in log(agents) if line.get("namespace") == namespace]
    assert [line["result"] for line in lines] == ["ok", "unauthenticated"]
    assert "expired" in lines[1]["error"]
    written = json.dumps(lines)
    assert fresh not in written
    assert old not in written


def asked(cluster: Cluster, namespace: str, certificate: tuple[Path, Path] | None) -> str:
    """What a caller with this client certificate, or with none, gets on the port for them."""
    program = """
        import base64, sys
        from agent import errors
        from agent.rpc import client
        address, namespace, authority, *files = sys.argv[1:]
        shown = [open(path, "rb").read() for path in files] or [None, None]
        credentials = client.Credentials(
            base64.b64decode(authority), "ckpt-agent-node.ckpt-agent.svc",
            certificate_pem=shown[0], key_pem=shown[1],
        )
        with client.connect(address, credentials, peer="the agent") as agent:
            try:
                print(len(agent.images(namespace)), "images")
            except errors.CkptError as exc:
                print(type(exc).__name__)
    """
    authority = cluster.get("configmap", "ckpt-agent-ca", "-n", OWN)["data"]["ca.crt"]
    done = cluster.run_in_control_plane(
        *(CHECKOUT / ".venv/bin/python", "-c", textwrap.dedent(program)),
        *(f"{agent_pod(cluster)['status']['podIP']}:7444", namespace),
        *(base64.b64encode(authority.encode()).decode(), *(certificate or ())),
        environment={"PYTHONPATH": str(CHECKOUT)},
    )
    return done.stdout.strip()


def test_without_a_valid_client_certificate_there_is_no_connection(
    agents: Cluster, namespace: str
) -> None:
    authority = Authority.load(agents.pki, "ca")
    past = datetime.timedelta(minutes=-5)
    masters = ("system:masters",)
    assert asked(agents, namespace, None) == "Unreachable"
    expired = authority.issue("user-late", "late", groups=masters, valid=past)
    assert asked(agents, namespace, expired) == "Unreachable"
    for why in ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "CERTIFICATE_VERIFY_FAILED"):
        told = [line for line in log(agents) if why in line["msg"]]
        assert told, why
    assert asked(agents, namespace, authority.issue("user-eve", "eve")) == "Forbidden"
    good = authority.issue("user-root", "root", groups=masters)
    assert asked(agents, namespace, good) == "0 images"


@pytest.fixture
def kubelet(agents: Cluster, namespace: str) -> Iterator[fake.Server]:
    """A kubelet in the place of n1's, for the agent alone: its certificate is the cluster's."""
    node = agents.node("n1")
    authority = Authority.load(agents.pki, "ca")
    pair = authority.issue("fake-kubelet", "system:node:n1", names=(node.ip,))
    table = "ckpt-agent-fake-kubelet"
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(namespaces.opened(proc.identity(node.pid), "net"))
        server = namespaces.within([network], lambda: fake.Server("0.0.0.0"))
        stack.enter_context(fake.answering(server, *pair))
        rule = (
            f"ip saddr 10.202.0.0/16 ip daddr {node.ip} tcp dport {KUBELET_PORT}"
            f" redirect to :{server.server_address[1]}"
        )
        chain = "type nat hook prerouting priority -150;"
        text = f"table ip {table} {{\nchain c {{\n{chain}\n{rule}\n}}\n}}\n"
        node.exec("nft", "-f", "-", stdin=text)
        stack.callback(node.exec, "nft", "delete", "table", "ip", table)
        yield server


def whole(namespace: str, *more: Entry, layer: bytes | None = None) -> bytes:
    """An archive of this very container, and what else is put into it."""
    beside = archives.parts(layer)
    beside["spec.dump"] = (
        beside["spec.dump"].replace(b'"team"', b'"%s"' % namespace.encode())
    ).replace(b'"pod-1"', b'"counter"')
    return archives.tar((*archives.entries(parts_of=beside), *more))


CASES: dict[str, Callable[[str], bytes]] = {
    "cut short": lambda name: whole(name)[: len(whole(name)) // 2],
    "leads out": lambda name: whole(name, Entry("../../../etc/cron.d/evil", b"* * * * *")),
    "link": lambda name: whole(name, Entry("more", type=tarfile.SYMTYPE, link="/etc/shadow")),
    "device": lambda name: whole(name, Entry("more", type=tarfile.CHRTYPE)),
    "another pod's": lambda name: whole("kube-system"),
}


def test_a_kubelet_that_hands_out_hostile_archives(
    agents: Cluster, namespace: str, kubelet: fake.Server
) -> None:
    node = agents.node("n1")
    folder = node.root / CHECKPOINTS
    start(agents, namespace)
    before = sorted(path.name for path in folder.glob("*.tar"))
    target = f"counter_{namespace}-c"
    for what, content in CASES.items():
        made = content(namespace)
        kubelet.meanwhile = functools.partial(kubelet.archive, folder, made, target)
        done = ckpt(agents, "dump", "pod/counter", "-n", namespace, "--engine", "kubelet")
        assert (done.returncode, refused(done)["code"]) == (exits.DATA, "corrupt"), what
    for name, plant in PLANTED.items():
        kubelet.meanwhile = functools.partial(plant, kubelet, node, target)
        done = ckpt(agents, "dump", "pod/counter", "-n", namespace, "--engine", "kubelet")
        assert (done.returncode, refused(done)["code"]) == (exits.FAILED, "dump-failed"), name
    assert len(kubelet.asked) == len(CASES) + len(PLANTED)
    assert images(agents, namespace) == []
    assert not (node.root / "etc/cron.d/evil").exists()
    assert (node.root / "etc/shadow").exists()
    for path in folder.glob(f"checkpoint-{target}-*"):
        assert path.is_symlink()  # not the kubelet's, so not the agent's to remove
        path.unlink()
    assert sorted(path.name for path in folder.glob("*.tar")) == before
    assert_clean(agents)
    assert_goes_on(agents, namespace)


def header(name: str, size_bytes: int = 0) -> bytes:
    """A member that claims to be that long."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def _endless(size_bytes: int) -> bytes:
    """A layer a thousandth as long as the file of zeros that it unpacks to."""
    piece = gzip.compress(bytes(UNPACKED_BYTES), mtime=0)
    return gzip.compress(header("zeros", size_bytes)) + piece * (size_bytes // UNPACKED_BYTES)


def _more(namespace: str, *headers: bytes) -> bytes:
    """An archive of this very container, and members of which there is nothing else."""
    content = whole(namespace).rstrip(b"\0")
    return content + bytes(-len(content) % tarfile.BLOCKSIZE) + b"".join(headers) + bytes(1024)


UNPACKED_BYTES = 64 << 20
# What makes them, and what is said of them.
BOMBS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "long": (lambda name: _more(name, header("more", 4 << 30)), "cut short"),
    "long layer": (lambda name: whole(name, layer=gzip.compress(header("x", 1 << 41))), "bytes"),
    "many members": (
        lambda name: _more(name, *(header(f"checkpoint/{n}.img") for n in range(100_000))),
        "more than 100000 members",
    ),
}


def test_a_kubelet_that_hands_out_bombs(
    agents: Cluster, namespace: str, kubelet: fake.Server
) -> None:
    node = agents.node("n1")
    folder = node.root / CHECKPOINTS
    start(agents, namespace)
    before = leftovers.of_all(agents)
    (agent,) = agent_pids(node)
    peak_bytes = _peak_bytes(agent)
    target = f"counter_{namespace}-c"
    dump = ("dump", "pod/counter", "-n", namespace, "--engine", "kubelet")
    for what, (content, words) in BOMBS.items():
        made = content(namespace)
        kubelet.meanwhile = functools.partial(kubelet.archive, folder, made, target)
        said = refused(ckpt(agents, *dump))
        assert (said["code"], words in said["message"]) == ("corrupt", True), (what, said)
        assert said["hint"]
    # Nobody can tell from its beginning that this one is not worth the time that it takes.
    made = whole(namespace, layer=_endless(96 << 30))
    kubelet.meanwhile = functools.partial(kubelet.archive, folder, made, target)
    began_s = time.monotonic()
    said = refused(ckpt(agents, *dump, "--deadline", "3s"))
    assert said["code"] == "deadline-exceeded", said
    assert said["hint"]
    assert_clean(agents)
    assert time.monotonic() - began_s < 30
    assert images(agents, namespace) == []
    assert agent_pids(node) == [agent]
    assert _peak_bytes(agent) - peak_bytes < 200 << 20
    leftovers.assert_none(agents, before)
    assert_goes_on(agents, namespace)


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def _elsewhere(kubelet: fake.Server, node: Node, target: str) -> None:
    kubelet.body = json.dumps({"items": ["/etc/shadow"]}).encode()


def _link(kubelet: fake.Server, node: Node, target: str) -> None:
    name = kubelet.archive(node.root / CHECKPOINTS, b"", target)
    (node.root / CHECKPOINTS / name).unlink()
    (node.root / CHECKPOINTS / name).symlink_to("/etc/shadow")


PLANTED = {"elsewhere": _elsewhere, "link": _link}
