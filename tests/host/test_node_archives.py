"""Archives over the node API: real gRPC and TLS, a real store; nothing of a failure stays."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from agent import errors
from agent.host import spool
from agent.model.archives import Exported, Exporting
from agent.node import transfers
from agent.node.dump import Cancel
from agent.rpc import client, results, server
from agent.rpc.v1 import node_pb2, node_pb2_grpc
from tests import archives
from tests.host import nodes
from tests.host.nodes import SERVER_NAME, VERBS, Node, wait_for


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    # No process is touched here: an engine would be a mistake.
    with nodes.running(tmp_path, None) as found:
        yield found


def take_in(agent: client.Agent, content: bytes, **more: object) -> results.Image:
    return agent.take_in("default", io.BytesIO(content), len(content), **more)  # type: ignore[arg-type]


def exported(
    agent: client.Agent, image: str, member: str = ""
) -> tuple[bytes, Exporting, Exported]:
    told: list[Exporting] = []
    content: list[bytes] = []
    done = agent.export("default", image, member, begun=told.append, content=content.append)
    return b"".join(content), told[0], done


def members(raw: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info))}


def stub_of(node: Node, stack_token: str) -> tuple[node_pb2_grpc.NodeStub, tuple[tuple[str, str]]]:
    channel = grpc.secure_channel(
        f"localhost:{node.server.token_port}",
        grpc.ssl_channel_credentials(node.authority.pem),
        options=(("grpc.ssl_target_name_override", SERVER_NAME),),
    )
    return node_pb2_grpc.NodeStub(channel), (("authorization", f"Bearer {stack_token}"),)


def nothing_stays(node: Node) -> None:
    wait_for(lambda: not node.operations.running())
    work = node.folder / "work"
    assert not work.exists() or list(work.iterdir()) == []
    for root in (node.folder / "stores", node.folder / "fast"):
        packs = [each for each in root.rglob("packs/**/*") if each.is_file()]
        assert packs == []
        assert list(root.rglob("epochs/**/group*")) == []


def test_an_archive_comes_in_and_goes_out_the_same(node: Node) -> None:
    content = archives.tar(archives.entries())
    with node.caller(*VERBS) as agent:
        sent: list[int] = []
        image = take_in(agent, content, progress=sent.append)
        assert (image.group, image.members, image.storage) == ("pod-1", ("c",), "default")
        assert sent[-1] == len(content)
        name = f"{image.group}@{image.epoch}"
        assert agent.verify("default", name).good
        raw, about, done = exported(agent, "pod-1")
        assert (about.image, about.member) == (name, "c")
        assert done.size_bytes == len(raw)
        assert about.expected_bytes <= len(raw)
        second = take_in(agent, raw, group="copy", storage="fast")
        assert (second.group, second.storage) == ("copy", "fast")
        assert members(exported(agent, "copy", "c")[0]) == members(raw)
        with pytest.raises(errors.NotFound):
            exported(agent, "copy", "d")
        with pytest.raises(errors.NotFound):
            exported(agent, "none")
    work = node.folder / "work"
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 100_000,
        archives.tar(archives.entries())[:30_000],
        archives.tar((*archives.entries(), archives.Entry("../../evil", b"x"))),
    ],
    ids=["no archive", "cut short", "hostile"],
)
def test_what_nobody_should_read_is_refused_and_nothing_of_it_stays(
    node: Node, content: bytes
) -> None:
    with node.caller(*VERBS) as agent, pytest.raises(errors.Corrupt):
        take_in(agent, content)
    nothing_stays(node)


def test_content_of_another_length_than_announced_is_refused(node: Node) -> None:
    token = node.api.add_user("ada", ("create", "default"))
    stub, metadata = stub_of(node, token)
    content = archives.tar(archives.entries())

    def messages(announced: int) -> Iterator[node_pb2.ImportImageRequest]:
        yield node_pb2.ImportImageRequest(namespace="default", size_bytes=announced)
        for at in range(0, len(content), 4096):
            yield node_pb2.ImportImageRequest(content=content[at : at + 4096])

    for announced in (len(content) - 1, len(content) + 1, 0, -5):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ImportImage(messages(announced), timeout=30, metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        stub.ImportImage(iter(()), timeout=30, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    nothing_stays(node)


def test_whoever_says_nothing_holds_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, ended = threading.Event(), threading.Event()

    def messages() -> Iterator[node_pb2.ImportImageRequest]:
        silent.set()
        ended.wait(30)
        yield from ()

    # Nobody known: not even that long.
    stub, nobody = stub_of(node, "expired")
    with pytest.raises(grpc.RpcError) as caught:
        stub.ImportImage(messages(), timeout=30, metadata=nobody)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    monkeypatch.setattr(server, "_FIRST_S", 0.3)
    stub, metadata = stub_of(node, node.api.add_user("ada", ("create", "default")))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ImportImage(messages(), timeout=30, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert silent.is_set()
    ended.set()
    nothing_stays(node)


def test_a_disk_without_room_to_spare_takes_nothing(node: Node, tmp_path: Path) -> None:
    with node.caller(*VERBS) as agent, pytest.raises(errors.EnvironmentUnfit, match="no room"):
        agent.take_in("default", io.BytesIO(b"x"), 1 << 50)
    nothing_stays(node)
    room = os.statvfs(tmp_path)
    free_percent = 100 * room.f_bavail // room.f_blocks
    with spool.spooled(str(tmp_path / "a"), 1, [b"x"], kept_free_percent=free_percent // 2) as fd:
        assert os.pread(fd, 2, 0) == b"x"
        assert os.listdir(tmp_path / "a") == []
    # There is room, but not as much as has to stay.
    with (
        pytest.raises(errors.EnvironmentUnfit, match="no room"),
        spool.spooled(str(tmp_path / "a"), 1, [b"x"], kept_free_percent=99),
    ):
        pass


def test_a_caller_who_leaves_or_dawdles_is_given_up(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archives.tar(archives.entries())
    begun, given_up, cancel = threading.Event(), threading.Event(), threading.Event()

    class Told(Cancel):
        """As the agent's own, which knows then that nobody waits."""

        def __init__(self, *args: str) -> None:
            super().__init__(*args)
            begun.set()

        def set(self) -> None:
            super().set()
            given_up.set()

    class Slow(io.BytesIO):
        """Says nothing more until the agent has given it up."""

        def read(self, count: int | None = -1) -> bytes:
            if self.tell() > 8192:
                assert begun.wait(30)
                cancel.set()
                assert given_up.wait(30)
            return super().read(4096)

    monkeypatch.setattr(transfers, "Cancel", Told)
    with node.caller(*VERBS) as agent:
        with pytest.raises(errors.Interrupted):
            agent.take_in("default", Slow(content), len(content), cancel=cancel)
        nothing_stays(node)
        monkeypatch.setattr(transfers, "_UPLOAD_S", 0.3)
        given_up.clear()
        with pytest.raises((errors.Unreachable, errors.DeadlineExceeded)):
            agent.take_in("default", Slow(content), len(content))
    nothing_stays(node)


def test_a_slow_reader_is_no_operation_that_a_dump_would_wait_for(node: Node) -> None:
    with node.caller(*VERBS) as agent:
        take_in(agent, archives.tar(archives.entries()))
        first = threading.Event()
        left = threading.Event()

        def content(piece: bytes) -> None:
            if not first.is_set():
                first.set()
                assert left.wait(30)

        reader = threading.Thread(
            target=lambda: agent.export(
                "default", "pod-1", begun=lambda about: None, content=content
            )
        )
        reader.start()
        assert first.wait(30)
        assert not node.operations.running()
        left.set()
        reader.join(30)


def test_each_needs_its_own_right_and_import_is_asked_before_anything_is_sent(node: Node) -> None:
    content = archives.tar(archives.entries())
    with node.caller("create") as agent:
        image = take_in(agent, content)
    name = f"pod-1@{image.epoch}"
    others = [verb for verb in VERBS if verb != "export"]
    with node.caller(*others, user="bob") as agent, pytest.raises(errors.Forbidden, match="export"):
        exported(agent, name)
    assert node.api.reviews[-1]["resourceAttributes"]["name"] == name

    class Untouched(io.BytesIO):
        taken = 0

        def read(self, count: int | None = -1) -> bytes:
            Untouched.taken += 1
            return super().read(count)

    others = [verb for verb in VERBS if verb != "create"]
    with node.caller(*others, user="eve") as agent:
        with pytest.raises(errors.Forbidden, match="create"):
            agent.take_in("default", Untouched(content * 100), len(content) * 100)
        with pytest.raises(errors.Forbidden):
            agent.take_in("kube-system", io.BytesIO(content), len(content))
        with pytest.raises(errors.InvalidInput):
            agent.take_in("../default", io.BytesIO(content), len(content))
    assert Untouched.taken < 100
    with node.connected(token="expired") as agent, pytest.raises(errors.Unauthenticated):
        take_in(agent, content)


def test_a_damaged_image_is_not_given_out_as_a_whole_one(node: Node) -> None:
    with node.caller(*VERBS) as agent:
        take_in(agent, archives.tar(archives.entries()))
        (pack,) = (each for each in node.folder.rglob("packs/**/*") if each.is_file())
        raw = bytearray(pack.read_bytes())
        raw[len(raw) // 3] ^= 0xFF
        pack.write_bytes(raw)
        with pytest.raises(errors.DataError):
            exported(agent, "pod-1")


def test_what_a_stranger_wrote_is_not_restored_with_the_agents_rights(node: Node) -> None:
    with node.caller(*VERBS) as agent:
        take_in(agent, archives.tar(archives.entries()))
        with pytest.raises(errors.RestoreConflict, match="imported"):
            agent.restore("default", "pod-1", "counter", pod_uid="", deadline_s=10.0)
