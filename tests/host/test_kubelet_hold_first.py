"""A kubelet that is slow, or not waited for, while the network is held: the hold ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, CaptureReport, Disposition
from agent.engines.kubelet import client, engine, holdfirst, resume
from agent.host import clock, endpoints, namespaces, netfilter, proc
from agent.model.container import Container
from tests import archives
from tests.fakes.kubelet import TOKEN, Certificates, Server, serving
from tests.host.image import MemoryImage

WHOLE = archives.tar(archives.entries())
OTHERS = frozenset({"10.77.0.9"})


@pytest.fixture
def container() -> Iterator[Container]:
    """A process with a network of its own."""
    script = "ip link set lo up && echo up && exec sleep 120"
    popen = subprocess.Popen(["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE)
    assert popen.stdout
    try:
        assert popen.stdout.readline() == b"up\n"
        yield Container("f" * 64, "c", popen.pid, "")
    finally:
        popen.kill()
        popen.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "checkpoints").mkdir(mode=0o700)
    (tmp_path / "token").write_text(TOKEN)
    with serving(Certificates(tmp_path / "pki")) as made:
        yield made


class Cut:
    """Notes what it is asked, and gives up when that is wanted."""

    def __init__(self, tables: Callable[[], set[str]]) -> None:
        self._tables = tables
        self.given_up = threading.Event()
        self.told: list[tuple[str, bool]] = []
        self.failed: BaseException | None = None

    def _note(self, stage: str) -> None:
        self.told.append((stage, bool(self._tables())))

    def check(self) -> None:
        if self.given_up.is_set():
            raise errors.DumpFailed("the epoch was given up")

    def fail(self, failure: BaseException) -> None:
        self.failed = failure

    def ready(self) -> None:
        self._note("ready")

    def poised(self, wait_s: float) -> bool:
        self._note("poised")
        return len(self.told) > 2

    def frozen(self) -> None:
        self._note("frozen")

    def held(self) -> None:
        self._note("held")

    def captured(self) -> Disposition:
        self._note("captured")
        return Disposition.RESUME

    def released(self) -> None:
        self._note("released")

    def running(self) -> None:
        self._note("running")


class Field:
    """An engine for the container, by a kubelet that answers as the test says."""

    def __init__(self, folder: Path, server: Server, container: Container) -> None:
        self.server, self.container = server, container
        self.folder = folder / "checkpoints"
        self.image = MemoryImage()
        self.cut = Cut(self.tables)
        kubelet = client.Kubelet(
            "127.0.0.1",
            client.Trust.parse(f"ca:{folder / 'pki' / 'ca.crt'}"),
            server.server_address[1],
            str(folder / "token"),
        )
        self._engine = engine.KubeletEngine(
            kubelet, "team", "pod-1", [container], directory=str(self.folder)
        )

    def tables(self) -> set[str]:
        who = proc.identity(self.container.pid)
        return namespaces.inside(who, ["net"], lambda: netfilter.tables("ckpt-agent-"))

    def capture(self) -> CaptureReport:
        options = CaptureOptions(deadline_s=60, within=OTHERS, hold_first=True)
        return self._engine.capture(self.container.pid, self.image, self.cut, options)


@pytest.fixture
def field(tmp_path: Path, server: Server, container: Container) -> Field:
    return Field(tmp_path, server, container)


def test_the_network_is_held_from_the_word_to_freeze_until_all_were_captured(field: Field) -> None:
    field.server.meanwhile = lambda: field.server.archive(field.folder, WHOLE)
    assert field.capture().raw_bytes
    assert field.cut.told == [
        *(("ready", False), ("poised", False), ("poised", False), ("frozen", True)),
        *(("held", True), ("captured", True), ("released", True), ("running", True)),
    ]
    assert field.tables() == set()
    assert field.image.known
    assert field.image.known["tcp_ends"] == []


def test_a_kubelet_that_hangs_is_waited_for_no_longer_than_the_network_may_be_held(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfirst, "HELD_S", 4.0)
    hangs = threading.Event()
    field.server.meanwhile = lambda: hangs.wait(60)
    try:
        with pytest.raises(errors.DeadlineExceeded, match="connections may be held"):
            field.capture()
    finally:
        hangs.set()
    assert field.cut.told[-1][0] == "held"
    assert field.tables() == set()


def test_who_gives_up_does_not_wait_for_the_kubelet(field: Field) -> None:
    hangs = threading.Event()

    def asked() -> None:
        field.cut.given_up.set()
        hangs.wait(60)

    field.server.meanwhile = asked
    try:
        with pytest.raises(client.Lost, match="given up"):
            field.capture()
    finally:
        hangs.set()
    assert field.cut.told[-1][0] == "held"
    assert field.tables() == set()
    # The kubelet may still be at work: its archive is looked for later.
    (note,) = field.folder.iterdir()
    assert '"abandoned": true' in note.read_text()


def test_the_others_go_on_while_a_runtime_has_not_let_go_yet(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that another engine captures stand still until they hear of it."""
    monkeypatch.setattr(holdfirst, "HELD_S", 4.0)
    hangs = threading.Event()
    field.server.meanwhile = lambda: hangs.wait(60)
    heard: list[BaseException | None] = []

    @contextlib.contextmanager
    def guarded(container: Container) -> Iterator[None]:
        try:
            yield
        finally:
            heard.append(field.cut.failed)

    monkeypatch.setattr(resume, "guarded", guarded)
    try:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            field.capture()
    finally:
        hangs.set()
    assert heard == [caught.value]


DYING = """
import os, sys
from agent.engines.kubelet import client, leftovers
from agent.host import hold, namespaces, proc
who = proc.identity(int(sys.argv[2]))
with (
    leftovers.opened(sys.argv[1]) as checkpoints,
    checkpoints.hold(client.Target("team", "pod-1", "c"), who) as table,
    namespaces.opened(who, "net") as network,
    hold.apart(table, ["10.77.0.9"], network=network),
):
    os._exit(7)
"""


def test_what_a_dead_agent_left_of_a_hold_is_taken_away(field: Field) -> None:
    words = [sys.executable, "-c", DYING, str(field.folder), str(field.container.pid)]
    assert subprocess.run(words, check=False, cwd=Path(__file__).parents[2]).returncode == 7
    assert field.tables()
    engine.recover(str(field.folder))
    assert field.tables() == set()
    assert list(field.folder.iterdir()) == []


_IMPATIENT = """
import socket, sys, time
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted = server.accept()[0]
client.setsockopt(*eval(sys.argv[1]))
print("up", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("option", "held"),
    [
        ("socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000", False),
        ("socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20000", True),
        ("socket.IPPROTO_IP, 11, 1", False),
        ("socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1", True),
    ],
    ids=["user timeout", "grpc", "recverr", "keepalive"],
)
def test_who_would_be_told_that_it_is_held_is_not_held(option: str, held: bool) -> None:
    program = ["unshare", "-n", sys.executable, "-c", f"import subprocess{_IMPATIENT}", option]
    popen = subprocess.Popen(program, stdout=subprocess.PIPE)
    assert popen.stdout
    try:
        assert popen.stdout.readline() == b"up\n"
        container = Container("f" * 64, "c", popen.pid, "")
        options = CaptureOptions(hold_first=True, within=OTHERS)
        holdfirst.check(container, options)  # nothing of it is held
        if held:
            holdfirst.check(container, options, alone=False)
        else:
            with pytest.raises(errors.TargetUnsuitable, match="cannot be held"):
                holdfirst.check(container, options, alone=False)
    finally:
        popen.kill()
        popen.communicate()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("ip addr add 10.77.0.1/32 dev lo; echo up", None),
        ("ip addr add 10.99.0.1/32 dev lo; echo up", "besides its pod's"),
        ("unshare -n sh -c 'echo up; exec sleep 120' &", "a network of its own"),
    ],
    ids=["its pod's", "another", "nested"],
)
def test_what_nobody_could_hold_is_refused(more: str, why: str | None) -> None:
    """A second network of the pod, of which the API server knows nothing, or one below it."""
    script = f"ip link set lo up; {more}\nexec sleep 120"
    popen = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert popen.stdout
    try:
        assert popen.stdout.readline() == b"up\n"
        container = Container("f" * 64, "c", popen.pid, "")
        options = CaptureOptions(hold_first=True, within=OTHERS | {"10.77.0.1"})
        if why is None:
            holdfirst.check(container, options)
            return
        with pytest.raises(errors.TargetUnsuitable, match=why):
            holdfirst.check(container, options)
    finally:
        os.killpg(popen.pid, signal.SIGKILL)
        popen.communicate()


def test_half_of_what_a_program_waits_for_is_how_long_it_is_held(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = ("10.77.0.1:1", f"{next(iter(OTHERS))}:2")
    monkeypatch.setattr(holdfirst, "HELD_S", 1000.0)
    monkeypatch.setattr(endpoints, "patience", lambda pids: [(ends, 1200.0), (ends, 2000.0)])
    options = CaptureOptions(hold_first=True, within=OTHERS)
    who = proc.identity(container.pid)
    cut = Cut(set)
    with holdfirst.apart(container, who, "ckpt-agent-test-half", cut, options, alone=True) as part:
        assert 500.0 < part.deadline(clock.Deadline.after(6000)).remaining_s <= 600.0
