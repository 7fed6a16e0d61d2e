"""The command line: help, usage, streams, formats and exit statuses, on a real store."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from typing import Any

import click
import jsonschema
import pytest
import yaml

from agent import errors, wiring
from agent.cli import documents, exits, failures, incluster, main, output
from agent.engines.base import CaptureReport, RestoreOptions
from agent.model import ids
from agent.model.streams import AddressSpace, FileEntry, PageRun
from agent.node.dump import Cancel, DumpOutcome
from agent.node.restore import Progress, RestoreOutcome
from agent.rpc import results
from agent.settings import KEYS, OUTPUTS
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume

VERBS = tuple(main.cli.commands)
_DOCS = pathlib.Path(__file__).parents[2] / "docs"
_SCHEMA = json.loads((_DOCS / "output-schema.json").read_text())
_DAY_S = 86400.0
_NOW_S = 1_790_000_000.0
_FACTS = {
    "layout": "criu-4",
    "processes": [
        {
            "pid": 7,
            "ppid": 1,
            "comm": "tra\x1b[31min",
            "state": "S",
            "threads": [7, 8],
            "memory": {"anon_bytes": 8192, "file_bytes": 4096, "shmem_bytes": 0, "swap_bytes": 0},
        }
    ],
    "files": [{"path": "/lib/x.so", "use": "mapped", "size_bytes": 10, "mtime_ns": 1}],
    "sockets": [{"pid": 7, "kind": "tcp", "local": "a:1", "remote": "b:2", "state": "listen"}],
}


class Ran:
    """What a run left: its exit status and both streams."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def document(self) -> dict[str, Any]:
        return checked(json.loads(self.out))


def strict() -> dict[str, Any]:
    """The schema with undocumented fields forbidden; the published one allows later ones."""

    def tighten(part: Any) -> None:
        if isinstance(part, dict):
            if "properties" in part:
                part["additionalProperties"] = False
            for each in part.values():
                tighten(each)
        elif isinstance(part, list):
            for each in part:
                tighten(each)

    schema = copy.deepcopy(_SCHEMA)
    tighten(schema)
    return dict(schema)


def checked(document: dict[str, Any]) -> dict[str, Any]:
    kind = document["kind"]
    jsonschema.validate(document, strict() | {"oneOf": [{"$ref": f"#/$defs/{kind}"}]})
    return document


def add_image(store: Store, group: str, now_s: float, content: bytes = b"a") -> str:
    with store.begin(ids.group_name(group), now_s=now_s) as writer:
        member = writer.member(ids.member_name("tree-0"))
        page = memoryview(content * 4096)
        member.pages(AddressSpace("process", 7), PageRun(4096, 1, 0), page)
        member.metadata("core-7.img", io.BytesIO(b"core"))
        entry = FileEntry("/tmp/out", "file", 0o100600, 0, 0, 1, 3, "open")
        member.file(entry, io.BytesIO(b"abc"))
        member.facts(_FACTS)
        writer.commit({"engine": "criu"})
    return ids.image_name(writer.group, writer.epoch)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A directory for a store, named by the environment; no configuration file is found."""
    for name in [name for name in os.environ if name.startswith("CKPT_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    monkeypatch.setenv("CKPT_AGENT_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def images(folder: pathlib.Path) -> list[str]:
    """Three images of one group, a day apart, and one of another."""
    store = Store.open(DirectoryVolume(str(folder), create=True), create=True)
    made = [add_image(store, "job", _NOW_S + day * _DAY_S, b"%d" % day) for day in range(3)]
    return [*made, add_image(store, "other", _NOW_S)]


@pytest.fixture
def run(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        status = main.run(arguments)
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return run


def damage(folder: pathlib.Path) -> None:
    """Flip a bit in the middle of every pack."""
    for path in (folder / "packs").rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)


# Help and usage.


@pytest.mark.parametrize("verb", VERBS)
def test_each_verbs_help_lists_its_exit_statuses_and_an_example(run: Any, verb: str) -> None:
    ran = run(verb, "--help")
    assert (ran.status, ran.err) == (0, "")
    listed = {int(code) for code in re.findall(r"^  (\d+) +\S", ran.out, re.MULTILINE)}
    assert {exits.DONE, exits.INTERNAL, exits.USAGE} <= listed
    assert f"Example:\n  ckpt-agent {verb}" in ran.out or verb == "completion"
    assert "--store" in ran.out


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_each_verb_names_options_that_exist(verb: str) -> None:
    command = main.cli.commands[verb]
    example = str(getattr(command, "example", ""))
    params = command.get_params(click.Context(command))
    known = {name for param in params for name in param.opts}
    words = re.findall(r"(?<!\S)--?[a-z][a-z-]*", example.split("|")[0])
    assert set(words) <= known


def test_the_reference_names_every_verb_option_status_key_variable_and_kind() -> None:
    text = (_DOCS / "cli.md").read_text()
    for verb, command in main.cli.commands.items():
        assert f"`{verb}" in text
        for param in command.params:
            long = [name for name in param.opts if name.startswith("--")]
            assert all(name in text for name in long), (verb, long)
    for code, meaning in exits.MEANING.items():
        assert f"| {code} | {meaning}" in text
    for key in KEYS:
        assert f"`{key}`" in text
        assert f"`CKPT_AGENT_{key.upper()}`" in text
    for ref in _SCHEMA["oneOf"]:
        assert f"`{ref['$ref'].rsplit('/', 1)[1]}`" in text


def test_the_statuses_of_the_error_tree_are_those_of_the_table() -> None:
    def tree(kind: type[errors.CkptError]) -> Iterator[type[errors.CkptError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    assert {kind.exit_status for kind in tree(errors.CkptError)} <= set(exits.MEANING)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("list", "--nonsense"),
        ("list", "-o", "xml"),
        ("dump",),
        ("dump", "--pid", "abc"),
        ("dump", "--pid", "0"),
        ("dump", "--pid", "-5"),
        ("dump", "--pid", "99999999999999999999"),
        ("dump", "--pid", "1", "--deadline", "soon"),
        ("dump", "jobset/train", "--container", "c"),
        ("dump", "jobset/train", "--engine", "kubelet", "--coordinator"),
        ("dump", "pod/x", "--follow", "--engine", "kubelet"),
        ("restore", "jobset/train", "--pod", "x"),
        ("restore", "jobset/train@", "--replace"),
        ("restore", "x", "--node", "n1", "--node", "n2"),
        ("migrate", "pod/x", "--to", "n1", "--to", "n2"),
        ("migrate", "jobset/train"),
        ("restore",),
        ("restore", "x", "--files", "maybe"),
        ("show",),
        ("verify",),
        ("verify", "x", "--all"),
        ("export",),
        ("export", "x"),
        ("export", "x", "f", "--reference", "r/x"),
        ("export", "x", "f", "--storage", "fast"),
        ("import",),
        ("import", "f", "--storage", "fast"),
        ("prune",),
        ("prune", "--keep-last", "0"),
        ("prune", "--keep-within", "long"),
        ("delete",),
        ("delete", "job"),
        ("plan",),
        ("completion", "tcsh"),
    ],
)
def test_wrong_usage_is_status_2_told_on_stderr_with_where_to_look(
    run: Any, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("ckpt-agent: ")
    assert "--help" in ran.err
    in_json = run("-o", "json", *arguments)
    assert (in_json.status, in_json.out) == (2, "")
    assert checked(json.loads(in_json.err))["code"] == "usage"


def test_without_a_verb_the_help_is_shown_as_wrong_usage(run: Any) -> None:
    ran = run()
    assert (ran.status, ran.out) == (2, "")
    assert "Commands:" in ran.err


def test_the_version_is_printed(run: Any) -> None:
    ran = run("--version")
    assert ran.status == 0
    assert re.fullmatch(r"ckpt-agent \d+\.\d+\.\d+\n", ran.out)


# Data, formats and streams.


def test_list_shows_all_images_or_those_of_a_group(run: Any, images: list[str]) -> None:
    assert run("list", "-o", "name").out.split() == images
    assert run("list", "other", "-o", "name").out.split() == [images[3]]


@pytest.mark.parametrize("form", OUTPUTS)
def test_options_mean_the_same_before_and_after_the_verb(
    run: Any, images: list[str], form: str
) -> None:
    before, after = run("-o", form, "list"), run("list", "-o", form)
    assert (before.status, before.out, before.err) == (after.status, after.out, after.err)
    assert before.err == ""


def test_the_option_after_the_verb_wins(run: Any, images: list[str]) -> None:
    assert run("-o", "json", "list", "-o", "name").out.split() == images


def test_a_table_is_aligned_and_cuts_no_name(run: Any, images: list[str]) -> None:
    lines = run("list").out.splitlines()
    assert lines[0].split() == ["NAME", "AGE", "MEMBERS", "RAW", "NEW", "STORED", "STATUS"]
    assert [line.split()[0] for line in lines[1:]] == images
    assert len({line.index("ok") for line in lines[1:]}) == 1


def test_json_and_yaml_hold_the_same(run: Any, images: list[str]) -> None:
    document = run("list", "-o", "json").document()
    assert yaml.safe_load(run("list", "-o", "yaml").out) == document
    assert document["apiVersion"] == "ckpt-agent.dev/v1"
    first = document["items"][0]
    assert first["createdAt"] == "2026-09-21T14:13:20Z"
    assert first["rawBytes"] == 4096 + len(b"core") + len(b"abc")


def test_show_tells_what_the_image_holds_and_which_was_before(run: Any, images: list[str]) -> None:
    document = run("show", images[1], "-o", "json").document()
    assert (document["kind"], document["name"]) == ("Image", images[1])
    assert document["previous"] == images[0]
    (member,) = document["detail"]
    assert member["processes"][0]["threads"] == 2
    assert {"kind": "anonymous", "bytes": 8192, "captured": True} in member["memory"]
    assert {file["path"]: file["travels"] for file in member["files"]} == {
        "/tmp/out": True,
        "/lib/x.so": False,
    }
    assert member["sockets"] == [{"kind": "tcp", "state": "listen", "local": "a:1", "peer": "b:2"}]
    assert run("show", images[0], "-o", "json").document()["previous"] is None


def test_a_table_leaves_files_that_do_not_travel_to_wide(run: Any, images: list[str]) -> None:
    narrow, wide = run("show", "job").out, run("show", "job", "-o", "wide").out
    assert "/tmp/out" in narrow
    assert "/lib/x.so" not in narrow
    assert "1 that do not travel" in narrow
    assert "/lib/x.so" in wide


def test_a_group_stands_for_its_newest_image(run: Any, images: list[str]) -> None:
    assert run("show", "job", "-o", "name").out.split() == [images[2]]


def test_control_characters_of_a_job_do_not_reach_the_terminal(run: Any, images: list[str]) -> None:
    out = run("show", "job").out
    assert "\x1b" not in out
    assert r"\x1b" in out


def test_diff_tells_what_changed_since_the_image_before(images: list[str], run: Any) -> None:
    document = run("diff", "job", "-o", "json").document()
    assert (document["name"], document["base"]) == (images[2], images[1])
    (member,) = document["members"]
    assert (member["sameBytes"], member["changedBytes"], member["files"]) == (0, 4096, [])
    reverse = run("diff", images[2], images[0], "-o", "json").document()
    assert (reverse["name"], reverse["base"]) == (images[0], images[2])
    shown = run("diff", "job").out
    assert images[1] in shown
    assert "tree-0" in shown


@pytest.mark.parametrize(
    "arguments", [("other",), ("job", "other"), ("absent",), ("job", "-n", "space")]
)
def test_diff_refuses_what_cannot_be_compared(
    images: list[str], run: Any, arguments: tuple[str, ...]
) -> None:
    ran = run("diff", *arguments)
    assert (ran.status, ran.out) == (exits.REFUSED, "")
    assert "hint: " in ran.err


def test_diff_names_files_that_changed(folder: pathlib.Path, images: list[str], run: Any) -> None:
    store = Store.open(DirectoryVolume(str(folder)))
    with store.begin(ids.group_name("job"), now_s=_NOW_S + 9 * _DAY_S) as writer:
        member = writer.member(ids.member_name("tree-0"))
        for path, content in (("/tmp/out", b"abd"), ("/tmp/new\n", b"")):
            entry = FileEntry(path, "file", 0o100600, 0, 0, 1, 3, "open")
            member.file(entry, io.BytesIO(content))
        writer.commit({})
    (member,) = run("diff", "job", "-o", "json").document()["members"]
    assert member["removedBytes"] == 4096
    assert member["files"] == [
        {"path": "/tmp/out", "change": "changed"},
        {"path": "/tmp/new\n", "change": "added"},
    ]
    assert "added    /tmp/new\\n\n" in run("diff", "job").out


def test_verify_names_each_damaged_part_and_is_status_5(
    run: Any, images: list[str], folder: pathlib.Path
) -> None:
    good = run("verify", "--all", "-o", "json")
    assert (good.status, good.document()["good"]) == (0, True)
    damage(folder)
    bad = run("verify", images[0], "-o", "json")
    (item,) = bad.document()["items"]
    assert bad.status == exits.DATA
    assert item["damaged"]
    assert all(part["part"].startswith("packs/") for part in item["damaged"])
    assert run("verify", images[0]).status == exits.DATA


def test_what_is_deleted_while_all_images_are_verified_hides_no_damage_of_others(
    run: Any, images: list[str], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(folder)
    verify, looked = Store.verify, []

    def meanwhile(store: Store, group: Any, epoch: Any, *rest: Any) -> Any:
        looked.append(epoch)
        if len(looked) == len(images):
            store.delete(group, epoch)
        return verify(store, group, epoch, *rest)

    monkeypatch.setattr(Store, "verify", meanwhile)
    ran = run("verify", "--all", "-o", "json")
    assert ran.status == exits.DATA
    assert f"{images[-1]} was deleted meanwhile" in ran.err
    names = [item["name"] for item in ran.document()["items"]]
    assert names == images[:-1]


@pytest.mark.parametrize("deleted", [True, False])
def test_what_is_deleted_while_all_images_of_a_namespace_are_verified_hides_no_damage_of_others(
    run: Any, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    there = [
        results.Image("job", f"2026010{day}-000000-00000a", 0.0, (), 0, 0, 0, 0, 0, None, "default")
        for day in (1, 2)
    ]
    names = [documents.image_name(each) for each in there]
    listings = iter([there, there[1:] if deleted else there])

    class Agent:
        def listing(self, *_: object) -> results.Listing:
            return results.Listing(next(listings), {})

        def verify(self, _: str, name: str, *__: object, **___: object) -> results.VerifyOutcome:
            if name == names[0]:
                raise errors.NotFound("there is no such image, or something else")
            return results.VerifyOutcome(False, 1, (("packs/1", "torn"),))

    session = types.SimpleNamespace(namespace="team", any_agent=lambda ask: ask(Agent()))
    monkeypatch.setattr(incluster, "connected", lambda _: contextlib.nullcontext(session))
    ran = run("verify", "--all", "-n", "team", "-o", "json")
    if not deleted:  # what could not be verified is not said to be gone
        assert ran.status == exits.REFUSED
        assert "or something else" in ran.err
        return
    assert ran.status == exits.DATA
    assert f"{names[0]} was deleted meanwhile" in ran.err
    assert [item["name"] for item in ran.document()["items"]] == names[1:]


def test_an_image_with_a_damaged_manifest_is_listed_as_such(
    run: Any, images: list[str], folder: pathlib.Path
) -> None:
    group, epoch = images[0].split("@")
    manifest = folder / "groups" / group / epoch / "epoch"
    manifest.chmod(0o600)
    manifest.write_bytes(b"rubbish")
    first = run("list", "-o", "json").document()["items"][0]
    assert first["name"] == images[0]
    assert first["damage"]
    assert first["createdAt"] == "2026-09-21T14:13:20Z"
    assert "damaged" in run("list").out


def test_prune_previews_and_then_removes_the_same(run: Any, images: list[str]) -> None:
    preview = run("prune", "--keep-last", "1", "--dry-run", "-o", "json").document()
    assert (preview["dryRun"], run("list", "-o", "name").out.split()) == (True, images)
    done = run("prune", "--keep-last", "1", "-o", "json").document()
    assert [item["name"] for item in preview["items"]] == images[:2]
    assert [item["name"] for item in done["items"]] == images[:2]
    assert sorted(done["kept"]) == sorted(images[2:])
    assert run("list", "-o", "name").out.split() == images[2:]


def test_prune_takes_its_rule_from_the_configuration_too(
    run: Any, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_AGENT_KEEP_LAST", "2")
    assert run("prune", "--group", "job", "-o", "name").out.split() == images[:1]


def test_delete_removes_one_image_and_takes_no_group(run: Any, images: list[str]) -> None:
    assert run("delete", "job").status == exits.USAGE
    assert run("delete", images[1], "-o", "json").document()["items"][0]["name"] == images[1]
    assert run("list", "job", "-o", "name").out.split() == [images[0], images[2]]


def test_doctor_is_validated_and_its_status_follows_the_worst_line(
    run: Any, images: list[str]
) -> None:
    ran = run("doctor", "-o", "json")
    document = ran.document()
    assert ran.status == (exits.ENVIRONMENT if document["status"] == "missing" else exits.DONE)
    lines = {check["name"]: check for check in document["checks"]}
    assert lines["store"]["status"] == "ok"
    without = run("doctor", "--criu", "/nonexistent/criu", "-o", "json")
    assert without.status == exits.ENVIRONMENT
    lines = {check["name"]: check for check in without.document()["checks"]}
    assert lines["criu"]["status"] == "missing"
    assert "cure: " in run("doctor", "--criu", "/nonexistent/criu").out


def test_doctor_names_what_a_killed_operation_left(run: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "work" / "dump-1-2-0").mkdir(parents=True)
    ran = run("doctor", "--work-dir", str(tmp_path / "work"), "-o", "json")
    lines = {check["name"]: check for check in ran.document()["checks"]}
    assert lines["leftovers"]["status"] == "degraded"
    assert "dump-1-2-0" in lines["leftovers"]["found"]


def test_plan_is_validated_and_names_what_is_in_the_way(run: Any) -> None:
    ran = run("plan", "--pid", str(os.getpid()), "-o", "json")
    assert ran.status == exits.REFUSED
    document = ran.document()
    assert not document["feasible"]
    assert "own-ancestor" in {finding["code"] for finding in document["blockers"]}
    assert "WAY OUT" in run("plan", "--pid", str(os.getpid())).out


def test_messages_go_to_stderr_and_quiet_silences_them(run: Any, images: list[str]) -> None:
    said = run("prune", "--keep-last", "9", "-o", "name")
    assert (said.out, bool(said.err)) == ("", True)
    assert run("prune", "--keep-last", "9", "-o", "name", "--quiet").err == ""


# Errors.


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("list", "--store", "s3://b"), exits.REFUSED, "invalid-input"),
        (("list", "--config", "/nonexistent"), exits.REFUSED, "not-found"),
        (("list", "a/b"), exits.REFUSED, "invalid-input"),
        (("show", "nothing"), exits.REFUSED, "not-found"),
        (("restore", "nothing"), exits.REFUSED, "not-found"),
        (("plan", "--pid", "2147483646"), exits.REFUSED, "not-found"),
        (("dump", "--pid", "2147483646"), exits.REFUSED, "not-found"),
        (("restore", "job", "--stdin", "/nonexistent/in"), exits.REFUSED, "invalid-input"),
        (("list", "--store", "/nonexistent/store"), exits.VOLUME, "volume-gone"),
    ],
)
def test_errors_are_told_once_with_their_status(
    run: Any, images: list[str], arguments: tuple[str, ...], status: int, code: str
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("ckpt-agent: ")
    for form, load in (("json", json.loads), ("yaml", yaml.safe_load)):
        ran = run(*arguments, "-o", form)
        assert (ran.status, ran.out) == (status, "")
        assert checked(load(ran.err))["code"] == code


def test_a_bad_configuration_names_file_line_key_and_way_out(
    run: Any, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("output: json\nstoer: /x\n")
    ran = run("list", "--config", str(path))
    assert ran.status == exits.REFUSED
    assert f"{path} line 2" in ran.err
    assert "'stoer'" in ran.err
    assert "did you mean 'store'?" in ran.err


def test_reasons_and_the_log_of_criu_are_shown(
    run: Any, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(*_: object, **__: object) -> None:
        raise errors.CriuFailed(
            "CRIU failed", hint="do this", reasons=["pid 7 is taken"], log_tail=["Error (x.c:1)"]
        )

    monkeypatch.setattr(wiring, "restore", restore)
    ran = run("restore", "job")
    assert ran.status == exits.FAILED
    assert ran.err.splitlines() == [
        "ckpt-agent: CRIU failed",
        "  - pid 7 is taken",
        "  | Error (x.c:1)",
        "hint: do this",
    ]


def test_a_defect_is_one_line_and_its_trace_is_shown_on_request(
    run: Any, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(wiring, "store", broken)
    ran = run("list")
    assert ran.status == exits.INTERNAL
    assert ran.err.startswith("ckpt-agent: internal error: RuntimeError: oh\n")
    assert "--verbose" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in run("list", "--verbose").err
    assert checked(json.loads(run("list", "-o", "json").err))["code"] == "internal"


# Dump and restore, with the engine's part played by a stand-in.


class Tree:
    """A restored tree that ends with a status, or when it is killed."""

    def __init__(self, status: int = 0) -> None:
        self.pid = 4711
        self.status = status
        self.signals: list[int] = []
        self.killed = False

    def wait(self, timeout_s: float | None = None) -> int:
        if self.status < 0:
            os.kill(os.getpid(), signal.SIGTERM)
            return 128 + self.signals[0]
        return self.status

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.killed = True


def dumped(folder: pathlib.Path, **changes: Any) -> DumpOutcome:
    store = Store.open(DirectoryVolume(str(folder), create=True), create=True)
    name = ids.member_name("tree-0")
    add_image(store, "job", _NOW_S)
    report = CaptureReport(0.1, 0.05, 4096, (7, 8))
    return DumpOutcome(store.epochs()[0], ((name, report),), 0.1, 0.4, False)


def test_dump_prints_the_name_that_restore_takes_and_nothing_else_on_stdout(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = dumped(folder)
    monkeypatch.setattr(wiring, "dump", lambda *_, **__: outcome)
    name = ids.image_name(outcome.epoch.group, outcome.epoch.epoch)
    for form in ("table", "wide", "name"):
        ran = run("dump", "--pid", "7", "-o", form)
        assert (ran.status, ran.out) == (0, f"{name}\n")
        assert "stopped for 100 ms" in ran.err
    document = run("dump", "--pid", "7", "-o", "json").document()
    assert (document["name"], document["processes"]) == (name, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_dump_cancels_it_and_is_status_130(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def dump(*_: object, cancel: Cancel, **__: object) -> None:
        os.kill(os.getpid(), number)
        cancel.check()

    before = signal.getsignal(number)
    monkeypatch.setattr(wiring, "dump", dump)
    ran = run("dump", "--pid", "7")
    assert (ran.status, ran.out) == (exits.INTERRUPTED, "")
    assert "the job goes on" in ran.err
    assert signal.getsignal(number) is before


@contextlib.contextmanager
def restored_by(
    monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, tree: Tree, number: int = 0
) -> Iterator[None]:
    epoch = dumped(folder).epoch
    outcome = RestoreOutcome(epoch, ((ids.member_name("tree-0"), tree),), 0.1, 0.2)

    def restore(*_: object, **__: object) -> RestoreOutcome:
        if number:
            os.kill(os.getpid(), number)
        return outcome

    monkeypatch.setattr(wiring, "restore", restore)
    yield


def test_restore_reports_the_pid_and_with_wait_ends_as_the_tree_did(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with restored_by(monkeypatch, folder, Tree(status=9)):
        ran = run("restore", "job", "-o", "json")
        assert (ran.status, ran.document()["members"][0]["exitStatus"]) == (0, None)
        ran = run("restore", "job", "--wait", "-o", "json")
        assert (ran.status, ran.document()["members"][0]["exitStatus"]) == (9, 9)
        assert "4711" in run("restore", "job").out


def test_memory_may_come_late_unless_all_of_it_is_to_come_first(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RestoreOptions] = []
    with restored_by(monkeypatch, folder, Tree()):
        stand_in = wiring.restore

        def restore(settings: Any, image: str, options: RestoreOptions, **rest: Any) -> Any:
            asked.append(options)
            return stand_in(settings, image, options, **rest)

        monkeypatch.setattr(wiring, "restore", restore)
        assert run("restore", "job").status == exits.DONE
        assert run("restore", "job", "--eager").status == exits.DONE
    assert [options.fills is not None for options in asked] == [True, False]


def test_a_signal_while_waiting_reaches_the_tree(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(status=-1)
    with restored_by(monkeypatch, folder, tree):
        assert run("restore", "job", "--wait").status == 128 + signal.SIGTERM
    assert tree.signals == [signal.SIGTERM]


def test_a_signal_during_a_restore_ends_what_was_restored(
    run: Any, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree()
    with restored_by(monkeypatch, folder, tree, number=signal.SIGINT):
        ran = run("restore", "job")
    assert (ran.status, ran.out) == (exits.INTERRUPTED, "")
    assert tree.killed


def test_a_signal_while_an_image_is_verified_lets_no_process_be_started(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def restore(*_: object, progress: Callable[[Progress], None], **__: object) -> None:
        progress(Progress("verify"))
        os.kill(os.getpid(), signal.SIGTERM)
        progress(Progress("restore"))
        begun.append("restore")

    monkeypatch.setattr(wiring, "restore", restore)
    ran = run("restore", "job")
    assert (ran.status, ran.out) == (exits.INTERRUPTED, "")
    assert "stopping" in ran.err
    assert not begun


# Shells and pipes.


def program() -> list[str]:
    return [sys.executable, "-c", "from agent.cli.start import main; main()"]


def test_a_terminal_gets_a_bar_on_stderr_and_stdout_stays_clean(images: list[str]) -> None:
    ours, theirs = os.openpty()
    ended = subprocess.run(
        [*program(), "verify", images[0], "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        timeout=60,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed and all is read
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert images[0].encode() in shown
    assert checked(json.loads(ended.stdout))["good"]


def test_an_interrupt_after_the_answer_does_not_undo_it(images: list[str]) -> None:
    # Modules are taken down when the interpreter no longer answers signals itself.
    late = """
import os, signal
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT): kill(pid, number)
late = Late()
"""
    command = [sys.executable, "-c", late + program()[2], "list", "-o", "name"]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert ended.returncode == exits.DONE, ended.stderr
    assert ended.stdout.decode().split() == images


def test_an_interrupt_while_the_answer_is_written_does_not_undo_it(images: list[str]) -> None:
    at_once = """
import io, os, signal, sys
class Out(io.TextIOWrapper):
    def flush(self):
        super().flush()
        os.kill(os.getpid(), signal.SIGINT)
sys.stdout = Out(open(1, "wb", 0, closefd=False), write_through=True)
"""
    command = [sys.executable, "-c", at_once + program()[2], "list", "-o", "name"]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (exits.DONE, b"")
    assert ended.stdout.decode().split() == images


def test_a_closed_pipe_is_quiet(images: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [*program(), "list", "-o", "name"], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (exits.PIPE_CLOSED, b"")


def test_a_full_disk_behind_stdout_names_what_was_done(images: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [*program(), "show", images[0]], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert ended.returncode == exits.ENVIRONMENT
    assert ended.stderr.startswith(f"ckpt-agent: Image {images[0]} is complete".encode())
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr


def test_a_closed_stdout_is_no_defect(images: list[str]) -> None:
    ended = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", *program(), "list"], stderr=subprocess.PIPE, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_without_pycriu_doctor_says_so_and_the_store_can_be_read(images: list[str]) -> None:
    # None in sys.modules makes an import fail as if the package were not there.
    without = "import sys; sys.modules['pycriu'] = None; from agent.cli.main import main; main()"
    command = [sys.executable, "-c", without]
    listed = subprocess.run([*command, "list", "-o", "name"], capture_output=True, timeout=60)
    assert listed.stdout.decode().split() == images
    ended = subprocess.run([*command, "doctor", "-o", "json"], capture_output=True, timeout=60)
    assert ended.returncode == exits.ENVIRONMENT
    lines = {check["name"]: check for check in checked(json.loads(ended.stdout))["checks"]}
    assert lines["criu"]["status"] == "missing"
    assert "scripts/setup" in lines["criu"]["cure"]
    refused = subprocess.run([*command, "restore", images[0]], capture_output=True, timeout=60)
    assert refused.returncode == exits.ENVIRONMENT


@pytest.mark.parametrize("entry", ["ckpt-agent", "kubectl-ckpt", "kubectl_complete-ckpt"])
def test_an_interruption_while_modules_are_loaded_is_told_in_one_line(
    tmp_path: pathlib.Path, entry: str
) -> None:
    project = tomllib.loads((_DOCS.parent / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"][entry].partition(":")
    slow = "import sys, time; print('loading', flush=True); time.sleep(60)"
    (tmp_path / "click.py").write_text(slow)
    started = subprocess.Popen(
        [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{_DOCS.parent}"},
    )
    assert started.stdout is not None
    assert started.stdout.readline() == b"loading\n"
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    said = output.render(failures.error(errors.Interrupted("interrupted")), "table", now_s=0.0)
    assert (started.returncode, told.decode()) == (exits.INTERRUPTED, said + "\n")


def test_head_takes_the_first_name(images: list[str], tmp_path: pathlib.Path) -> None:
    script = f"{sys.executable} -c 'from agent.cli.main import main; main()' list -o name | head -1"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == (f"{images[0]}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_one_the_shell_can_parse(
    run: Any, shell: str, tmp_path: pathlib.Path
) -> None:
    ran = run("completion", shell)
    assert ran.status == 0
    assert f"_CKPT_AGENT_COMPLETE={shell}_complete" in ran.out
    script = tmp_path / "script"
    script.write_text(ran.out)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True, timeout=30)


def test_the_shell_is_offered_verbs_and_image_names(
    run: Any, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CKPT_AGENT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ckpt-agent re")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().out == "plain,restore\n"
    monkeypatch.setenv("COMP_WORDS", "ckpt-agent restore jo")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run().out.split() == [f"plain,{name}" for name in images[:3]]
