"""The webhook's server over real TLS: reviews, probes, bad clients, new certificates, the end."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent import errors
from agent.admission import certificates, keeper, mutate, review, rotation, serve, server
from agent.admission.certificates import Pair
from agent.host.clock import Deadline
from agent.model import optin
from agent.model.intent import Intent
from tests import jsonpatch
from tests.fakes.objects import Objects

IMAGE = "registry.example/ckpt-agent:1"
POD = {
    "metadata": {"generateName": "job-", "labels": {optin.LABEL: optin.ENABLED}},
    "spec": {"containers": [{"name": "main", "image": "i", "command": ["/bin/work"]}]},
}
DAY_S = 86400.0


def no_intents(namespace: str, name: str) -> None:
    """No JobSet shall come back."""


def asking(pod: Any = POD, **more: Any) -> dict[str, Any]:
    request = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "team",
        "operation": "CREATE",
        "object": pod,
        "dryRun": False,
    }
    return {"apiVersion": review.API_VERSION, "kind": "AdmissionReview", "request": request | more}


def answer(body: Any) -> dict[str, Any]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = json.loads(review.respond(text, image=IMAGE, intents=no_intents))
    assert (found["apiVersion"], found["kind"]) == (review.API_VERSION, "AdmissionReview")
    return dict(found["response"])


# Reviews.


def test_an_opted_in_pod_is_answered_with_a_patch() -> None:
    response = answer(asking())
    assert response["uid"] == "705ab4f5-6393-11e8-b7cc-42010a800002"
    assert response["allowed"] is True
    assert response["patchType"] == "JSONPatch"
    after = jsonpatch.apply(POD, json.loads(base64.b64decode(response["patch"])))
    assert after["spec"]["containers"][0]["command"][0] == "/.ckpt-agent/hold"


def test_a_dry_run_is_answered_alike() -> None:
    assert answer(asking(dryRun=True)) == answer(asking())


@pytest.mark.parametrize(
    "request_",
    [
        asking({"metadata": {}, "spec": {}}),
        asking(operation="UPDATE"),
        asking(subResource="ephemeralcontainers"),
        asking(resource={"group": "apps", "version": "v1", "resource": "deployments"}),
        asking(resource=None),
        asking(None),
    ],
)
def test_what_is_not_the_creation_of_an_opted_in_pod_is_allowed_without_a_patch(
    request_: Any,
) -> None:
    assert answer(request_).keys() == {"uid", "allowed"}


def test_a_pod_that_makes_no_sense_is_allowed_with_a_warning() -> None:
    broken = {"metadata": {"labels": {optin.LABEL: optin.ENABLED}}, "spec": []}
    response = answer(asking(broken))
    assert response["allowed"] is True
    assert "patch" not in response
    assert "spec of the pod is not an object" in response["warnings"][0]


def test_a_defect_in_the_webhook_keeps_no_pod_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret of a job")

    monkeypatch.setattr(mutate, "mutate", defect)
    response = answer(asking())
    assert response["allowed"] is True
    assert "patch" not in response
    assert "internal error" in response["warnings"][0]
    assert "secret" not in response["warnings"][0]


MALFORMED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"[" * 100_000,
    json.dumps({"apiVersion": review.API_VERSION, "kind": "AdmissionReview"}).encode(),
    json.dumps(asking() | {"apiVersion": "admission.k8s.io/v1beta1"}).encode(),
    json.dumps(asking() | {"kind": "Pod"}).encode(),
    json.dumps(asking(uid="")).encode(),
    json.dumps(asking(uid=7)).encode(),
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:20]))
def test_what_is_no_review_is_refused(body: bytes) -> None:
    with pytest.raises(errors.InvalidInput):
        review.respond(body, image=IMAGE, intents=no_intents)


def of_a_jobset(owner: str = "train-worker-0", **labels: str) -> Any:
    metadata: Any = POD["metadata"]
    marks = {
        "jobset.sigs.k8s.io/jobset-name": "train",
        "jobset.sigs.k8s.io/replicatedjob-name": "worker",
        "jobset.sigs.k8s.io/job-index": "0",
        **labels,
    }
    owners = [{"kind": "Job", "name": owner, "controller": True}]
    more = {"labels": {**metadata["labels"], **marks}, "ownerReferences": owners}
    return {**POD, "metadata": {**metadata, **more}}


def test_a_pod_of_a_jobset_that_shall_come_back_waits_for_its_image() -> None:
    asked = []

    def intents(namespace: str, name: str) -> Intent:
        asked.append((namespace, name))
        return Intent("jobset.train@20260131-235959-0a1b2c")

    body = json.dumps(asking(of_a_jobset())).encode()
    response = json.loads(review.respond(body, image=IMAGE, intents=intents))["response"]
    after = jsonpatch.apply(of_a_jobset(), json.loads(base64.b64decode(response["patch"])))
    assert after["metadata"]["annotations"][optin.RESTORE] == "jobset.train@20260131-235959-0a1b2c"
    assert "warnings" not in response
    # Who is not opted in, or is of no JobSet, costs no look at one.
    for pod in (POD, of_a_jobset(**{optin.LABEL: "no"})):
        review.respond(json.dumps(asking(pod)).encode(), image=IMAGE, intents=intents)
    assert asked == [("team", "train")]


def waits(pod: Any, intent: Intent) -> bool:
    body = json.dumps(asking(pod)).encode()
    text = review.respond(body, image=IMAGE, intents=lambda namespace, name: intent)
    response = json.loads(text)["response"]
    assert "warnings" not in response
    after = jsonpatch.apply(pod, json.loads(base64.b64decode(response["patch"])))
    return optin.RESTORE in after["metadata"].get("annotations", {})


def test_labels_alone_make_no_pod_one_that_waits() -> None:
    intent = Intent("jobset.train@20260131-235959-0a1b2c")
    assert waits(of_a_jobset(), intent)
    assert not waits(of_a_jobset("mine"), intent)
    assert not waits(of_a_jobset(**{"jobset.sigs.k8s.io/job-index": "1"}), intent)


def test_a_warning_is_said_once() -> None:
    metadata: Any = POD["metadata"]
    hooked = {**POD, "metadata": {**metadata, "annotations": {optin.HOOKS: "{"}}}
    (warning,) = answer(asking(hooked))["warnings"]
    assert optin.HOOKS in warning


def test_a_pod_whose_jobset_cannot_be_looked_at_is_held_and_its_maker_warned() -> None:
    def intents(namespace: str, name: str) -> None:
        raise errors.Forbidden(f"JobSet {namespace}/{name}: not for you")

    body = json.dumps(asking(of_a_jobset())).encode()
    response = json.loads(review.respond(body, image=IMAGE, intents=intents))["response"]
    after = jsonpatch.apply(of_a_jobset(), json.loads(base64.b64decode(response["patch"])))
    assert after["spec"]["containers"][0]["command"][0] == "/.ckpt-agent/hold"
    assert optin.RESTORE not in after["metadata"].get("annotations", {})
    assert "not for you" in response["warnings"][0]


# The server.


def authority() -> Pair:
    return certificates.new_authority(time.time(), DAY_S)


def leaf(ca: Pair) -> Pair:
    return certificates.new_leaf(ca, keeper.names("ckpt-agent"), time.time(), DAY_S)


@contextlib.contextmanager
def serving(pair: Pair, respond: Callable[[bytes], bytes] | None = None) -> Iterator[server.Server]:
    made = server.Server(
        0, respond or functools.partial(review.respond, image=IMAGE, intents=no_intents)
    )
    made.present(pair)
    made.ready = True
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.stop(Deadline.after(5))
        made.server_close()
        thread.join()


def client(port: int, ca: Pair, *, host: str = "127.0.0.1") -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cadata=ca.certificate.decode())
    context.check_hostname = False  # the names are tested with the certificates
    return http.client.HTTPSConnection(host, port, timeout=60, context=context)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.fixture(scope="module")
def ca() -> Pair:
    return authority()


@pytest.fixture
def running(ca: Pair) -> Iterator[server.Server]:
    with serving(leaf(ca)) as made:
        yield made


@pytest.fixture
def connection(running: server.Server, ca: Pair) -> Iterator[http.client.HTTPSConnection]:
    with contextlib.closing(client(running.server_port, ca)) as made:
        yield made


def test_reviews_are_answered_one_after_another_on_one_connection(
    connection: http.client.HTTPSConnection,
) -> None:
    body = json.dumps(asking()).encode()
    for _ in range(3):
        status, text = ask(connection, "POST", "/mutate?timeout=3s", body)
        assert status == 200
        assert json.loads(text)["response"]["patchType"] == "JSONPatch"
        assert connection.sock is not None, "the connection was kept"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
def test_a_cluster_of_either_family_reaches_it(running: server.Server, ca: Pair) -> None:
    for host in ("127.0.0.1", "::1"):
        with contextlib.closing(client(running.server_port, ca, host=host)) as made:
            assert ask(made, "GET", "/healthz")[0] == 200


def test_it_is_ready_only_when_told(
    running: server.Server, connection: http.client.HTTPSConnection
) -> None:
    assert ask(connection, "GET", "/readyz") == (200, b"ok\n")
    running.ready = False
    assert ask(connection, "GET", "/readyz")[0] == 503
    assert ask(connection, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:20]))
def test_a_malformed_review_gets_a_reason_and_the_next_client_an_answer(
    running: server.Server, connection: http.client.HTTPSConnection, ca: Pair, body: bytes
) -> None:
    status, text = ask(connection, "POST", "/mutate", body)
    assert status == 400
    assert b"AdmissionReview" in text
    with contextlib.closing(client(running.server_port, ca)) as other:
        assert ask(other, "POST", "/mutate", json.dumps(asking()).encode())[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/mutate", {}, 404),
        ("POST", "/other", {"Content-Length": "0"}, 404),
        ("POST", "/mutate", {}, 411),
        ("POST", "/mutate", {"Content-Length": "-1"}, 411),
        ("POST", "/mutate", {"Content-Length": "\u0663".encode().decode("latin-1")}, 411),
        ("POST", "/mutate", {"Content-Length": str((4 << 20) + 1)}, 413),
        ("POST", "/mutate", {"Content-Length": "9" * 5000}, 413),
        ("DELETE", "/mutate", {}, 501),
    ],
)
def test_requests_that_are_not_ours_are_refused(
    connection: http.client.HTTPSConnection,
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
) -> None:
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == status


def test_clients_that_stall_hold_up_nobody(
    running: server.Server, ca: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never shakes hands, one that speaks no TLS, one that never ends its request."""
    context = ssl.create_default_context(cadata=ca.certificate.decode())
    begun = b"POST /mutate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:

        def connected() -> socket.socket:
            address = ("127.0.0.1", running.server_port)
            return stack.enter_context(socket.create_connection(address, timeout=60))

        def shaken() -> ssl.SSLSocket:
            made = context.wrap_socket(connected(), server_hostname="localhost")
            return stack.enter_context(made)

        # Longer than those need who do not stall, however busy the machine is.
        monkeypatch.setattr(server, "_REQUEST_S", 60.0)
        connected()
        connected().sendall(b"GET / HTTP/1.1\r\n\r\n")
        shaken().sendall(begun)
        slow = shaken()
        with contextlib.closing(client(running.server_port, ca)) as good:
            assert ask(good, "POST", "/mutate", json.dumps(asking()).encode())[0] == 200
        monkeypatch.setattr(server, "_REQUEST_S", 0.5)
        silent = connected()
        slow.sendall(begun)
        for stalled in (silent, slow):
            with contextlib.suppress(ConnectionError):
                assert stalled.recv(100) == b"", "it was closed when its time was over"


def test_more_clients_than_there_is_room_for_wait_and_are_served(
    running: server.Server, ca: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of them shake hands in one process, with itself.
    monkeypatch.setattr(server, "_REQUEST_S", 60.0)
    body = json.dumps(asking()).encode()
    statuses: list[int] = []

    def one() -> None:
        with contextlib.closing(client(running.server_port, ca)) as made:
            statuses.append(ask(made, "POST", "/mutate", body)[0])

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 200


def test_a_new_certificate_is_shown_without_an_interruption(
    running: server.Server, connection: http.client.HTTPSConnection, ca: Pair
) -> None:
    assert ask(connection, "GET", "/healthz")[0] == 200
    other = authority()
    running.present(leaf(other))
    assert ask(connection, "GET", "/healthz")[0] == 200, "who is connected stays so"
    with contextlib.closing(client(running.server_port, other)) as made:
        assert ask(made, "GET", "/healthz")[0] == 200
    with (
        contextlib.closing(client(running.server_port, ca)) as made,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ask(made, "GET", "/healthz")


def test_a_server_that_is_about_to_stop_sends_its_clients_elsewhere(
    running: server.Server, connection: http.client.HTTPSConnection
) -> None:
    assert ask(connection, "GET", "/healthz")[0] == 200
    assert connection.sock is not None
    running.drain()
    assert ask(connection, "GET", "/readyz")[0] == 503
    assert connection.sock is None, "closed by the server, after the answer"


def test_stopping_lets_a_request_end(ca: Pair) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(body: bytes) -> bytes:
        begun.set()
        assert go_on.wait(60)
        return b"{}"

    answers: list[tuple[int, bytes]] = []
    with (
        serving(leaf(ca), slowly) as made,
        contextlib.closing(client(made.server_port, ca)) as asking_,
    ):
        thread = threading.Thread(
            target=lambda: answers.append(ask(asking_, "POST", "/mutate", b"x"))
        )
        thread.start()
        assert begun.wait(60)
        threading.Timer(0.2, go_on.set).start()
        made.stop(Deadline.after(60))
        thread.join()
    assert answers == [(200, b"{}")]


# The whole service, on a store of objects instead of a cluster.


def options(**more: Any) -> serve.Options:
    policy = rotation.Policy(30 * DAY_S, 10 * DAY_S, 365 * DAY_S, 90 * DAY_S, 3600.0)
    return serve.Options(
        namespace="ckpt-agent",
        image=IMAGE,
        holder="one",
        port=0,
        policy=policy,
        period_s=0.05,
        drain_s=0.01,
        **more,
    )


@contextlib.contextmanager
def service(cluster: Objects) -> Iterator[serve.Admission]:
    made, stop = serve.Admission(cluster, options()), threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def status_of(port: int, path: str) -> int:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # as the kubelet's probes
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
    ) as made:
        return ask(made, "GET", path)[0]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_replica_gets_ready_by_itself_and_lets_go_when_it_ends() -> None:
    cluster = Objects()
    with service(cluster) as made:
        port = made.server.server_port
        until(lambda: status_of(port, "/readyz") == 200)
        text = cluster.found["/api/v1/namespaces/ckpt-agent/configmaps/ckpt-agent-ca"]["data"]
        with contextlib.closing(client(port, Pair(text["ca.crt"].encode()))) as asking_:
            assert ask(asking_, "POST", "/mutate", json.dumps(asking()).encode())[0] == 200
    path = "/apis/coordination.k8s.io/v1/namespaces/ckpt-agent/leases/ckpt-agent-admission"
    assert cluster.found[path]["spec"]["holderIdentity"] == ""


def test_a_replica_lives_but_is_not_ready_while_the_cluster_does_not_answer() -> None:
    cluster = Objects()
    cluster.fail_at = 0
    with service(cluster) as made:
        port = made.server.server_port
        until(lambda: cluster.fail_at is not None and cluster.fail_at < -10)
        assert status_of(port, "/healthz") == 200
        assert status_of(port, "/readyz") == 503
        cluster.fail_at = None
        until(lambda: status_of(port, "/readyz") == 200)
        cluster.fail_at = 0
        until(lambda: cluster.fail_at is not None and cluster.fail_at < -10)
        assert status_of(port, "/readyz") == 200, "it goes on with what it has"


def test_the_image_for_pods_is_the_services_own() -> None:
    cluster = Objects()
    path = "/api/v1/namespaces/ckpt-agent/pods/one"
    cluster.put(path, {"metadata": {}, "spec": {"containers": [{"name": "a", "image": "i:7"}]}})
    assert serve.own_image(cluster, "ckpt-agent", "one") == "i:7"
    with pytest.raises(errors.NotFound):
        serve.own_image(cluster, "ckpt-agent", "two")
