"""CRIU's options on the node: the administrator's file stays the administrator's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.engines.kubelet import runcconf


def options(content: bytes) -> dict[str, str]:
    """The options as CRIU would read them; the last one of a name counts."""
    found = {}
    for line in content.decode().splitlines():
        words = line.partition("#")[0].split(None, 1)
        if words:
            found[words[0]] = words[1] if len(words) > 1 else ""
    return found


def test_without_a_file_one_is_made_and_goes_again(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    with runcconf.installed(str(path)):
        assert options(path.read_bytes()) == dict(runcconf.OPTIONS)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == []


def test_the_administrators_lines_stay_and_win(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    theirs = b"# ours\nghost-limit 5000000\n  tcp-close\nlog-level 4 # loud\n"
    path.write_bytes(theirs)
    path.chmod(0o640)
    os.chown(path, 12, 34)
    with runcconf.installed(str(path)):
        content = path.read_bytes()
        assert content.startswith(theirs)
        found = options(content)
        assert found["ghost-limit"] == "5000000"
        assert "tcp-established" not in found
        assert "file-locks" in found
        info = path.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o640, 12, 34)
    assert path.read_bytes() == theirs


def test_an_empty_file_of_theirs_stays(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    path.write_bytes(b"")
    with runcconf.installed(str(path)):
        assert options(path.read_bytes()) == dict(runcconf.OPTIONS)
    assert path.read_bytes() == b""


def test_asking_again_changes_nothing_and_a_crash_is_undone_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    path.write_bytes(b"log-level 4\n")
    assert runcconf.install(str(path))  # and then the agent is killed
    assert not runcconf.install(str(path))
    assert runcconf.install(str(path), {"file-locks": ""})
    assert options(path.read_bytes()) == {"log-level": "4", "file-locks": ""}
    assert runcconf.remove(str(path))
    assert not runcconf.remove(str(path))
    assert path.read_bytes() == b"log-level 4\n"


def test_what_is_edited_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    with runcconf.installed(str(path)):
        path.write_bytes(b"log-level 4\n" + path.read_bytes() + b"manage-cgroups ignore\n")
        runcconf.install(str(path))
    assert path.read_bytes() == b"log-level 4\nmanage-cgroups ignore\n"


def test_an_unfinished_file_of_a_killed_agent_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "runc.conf"
    (tmp_path / "runc.conf.ckpt-agent-new").write_bytes(b"half")
    with runcconf.installed(str(path)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_file_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "managed.conf"
    target.write_bytes(b"log-level 4\n")
    path = tmp_path / "runc.conf"
    path.symlink_to(target)
    with pytest.raises(errors.EnvironmentUnfit, match="not a regular file") as caught:
        runcconf.install(str(path))
    assert "tcp-established" in caught.value.hint
    assert target.read_bytes() == b"log-level 4\n"
    with pytest.raises(errors.EnvironmentUnfit, match="cannot change"):
        runcconf.install(str(tmp_path / "absent" / "runc.conf"))
    target.write_bytes(bytes(2 << 20))
    with pytest.raises(errors.EnvironmentUnfit, match="too long"):
        runcconf.install(str(target))


_lines = st.lists(
    st.one_of(
        st.sampled_from(
            [b"tcp-close", b"ghost-limit 1", b"# a comment", b"", b"  file-locks", b"--log-level 4"]
        ),
        st.binary(max_size=20).filter(lambda raw: b"\n" not in raw and b"ckpt-agent" not in raw),
    ),
    max_size=6,
)


@given(_lines)
def test_taking_the_block_out_gives_back_what_was_there(lines: list[bytes]) -> None:
    content = b"".join(line + b"\n" for line in lines)
    once = runcconf.merged(content)
    assert runcconf.merged(once) == once
    assert once.startswith(content)
    assert runcconf.stripped(once) == content
