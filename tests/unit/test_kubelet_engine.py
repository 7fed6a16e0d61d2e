"""The kubelet engine under the orchestration of a dump: an epoch whole, or nothing anywhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.kubelet import client, engine
from agent.host import addresses
from agent.model import ids
from agent.model.container import Container, Mount
from agent.node import dump as node_dump
from agent.store.repository import Store
from agent.volumes.base import Volume
from agent.volumes.memory import MemoryVolume
from tests import archives
from tests.fakes.kubelet import TOKEN, Certificates, Server, serving
from tests.faults import Fault, FaultyVolume
from tests.images import EMPTY

GROUP = ids.group_name("pod-1")
MEMBER = ids.member_name("c")
WHOLE = archives.tar(archives.entries())


@dataclasses.dataclass
class Field:
    """A kubelet, its directory, and a store."""

    server: Server
    folder: Path
    kubelet: client.Kubelet
    volume: Volume

    def engine(self, *mounts: Mount) -> engine.KubeletEngine:
        container = Container("f" * 64, "c", os.getpid(), "", mounts, "sha256:" + "cd" * 32)
        return engine.KubeletEngine(
            self.kubelet, "team", "pod-1", [container], directory=str(self.folder)
        )

    def dump(
        self,
        options: CaptureOptions | None = None,
        *,
        stop: bool = False,
        mounts: tuple[Mount, ...] = (),
        cancel: node_dump.Cancel | None = None,
    ) -> node_dump.DumpOutcome:
        return node_dump.dump(
            Store.open(self.volume, create=True),
            self.engine(*mounts),
            GROUP,
            [node_dump.Member(MEMBER, os.getpid())],
            options or CaptureOptions(deadline_s=20),
            stop=stop,
            cancel=cancel,
        )

    def answer(self, content: bytes) -> None:
        self.server.meanwhile = lambda: self.server.archive(self.folder, content)

    def assert_nothing_left(self) -> None:
        assert list(self.folder.iterdir()) == []
        assert [blob.name for blob in self.volume.list()] == EMPTY


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture
def field(certificates: Certificates, tmp_path: Path) -> Iterator[Field]:
    folder = tmp_path / "checkpoints"
    folder.mkdir(mode=0o700)
    (tmp_path / "token").write_text(TOKEN)
    with serving(certificates) as server:
        kubelet = client.Kubelet(
            "127.0.0.1",
            client.Trust.parse(f"ca:{certificates.ca}"),
            server.server_address[1],
            str(tmp_path / "token"),
        )
        yield Field(server, folder, kubelet, MemoryVolume())


def test_a_container_is_stored_and_its_archive_is_gone(field: Field) -> None:
    field.answer(WHOLE)
    empty = Mount("/cache", "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/cache", "bind")
    outcome = field.dump(mounts=(empty,))
    assert list(field.folder.iterdir()) == []
    (_, report) = outcome.members[0]
    assert report.pids == (1, 7)
    assert report.freeze_s == 0.001
    assert report.engine_facts["criu_frozen_s"] == 0.23
    assert outcome.stop_s == report.stop_s == report.engine_facts["call_s"]
    member = Store.open(field.volume).read(GROUP, outcome.epoch.epoch).member(MEMBER)
    known = member.facts()
    assert known["container"]["image_digest"] == "sha256:" + "cd" * 32
    assert known["skipped"] == [["/cache", "a volume, which a kubelet does not archive"]]
    assert known["container"]["addresses"] == addresses.of(os.getpid())
    assert (known["engine"], known["kernel"]) == ("kubelet", os.uname().release)
    member.check()


def test_a_second_archive_of_the_same_memory_costs_little(field: Field) -> None:
    field.answer(WHOLE)
    first = field.dump().epoch
    changed = archives.criu_images()
    changed |= {"pages-2.img": archives.pages(((32, 4, (2, 3, 41)),))}
    field.answer(archives.tar(archives.entries(changed)))
    second = field.dump().epoch
    assert first.new_bytes > 30 * 4096
    assert second.new_bytes == 4096


BROKEN = [
    (WHOLE[: len(WHOLE) // 2], "cut short"),
    (archives.tar((*archives.entries(), archives.Entry("../../etc/cron.d/x", b"x"))), "leads out"),
    (b"", "cut short"),
    (b"no archive" * 1000, "header is missing"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN)
def test_a_damaged_or_hostile_archive_leaves_nothing(
    field: Field, content: bytes, words: str
) -> None:
    field.answer(content)
    with pytest.raises(errors.Corrupt, match=words):
        field.dump()
    field.assert_nothing_left()


def test_the_archive_of_another_container_is_refused(field: Field) -> None:
    beside = archives.parts()
    beside["spec.dump"] = beside["spec.dump"].replace(b'"team"', b'"rich"')
    field.answer(archives.tar(archives.entries(parts_of=beside)))
    with pytest.raises(errors.Corrupt, match="rich/pod-1/c, not of team/pod-1/c"):
        field.dump()
    field.assert_nothing_left()


def test_a_failed_checkpoint_leaves_nothing(field: Field) -> None:
    def fail() -> None:
        field.server.archive(field.folder, WHOLE[:5000])
        field.server.status, field.server.body = 500, b"checkpointing failed (criu failed: x)"

    field.server.meanwhile = fail
    with pytest.raises(errors.CriuFailed):
        field.dump()
    field.assert_nothing_left()


def test_what_crius_own_log_says_is_told(field: Field, tmp_path: Path) -> None:
    for folder, told in (("f" * 64, True), ("e" * 64, False)):
        log = tmp_path / folder / "criu-dump.log"
        log.parent.mkdir()
        log.write_text("(00.1) Error (criu/sk-inet.c:1): inet: Connected TCP socket\n")
        field.server.status = 500
        field.server.body = f"failed: criu failed: type DUMP errno 0 path= {log}".encode()
        with pytest.raises(errors.CriuFailed) as caught:
            field.dump()
        assert ("Connected TCP socket" in caught.value.message) is told
        assert ("connections" in caught.value.hint) is told
    log.unlink()
    with pytest.raises(errors.CriuFailed, match="could not checkpoint"):
        field.dump()


def test_a_volume_that_fails_leaves_nothing_on_the_node(field: Field) -> None:
    field.answer(WHOLE)
    full = Fault(errors.VolumeFull("no room"))
    field.volume = FaultyVolume(
        field.volume, lambda _, method, name: full if method == "write" else None
    )
    with pytest.raises(errors.VolumeFull):
        field.dump()
    field.assert_nothing_left()


def test_what_reads_back_damaged_is_not_kept(field: Field) -> None:
    field.answer(WHOLE)
    store_it = field.volume
    field.volume = _Rotten(store_it)
    with pytest.raises(errors.Corrupt, match="reads back damaged"):
        field.dump()
    field.volume = store_it
    assert Store.open(store_it).epochs() == []


class _Rotten(FaultyVolume):
    """Loses a bit of every pack once its epoch is committed."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        raw = super().read(name, offset, length)
        committed = any(blob.name.endswith("/epoch") for blob in self.inner.list())
        if committed and name.startswith("packs/") and raw:
            return bytes([raw[0] ^ 1]) + raw[1:]
        return raw


def test_ending_the_processes_is_refused_before_anything_is_asked(field: Field) -> None:
    for options, stop in (
        (CaptureOptions(), True),
        (CaptureOptions(include=("/data",)), False),
    ):
        with pytest.raises(errors.InvalidInput, match="kubelet"):
            field.dump(options, stop=stop)
    assert field.server.asked == []
    field.assert_nothing_left()


def test_a_cancelled_dump_leaves_nothing(field: Field) -> None:
    cancel = node_dump.Cancel()

    def interrupted() -> None:
        field.server.archive(field.folder, WHOLE)
        cancel.set()

    field.server.meanwhile = interrupted
    with pytest.raises(errors.Interrupted):
        field.dump(cancel=cancel)
    field.assert_nothing_left()


def test_the_next_dump_removes_what_a_dead_one_left(field: Field) -> None:
    field.server.hang_up = True
    with pytest.raises(client.Lost):
        field.dump()
    late = field.server.archive(field.folder, WHOLE)
    assert engine.recover(str(field.folder)) == [late]
    field.assert_nothing_left()


def test_the_engine_does_not_restore(field: Field) -> None:
    with pytest.raises(errors.TargetUnsuitable, match="only dumps"):
        field.engine().restore(None, None, None)  # type: ignore[arg-type]
