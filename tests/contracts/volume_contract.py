"""What every volume promises, as tests. A test module makes a subclass for each kind of volume."""

from __future__ import annotations

import threading
from concurrent import futures

import pytest

from agent import errors
from agent.volumes.base import Volume

HOSTILE_NAMES = (
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../x",
    "a/./x",
    "a//x",
    "a/",
    ".hidden",
    "a/.unfinished",
    "-x",
    "a b",
    "a\0b",
    "a\nb",
    "ä",
    "a\\b",
    "x" * 254,
    "/".join(["x" * 100] * 11),
)


class VolumeContract:
    """``volume`` is empty; ``same`` is another way to the same blobs, as another process has it."""

    @pytest.fixture
    def volume(self) -> Volume:
        raise NotImplementedError

    @pytest.fixture
    def same(self, volume: Volume) -> Volume:
        return volume

    def test_a_blob_is_read_back_whole_and_in_parts(self, volume: Volume, same: Volume) -> None:
        volume.put("a/b/c", b"0123456789")
        assert same.read("a/b/c") == b"0123456789"
        assert same.read("a/b/c", 3) == b"3456789"
        assert same.read("a/b/c", 3, 4) == b"3456"
        assert same.read("a/b/c", 3, 0) == b""
        assert same.read("a/b/c", 8, 100) == b"89"
        assert same.read("a/b/c", 100, 5) == b""
        assert same.read("a/b/c", 100) == b""

    def test_an_empty_blob_is_a_blob(self, volume: Volume, same: Volume) -> None:
        volume.put("empty", b"")
        assert same.read("empty") == b""
        assert same.info("empty").size_bytes == 0

    def test_a_blob_is_written_in_pieces_of_any_kind(self, volume: Volume) -> None:
        with volume.create("pieces") as writer:
            writer.write(b"ab")
            writer.write(memoryview(bytearray(b"cdef"))[1:3])
            writer.write(b"")
            writer.commit()
        assert volume.read("pieces") == b"abde"

    def test_a_large_blob_is_written_and_read_whole(self, volume: Volume) -> None:
        piece = bytes(range(256)) * 4096
        with volume.create("large") as writer:
            for _ in range(70):
                writer.write(piece)
            writer.commit()
        assert volume.info("large").size_bytes == 70 * len(piece)
        assert volume.read("large", 69 * len(piece) - 3, 7) == piece[-3:] + piece[:4]

    def test_nothing_is_visible_before_commit(self, volume: Volume, same: Volume) -> None:
        with volume.create("slow") as writer:
            writer.write(b"x")
            assert list(same.list()) == []
            with pytest.raises(errors.BlobNotFound):
                same.read("slow")
            writer.commit()
            assert same.read("slow") == b"x"

    def test_leaving_without_commit_leaves_nothing(self, volume: Volume) -> None:
        with volume.create("dropped") as writer:
            writer.write(b"x")
        with pytest.raises(ZeroDivisionError), volume.create("failed") as writer:
            writer.write(bytes(1 // 0))
        assert list(volume.list()) == []
        assert volume.sweep(0.0) == 0

    def test_a_name_is_taken_once(self, volume: Volume) -> None:
        volume.put("name", b"first")
        with pytest.raises(errors.BlobExists):
            volume.put("name", b"second")
        assert volume.read("name") == b"first"

    def test_a_name_taken_meanwhile_fails_the_commit(self, volume: Volume, same: Volume) -> None:
        with volume.create("name") as writer:
            writer.write(b"second")
            same.put("name", b"first")
            with pytest.raises(errors.BlobExists):
                writer.commit()
        assert volume.read("name") == b"first"

    def test_a_finished_blob_takes_nothing_more(self, volume: Volume) -> None:
        with volume.create("name") as writer:
            writer.commit()
            with pytest.raises(errors.VolumeError):
                writer.write(b"x")
            with pytest.raises(errors.VolumeError):
                writer.commit()
        assert volume.read("name") == b""

    def test_of_many_at_once_exactly_one_wins(self, volume: Volume, same: Volume) -> None:
        start = threading.Barrier(8)
        won: list[int] = []

        def put(number: int) -> None:
            start.wait(60)
            try:
                (volume if number % 2 else same).put("deep/er/name", bytes([number]) * 1000)
            except errors.BlobExists:
                return
            won.append(number)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(won) == 1
        assert volume.read("deep/er/name") == bytes(won) * 1000

    def test_creating_and_deleting_in_one_folder_at_once_loses_nothing(
        self, volume: Volume, same: Volume
    ) -> None:
        def churn(which: Volume, mark: str) -> None:
            for number in range(60):
                which.put(f"f/g/{mark}{number}", b"x")
                assert which.read(f"f/g/{mark}{number}") == b"x"
                which.delete(f"f/g/{mark}{number}")

        with futures.ThreadPoolExecutor(2) as pool:
            both = [pool.submit(churn, volume, "a"), pool.submit(churn, same, "b")]
        for one in both:
            one.result()
        assert list(volume.list()) == []

    def test_a_listing_is_in_order_of_names_and_by_prefix(self, volume: Volume) -> None:
        names = ["a", "a-b/c", "a.d", "a/b", "a/c/d", "a0", "b/x", "b/xy", "b/y"]
        for name in reversed([n for n in names if n != "a"]):
            volume.put(name, name.encode())
        expected = [n for n in names if n != "a"]
        assert [info.name for info in volume.list()] == expected
        assert [info.name for info in volume.list("b/")] == ["b/x", "b/xy", "b/y"]
        assert [info.name for info in volume.list("b/x")] == ["b/x", "b/xy"]
        assert [info.name for info in volume.list("a")] == [n for n in expected if n[0] == "a"]
        assert [info.name for info in volume.list("a/c")] == ["a/c/d"]
        assert list(volume.list("zzz/")) == []
        assert [info.size_bytes for info in volume.list("b/xy")] == [4]

    def test_a_listing_and_info_agree(self, volume: Volume) -> None:
        volume.put("a/b", b"xyz")
        assert list(volume.list("a/")) == [volume.info("a/b")]
        assert volume.info("a/b").modified_s > 0

    def test_a_deleted_blob_is_gone_and_its_name_free(self, volume: Volume, same: Volume) -> None:
        volume.put("a/b/c", b"1")
        volume.delete("a/b/c")
        volume.delete("a/b/c")
        volume.delete("never/was")
        with pytest.raises(errors.BlobNotFound):
            same.read("a/b/c")
        with pytest.raises(errors.BlobNotFound):
            same.info("a/b/c")
        same.put("a/b/c", b"2")
        assert volume.read("a/b/c") == b"2"

    def test_what_is_not_there_is_not_found(self, volume: Volume) -> None:
        volume.put("a/b", b"1")
        for name in ("x", "a", "a/b/c", "a/x"):
            with pytest.raises(errors.VolumeError):
                volume.read(name)
        with pytest.raises(errors.BlobNotFound):
            volume.read("a/x")
        with pytest.raises(errors.BlobNotFound):
            volume.info("x/y/z")

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_a_name_that_might_lead_out_is_refused(self, volume: Volume, name: str) -> None:
        with pytest.raises(errors.InvalidInput):
            volume.put(name, b"x")
        with pytest.raises(errors.InvalidInput):
            volume.read(name)
        with pytest.raises(errors.InvalidInput):
            volume.info(name)
        with pytest.raises(errors.InvalidInput):
            volume.delete(name)
        assert list(volume.list()) == []

    @pytest.mark.parametrize("prefix", ["/", "..", "../", "a/../", ".unfinished/", "a//"])
    def test_a_prefix_that_might_lead_out_is_refused(self, volume: Volume, prefix: str) -> None:
        with pytest.raises(errors.InvalidInput):
            list(volume.list(prefix))

    def test_space_is_told_or_admitted_unknown(self, volume: Volume) -> None:
        space = volume.space()
        assert (space.total_bytes is None) == (space.free_bytes is None)
        if space.total_bytes is not None and space.free_bytes is not None:
            assert 0 <= space.free_bytes <= space.total_bytes

    def test_the_url_names_the_volume(self, volume: Volume, same: Volume) -> None:
        assert volume.url == same.url != ""
