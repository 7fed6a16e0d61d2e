"""export and import on the command line against a cluster, over real TLS and port-forwards."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import errors
from agent.cli import exits, main
from tests import archives
from tests.fakes import nodeagent
from tests.fakes.authority import Authority
from tests.unit import test_cli_pods
from tests.unit.test_agent_client import connected
from tests.unit.test_cli import Ran, checked
from tests.unit.test_cli_pods import World

authority, world = test_cli_pods.authority, test_cli_pods.world


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        status = main.run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return run


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.tar"
    path.write_bytes(archives.tar(archives.entries()))
    return path


def test_a_file_goes_there_and_comes_back(
    run: Callable[..., Ran], world: World, tar: Path, tmp_path: Path
) -> None:
    there = run("import", tar, "-o", "json", "-n", "default", "--name", "copy").document()
    assert there["name"] == world.agents.images[0].name
    ((_, request),) = world.called("ImportImage")
    assert (request.namespace, request.group) == ("default", "copy")
    assert request.size_bytes == tar.stat().st_size
    back = tmp_path / "back.tar"
    ran = run("export", "copy", back, "-o", "json", "-n", "default", "--member", "c")
    assert ran.document()["sizeBytes"] == tar.stat().st_size
    assert "/volume-0.tar" in ran.err
    assert back.read_bytes() == tar.read_bytes()
    image = run("export", "copy", tmp_path / "x.oci", "-n", "default", "--format", "oci")
    assert image.status == exits.DONE
    assert world.called("ExportImage")[0][1].member == "c"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (errors.Corrupt("a pack is damaged"), exits.DATA),
        (errors.VolumeGone("the volume is gone"), exits.VOLUME),
        (errors.Forbidden("ada may not export images"), exits.REFUSED),
    ],
)
@pytest.mark.parametrize("form", ["archive", "oci"])
def test_of_an_export_that_fails_midway_no_file_is_left(
    run: Callable[..., Ran],
    world: World,
    tmp_path: Path,
    failure: errors.CkptError,
    status: int,
    form: str,
) -> None:
    world.agents.add_image("job", 0)
    world.agents.fails["ExportImage.late"] = failure
    folder = tmp_path / "out"
    folder.mkdir()
    ran = run("export", "job", folder / "a", "-n", "default", "-o", "json", "--format", form)
    assert (ran.status, ran.out) == (status, "")
    assert checked(json.loads(ran.err))["code"] == failure.code
    assert list(folder.iterdir()) == []


def test_an_agent_that_ends_midway_is_followed_by_the_next(
    run: Callable[..., Ran], world: World, tmp_path: Path
) -> None:
    name = world.agents.add_image("job", 0)
    world.agents.archives[name] = b"x" * 100_000

    world.agents.fails["ExportImage.late"] = errors.Unreachable("the agent ends")
    ran = run("export", "job", tmp_path / "a", "-n", "default")
    assert ran.status == exits.ENVIRONMENT
    assert {node for node, _ in world.called("ExportImage")} == {"n1", "n2"}
    assert not (tmp_path / "a").exists()


def test_what_is_no_archive_is_not_sent(
    run: Callable[..., Ran], world: World, tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 10_000)
    assert run("import", path, "-n", "default").status == exits.DATA
    assert run("import", tmp_path / "absent", "-n", "default").status == exits.REFUSED
    assert world.called("ImportImage") == []


def test_an_import_whose_answer_is_lost_may_have_been_stored_and_is_no_case_for_a_retry() -> None:
    ours, agents = Authority("ckpt-agent"), nodeagent.Cluster(tokens={"good"})
    content = b"x" * 100_000
    seen = threading.Event()

    def end() -> None:
        agents.ends()
        assert seen.wait(30)

    agents.fails["ImportImage.late"] = end
    with connected(agents, ours, ours) as agent:
        with pytest.raises(errors.Failed, match="may have been stored") as caught:
            agent.take_in("default", io.BytesIO(content), len(content))
        seen.set()
        assert not caught.value.retryable
        assert "list" in caught.value.hint


def test_wrong_usage(run: Callable[..., Ran], world: World, tmp_path: Path) -> None:
    assert run("export", "job", tmp_path / "a", "--reference", "x/y").status == exits.USAGE
    assert run("export", "job", tmp_path / "a", "--format", "zip").status == exits.USAGE
    ran = run(
        *("export", "job", tmp_path / "a", "-n", "default"),
        *("--format", "oci", "--reference", "NoRegistry"),
    )
    assert ran.status == exits.REFUSED
    assert world.called("ExportImage") == []
