"""The call to the kubelet: whom it trusts with the token, and what each answer means.

The kubelet here is an HTTPS server with the kubelet's path, query and answers.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent import errors
from agent.engines.kubelet import client
from agent.engines.kubelet.client import Kubelet, Target, Trust
from agent.host import clock

TOKEN = "header.payload.signature"
TARGET = Target("team", "pod-1", "c")
ITEM = "/var/lib/kubelet/checkpoints/checkpoint-pod-1_team-c-2026-01-01T00:00:00Z.tar"


class Server(http.server.ThreadingHTTPServer):
    """What it answers, and what it was asked."""

    daemon_threads = True
    status = 200
    body = json.dumps({"items": [ITEM]}).encode()
    wait_s = 0.0
    hang_up = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.server.hang_up:
            self.connection.close()
            return
        time.sleep(self.server.wait_s)
        with contextlib.suppress(OSError):
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


class Certificates:
    """An authority, and a serving certificate signed by it."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        folder.mkdir()
        authority_key = ec.generate_private_key(ec.SECP256R1())
        key = ec.generate_private_key(ec.SECP256R1())
        authority = self._certificate("authority", authority_key, "authority", authority_key, None)
        serving = self._certificate("authority", authority_key, "node", key, address)
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        self.cert = folder / "kubelet.crt"
        self.cert.write_bytes(serving.public_bytes(serialization.Encoding.PEM))
        self.key = folder / "kubelet.key"
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        der = serving.public_bytes(serialization.Encoding.DER)
        self.fingerprint = hashlib.sha256(der).hexdigest()

    @staticmethod
    def _certificate(
        issuer: str,
        issuer_key: ec.EllipticCurvePrivateKey,
        subject: str,
        key: ec.EllipticCurvePrivateKey,
        address: str | None,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=address is None, path_length=None), True)
        )
        if address is not None:
            name = x509.IPAddress(ipaddress.ip_address(address))
            builder = builder.add_extension(x509.SubjectAlternativeName([name]), False)
        return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki") / "good")


@contextlib.contextmanager
def serving(certificates: Certificates) -> Iterator[Server]:
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.cert, certificates.key)
    # The handshake belongs into the thread of the connection: a client may break it off.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(certificates: Certificates) -> Iterator[Server]:
    with serving(certificates) as server:
        yield server


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def kubelet(server: Server, certificates: Certificates, token: Path) -> Kubelet:
    return at(server, token, f"ca:{certificates.ca}")


def at(server: Server, token: Path, trust: str) -> Kubelet:
    return Kubelet("127.0.0.1", Trust.parse(trust), server.server_address[1], str(token))


def call(kubelet: Kubelet, seconds: float = 30.0) -> list[str]:
    return client.checkpoint(kubelet, TARGET, clock.Deadline.after(seconds))


def test_the_kubelet_is_asked_with_the_token_and_a_timeout(
    kubelet: Kubelet, server: Server
) -> None:
    assert call(kubelet, 30.5) == [ITEM]
    assert server.asked == [("/checkpoint/team/pod-1/c?timeout=30", f"Bearer {TOKEN}")]


@pytest.mark.parametrize("name", ["", "..", "a/b", "c?x", "A", "a ", "a" * 254, "a\n"])
def test_names_cannot_become_other_paths(name: str) -> None:
    for names in ((name, "p", "c"), ("n", name, "c"), ("n", "p", name)):
        with pytest.raises(errors.InvalidInput, match="names no object"):
            Target(*names)


def test_each_way_to_know_the_certificate_works(
    server: Server, certificates: Certificates, token: Path
) -> None:
    colons = ":".join(certificates.fingerprint[at : at + 2].upper() for at in range(0, 64, 2))
    for trust in (
        f"ca:{certificates.ca}",
        f"cert:{certificates.cert}",
        f"sha256:{certificates.fingerprint}",
        f"sha256:{colons}",
    ):
        assert call(at(server, token, trust)) == [ITEM]


def test_a_stranger_is_never_sent_the_token(
    server: Server, certificates: Certificates, token: Path, tmp_path: Path
) -> None:
    other = Certificates(tmp_path / "other")
    for trust in (
        f"ca:{other.ca}",
        f"cert:{other.cert}",
        f"sha256:{other.fingerprint}",
    ):
        with pytest.raises(errors.Unreachable, match="certificate") as caught:
            call(at(server, token, trust))
        assert "cert:/var/lib/kubelet/pki/kubelet.crt" in caught.value.hint
    assert server.asked == []


def test_a_certificate_for_another_address_is_refused(tmp_path: Path, token: Path) -> None:
    elsewhere = Certificates(tmp_path / "elsewhere", address="127.0.0.2")
    with serving(elsewhere) as server:
        with pytest.raises(errors.Unreachable, match="certificate"):
            call(at(server, token, f"ca:{elsewhere.ca}"))
        assert server.asked == []
        assert call(at(server, token, f"cert:{elsewhere.cert}")) == [ITEM]


@pytest.mark.parametrize(
    "text",
    ["", "none", "insecure", "ca:", "ca:relative", "cert:x", "sha256:12", "sha256:" + "g" * 64],
)
def test_there_is_no_way_not_to_check(text: str) -> None:
    with pytest.raises(errors.InvalidInput, match="does not say how"):
        Trust.parse(text)


@pytest.mark.parametrize(
    "trust", ["ca:/absent/ca.crt", "cert:/absent/kubelet.crt", "cert:/etc/passwd"]
)
def test_a_missing_certificate_file_is_named(server: Server, token: Path, trust: str) -> None:
    with pytest.raises(errors.EnvironmentUnfit, match=trust.partition(":")[2]):
        call(at(server, token, trust))
    assert server.asked == []


ANSWERS = [
    (401, "Unauthorized", errors.PrivilegeMissing, "authentication.webhook"),
    (403, "Forbidden (user=x, verb=create)", errors.PrivilegeMissing, "nodes/checkpoint"),
    (404, "pod does not exist", errors.NotFound, "names"),
    (404, "container c does not exist", errors.NotFound, "names"),
    (404, "404 page not found", errors.EnvironmentUnfit, "ContainerCheckpoint"),
    (405, "405: Method Not Allowed", errors.EnvironmentUnfit, "ContainerCheckpoint"),
    (
        500,
        "checkpointing of team/pod-1/c failed (rpc error: code = Unimplemented desc = unknown)",
        errors.EnvironmentUnfit,
        "containerd 2.0",
    ),
    (
        500,
        'checkpointing of team/pod-1/c failed (rpc error: code = Unknown desc = CRIU binary not'
        ' found or too old (<31600). Failed to checkpoint container "f")',
        errors.CriuMissing,
        "install CRIU",
    ),
    (
        500,
        'container "f" is in CONTAINER_EXITED state. only CONTAINER_RUNNING containers can be'
        " checkpointed",
        errors.TargetUnsuitable,
        "while it runs",
    ),
    (
        500,
        "rpc error: code = DeadlineExceeded desc = context deadline exceeded",
        errors.DeadlineExceeded,
        "more time",
    ),
    (
        500,
        "runc did not terminate successfully: exit status 1: criu failed: type NOTIFY errno 0",
        errors.CriuFailed,
        "runc.conf",
    ),
    (500, "something else", errors.DumpFailed, "logs"),
    (503, "", errors.DumpFailed, "logs"),
    (200, "", errors.DumpFailed, "version"),
    (200, "[]", errors.DumpFailed, "version"),
    (200, '{"items": []}', errors.DumpFailed, "version"),
    (200, '{"items": [1]}', errors.DumpFailed, "version"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "error", "hint"), ANSWERS)
def test_each_answer_is_an_error_with_a_way_out(
    kubelet: Kubelet,
    server: Server,
    status: int,
    body: str,
    error: type[errors.CkptError],
    hint: str,
) -> None:
    server.status, server.body = status, body.encode()
    with pytest.raises(error) as caught:
        call(kubelet)
    assert type(caught.value) is error
    assert hint in caught.value.hint
    assert TOKEN not in f"{caught.value}{caught.value.hint}{caught.value.facts}"


def test_a_kubelet_that_does_not_end_in_time_is_left(
    kubelet: Kubelet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.2)
    server.wait_s = 2.5
    with pytest.raises(errors.DeadlineExceeded, match="team/pod-1/c"):
        call(kubelet, 1.0)


def test_a_connection_that_breaks_is_an_error(kubelet: Kubelet, server: Server) -> None:
    server.hang_up = True
    with pytest.raises(client.Lost, match="broke"):
        call(kubelet)


def test_nobody_at_the_address_is_an_error(certificates: Certificates, token: Path) -> None:
    kubelet = Kubelet("127.0.0.1", Trust.parse(f"ca:{certificates.ca}"), 1, str(token))
    with pytest.raises(errors.Unreachable, match="does not answer"):
        call(kubelet)


@pytest.mark.parametrize("content", [None, "", "a b", "token\r\nX-Header: y", "\xe4"])
def test_without_a_usable_token_nothing_is_asked(
    server: Server, certificates: Certificates, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "no-token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.PrivilegeMissing, match="token"):
        call(at(server, path, f"ca:{certificates.ca}"))
    assert server.asked == []
