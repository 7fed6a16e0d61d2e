"""An API server for tests: real HTTP over real TLS, port-forward over real websockets.

Knows pods, nodes, JobSets, ConfigMaps and reviews of rights, as far as a caller of ours asks for
them. ``pods``, ``nodes`` and ``jobsets`` are the objects it serves; ``backends`` says where a pod's
port leads.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import http.server
import json
import pathlib
import socket
import ssl
import struct
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tests.fakes.authority import Authority

TOKEN = "a-token-of-tests"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10


class ApiServer:
    """What the server holds; change it freely while it runs."""

    def __init__(self) -> None:
        self.pods: dict[tuple[str, str], dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.config_maps: dict[tuple[str, str], dict[str, str]] = {}
        self.backends: dict[tuple[str, int], str] = {}
        self.denied: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []
        self.url = ""
        self.token = TOKEN
        # Called when a pod was created, as a scheduler and a kubelet would be.
        self.on_create: Any = lambda pod: None
        self.refuse_create = ""
        # What admission makes of a pod; called when a JobSet was created or changed, as its
        # controller would be.
        self.admit: Callable[[str, Any], Any] = lambda namespace, pod: pod
        self.on_jobset: Callable[[Any], None] = lambda jobset: None
        self.jobsets: dict[tuple[str, str], dict[str, Any]] = {}
        self.hold_deletions = False

    def add_pod(self, name: str, node: str, *, namespace: str = "default", **more: Any) -> str:
        """Add a running pod and return its uid."""
        uid = str(uuid.uuid4())
        metadata = {"name": name, "namespace": namespace, "uid": uid} | more.pop("metadata", {})
        self.pods[namespace, name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}
            | copy.deepcopy(more.pop("spec", {})),
            "status": {
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}],
            }
            | more.pop("status", {}),
        }
        return uid

    def add_node(self, name: str, **spec: Any) -> None:
        """Add a node that is ready."""
        self.nodes[name] = {
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }

    def kubeconfig(
        self, path: pathlib.Path, authority: Authority, user: dict[str, Any] | None = None
    ) -> str:
        """Write a kubeconfig with the contexts ``fake`` and ``other``."""
        ca = base64.b64encode(authority.pem).decode()
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [
                {
                    "name": "fake",
                    "cluster": {"server": self.url, "certificate-authority-data": ca},
                }
            ],
            "users": [{"name": "u", "user": user or {"token": TOKEN}}],
            "contexts": [
                {"name": "fake", "context": {"cluster": "fake", "user": "u"}},
                {
                    "name": "other",
                    "context": {"cluster": "fake", "user": "u", "namespace": "team-a"},
                },
            ],
        }
        path.write_text(json.dumps(content))
        return str(path)


@contextlib.contextmanager
def running(
    authority: Authority, folder: pathlib.Path, handler: type[_Handler] | None = None
) -> Iterator[ApiServer]:
    """An API server on loopback whose certificate ``authority`` issued; ``handler`` may know more
    than this one.
    """
    state = ApiServer()

    class Handler(handler or _Handler):  # type: ignore[misc]
        api = state

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue_files(folder, "apiserver", ("127.0.0.1",)))
    server = _Server(("127.0.0.1", 0), Handler, context)
    state.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: Any, handler: Any, context: ssl.SSLContext) -> None:
        super().__init__(address, handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a client that fails the handshake holds up nobody.
        with (
            contextlib.suppress(ssl.SSLError, OSError),
            self._context.wrap_socket(request, server_side=True) as wrapped,
        ):
            self.RequestHandlerClass(wrapped, client_address, self)  # type: ignore[arg-type]

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: ApiServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        assert self.headers["content-type"] == "application/merge-patch+json"
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urllib.parse.urlsplit(self.path)
        query = {key: each[0] for key, each in urllib.parse.parse_qs(url.query).items()}
        self.api.requests.append((method, url.path))
        if self.headers.get("authorization") != f"Bearer {self.api.token}":
            self._send(401, _status("Unauthorized"))
            return
        parts = url.path.strip("/").split("/")
        if parts[-1] == "portforward":
            self._forward(parts[3], parts[5], int(query["ports"]))
            return
        for verb, path in self.api.denied:
            if verb == method and path in url.path:
                self._send(403, _status(f"user u cannot {method} {path}"))
                return
        self._send(*self._object(method, parts, query, body))

    def _object(
        self, method: str, parts: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        api = self.api
        match (method, *parts):
            case ("GET", "version"):
                return 200, {"gitVersion": "v1.36.3"}
            case ("POST", "apis", "authorization.k8s.io", *_):
                return 201, {"status": {"allowed": not self._is_denied(body)}}
            case ("GET", "api", "v1", "nodes"):
                return 200, {"items": list(api.nodes.values())}
            case ("GET", "api", "v1", "nodes", name):
                return _found(api.nodes.get(name), name)
            case ("GET", "api", "v1", "namespaces", space, "configmaps", name):
                data = api.config_maps.get((space, name))
                return _found(None if data is None else {"data": data}, name)
            case ("GET", "api", "v1", "namespaces", space, "pods"):
                wanted = dict(
                    each.split("=") for each in query.get("labelSelector", "").split(",") if each
                )
                _, _, named = query.get("fieldSelector", "").partition("metadata.name=")
                return 200, {
                    "items": [
                        pod
                        for (where, name), pod in list(api.pods.items())
                        if where == space
                        and named in ("", name)
                        and wanted.items() <= pod["metadata"].get("labels", {}).items()
                    ]
                }
            case ("GET", "api", "v1", "namespaces", space, "pods", name):
                return _found(api.pods.get((space, name)), name)
            case ("POST", "api", "v1", "namespaces", space, "pods"):
                return self._create(space, query, body)
            case ("DELETE", "api", "v1", "namespaces", space, "pods", name):
                return self._delete(space, name, body)
            case (_, "apis", "jobset.x-k8s.io", "v1alpha2", "namespaces", space, "jobsets", *name):
                return self._jobset(method, space, name, body)
        return 404, _status("the server could not find the requested resource")

    def _jobset(self, method: str, space: str, name: list[str], body: Any) -> tuple[int, Any]:
        if method == "POST":
            found = copy.deepcopy(body)
            found["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": space}
            found["metadata"]["resourceVersion"] = "1"
            self.api.jobsets[space, found["metadata"]["name"]] = found
            self.api.on_jobset(found)
            return 201, found
        found = self.api.jobsets.get((space, name[0]))
        if found is None:
            return 404, _status(f'jobsets "{name[0]}" not found')
        wanted = body.get("preconditions") or body.get("metadata") or {}
        if wanted.get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
            return 409, _status("the UID in the precondition does not match")
        version = found["metadata"].setdefault("resourceVersion", "1")
        if method == "PATCH":
            if body.get("metadata", {}).get("resourceVersion", version) != version:
                return 409, _status("the object has been modified")
            _merge(found, body)
            found["metadata"]["resourceVersion"] = str(int(version) + 1)
            self.api.on_jobset(found)
        elif method == "DELETE":
            del self.api.jobsets[space, name[0]]
        return 200, found

    def _is_denied(self, body: Any) -> bool:
        wanted = body["spec"]["resourceAttributes"]
        resource = wanted["resource"] + (
            f"/{wanted['subresource']}" if "subresource" in wanted else ""
        )
        return (wanted["verb"], resource) in self.api.denied

    def _create(self, space: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if self.api.refuse_create:
            return 403, _status(self.api.refuse_create)
        if (space, name) in self.api.pods:
            return 409, _status(f'pods "{name}" already exists')
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": space}
        made["status"] = {"phase": "Pending"}
        made = self.api.admit(space, made)
        if query.get("dryRun") != "All":
            self.api.pods[space, name] = made
            self.api.on_create(made)
        return 201, made

    def _delete(self, space: str, name: str, body: Any) -> tuple[int, Any]:
        found = self.api.pods.get((space, name))
        if found is None:
            return 404, _status(f'pods "{name}" not found')
        wanted = (body.get("preconditions") or {}).get("uid")
        if wanted and wanted != found["metadata"]["uid"]:
            return 409, _status("the UID in the precondition does not match")
        if self.api.hold_deletions:
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del self.api.pods[space, name]
        return 200, found

    def _send(self, code: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _forward(self, space: str, pod: str, port: int) -> None:
        if ("GET", "portforward") in self.api.denied:
            self._send(403, _status(f"user u cannot create pods/portforward in {space}"))
            return
        if (space, pod) not in self.api.pods:
            self._send(404, _status(f'pods "{pod}" not found'))
            return
        assert "v4.channel.k8s.io" in self.headers["sec-websocket-protocol"]
        key = self.headers["sec-websocket-key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
        self.send_response(101)
        for name, value in (
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept),
            ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        _Bridge(self.rfile, self.wfile).run(self.api.backends.get((pod, port)), port)


def _merge(found: dict[str, Any], patch: dict[str, Any]) -> None:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict):
            _merge(found.setdefault(key, {}), value)
        else:
            found[key] = value


class _Bridge:
    """The server's end of a port-forward."""

    def __init__(self, rfile: Any, wfile: Any) -> None:
        self._rfile = rfile
        self._wfile = wfile
        self._lock = threading.Lock()

    def run(self, backend: str | None, port: int) -> None:
        for stream in (0, 1):
            self._write(_BINARY, bytes((stream,)) + struct.pack("<H", port))
        if backend is None:
            self._write(_BINARY, b"\x01" + b"dial tcp: connection refused")
            self._write(_CLOSE, b"")
            return
        with contextlib.closing(_dialled(backend)) as inner:
            outward = threading.Thread(target=self._outward, args=(inner,))
            outward.start()
            with contextlib.suppress(OSError):
                self._inward(inner)
                inner.shutdown(socket.SHUT_RDWR)
            outward.join()

    def _inward(self, inner: socket.socket) -> None:
        while True:
            opcode, data = self._read()
            if opcode == _CLOSE:
                return
            if opcode == _PING:
                self._write(_PONG, data)
            elif opcode == _BINARY:
                assert data[0] == 0
                inner.sendall(data[1:])

    def _outward(self, inner: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := inner.recv(32 << 10):
                self._write(_BINARY, b"\0" + part)
        with contextlib.suppress(OSError):
            self._write(_CLOSE, b"")

    def _read(self) -> tuple[int, bytes]:
        head = self._rfile.read(2)
        if len(head) < 2:
            return _CLOSE, b""
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self._rfile.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._rfile.read(8))
        assert head[1] & 0x80, "a client masks"
        mask = self._rfile.read(4)
        data = self._rfile.read(length)
        wide = int.from_bytes(mask * (length // 4 + 1), "big") >> 8 * (4 - length % 4)
        if len(data) < length:
            return _CLOSE, b""
        return head[0] & 0xF, (int.from_bytes(data, "big") ^ wide).to_bytes(length, "big")

    def _write(self, opcode: int, data: bytes) -> None:
        head = bytes((0x80 | opcode,))
        if len(data) < 126:
            head += bytes((len(data),))
        elif len(data) < 1 << 16:
            head += b"\x7e" + struct.pack(">H", len(data))
        else:
            head += b"\x7f" + struct.pack(">Q", len(data))
        with self._lock:
            self._wfile.write(head + data)


def _dialled(backend: str) -> socket.socket:
    host, port = backend.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def _found(found: Any, name: str) -> tuple[int, Any]:
    return (200, found) if found is not None else (404, _status(f'"{name}" not found'))


def _status(message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "message": message}
