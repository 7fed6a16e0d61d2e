"""Settings: who wins, what is refused, and what a refusal tells."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import pytest

from agent import errors, settings
from agent.model import values
from agent.model.values import StoreUrl
from agent.settings import ConfigFile, Settings


def merged(
    flags: Mapping[str, object] | None = None,
    environ: dict[str, str] | None = None,
    text: str | None = None,
) -> Settings:
    file = None if text is None else settings.parse_file("/etc/xdg/ckpt-agent/config.yaml", text)
    return settings.merge(flags or {}, environ or {}, file, cwd="/cwd")


def refused(text: str) -> errors.InvalidInput:
    with pytest.raises(errors.InvalidInput) as caught:
        merged(text=text)
    return caught.value


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default() -> None:
    file, environ, flags = "store: /f\n", {"CKPT_AGENT_STORE": "/e"}, {"store": "/a"}
    assert merged(flags, environ, file).store.path == "/a"
    assert merged({}, environ, file).store.path == "/e"
    assert merged({}, {}, file).store.path == "/f"
    assert merged().store.path == "/var/lib/ckpt-agent/store"


def test_a_flag_that_was_not_given_and_an_empty_variable_leave_the_file_alone() -> None:
    assert merged({"store": None}, {"CKPT_AGENT_STORE": ""}, "store: /f").store.path == "/f"


def test_every_setting_can_come_from_flag_environment_and_file() -> None:
    values: dict[str, tuple[str, Any]] = {
        "store": ("/s", StoreUrl("file", "/s")),
        "stores": ("fast=/f,slow=/g/", {"fast": "/f", "slow": "/g"}),
        "criu": ("/c", "/c"),
        "work_dir": ("/w", "/w"),
        "criu_bundle": ("/b", "/b"),
        "output": ("json", "json"),
        "dump_deadline": ("2m", 120.0),
        "restore_deadline": ("90", 90.0),
        "ghost_limit": ("2GiB", 2 << 30),
        "precopy": ("false", False),
        "precopy_cpu": ("20%", 20),
        "precopy_rate": ("200MiB", 200 << 20),
        "criu_log_level": ("4", 4),
        "keep_last": ("3", 3),
        "keep_within": ("7d", 604800.0),
        "use_cluster": ("true", True),
        "kubeconfig": ("/k", "/k"),
        "context": ("prod", "prod"),
        "namespace": ("team-a", "team-a"),
        "agent_namespace": ("other", "other"),
        "agent_selector": ("app=a", "app=a"),
        "agent_address": ("agent.svc:7443", "agent.svc:7443"),
        "agent_ca": ("/ca.crt", "/ca.crt"),
        "agent_silence": ("2s", 2.0),
        "schedule_deadline": ("5m", 300.0),
        "image": ("registry.example/agent:1", "registry.example/agent:1"),
        "leaf_lifetime": ("30d", 2592000.0),
        "leaf_renew_before": ("10d", 864000.0),
        "ca_lifetime": ("52w", 31449600.0),
        "ca_renew_before": ("90d", 7776000.0),
        "trust_overlap": ("1h", 3600.0),
        "node_name": ("n1", "n1"),
        "runtime_socket": ("/r", "/r"),
        "tls_dir": ("/t", "/t"),
        "token_port": ("1", 1),
        "certificate_port": ("0", 0),
        "kubelet_address": ("10.0.0.1", "10.0.0.1"),
        "kubelet_trust": ("ca:/ca.crt", "ca:/ca.crt"),
        "kubelet_checkpoints": ("/q", "/q"),
        "runc_conf": ("/c", "/c"),
        "probe_port": ("2", 2),
        "work_kept_free": ("15%", 15),
        "parallel": ("4", 4),
        "use_coordinator": ("true", True),
        "coordinator_selector": ("app=c", "app=c"),
        "coordinator_address": ("coordinator.svc:7543", "coordinator.svc:7543"),
        "coordinator_token_port": ("3", 3),
        "coordinator_certificate_port": ("4", 4),
        "coordinator_parallel": ("5", 5),
        "operation_deadline": ("2h", 7200.0),
        "caller_rate": ("0.5", 0.5),
        "caller_burst": ("7", 7),
        "caller_streams": ("3", 3),
        "shutdown_grace": ("90s", 90.0),
    }
    assert set(values) == set(settings.KEYS)
    wanted = Settings(*(value for _, value in values.values()))
    said = {key: text for key, (text, _) in values.items()}
    assert merged(said) == wanted
    assert merged({}, {f"CKPT_AGENT_{key.upper()}": text for key, text in said.items()}) == wanted
    assert merged(text="".join(f"{key}: {text}\n" for key, text in said.items())) == wanted


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(errors.InvalidInput, match="token_port"):
        merged(text=f"token_port: {port!r}")


@pytest.mark.parametrize("rate", ["0", "-1", "1/s", ""])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(errors.InvalidInput, match="caller_rate"):
        merged(text=f"caller_rate: {rate!r}")


@pytest.mark.parametrize("text", ["precopy_cpu: 0", "precopy_cpu: 101", "precopy_rate: 4KiB"])
def test_what_would_never_end_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput, match="precopy_"):
        merged(text=text)


def test_numbers_in_yaml_need_no_quotes() -> None:
    assert merged(text="keep_last: 3\ndump_deadline: 1.5\n").dump_deadline_s == 1.5


def test_each_field_is_documented_below_it() -> None:
    source = pathlib.Path(settings.__file__).read_text()
    body = source[source.index("class Settings:") : source.index("class _Key:")]
    for field in dataclasses.fields(Settings):
        assert re.search(rf'\n    {field.name}: .*\n    """', body), field.name


def test_relative_paths_are_taken_from_where_they_were_written() -> None:
    assert merged({"store": "s"}).store.path == "/cwd/s"
    assert merged({}, {"CKPT_AGENT_WORK_DIR": "w"}).work_dir == "/cwd/w"
    assert merged(text="store: ../s").store.path == "/etc/xdg/s"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///srv/a%20b", "/srv/a b"),
        ("file://localhost/srv", "/srv"),
        ("/srv//x/", "/srv/x"),
        ("a:b", "/cwd/a:b"),
    ],
)
def test_a_store_is_a_path_or_a_file_url(text: str, path: str) -> None:
    assert values.store_url(text, "/cwd") == StoreUrl("file", path)


@pytest.mark.parametrize("text", ["s3://bucket/x", "nfs://host/export", "://x"])
def test_an_unknown_scheme_is_refused_with_what_is_supported(text: str) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        values.store_url(text, "/")
    assert "file:///" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["file://host/path", "file://", "file:///a?b", "file:///a#b", "", "a\0b"]
)
def test_a_url_with_more_or_less_than_a_path_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        values.store_url(text, "/")


def test_a_store_url_read_again_is_the_same() -> None:
    url = values.store_url("/srv/a b%/ü", "/")
    assert values.store_url(str(url), "/") == url


@pytest.mark.parametrize("text", ["0", "-1", "7 d", "d", "1y", "1e3", "inf", "nan", "٣d"])
def test_what_is_no_time_span_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        values.duration_s(text)


@pytest.mark.parametrize("text", ["1GB", "-1", "1.5GiB", "GiB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        values.size_bytes(text)


def test_a_bad_value_names_its_flag_its_variable_or_its_file_and_line() -> None:
    with pytest.raises(errors.InvalidInput, match=r"^--keep-last: "):
        merged({"keep_last": "no"})
    with pytest.raises(errors.InvalidInput, match=r"^CKPT_AGENT_OUTPUT: .*'xml'"):
        merged({}, {"CKPT_AGENT_OUTPUT": "xml"})
    found = refused("# what to keep\nkeep_last: often\n")
    assert "/etc/xdg/ckpt-agent/config.yaml line 2, key 'keep_last'" in found.message
    assert found.hint


@pytest.mark.parametrize(
    ("typed", "meant"), [("stor", "store"), ("work-dir", "work_dir"), ("keepLast", "keep_last")]
)
def test_an_unknown_key_names_its_line_and_the_nearest_known_key(typed: str, meant: str) -> None:
    found = refused(f"output: json\n{typed}: x\n")
    assert "config.yaml line 2" in found.message
    assert typed in found.message
    assert found.hint == f"did you mean {meant!r}?"


def test_a_key_that_is_like_no_other_gets_the_whole_list() -> None:
    assert "restore_deadline" in refused("zzzzzz: 1").hint


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("store: [", 1),
        ("output: json\nstore: 'x", 2),
        ("- store\n", 1),
        ("just text", 1),
        ("store: /a\nstore: /b", 2),
        ("store: !!python/object:os.system x", 1),
        ("[1, 2]: x", 1),
    ],
)
def test_a_file_that_is_no_mapping_of_known_keys_names_file_and_line(text: str, line: int) -> None:
    found = refused(text)
    assert f"config.yaml line {line}" in found.message
    assert found.hint


@pytest.mark.parametrize("value", ["null", "true", "[a]", "{a: b}", "''"])
def test_a_value_of_another_type_is_refused(value: str) -> None:
    assert "key 'store'" in refused(f"store: {value}").message


def test_an_empty_file_sets_nothing() -> None:
    assert merged(text="# nothing\n") == Settings()


def test_a_named_file_must_be_there_and_a_default_one_need_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.NotFound, match="there is no configuration file"):
        settings.read_file(str(tmp_path / "none.yaml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    assert settings.read_file(None) is None


def test_the_users_file_is_found_before_the_machines(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    for kind in ("site", "user"):
        folder = tmp_path / kind / "ckpt-agent"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"store: /{kind}\n")
        assert settings.load({}, None, {}).store.path == f"/{kind}"


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_as_text_is_refused(
    tmp_path: pathlib.Path, content: bytes | None
) -> None:
    path = tmp_path / "config.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(errors.InvalidInput, match=re.escape(os.fspath(path))):
        settings.read_file(str(path))


def test_the_variable_for_the_file_gives_way_to_the_flag(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"criu: {name}\n")
    environ = {"CKPT_AGENT_CONFIG": str(tmp_path / "a")}
    assert settings.load({}, None, environ).criu == str(tmp_path / "a")
    assert settings.load({}, str(tmp_path / "b"), environ).criu == str(tmp_path / "b")


def test_a_config_file_value_needs_no_file() -> None:
    file = ConfigFile("/x/y.yaml", {"criu": ("bin/criu", 4)})
    assert settings.merge({}, {}, file, cwd="/").criu == "/x/bin/criu"
