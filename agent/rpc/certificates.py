"""The server's certificate, read again whenever its files change.

Promises: a new certificate is used from the next connection on; files that do not fit together
(half written, a key of another certificate) are told once and the last good ones stay in use.
Does not: make certificates.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from typing import cast

import grpc

from agent import errors
from agent.host import clock

_log = logging.getLogger(__name__)

# The keys of a Secret of the type kubernetes.io/tls, and the usual one beside them.
_CERTIFICATE, _KEY, _AUTHORITY = "tls.crt", "tls.key", "ca.crt"


# The API server's own authorities change once in years.
_AUTHORITIES_S = 300.0
_AUTHORITIES_SOON_S = 10.0


class Authorities:
    """The cluster's authorities for client certificates, as last heard."""

    def __init__(self, ask: Callable[[], bytes]) -> None:
        self._ask = ask
        self._pem = b""
        self._due_s = 0.0
        self._problem = ""

    def pem(self) -> bytes:
        """What is known now; does not block."""
        return self._pem

    def refresh(self) -> None:
        """Ask if it is due."""
        if clock.monotonic_s() < self._due_s:
            return
        try:
            self._pem = self._ask()
        except errors.CkptError as exc:
            if exc.message != self._problem:
                _log.warning(
                    "client certificates of the cluster cannot be checked: %s", exc.message
                )
            self._problem = exc.message
            self._due_s = clock.monotonic_s() + _AUTHORITIES_SOON_S
        else:
            self._problem = ""
            self._due_s = clock.monotonic_s() + _AUTHORITIES_S


class Certificates:
    """The files of one directory, which a Secret's mount replaces as a whole."""

    def __init__(self, directory: str, authorities: Callable[[], bytes] = bytes) -> None:
        """``authorities`` are further issuers of client certificates, PEM; asked at each
        connection, so it must not block.
        """
        self._directory = directory
        self._authorities = authorities

    def port(self, *, clients: bool) -> grpc.ServerCredentials:
        """Credentials of a port; with ``clients`` it takes only connections with a certificate
        of the directory's authority or of ``authorities``.

        Raises:
            errors.EnvironmentUnfit: the files are not there or do not fit together.
        """
        follower = _Follower(self._read, clients=clients)
        # No change is None, which the types of grpc do not know.
        changed = cast(Callable[[], grpc.ServerCertificateConfiguration], follower.changed)
        return grpc.dynamic_ssl_server_credentials(follower.first, changed, clients)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate chain, key and client authorities as they are now."""
        paths = [os.path.join(self._directory, name) for name in (_CERTIFICATE, _KEY, _AUTHORITY)]
        try:
            chain, key, own = (_content(path) for path in paths)
            # Only OpenSSL itself says whether the key is the certificate's.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths[0], paths[1])
        except (OSError, ssl.SSLError) as exc:
            raise errors.EnvironmentUnfit(
                f"the certificate in {self._directory} cannot be used: {exc}",
                hint="is the Secret ckpt-agent-tls there, with tls.crt, tls.key and ca.crt?",
                directory=self._directory,
            ) from exc
        return chain, key, own + b"\n" + self._authorities()


class _Follower:
    """What one port was given last. gRPC asks before each handshake."""

    def __init__(self, read: Callable[[], tuple[bytes, bytes, bytes]], *, clients: bool) -> None:
        self._read = read
        self._clients = clients
        self._current = read()
        self._problem = ""
        self.first = self._configuration()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None if it is the same as before."""
        try:
            found = self._read()
        except errors.EnvironmentUnfit as exc:
            if self._problem != exc.message:
                _log.warning("%s; the last good one stays in use", exc.message)
            self._problem = exc.message
            return None
        self._problem = ""
        if found == self._current:
            return None
        self._current = found
        _log.info("the server's certificate was replaced")
        return self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        chain, key, authorities = self._current
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], authorities if self._clients else None
        )


def authority(directory: str) -> bytes:
    """The authority that issued the certificate in ``directory``, PEM.

    Raises:
        errors.EnvironmentUnfit: it is not there.
    """
    path = os.path.join(directory, _AUTHORITY)
    try:
        return _content(path)
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"{path} cannot be read: {exc.strerror}", hint="set tls_dir", path=path
        ) from exc


def _content(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()
