"""The call to the kubelet: whom it trusts with the token, and what each answer means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.kubelet import client
from agent.engines.kubelet.client import Kubelet, Target, Trust
from agent.host import clock
from tests.fakes.kubelet import ITEM, TOKEN, Certificates, Server, serving

TARGET = Target("team", "pod-1", "c")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture
def server(certificates: Certificates) -> Iterator[Server]:
    with serving(certificates) as server:
        yield server


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def kubelet(server: Server, certificates: Certificates, token: Path) -> Kubelet:
    return at(server, token, f"ca:{certificates.ca}")


def at(server: Server, token: Path, trust: str) -> Kubelet:
    return Kubelet("127.0.0.1", Trust.parse(trust), server.server_address[1], str(token))


def call(kubelet: Kubelet, seconds: float = 30.0) -> list[str]:
    return client.checkpoint(kubelet, TARGET, clock.Deadline.after(seconds))


def test_the_kubelet_is_asked_with_the_token_and_a_timeout(
    kubelet: Kubelet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "monotonic_s", lambda: 1000.0)  # to connect takes no time
    assert call(kubelet, 30.5) == [ITEM]
    assert server.asked == [("/checkpoint/team/pod-1/c?timeout=30", f"Bearer {TOKEN}")]


@pytest.mark.parametrize("name", ["", "..", "a/b", "c?x", "A", "a ", "a" * 254, "a\n"])
def test_names_cannot_become_other_paths(name: str) -> None:
    for names in ((name, "p", "c"), ("n", name, "c"), ("n", "p", name)):
        with pytest.raises(errors.InvalidInput, match="names no object"):
            Target(*names)


def test_each_way_to_know_the_certificate_works(
    server: Server, certificates: Certificates, token: Path
) -> None:
    colons = ":".join(certificates.fingerprint[at : at + 2].upper() for at in range(0, 64, 2))
    for trust in (
        f"ca:{certificates.ca}",
        f"cert:{certificates.cert}",
        f"sha256:{certificates.fingerprint}",
        f"sha256:{colons}",
    ):
        assert call(at(server, token, trust)) == [ITEM]


def test_a_stranger_is_never_sent_the_token(
    server: Server, certificates: Certificates, token: Path, tmp_path: Path
) -> None:
    other = Certificates(tmp_path / "other")
    for trust in (
        f"ca:{other.ca}",
        f"cert:{other.cert}",
        f"sha256:{other.fingerprint}",
    ):
        with pytest.raises(errors.Unreachable, match="certificate") as caught:
            call(at(server, token, trust))
        assert "cert:/var/lib/kubelet/pki/kubelet.crt" in caught.value.hint
    assert server.asked == []


def test_a_certificate_for_another_address_is_refused(tmp_path: Path, token: Path) -> None:
    elsewhere = Certificates(tmp_path / "elsewhere", address="127.0.0.2")
    with serving(elsewhere) as server:
        with pytest.raises(errors.Unreachable, match="certificate"):
            call(at(server, token, f"ca:{elsewhere.ca}"))
        assert server.asked == []
        assert call(at(server, token, f"cert:{elsewhere.cert}")) == [ITEM]


@pytest.mark.parametrize(
    "text",
    ["", "none", "insecure", "ca:", "ca:relative", "cert:x", "sha256:12", "sha256:" + "g" * 64],
)
def test_there_is_no_way_not_to_check(text: str) -> None:
    with pytest.raises(errors.InvalidInput, match="does not say how"):
        Trust.parse(text)


@pytest.mark.parametrize(
    "trust", ["ca:/absent/ca.crt", "cert:/absent/kubelet.crt", "cert:/etc/passwd"]
)
def test_a_missing_certificate_file_is_named(server: Server, token: Path, trust: str) -> None:
    with pytest.raises(errors.EnvironmentUnfit, match=trust.partition(":")[2]):
        call(at(server, token, trust))
    assert server.asked == []


ANSWERS = [
    (401, "Unauthorized", errors.PrivilegeMissing, "authentication.webhook"),
    (403, "Forbidden (user=x, verb=create)", errors.PrivilegeMissing, "nodes/checkpoint"),
    (404, "pod does not exist", errors.NotFound, "names"),
    (404, "container c does not exist", errors.NotFound, "names"),
    (404, "404 page not found", errors.EnvironmentUnfit, "ContainerCheckpoint"),
    (405, "405: Method Not Allowed", errors.EnvironmentUnfit, "ContainerCheckpoint"),
    (
        500,
        "checkpointing of team/pod-1/c failed (rpc error: code = Unimplemented desc = unknown)",
        errors.EnvironmentUnfit,
        "containerd 2.0",
    ),
    (
        500,
        'checkpointing of team/pod-1/c failed (rpc error: code = Unknown desc = CRIU binary not'
        ' found or too old (<31600). Failed to checkpoint container "f")',
        errors.CriuMissing,
        "install CRIU",
    ),
    (
        500,
        'container "f" is in CONTAINER_EXITED state. only CONTAINER_RUNNING containers can be'
        " checkpointed",
        errors.TargetUnsuitable,
        "while it runs",
    ),
    (
        500,
        "rpc error: code = DeadlineExceeded desc = context deadline exceeded",
        errors.DeadlineExceeded,
        "more time",
    ),
    (
        500,
        "runc did not terminate successfully: exit status 1: criu failed: type NOTIFY errno 0",
        errors.CriuFailed,
        "runc.conf",
    ),
    (500, "OCI runtime pause failed: unable to freeze", errors.DumpFailed, "try again"),
    (500, "something else", errors.DumpFailed, "logs"),
    (503, "", errors.DumpFailed, "logs"),
    (200, "", errors.DumpFailed, "version"),
    (200, "[]", errors.DumpFailed, "version"),
    (200, '{"items": []}', errors.DumpFailed, "version"),
    (200, '{"items": [1]}', errors.DumpFailed, "version"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "error", "hint"), ANSWERS)
def test_each_answer_is_an_error_with_a_way_out(
    kubelet: Kubelet,
    server: Server,
    status: int,
    body: str,
    error: type[errors.CkptError],
    hint: str,
) -> None:
    server.status, server.body = status, body.encode()
    with pytest.raises(error) as caught:
        call(kubelet)
    assert type(caught.value) is error
    assert hint in caught.value.hint
    assert TOKEN not in f"{caught.value}{caught.value.hint}{caught.value.facts}"


def test_a_kubelet_that_does_not_end_in_time_is_left(
    kubelet: Kubelet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.2)
    server.wait_s = 4.0
    # Most of it is for the way there, on a busy machine.
    with pytest.raises(errors.DeadlineExceeded, match="team/pod-1/c"):
        call(kubelet, 2.9)


def test_a_connection_that_breaks_is_an_error(kubelet: Kubelet, server: Server) -> None:
    server.hang_up = True
    with pytest.raises(client.Lost, match="broke"):
        call(kubelet)


def test_nobody_at_the_address_is_an_error(certificates: Certificates, token: Path) -> None:
    kubelet = Kubelet("127.0.0.1", Trust.parse(f"ca:{certificates.ca}"), 1, str(token))
    with pytest.raises(errors.Unreachable, match="does not answer"):
        call(kubelet)


@pytest.mark.parametrize("content", [None, "", "a b", "token\r\nX-Header: y", "\xe4"])
def test_without_a_usable_token_nothing_is_asked(
    server: Server, certificates: Certificates, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "no-token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(errors.PrivilegeMissing, match="token"):
        call(at(server, path, f"ca:{certificates.ca}"))
    assert server.asked == []
