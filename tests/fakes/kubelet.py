"""A kubelet that only checkpoints: its path, query and answers over real TLS, and archives in a
directory.
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
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOKEN = "header.payload.signature"
ITEM = "/var/lib/kubelet/checkpoints/checkpoint-pod-1_team-c-2026-01-01T00:00:00Z.tar"


class Server(http.server.ThreadingHTTPServer):
    """What it answers, and what it was asked."""

    daemon_threads = True
    status = 200
    body = json.dumps({"items": [ITEM]}).encode()
    wait_s = 0.0
    hang_up = False

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def archive(self, folder: Path, content: bytes, target: str = "pod-1_team-c") -> str:
        """Put an archive there as if begun now, and name it in the answer; return its name."""
        stamp = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
        name = f"checkpoint-{target}-{stamp.replace('+00:00', 'Z')}.tar"
        (folder / name).write_bytes(content)
        self.body = json.dumps({"items": [f"/var/lib/kubelet/checkpoints/{name}"]}).encode()
        return name


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.server.hang_up:
            self.connection.close()
            return
        time.sleep(self.server.wait_s)
        self.server.meanwhile()
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


@contextlib.contextmanager
def serving(certificates: Certificates) -> Iterator[Server]:
    with answering(Server(), certificates.cert, certificates.key) as server:
        yield server


@contextlib.contextmanager
def answering(server: Server, certificate: Path, key: Path) -> Iterator[Server]:
    """Let ``server`` answer over TLS; close it in the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
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
