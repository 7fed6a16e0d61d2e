"""Rights come from the API server alone; what it said is remembered for seconds, tokens never."""

from __future__ import annotations

from typing import Any

import pytest

from agent import errors
from agent.host import clock
from agent.kube import access
from agent.kube.connection import Connection
from agent.model.access import API_GROUP, Caller, Right

TOKEN = "a-very-secret-token"
RIGHT = Right("create", "images", "team-a")
ADA = Caller("ada", ("staff",), "u1", {"scopes": ("x",)})


class Server(Connection):
    """Answers reviews; ``down`` and ``forbidden`` say how it fails."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, list[str]]] = {TOKEN: ("ada", [])}
        self.allowed = {"ada"}
        self.asked: list[dict[str, Any]] = []
        self.failure: errors.CkptError | None = None
        self.denied = False

    def call(self, method: str, path: str, what: str, **more: Any) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        spec = more["body"]["spec"]
        self.asked.append(spec)
        if path.endswith("tokenreviews"):
            user, audiences = self.known.get(spec["token"], ("", []))
            wanted = spec.get("audiences", [])
            good = bool(user) and (not wanted or set(wanted) <= set(audiences))
            return {
                "status": {"authenticated": good, "user": {"username": user}, "audiences": wanted}
            }
        return {"status": {"allowed": spec["user"] in self.allowed, "denied": self.denied}}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [1000.0]
    monkeypatch.setattr(clock, "monotonic_s", lambda: seconds[0])
    return seconds


def test_an_answer_is_asked_for_once_in_ten_seconds(server: Server, now: list[float]) -> None:
    found = access.Access(server)
    for _ in range(3):
        assert found.authenticate(TOKEN).user == "ada"
        found.authorize(ADA, RIGHT)
    # Our own audience first, then the API server's.
    assert len(server.asked) == 3
    now[0] += access.ALLOWED_S - 0.01
    found.authorize(ADA, RIGHT)
    assert len(server.asked) == 3
    server.allowed.clear()
    now[0] += 0.01
    with pytest.raises(errors.Forbidden, match="ada may not create images"):
        found.authorize(ADA, RIGHT)
    assert access.ALLOWED_S <= 10


def test_a_refusal_is_soon_forgotten(server: Server, now: list[float]) -> None:
    found = access.Access(server)
    server.allowed.clear()
    with pytest.raises(errors.Forbidden):
        found.authorize(ADA, RIGHT)
    server.allowed.add("ada")
    now[0] += access.REFUSED_S
    found.authorize(ADA, RIGHT)


@pytest.mark.parametrize(
    ("caller", "right"),
    [
        (Caller("bob", ADA.groups, ADA.uid, ADA.extra), RIGHT),
        (Caller("ada", (), ADA.uid, ADA.extra), RIGHT),
        (Caller("ada", ADA.groups, "u2", ADA.extra), RIGHT),
        (Caller("ada", ADA.groups, ADA.uid, {"scopes": ("y",)}), RIGHT),
        (ADA, Right("restore", "images", "team-a")),
        (ADA, Right("create", "images", "team-b")),
        (ADA, Right("create", "images", "team-a", "x@1")),
        (ADA, Right("create", "nodes", "team-a")),
    ],
)
def test_an_answer_counts_for_nothing_else(server: Server, caller: Caller, right: Right) -> None:
    found = access.Access(server)
    found.authorize(ADA, RIGHT)
    server.allowed.clear()
    with pytest.raises(errors.Forbidden):
        found.authorize(caller, right)


def test_what_is_asked_is_the_whole_identity_and_right(server: Server) -> None:
    access.Access(server).authorize(ADA, Right("get", "images", "team-a", "x@1"))
    assert server.asked == [
        {
            "user": "ada",
            "groups": ["staff"],
            "uid": "u1",
            "extra": {"scopes": ["x"]},
            "resourceAttributes": {
                "group": API_GROUP,
                "verb": "get",
                "resource": "images",
                "namespace": "team-a",
                "name": "x@1",
            },
        }
    ]


def test_a_token_of_another_audience_is_nobodys(server: Server) -> None:
    server.known = {TOKEN: ("", [])}
    with pytest.raises(errors.Unauthenticated) as caught:
        access.Access(server).authenticate(TOKEN)
    assert TOKEN not in f"{caught.value!r} {caught.value.facts} {caught.value.hint}"


def test_a_denial_beats_an_allowance(server: Server) -> None:
    server.denied = True
    with pytest.raises(errors.Forbidden):
        access.Access(server).authorize(ADA, RIGHT)


@pytest.mark.parametrize(
    "failure", [errors.Unreachable("away"), errors.Forbidden("the agent may not ask")]
)
def test_nobody_is_let_in_when_nobody_can_be_asked(
    server: Server, failure: errors.CkptError
) -> None:
    found = access.Access(server)
    server.failure = failure
    with pytest.raises(errors.Unreachable):
        found.authenticate(TOKEN)
    with pytest.raises(errors.Unreachable):
        found.authorize(ADA, RIGHT)
    server.failure = None
    found.authorize(ADA, RIGHT)


def test_tokens_are_not_kept(server: Server) -> None:
    found = access.Access(server)
    found.authenticate(TOKEN)
    kept = found._callers._entries
    assert len(kept) == 1
    assert TOKEN not in repr(kept)


def test_what_is_remembered_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_ENTRIES", 8)
    found = access.Access(server)
    for number in range(50):
        found.authorize(ADA, Right("create", "images", f"n{number}"))
    assert len(found._allowed._entries) == 8
