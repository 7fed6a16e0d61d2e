"""The kubelet's checkpoint endpoint: one call, one archive on the node.

``POST https://NODE:10250/checkpoint/NAMESPACE/POD/CONTAINER?timeout=SECONDS`` with the agent's own
ServiceAccount token. The kubelet asks the API server whether that account may ``create``
``nodes/checkpoint``; nothing more is needed, and never ``nodes/proxy``.

Promises: the token is sent only to a server whose certificate was found to be the kubelet's, by an
authority, by its own certificate file on this node, or by a fingerprint; every answer is a list of
archives or a typed error with the way out; every wait has a deadline. The token is in no error and
no log.
Does not: retry (the first call may still be running), or look at archives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from agent import errors
from agent.host import clock

PORT = 10250
TOKEN_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
RBAC = '{apiGroups: [""], resources: ["nodes/checkpoint"], verbs: ["create"]}'

# The kubelet gives up by itself at the deadline that it was told; its answer then needs a moment.
_ANSWER_S = 5.0
_CONNECT_S = 10.0
# How soon after it was given up nobody waits for the kubelet any more.
_CHECK_S = 0.05
_ANSWER_BYTES = 64 << 10
_QUOTED_CHARACTERS = 2000
_FINGERPRINT_BYTES = 32
# A DNS subdomain, which pods' names are; those of namespaces and containers are narrower.
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class Lost(errors.DumpFailed):
    """The kubelet did not end its answer, so that it may still be at work."""


@dataclasses.dataclass(frozen=True)
class Trust:
    """How the kubelet's serving certificate is known; exactly one field is set.

    ``authority``: a file of certificate authorities; the certificate must also be made out to the
    address. ``certificate``: the kubelet's own certificate file, such as
    ``/var/lib/kubelet/pki/kubelet.crt``, which it makes itself where nobody gives it one.
    ``fingerprint``: SHA-256 of the certificate (DER).
    """

    authority: str = ""
    certificate: str = ""
    fingerprint: bytes = b""

    @classmethod
    def parse(cls, text: str) -> Trust:
        """Read ``ca:PATH``, ``cert:PATH`` or ``sha256:HEX`` (colons between bytes are fine).

        Raises:
            errors.InvalidInput: it is none of them.
        """
        kind, _, value = text.partition(":")
        if kind == "ca" and os.path.isabs(value):
            return cls(authority=value)
        if kind == "cert" and os.path.isabs(value):
            return cls(certificate=value)
        digits = value.replace(":", "")
        if kind == "sha256" and re.fullmatch(rf"[0-9a-fA-F]{{{2 * _FINGERPRINT_BYTES}}}", digits):
            return cls(fingerprint=bytes.fromhex(digits))
        raise errors.InvalidInput(
            f"{text!r} does not say how to know the kubelet's certificate",
            hint="write ca:/absolute/path, cert:/absolute/path or sha256:FINGERPRINT",
        )


@dataclasses.dataclass(frozen=True)
class Kubelet:
    """This node's kubelet: its address as the certificate names it, and what it is known by."""

    address: str
    trust: Trust
    port: int = PORT
    token_file: str = TOKEN_FILE


@dataclasses.dataclass(frozen=True)
class Target:
    """The container to checkpoint; raises ``errors.InvalidInput`` for names that no cluster has."""

    namespace: str
    pod: str
    container: str

    def __post_init__(self) -> None:
        for name in (self.namespace, self.pod, self.container):
            if not _NAME.fullmatch(name):
                raise errors.InvalidInput(
                    f"{name!r} names no object of a cluster", hint="check the names", name=name
                )

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}/{self.container}"


def checkpoint(
    kubelet: Kubelet,
    target: Target,
    deadline: clock.Deadline,
    check: Callable[[], None] | None = None,
) -> list[str]:
    """Have one container checkpointed; return the archives' paths as the kubelet names them. The
    container runs on. ``check`` is called again and again meanwhile, in another thread; if it
    raises, nobody waits any more.

    Raises:
        errors.NotFound: the kubelet knows no such container.
        errors.TargetUnsuitable: it does not run.
        errors.PrivilegeMissing: the token is missing, refused, or may not do this.
        errors.Unreachable: no answer, or not from this kubelet.
        errors.EnvironmentUnfit: the kubelet or the runtime has no checkpoints.
        errors.CriuFailed | errors.DumpFailed: it failed.
        Lost | errors.DeadlineExceeded: it may still be at work.
    """
    token = _token(kubelet.token_file)
    connection = _connected(kubelet, deadline)
    try:
        with _given_up_by(check, connection, target):
            status, raw = _post(connection, target, token, deadline)
    finally:
        connection.close()
    body = raw.decode("utf-8", "replace").strip()[:_QUOTED_CHARACTERS]
    if status != http.client.OK:
        _refuse(status, body, target)
    return _items(body)


def _token(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise errors.PrivilegeMissing(
            f"cannot read the agent's token in {path}",
            hint="run the agent in a pod with a ServiceAccount whose token is mounted",
            path=path,
        ) from exc
    # Whatever it is, it must not become further headers.
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token):
        raise errors.PrivilegeMissing(
            f"{path} does not hold a token", hint="check what is mounted there", path=path
        )
    return token


def _connected(kubelet: Kubelet, deadline: clock.Deadline) -> http.client.HTTPSConnection:
    connection = http.client.HTTPSConnection(
        kubelet.address,
        kubelet.port,
        timeout=max(0.001, deadline.sooner(_CONNECT_S).remaining_s),
        context=_context(kubelet.trust),
    )
    try:
        connection.connect()
        if not kubelet.trust.authority:
            _check_pinned(connection, kubelet)
    except ssl.SSLError as exc:
        connection.close()
        raise _untrusted(kubelet, str(exc.reason or exc)) from exc
    except OSError as exc:
        connection.close()
        raise errors.Unreachable(
            f"the kubelet at {kubelet.address} port {kubelet.port} does not answer: {exc}",
            hint="check the node's address, and that the agent may connect to it",
        ) from exc
    except errors.CkptError:
        connection.close()
        raise
    return connection


def _context(trust: Trust) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not trust.authority:
        # Checked against the known certificate as soon as it is seen, before anything is sent.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        context.load_verify_locations(cafile=trust.authority)
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"cannot read the certificate authorities in {trust.authority}",
            hint="mount the file that signed the kubelet's certificate, or use cert: or sha256:",
            path=trust.authority,
        ) from exc
    return context


def _check_pinned(connection: http.client.HTTPSConnection, kubelet: Kubelet) -> None:
    seen = connection.sock.getpeercert(binary_form=True) or b""
    if kubelet.trust.certificate:
        # Read each time: the kubelet renews it.
        if seen != _certificate(kubelet.trust.certificate):
            raise _untrusted(kubelet, f"it is not the one in {kubelet.trust.certificate}")
    elif hashlib.sha256(seen).digest() != kubelet.trust.fingerprint:
        raise _untrusted(
            kubelet, f"its fingerprint is {hashlib.sha256(seen).hexdigest()}, not the known one"
        )


def _certificate(path: str) -> bytes:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read()
        begin = text.index(ssl.PEM_HEADER)
        end = text.index(ssl.PEM_FOOTER, begin) + len(ssl.PEM_FOOTER)
        return ssl.PEM_cert_to_DER_cert(text[begin:end])
    except (OSError, ValueError) as exc:
        raise errors.EnvironmentUnfit(
            f"there is no certificate in {path}",
            hint="mount the node's /var/lib/kubelet/pki, or use ca: or sha256:",
            path=path,
        ) from exc


def _untrusted(kubelet: Kubelet, why: str) -> errors.Unreachable:
    return errors.Unreachable(
        f"what answers at {kubelet.address} port {kubelet.port} has no certificate of this node's"
        f" kubelet: {why}",
        hint="set how its certificate is known: ca:PATH if an authority signed it, else"
        " cert:/var/lib/kubelet/pki/kubelet.crt, or sha256:FINGERPRINT",
    )


def _post(
    connection: http.client.HTTPSConnection, target: Target, token: str, deadline: clock.Deadline
) -> tuple[int, bytes]:
    parts = (target.namespace, target.pod, target.container)
    path = "/".join(urllib.parse.quote(part, safe="") for part in parts)
    timeout_s = max(1, int(deadline.remaining_s))
    whole = clock.Deadline.after(timeout_s + _ANSWER_S)
    try:
        connection.sock.settimeout(timeout_s + _ANSWER_S)
        connection.request(
            "POST",
            f"/checkpoint/{path}?timeout={timeout_s}",
            headers={"Authorization": f"Bearer {token}"},
        )
        response = connection.getresponse()
        raw = b""
        while len(raw) < _ANSWER_BYTES and (piece := response.read1(_ANSWER_BYTES - len(raw))):
            raw += piece
            whole.check("the kubelet's answer")
    except TimeoutError as exc:
        raise errors.DeadlineExceeded(
            f"the kubelet did not checkpoint {target} within {timeout_s} s",
            hint="allow more time; the container goes on, and what the kubelet still writes is"
            " removed later",
        ) from exc
    except (OSError, http.client.HTTPException) as exc:
        raise Lost(
            f"the connection to the kubelet broke while it checkpointed {target}",
            hint="check that the kubelet runs, and try again",
        ) from exc
    return response.status, raw


@contextlib.contextmanager
def _given_up_by(
    check: Callable[[], None] | None, connection: http.client.HTTPSConnection, target: Target
) -> Iterator[None]:
    """End the connection when ``check`` raises: whoever reads from it then does not wait."""
    if check is None:
        yield
        return
    over = threading.Event()
    reasons: list[errors.CkptError] = []

    def watch() -> None:
        while not over.wait(_CHECK_S):
            try:
                check()
            except errors.CkptError as exc:
                reasons.append(exc)
                with contextlib.suppress(OSError):  # it has ended by itself
                    # Not TLS's own, which takes the layer away from under whoever reads.
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
                return

    watcher = threading.Thread(target=watch, name="kubelet", daemon=True)
    watcher.start()
    try:
        yield
    except (Lost, errors.DeadlineExceeded) as exc:
        over.set()
        watcher.join()
        if reasons and isinstance(reasons[0], errors.DeadlineExceeded):
            raise reasons[0] from exc
        if reasons:
            raise Lost(
                f"the checkpoint of {target} was given up while the kubelet was at it:"
                f" {reasons[0].message}",
                hint=reasons[0].hint,
            ) from exc
        raise
    finally:
        over.set()
        watcher.join()


def _items(body: str) -> list[str]:
    try:
        answer: Any = json.loads(body)
        items = answer["items"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise _strange() from exc
    if not isinstance(items, list) or not items:
        raise _strange()
    if not all(isinstance(item, str) and item for item in items):
        raise _strange()
    return items


def _strange() -> errors.DumpFailed:
    return errors.DumpFailed(
        "the kubelet answered with something else than the names of archives",
        hint="check the kubelet's version",
    )


def _refuse(status: int, body: str, target: Target) -> NoReturn:
    """Raise what an answer other than success means."""
    if status == http.client.UNAUTHORIZED:
        raise errors.PrivilegeMissing(
            "the kubelet does not know the agent's token",
            hint="its configuration needs authentication.webhook.enabled: true",
        )
    if status == http.client.FORBIDDEN:
        raise errors.PrivilegeMissing(
            "the agent may not have containers checkpointed by the kubelet",
            hint=f"its ClusterRole needs the rule {RBAC}",
        )
    if status == http.client.NOT_FOUND and "does not exist" in body:
        raise errors.NotFound(
            f"the kubelet of this node knows no container {target}",
            hint="check the names, and that the pod runs on this node",
        )
    if status in (http.client.NOT_FOUND, http.client.METHOD_NOT_ALLOWED):
        raise errors.EnvironmentUnfit(
            "the kubelet of this node offers no checkpoints",
            hint="its feature gate ContainerCheckpoint must be on (it is from Kubernetes 1.30)",
        )
    raise _failed(body, target)


# What runtimes say, in the order in which it is looked for.
_FAILURES: tuple[tuple[str, type[errors.CkptError], str], ...] = (
    (
        r"[Uu]nimplemented|unknown (method|service)|support (is )?not (available|enabled)",
        errors.EnvironmentUnfit,
        "use containerd 2.0 or newer, or CRI-O with checkpoints enabled",
    ),
    (
        r"CRIU binary not found or too old|criu.*executable file not found",
        errors.CriuMissing,
        "install CRIU 4.2 or newer on the node, where the runtime finds it",
    ),
    (
        r"only \w+ containers can be checkpointed|container .* is not running",
        errors.TargetUnsuitable,
        "checkpoint it while it runs",
    ),
    (
        r"DeadlineExceeded|context deadline exceeded",
        errors.DeadlineExceeded,
        "allow more time; the container goes on",
    ),
    (
        r"unable to freeze",
        errors.DumpFailed,
        "the runtime could not stop the container in time on a busy node; try again",
    ),
    (
        r"criu failed|CRIU|/criu",
        errors.CriuFailed,
        "the node's CRIU log says more; options for CRIU on the node stand in /etc/criu/runc.conf",
    ),
)


def _failed(body: str, target: Target) -> errors.CkptError:
    for pattern, kind, hint in _FAILURES:
        if re.search(pattern, body):
            return kind(f"the kubelet could not checkpoint {target}: {body}", hint=hint)
    return errors.DumpFailed(
        f"the kubelet could not checkpoint {target}: {body or 'it does not say why'}",
        hint="the logs of the kubelet and of the container runtime say more",
    )
