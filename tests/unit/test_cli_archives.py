"""export and import on the command line: files of other programs in and out of a real store."""

from __future__ import annotations

import json
import os
import pathlib
import stat
from collections.abc import Callable

import pytest

from agent.cli import exits, main
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests import archives
from tests.unit import test_cli
from tests.unit.test_cli import Ran, add_image, damage

Run = Callable[..., Ran]
folder = test_cli.folder


@pytest.fixture
def run(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Ran:
        status = main.run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return run


@pytest.fixture
def tar(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "checkpoint.tar"
    path.write_bytes(archives.tar(archives.entries()))
    return path


def test_an_archive_comes_in_is_an_image_and_goes_out_again(
    run: Run, tar: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = run("import", tar).out.strip()
    assert image.startswith("pod-1@")
    document = run("show", image, "-o", "json").document()
    assert document["members"] == ["c"]
    assert run("verify", image).status == exits.DONE
    again = tmp_path / "again.tar"
    report = run("export", image, again, "-o", "json").document()
    assert report["sizeBytes"] == again.stat().st_size
    assert (report["member"], report["path"], report["leftOut"]) == ("c", str(again), [])
    assert stat.S_IMODE(again.stat().st_mode) == 0o600
    second = run("import", again, "--name", "copy", "-o", "json").document()
    assert second["name"].startswith("copy@")
    assert second["rawBytes"] == document["rawBytes"]


def test_a_hostile_archive_is_status_5_and_nothing_is_stored(
    run: Run,
    tar: pathlib.Path,
    folder: pathlib.Path,
) -> None:
    for content in (
        tar.read_bytes()[:30_000],
        archives.tar((*archives.entries(), archives.Entry("../../evil", b"x"))),
    ):
        tar.write_bytes(content)
        ran = run("import", tar, "-o", "json")
        assert (ran.status, ran.out) == (exits.DATA, "")
        assert json.loads(ran.err)["code"] == "corrupt"
    if folder.exists():
        assert Store.open(DirectoryVolume(str(folder))).epochs() == []
        assert [path for path in (folder / "packs").rglob("*") if path.is_file()] == []


def test_what_cannot_be_imported_is_refused(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("import", tmp_path / "absent.tar").status == exits.REFUSED
    (tmp_path / "a.tar").write_bytes(archives.tar(archives.entries()))
    assert run("import", tmp_path / "a.tar", "--name", "no/name").status == exits.REFUSED


def test_files_without_a_place_are_named(
    run: Run,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    image = add_image(
        Store.open(DirectoryVolume(str(folder), create=True), create=True), "job", 1e9
    )
    ran = run("export", image, tmp_path / "a.tar")
    assert ran.status == exits.DONE
    assert "/tmp/out" in ran.err
    assert run("export", image, tmp_path / "a.tar", "--quiet").err == ""


def test_a_damaged_image_is_not_exported(
    run: Run,
    tar: pathlib.Path,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    image = run("import", tar).out.strip()
    damage(folder)
    target = tmp_path / "out"
    target.mkdir()
    assert run("export", image, target / "a.tar").status == exits.DATA
    assert list(target.iterdir()) == []


def test_the_old_file_stays_until_the_new_one_is_whole(
    run: Run, tar: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = run("import", tar).out.strip()
    target = tmp_path / "a.tar"
    target.write_text("old")
    assert run("export", image, target).status == exits.DONE
    assert target.stat().st_size > 10_000
    assert run("export", image, tmp_path / "absent" / "a.tar").status == exits.REFUSED
    assert run("export", image, target, "--member", "other").status == exits.REFUSED
    assert [name for name in os.listdir(tmp_path) if "unfinished" in name] == []
