"""Hooks as a pod's owner writes them, and what of them is run when."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.admission import hooked
from agent.host import clock
from agent.model import hooks, optin
from agent.model.container import Container
from agent.model.hooks import Hook, Outcome, Phase, Told
from agent.model.pods import Placement, Pod
from agent.node.dump import Cancel
from agent.node.interrupted import Left, Trail
from agent.node.operations import Operations
from agent.node.podhooks import Around, PodHooks
from agent.node.pods import Pods
from agent.node.podwork import PodWork

RUN = {"name": "run", "exec": ["/bin/true"]}


def read(value: Any, containers: Sequence[str] = ("main", "proxy")) -> hooks.Hooks:
    text = value if isinstance(value, str) else json.dumps(value)
    return hooks.read({optin.HOOKS: text}, containers)


def names(steps: hooks.Steps) -> list[list[str]]:
    return [[hook.name for hook in step] for step in steps]


class TestAnnotation:
    def test_a_pod_that_says_nothing_has_no_hooks(self) -> None:
        assert hooks.read({}, ("main",)) == hooks.Hooks()

    def test_every_kind_is_understood_with_what_it_says_and_what_it_leaves_open(self) -> None:
        found = read(
            {
                "pre": [
                    [RUN | {"container": "proxy"}, {"name": "ask", "http": {"port": 80}}],
                    {
                        "name": "tell",
                        "unix": {"socket": "/run/s", "path": "/quiesce?now=1"},
                        "deadlineSeconds": 2.5,
                        "onFailure": "ignore",
                        "scope": "group",
                    },
                    {"name": "drop", "action": "drop-caches", "path": "/data"},
                    [
                        {"name": "call", "grpc": {"port": 50051}},
                        {"name": "dial", "grpc": {"socket": "/run/g"}, "container": "proxy"},
                    ],
                ],
                "post": [RUN | {"when": "decided"}, {"name": "sync", "action": "sync"}],
            }
        )
        assert names(found.pre) == [["run", "ask"], ["tell"], ["drop"], ["call", "dial"]]
        run, ask, tell, drop, call, dial = (hook for step in found.pre for hook in step)
        assert (run.container, run.means) == ("proxy", hooks.Exec(("/bin/true",)))
        assert (run.deadline_s, run.aborts, run.scope) == (10.0, True, hooks.Scope.MEMBER)
        assert ask.means == hooks.Http(80, "/")
        assert tell.means == hooks.Unix("/run/s", "/quiesce?now=1")
        assert (tell.deadline_s, tell.aborts, tell.scope) == (2.5, False, hooks.Scope.GROUP)
        assert drop.means == hooks.Builtin(hooks.Action.DROP_CACHES, "/data")
        assert (call.means, call.aborts) == (hooks.Grpc(port=50051), True)
        assert (dial.means, dial.container) == (hooks.Grpc(socket="/run/g"), "proxy")
        decided, sync = (hook for step in found.post for hook in step)
        assert (decided.when, sync.when) == (hooks.When.DECIDED, hooks.When.RUNNING)
        assert not decided.aborts
        assert found.names == {"run", "ask", "tell", "drop", "call", "dial"}

    @pytest.mark.parametrize(
        ("value", "word"),
        [
            ("{", "not JSON"),
            ("[" * 100000, "not JSON"),
            ([], "not a JSON object"),
            ({"before": []}, "'before'"),
            ({"pre": {}}, "pre is not a list"),
            ({"pre": [[]]}, r"pre\[0\] is an empty list"),
            ({"pre": [RUN, 7]}, r"pre\[1\] is not a JSON object"),
            ({"pre": [[RUN, [RUN]]]}, r"pre\[0\] is not a JSON object"),
            ({"pre": [{"exec": ["x"]}]}, r"pre\[0\] has no name"),
            ({"pre": [RUN | {"name": "Bad Name"}]}, "has no name"),
            ({"pre": [RUN, RUN]}, "two hooks of pre are called 'run'"),
            ({"pre": [{"name": "x"}]}, "says nothing that it does"),
            ({"pre": [RUN | {"http": {"port": 1}}]}, "both exec and http"),
            ({"pre": [RUN | {"exec": []}]}, "no list of words"),
            ({"pre": [RUN | {"exec": "true"}]}, "no list of words"),
            ({"pre": [RUN | {"exec": ["a\0b"]}]}, "no list of words"),
            ({"pre": [RUN | {"exec": ["echo", "\ud800"]}]}, "no list of words"),
            ({"pre": [RUN | {"exec": ["PATH=/tmp", "x"]}]}, "a program called 'PATH=/tmp'"),
            ({"pre": [RUN | {"exec": ["-S", "x"]}]}, "a program called '-S'"),
            ({"pre": [{"name": "x", "http": {"port": 0}}]}, "no port"),
            ({"pre": [{"name": "x", "http": {"port": True}}]}, "no port"),
            ({"pre": [{"name": "x", "http": {"port": 1, "host": "10.0.0.1"}}]}, "'host'"),
            ({"pre": [{"name": "x", "http": {"port": 1, "path": "/a b"}}]}, "path of"),
            ({"pre": [{"name": "x", "http": {"port": 1, "path": "/a\r\nX: y"}}]}, "path of"),
            ({"pre": [{"name": "x", "http": {"port": 1}, "container": "main"}]}, "container of"),
            ({"pre": [{"name": "x", "unix": {"socket": "run/s"}}]}, "no socket"),
            ({"pre": [{"name": "x", "unix": {"socket": "/run/\udcff"}}]}, "no socket"),
            ({"pre": [{"name": "x", "grpc": {}}]}, "neither a port nor a socket"),
            ({"pre": [{"name": "x", "grpc": "://:50051"}]}, "neither a port nor a socket"),
            ({"pre": [{"name": "x", "grpc": {"port": 1, "socket": "/s"}}]}, "or both"),
            ({"pre": [{"name": "x", "grpc": {"port": 1 << 16}}]}, "neither a port"),
            ({"pre": [{"name": "x", "grpc": {"socket": "s"}}]}, "neither a port nor a socket"),
            ({"pre": [{"name": "x", "grpc": {"port": 1, "tls": True}}]}, "'tls'"),
            ({"pre": [{"name": "x", "grpc": {"port": 1}, "container": "main"}]}, "container of"),
            ({"pre": [{"name": "x", "action": "sync", "path": "/\ud800"}]}, "not absolute"),
            ({"pre": [{"name": "x", "action": "reboot"}]}, "no action that there is"),
            ({"pre": [{"name": "x", "action": "drop-caches"}]}, "whose caches"),
            ({"pre": [{"name": "x", "action": "sync", "path": "data"}]}, "not absolute"),
            ({"pre": [RUN | {"container": "other"}]}, "cannot be 'other'"),
            ({"pre": [RUN | {"container": ["main"]}]}, "cannot be"),
            ({"pre": [RUN | {"deadlineSeconds": 0}]}, "deadlineSeconds"),
            ({"pre": [RUN | {"deadlineSeconds": "10s"}]}, "deadlineSeconds"),
            ('{"pre": [{"name": "x", "exec": ["x"], "deadlineSeconds": NaN}]}', "deadlineSeconds"),
            ({"pre": [RUN | {"deadlineSeconds": 301}]}, "deadlineSeconds"),
            ({"pre": [RUN | {"deadlineSeconds": 10**400}]}, "deadlineSeconds"),
            ({"pre": [RUN | {"deadlineSeconds": -(10**400)}]}, "deadlineSeconds"),
            ({"pre": [RUN | {"onFailure": "retry"}]}, "onFailure"),
            ({"post": [RUN | {"onFailure": "abort"}]}, "'onFailure'"),
            ({"pre": [RUN | {"when": "decided"}]}, "'when'"),
            ({"pre": [RUN | {"scope": "pod"}]}, "scope"),
            ({"pre": [RUN | {"user": 0}]}, "'user'"),
            ({"pre": [RUN | {"name": f"x{n}"} for n in range(33)]}, "33 hooks"),
            (
                {"pre": [RUN | {"name": f"x{n}", "deadlineSeconds": 160} for n in range(2)]},
                "320 s together",
            ),
        ],
    )
    def test_what_makes_no_sense_is_named_with_the_way_out(self, value: Any, word: str) -> None:
        with pytest.raises(errors.InvalidInput, match=word) as refused:
            read(value)
        assert optin.HOOKS in refused.value.message
        assert refused.value.hint

    def test_hooks_at_once_take_as_long_as_the_longest(self) -> None:
        read({"pre": [[RUN | {"name": f"x{n}", "deadlineSeconds": 160} for n in range(2)]]})

    def test_the_webhook_warns_of_hooks_that_make_no_sense_and_only_of_those(self) -> None:
        def warned(text: str) -> tuple[str, ...]:
            metadata = {"name": "p", "annotations": {optin.HOOKS: text}}
            return hooked.warnings({"metadata": metadata, "spec": {"containers": [{"name": "a"}]}})

        assert warned(json.dumps({"pre": [RUN]})) == ()
        (said,) = warned(json.dumps({"pre": [RUN | {"container": "b"}]}))
        assert "cannot be 'b'; there are a" in said
        assert all(len(text) <= 250 for text in warned(json.dumps({"x" * 1000: 1})))
        assert hooked.warnings({"metadata": None, "spec": 7}) == ()


@dataclasses.dataclass
class Calls:
    """Notes what is called; some of it fails, or waits until it is told."""

    failing: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    waits: frozenset[str] = frozenset()
    done: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    told: list[Told] = dataclasses.field(default_factory=list)
    entered: threading.Event = dataclasses.field(default_factory=threading.Event)
    go: threading.Event = dataclasses.field(default_factory=threading.Event)

    def call(self, hook: Hook, containers: Sequence[Container], told: Told) -> None:
        outcome = told.outcome.value if told.outcome else ""
        self.done.append((hook.name, told.phase.value, outcome))
        self.told.append(told)
        if hook.name in self.waits:
            self.entered.set()
            assert self.go.wait(20)
        if hook.name in self.broken:
            raise UnicodeEncodeError("utf-8", "secret", 0, 1, "why")
        if hook.name in self.failing:
            raise errors.HookFailed(f"the hook {hook.name!r} failed", output="why")

    def tell(self, pod: Pod, reason: Any, note: str) -> None:
        self.done.append((reason, "", note.partition(" (")[0]))


BOTH = {
    "pre": [RUN | {"name": "a"}, RUN | {"name": "b"}],
    "post": [RUN | {"name": "r"}, RUN | {"name": "d", "when": "decided"}],
}


CONTAINER = Container("id", "main", os.getpid(), "/")


def pod_with(wanted: Any) -> Pod:
    annotations = {optin.HOOKS: json.dumps(wanted)}
    return Pod("ns", "p", "u", "n", "Running", False, ("main",), annotations, "{}")


def around(calls: Calls, wanted: Any = None, *, leads: bool = True) -> Around:
    made = PodHooks(calls, calls, Trail("trail"))
    return made.around(pod_with(wanted or BOTH), [CONTAINER], leads=leads, image="g@e")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class TestAround:
    def test_before_running_and_after_each_once(self) -> None:
        calls = Calls()
        made = around(calls)
        made.before()
        made.before()
        made.running()
        made.running()
        assert made.after(Outcome.COMMITTED) == ()
        assert made.after(Outcome.ABORTED) == ()
        assert calls.done == [
            ("a", "pre", ""),
            ("b", "pre", ""),
            ("r", "post", "captured"),
            ("d", "post", "committed"),
        ]

    def test_no_post_hook_follows_where_no_pre_hook_was_begun(self) -> None:
        calls = Calls()
        made = around(calls)
        made.running()
        made.after(Outcome.ABORTED)
        assert calls.done == []

    def test_a_pod_with_post_hooks_only_is_told_as_well(self) -> None:
        calls = Calls()
        made = around(calls, {"post": BOTH["post"]})
        made.before()
        made.after(Outcome.COMMITTED)
        assert [each[0] for each in calls.done] == ["r", "d"]

    def test_a_hook_that_aborts_ends_the_pre_hooks_and_all_post_hooks_hear_of_it(self) -> None:
        calls = Calls(failing=frozenset("a"))
        made = around(calls)
        with pytest.raises(errors.HookFailed):
            made.before()
        assert made.after(Outcome.ABORTED) == ()
        assert calls.done == [("a", "pre", ""), ("r", "post", "aborted"), ("d", "post", "aborted")]

    def test_a_hook_whose_failure_is_ignored_is_told_to_all_but_the_log_and_event_without_output(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = Calls(failing=frozenset("ar"))
        made = around(calls, {**BOTH, "pre": [RUN | {"name": "a", "onFailure": "ignore"}]})
        made.before()
        made.running()
        problems = made.after(Outcome.COMMITTED)
        assert problems == ("the hook 'a' failed\nwhy", "the hook 'r' failed\nwhy")
        assert ("HookFailed", "", "the hook 'a' failed") in calls.done
        assert "why" not in caplog.text
        assert calls.done[-1] == ("d", "post", "committed")

    def test_a_defect_fails_the_hook_that_met_it_and_nothing_else(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = Calls(broken=frozenset("rd"))
        made = around(calls)
        made.before()
        made.running()
        said = "the hook 'r' failed: the agent met a defect"
        assert made.after(Outcome.COMMITTED) == (said, said.replace("'r'", "'d'"))
        assert ("HookFailed", "", said) in calls.done
        assert around(calls).restored(Placement("old", "u0", "n0", ())) == made.problems
        assert "Traceback" in caplog.text
        with pytest.raises(errors.HookFailed, match="'a' failed: the agent met a defect"):
            around(Calls(broken=frozenset("a"))).before()

    def test_a_second_try_is_prepared_for_once_more_if_the_first_let_the_job_know(self) -> None:
        calls = Calls()
        made = around(calls)
        made.before()
        made.running()
        made.before()
        made.running()
        made.after(Outcome.COMMITTED)
        assert [each[0] for each in calls.done] == ["a", "b", "r", "a", "b", "r", "d"]

    def test_post_hooks_wait_for_the_pre_hook_that_runs_and_no_other_begins(self) -> None:
        calls = Calls(waits=frozenset("a"))
        made = around(calls)
        failures: list[BaseException] = []

        def before() -> None:
            try:
                made.before()
            except errors.DumpFailed as exc:
                failures.append(exc)

        pre = threading.Thread(target=before)
        pre.start()
        assert calls.entered.wait(20)
        assert made.give_up()
        post = threading.Thread(target=made.after, args=(Outcome.ABORTED,))
        post.start()
        calls.go.set()
        pre.join(20)
        post.join(20)
        assert [each[0] for each in calls.done] == ["a", "r", "d"]
        assert len(failures) == 1

    def test_what_was_given_up_before_it_began_never_begins(self) -> None:
        calls = Calls()
        made = around(calls)
        assert not made.give_up()
        with pytest.raises(errors.DumpFailed):
            made.before()
        made.after(Outcome.ABORTED)
        assert calls.done == []

    def test_hooks_of_the_group_run_where_it_is_led(self) -> None:
        wanted = {"pre": [RUN | {"name": "g", "scope": "group"}, RUN | {"name": "m"}]}
        for leads, expected in ((True, ["g", "m"]), (False, ["m"])):
            calls = Calls()
            around(calls, wanted, leads=leads).before()
            assert [each[0] for each in calls.done] == expected

    def test_a_restored_pod_hears_where_it_was_and_is(self) -> None:
        calls = Calls()
        was = Placement("old", "u0", "n0", ("10.0.0.1",))
        around(calls).restored(was)
        assert calls.done == [("r", "post", "restored"), ("d", "post", "restored")]
        told = calls.told[0]
        assert (
            told.environment()
            | {
                "CKPT_AGENT_OUTCOME": "restored",
                "CKPT_AGENT_IMAGE": "g@e",
                "CKPT_AGENT_POD": "p",
                "CKPT_AGENT_NODE": "n",
                "CKPT_AGENT_WAS_POD": "old",
                "CKPT_AGENT_WAS_ADDRESSES": "10.0.0.1",
            }
            == told.environment()
        )
        document = told.document()
        assert (document["phase"], document["was"]["node"]) == (Phase.POST.value, "n0")
        assert document["now"]["pod"] == "p"


class OnePod(Pods):
    """A node with that pod on it."""

    def __init__(self) -> None:
        pass

    def with_containers(self, namespace: str, name: str, uid: str) -> tuple[Pod, list[Container]]:
        return pod_with(BOTH), [CONTAINER]


class TestAfterAKill:
    """What an agent owes that was killed is done by its successor, and nothing else is."""

    def successor(
        self,
        find: Callable[[Left], tuple[Pod, Sequence[Container]]],
        alone: Callable[..., AbstractContextManager[None]] = lambda *_: contextlib.nullcontext(),
    ) -> list[Any]:
        calls = Calls()
        made = PodHooks(calls, calls, Trail("trail"))
        made.follow_up(find, alone)
        made.follow_up(find, alone)
        for thread in threading.enumerate():
            if thread.name == "post hooks":
                thread.join(20)
        return calls.done

    def found(self, left: Left) -> tuple[Pod, Sequence[Container]]:
        assert (left.namespace, left.pod, left.uid) == ("ns", "p", "u")
        return pod_with(BOTH), [CONTAINER]

    def test_between_pre_and_post_hooks(self) -> None:
        killed = around(Calls())
        killed.before()
        expected = [("r", "post", "unknown"), ("d", "post", "unknown")]
        assert self.successor(self.found) == expected
        assert self.successor(self.found) == []

    def test_in_the_middle_of_the_pre_hooks(self) -> None:
        killed = around(Calls(failing=frozenset("a")))
        with pytest.raises(errors.HookFailed):
            killed.before()
        assert [each[0] for each in self.successor(self.found)] == ["r", "d"]

    def test_not_once_they_were_begun(self) -> None:
        killed = around(Calls())
        killed.before()
        killed.running()
        for _ in range(1000):
            if not list(Path("trail").iterdir()):
                break
            time.sleep(0.01)
        assert self.successor(self.found) == []

    @pytest.mark.parametrize(("leads", "expected"), [(True, ["g", "m"]), (False, ["m"])])
    def test_hooks_of_the_group_only_where_it_was_led(
        self, leads: bool, expected: list[str]
    ) -> None:
        wanted = {"post": [RUN | {"name": "g", "scope": "group"}, RUN | {"name": "m"}]}
        killed = around(Calls(), wanted, leads=leads)
        killed.before()
        done = self.successor(lambda left: (pod_with(wanted), [CONTAINER]))
        assert [each[0] for each in done] == expected

    def test_alone_with_the_pod_and_noted_until_then(self) -> None:
        killed = around(Calls(), leads=False)
        killed.before()
        noted: list[Left] = []

        @contextlib.contextmanager
        def alone(pod: Pod, containers: Sequence[Container]) -> Iterator[None]:
            # Killed while it waits, this agent owes what its predecessor did.
            noted.extend(Trail("trail").take())
            raise errors.TargetBusy("the pod is being dumped")
            yield

        assert self.successor(self.found, alone) == []
        assert noted == [Left("dump", "ns", "p", "u", leads=False)]

    def test_not_while_anything_else_is_done_to_the_pod_nor_the_other_way_round(self) -> None:
        killed = around(Calls())
        killed.before()
        calls, operations = Calls(waits=frozenset("r")), Operations(1)
        made = PodHooks(calls, calls, Trail("trail"))
        nothing: Any = None
        work = PodWork(OnePod(), nothing, nothing, operations, Trail("other"), calls, made)

        def dump() -> AbstractContextManager[object]:
            return operations.begin("dump", "pod ns/p", [("u", "main")], Cancel())

        with dump():
            work.run_owed_hooks()
            assert not calls.entered.wait(0.5)
        assert calls.entered.wait(20)
        with pytest.raises(errors.TargetBusy), dump():
            pass
        calls.go.set()
        assert operations.wait_empty(clock.Deadline.after(20))
        assert [each[0] for each in calls.done] == ["r", "d"]

    def test_not_where_the_pod_is_gone(self, caplog: pytest.LogCaptureFixture) -> None:
        killed = around(Calls())
        killed.before()

        def gone(left: Left) -> tuple[Pod, Sequence[Container]]:
            raise errors.NotFound("there is no such pod")

        assert self.successor(gone) == []
        assert "cannot be run any more: there is no such pod" in caplog.text
