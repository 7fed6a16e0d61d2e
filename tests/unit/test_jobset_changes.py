"""Changes of JobSets by somebody who is stopped at the worst moment."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import pytest

from agent import errors
from agent.kube import connection, jobsets
from agent.model import optin
from tests.fakes import apiserver
from tests.fakes.authority import Authority

UID = "uid-of-train"


@pytest.fixture
def api(tmp_path: pathlib.Path) -> Iterator[tuple[apiserver.ApiServer, connection.Connection]]:
    authority = Authority("cluster")
    with apiserver.running(authority, tmp_path) as server:
        server.jobsets["default", "train"] = {
            "metadata": {"name": "train", "namespace": "default", "uid": UID},
            "spec": {"suspend": False},
        }
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig", authority)
        with contextlib.closing(connection.connect(kubeconfig, None)) as made:
            yield server, made


def once(act: Callable[[], object]) -> Callable[[], None]:
    """A guard that lets pass, after which its owner is stopped while somebody else acts; asked
    again, it knows.
    """
    asked: list[object] = []

    def check() -> None:
        if asked:
            raise errors.Unreachable("another one leads")
        asked.append(None)
        act()

    return check


@pytest.mark.parametrize("fenced", [False, True])
def test_what_was_about_to_be_sent_changes_nothing_once_another_has_gone_on(
    api: tuple[apiserver.ApiServer, connection.Connection], fenced: bool
) -> None:
    """Also if that other one only looked, and found that nothing is to be changed."""
    server, here = api

    def other() -> None:
        if fenced:
            jobsets.fence(here, "default", "train", UID)
        else:
            jobsets.change(here, "default", "train", UID, annotations={optin.RESTORE: None})

    stopped = here.guarded(once(other))
    with pytest.raises(errors.Unreachable, match="another one leads"):
        jobsets.change(stopped, "default", "train", UID, suspend=True)
    found = server.jobsets["default", "train"]
    assert found["spec"] == {"suspend": False}
    assert not found["metadata"].get("annotations")


def test_a_controller_that_tells_its_status_meanwhile_is_no_obstacle(
    api: tuple[apiserver.ApiServer, connection.Connection],
) -> None:
    server, here = api
    told: list[str] = []

    def status() -> None:
        if len(told) < 3:
            told.append(server.jobsets["default", "train"]["metadata"].get("resourceVersion", "1"))
            server.jobsets["default", "train"]["metadata"]["resourceVersion"] = f"9{len(told)}"

    jobsets.change(here.guarded(status), "default", "train", UID, suspend=True)
    assert len(told) == 3
    assert server.jobsets["default", "train"]["spec"] == {"suspend": True}
    with pytest.raises(errors.Conflict):
        jobsets.change(here, "default", "train", "of another one", suspend=False)
    with pytest.raises(errors.NotFound):
        jobsets.change(here, "default", "none", UID, suspend=False)
