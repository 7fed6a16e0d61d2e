"""The cluster for the tests: started once a session, or attached to when it runs already."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster import deployed
from tests.cluster.cluster import Cluster

HERE = Path(__file__).parent
TORCH_IMAGE = "localhost/torch:1"
BUILD_S = 5400  # from nothing, on two slow cores


_built = pytest.StashKey[str]()  # what went wrong, or nothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.geteuid() == 0 else "needs root"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
    # What fails without a cluster is to be seen before a quarter of an hour goes into building one.
    items.sort(key=lambda item: HERE in item.path.parents)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Builds what these tests need, before the first of them and outside of its time limit."""
    ours = HERE in item.path.parents
    if ours and _built not in item.session.stash and os.geteuid() == 0:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        assert capture is not None
        item.session.stash[_built] = ""
        try:
            with capture.global_and_fixture_disabled():
                _build(item.session)
        except (subprocess.SubprocessError, OSError) as error:
            item.session.stash[_built] = str(error)
    return (yield)


def _build(session: pytest.Session) -> None:
    ours = [item for item in session.items if HERE in item.path.parents]
    used = {name for item in ours for name in getattr(item, "fixturenames", ())}
    if not Cluster().running():
        subprocess.run([HERE / "build"], check=True, timeout=BUILD_S)
    if "agents" in used:
        deployed.build_image(Cluster())
    if "torch_image" in used:
        subprocess.run([HERE / "build", "torch"], check=True, timeout=BUILD_S)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The two-node cluster. Started if it does not run, and then ended with the tests; one that a
    person started (``scripts/cluster up``) is used and left running.
    """
    failure = request.session.stash.get(_built, "")
    if failure:
        pytest.fail(f"the cluster could not be built: {failure}", pytrace=False)
    cluster = Cluster()
    if cluster.running():
        yield cluster
        return
    with cluster:
        yield cluster


@pytest.fixture(scope="session")
def agents(cluster: Cluster) -> Cluster:
    """The cluster with the project on it, as users have it: an agent on every node, the admission
    service, rights and policies, all from this checkout.
    """
    deployed.deploy(cluster)
    return cluster


@pytest.fixture(autouse=True)
def _agents_are_ready(request: pytest.FixtureRequest) -> None:
    """A test that kills agents leaves the kubelet to start them again, in its own time."""
    if "agents" in request.fixturenames:
        agents: Cluster = request.getfixturevalue("agents")
        status = ("rollout", "status", "daemonset/ckpt-agent-node", "-n", deployed.NAMESPACE)
        agents.kubectl(*status, "--timeout=120s", timeout_s=130)


@pytest.fixture(scope="session")
def torch_image(cluster: Cluster) -> str:
    """The name of an image with PyTorch and ``/opt/trainer.py``, on both nodes."""
    if not all(node.has_image(TORCH_IMAGE) for node in cluster.nodes.values()):
        cluster.import_image(cluster.cache / "images/torch.tar")
    return TORCH_IMAGE


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own; it is deleted after the test, its pods at once."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    # Without it pods are refused, and it comes a moment after its namespace.
    cluster.wait_for(
        "the default ServiceAccount",
        lambda: cluster.get("serviceaccount", "default", "-n", name),
        30,
    )
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    # Its pods must not disturb the next test; the rest of it may take its time.
    cluster.kubectl("delete", "pods", "--all", "-n", name, "--timeout=90s")
