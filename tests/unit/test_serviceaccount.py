"""A pod's own identity against an API server over real TLS."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.kube import serviceaccount
from agent.kube.connection import Connection
from tests.fakes import nodeapi
from tests.fakes.authority import Authority


@pytest.fixture
def api(tmp_path: Path) -> Iterator[nodeapi.NodeApi]:
    authority = Authority("cluster")
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    (tmp_path / "namespace").write_text("ckpt-agent\n")
    (tmp_path / "token").write_text(nodeapi.OWN_TOKEN)
    with nodeapi.running(authority, tmp_path) as found:
        yield found


def environment(api: nodeapi.NodeApi) -> dict[str, str]:
    url = urllib.parse.urlsplit(api.url)
    return {
        "KUBERNETES_SERVICE_HOST": str(url.hostname),
        "KUBERNETES_SERVICE_PORT": str(url.port),
    }


@contextlib.contextmanager
def connected(api: nodeapi.NodeApi, folder: Path) -> Iterator[Connection]:
    account, namespace = serviceaccount.read(str(folder), environment(api))
    made = Connection(account, name="this cluster", namespace=namespace)
    with contextlib.closing(made):
        yield made


def test_objects_and_watches_come_and_a_new_token_is_used_at_once(
    api: nodeapi.NodeApi, tmp_path: Path
) -> None:
    api.put("one", "n1")
    query = {"fieldSelector": "spec.nodeName=n1"}
    with connected(api, tmp_path) as made:
        assert made.namespace == "ckpt-agent"
        assert made.identity().token == nodeapi.OWN_TOKEN
        found = made.call("GET", "/api/v1/pods", "pods", query=query)
        assert [each["metadata"]["name"] for each in found["items"]] == ["one"]
        review = {"apiVersion": "x", "kind": "TokenReview", "spec": {"token": "nobody's"}}
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        assert "error" in made.call("POST", path, "a review", body=review)["status"]
        watch = query | {"watch": "1", "resourceVersion": "0"}
        with made.events("/api/v1/pods", "pods", query=watch, silent_s=10) as events:
            assert next(iter(events))["object"]["metadata"]["name"] == "one"
        (tmp_path / "token").write_text("expired")
        with pytest.raises(errors.Unauthenticated):
            made.call("GET", "/api/v1/pods", "pods", query=query)
        (tmp_path / "token").write_text(nodeapi.OWN_TOKEN)
        made.call("GET", "/api/v1/pods", "pods", query=query)


def test_an_api_server_of_another_authority_is_not_told_the_token(
    api: nodeapi.NodeApi, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_bytes(Authority("another").pem)
    with connected(api, tmp_path) as made, pytest.raises(errors.Unreachable, match="certificate"):
        made.call("GET", "/api/v1/pods", "pods")


@pytest.mark.parametrize("lacks", ["token", "ca.crt", "namespace", "environment", "content"])
def test_what_lacks_is_named(api: nodeapi.NodeApi, tmp_path: Path, lacks: str) -> None:
    environ = environment(api)
    if lacks == "environment":
        environ = {}
    elif lacks == "content":
        (tmp_path / "token").write_text("\n")
    else:
        (tmp_path / lacks).unlink()
    with pytest.raises(errors.InvalidInput, match="ServiceAccount") as caught:
        serviceaccount.read(str(tmp_path), environ)
    assert {"environment": "environment", "content": "token"}.get(lacks, lacks) in str(caught.value)


def test_services_in_a_pod_load_nothing_that_reads_kubeconfigs_or_shows_progress() -> None:
    """Each takes its megabytes on every node."""
    names = (
        "agent.admission.serve",
        "agent.cli.main",
        "agent.engines.container.engine",
        "agent.engines.kubelet.engine",
        "agent.kube.events",
        "agent.kube.pods",
        "agent.kube.serviceaccount",
        "agent.node.serve",
        "agent.node.service",
        "agent.rpc.server",
    )
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}];"
        "print(sorted({'kubernetes', 'pydantic', 'requests', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"
