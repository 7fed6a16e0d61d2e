"""An API server for tests as a node's agent sees it: real HTTP over real TLS.

Pods can be listed and watched by node, tokens and rights reviewed, events put on pods. ``pods`` are
the objects it serves; ``put`` and ``remove`` change them and tell those who watch.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import pathlib
import ssl
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

from tests.fakes.authority import Authority

OWN_TOKEN = "the-agents-own-token"
Json = dict[str, Any]


class NodeApi:
    """What the server holds; change it while it runs."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.pods: dict[tuple[str, str], Json] = {}
        self.history: list[tuple[int, Json]] = []
        self.version = 100
        # Token -> user; user -> what SubjectAccessReview allows: (verb, resource, namespace).
        self.users: dict[str, Json] = {}
        self.audiences: dict[str, list[str]] = {}
        self.rights: dict[str, set[tuple[str, str, str]]] = {}
        self.reviews: list[Json] = []
        self.events: list[Json] = []
        # Annotations by namespace; None: reading it is refused.
        self.namespaces: dict[str, dict[str, str] | None] = {}
        self.client_ca = b""
        self.url = ""
        self.down = False
        self.forgotten_before = 0
        self.watches = 0
        self.ended = 0
        self.closing = False

    def add_user(
        self, name: str, *rights: tuple[str, str], audience: str = "", groups: tuple[str, ...] = ()
    ) -> str:
        """Let a user do ``rights``, each a verb on images in a namespace; return a token."""
        token = f"token-of-{name}-{uuid.uuid4()}"
        self.users[token] = {"username": name, "uid": f"uid-{name}", "groups": list(groups)}
        self.audiences[token] = [audience] if audience else ["https://kubernetes.default.svc"]
        self.rights[name] = {(verb, "images", namespace) for verb, namespace in rights}
        return token

    def put(self, name: str, node: str, *, namespace: str = "default", **more: Any) -> str:
        """Add or replace a running pod; return its uid."""
        uid = str(uuid.uuid4())
        containers = more.pop("containers", ("c",))
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid,
                "creationTimestamp": "2026-01-01T00:00:00Z",
            }
            | more.pop("metadata", {}),
            "spec": {
                "nodeName": node,
                "containers": [{"name": each, "image": "i"} for each in containers],
            },
            "status": {"phase": more.pop("phase", "Running")},
        }
        with self.changed:
            kind = "MODIFIED" if (namespace, name) in self.pods else "ADDED"
            self.pods[namespace, name] = pod
            self._tell(kind, pod)
        return uid

    def remove(self, name: str, *, namespace: str = "default") -> None:
        """Remove a pod."""
        with self.changed:
            self._tell("DELETED", self.pods.pop((namespace, name)))

    def end_watches(self, *, forget: bool = False) -> None:
        """End every watch; with ``forget`` no watch can begin where one of them ended."""
        with self.changed:
            self.ended += 1
            if forget:
                self.version += 1000
                self.forgotten_before = self.version
            self.changed.notify_all()

    def _tell(self, kind: str, pod: Json) -> None:
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, {"type": kind, "object": pod}))
        self.changed.notify_all()

    def kubeconfig(self, path: pathlib.Path, authority: Authority) -> str:
        """Write the agent's kubeconfig."""
        ca = base64.b64encode(authority.pem).decode()
        cluster = {"server": self.url, "certificate-authority-data": ca}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": OWN_TOKEN}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "u"}}],
        }
        path.write_text(json.dumps(content))
        return str(path)


@contextlib.contextmanager
def running(authority: Authority, folder: pathlib.Path) -> Iterator[NodeApi]:
    """An API server on loopback whose certificate ``authority`` issued."""
    state = NodeApi()

    class Handler(_Handler):
        api = state

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue_files(folder, "apiserver", ("127.0.0.1",)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    state.url = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        state.closing = True
        state.end_watches()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: NodeApi

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Read."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Create."""
        self._answer("POST")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        url = urllib.parse.urlsplit(self.path)
        query = {key: each[0] for key, each in urllib.parse.parse_qs(url.query).items()}
        if self.api.down:
            self._send(503, {"message": "the server is currently unable to handle the request"})
        elif self.headers.get("authorization") != f"Bearer {OWN_TOKEN}":
            self._send(401, {"message": "Unauthorized"})
        elif query.get("watch"):
            self._watch(query)
        else:
            self._send(*self._object((method, *url.path.strip("/").split("/")), query, body))

    def _object(self, parts: tuple[str, ...], query: dict[str, str], body: Any) -> tuple[int, Json]:
        api = self.api
        match parts:
            case ("GET", "api", "v1", "pods"):
                with api.changed:
                    return 200, {
                        "metadata": {"resourceVersion": str(api.version)},
                        "items": [pod for pod in api.pods.values() if _selected(pod, query)],
                    }
            case ("POST", "apis", "authentication.k8s.io", *_):
                return 201, {"status": self._token_review(body["spec"])}
            case ("POST", "apis", "authorization.k8s.io", *_):
                api.reviews.append(body["spec"])
                wanted = body["spec"]["resourceAttributes"]
                key = wanted["verb"], wanted["resource"], wanted.get("namespace", "")
                allowed = key in api.rights.get(body["spec"]["user"], set())
                return 201, {"status": {"allowed": allowed}}
            case ("POST", "apis", "events.k8s.io", "v1", "namespaces", namespace, "events"):
                assert body["metadata"]["namespace"] == namespace
                with api.changed:
                    api.events.append(body)
                    api.changed.notify_all()
                return 201, body
            case ("GET", "api", "v1", "namespaces", namespace):
                annotations = api.namespaces.get(namespace, {})
                if annotations is None:
                    return 403, {"message": f'namespaces "{namespace}" is forbidden'}
                return 200, {"metadata": {"name": namespace, "annotations": annotations}}
            case ("GET", *_, "configmaps", "extension-apiserver-authentication"):
                return 200, {"data": {"client-ca-file": api.client_ca.decode()}}
        return 404, {"message": "the server could not find the requested resource"}

    def _token_review(self, spec: Json) -> Json:
        api = self.api
        user = api.users.get(spec["token"])
        good = api.audiences.get(spec["token"], [])
        wanted = spec.get("audiences") or ["https://kubernetes.default.svc"]
        shared = [each for each in wanted if each in good]
        if user is None or not shared:
            return {"user": {}, "error": "invalid bearer token"}
        return {"authenticated": True, "user": user, "audiences": shared}

    def _watch(self, query: dict[str, str]) -> None:
        api = self.api
        seen = int(query["resourceVersion"])
        if seen < api.forgotten_before:
            self._send(410, {"message": "too old resource version", "code": 410})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with api.changed:
            api.watches += 1
            ended = api.ended
        while True:
            with api.changed:
                while api.ended == ended and api.version <= seen:
                    api.changed.wait()
                stopping = api.ended != ended
                news = [event for version, event in api.history if version > seen]
                seen = max(seen, api.version)
            for event in news:
                if _selected(event["object"], query):
                    self._chunk(json.dumps(event).encode() + b"\n")
            if stopping:
                self._chunk(b"")
                return

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _send(self, code: int, body: Json) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _selected(pod: Json, query: dict[str, str]) -> bool:
    field, _, node = query.get("fieldSelector", "").partition("=")
    return field == "spec.nodeName" and pod["spec"]["nodeName"] == node
