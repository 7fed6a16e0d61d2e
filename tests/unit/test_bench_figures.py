"""The bench's arithmetic, and that its report calls a miss a miss."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import zstandard

from bench import report, tools
from bench.figures import Samples, mib
from bench.trainings import Yardsticks


def test_a_ratio_pairs_values_in_the_order_they_were_measured() -> None:
    slow, fast = Samples.of([4.0, 9.0, 2.0]), Samples.of([2.0, 3.0, 2.0])
    assert slow.over(fast).values == (2.0, 3.0, 1.0)
    assert slow.over(fast).told("x") == "2.00 x (1.00-3.00)"
    assert slow.plus(fast).median == 6.0
    with pytest.raises(ValueError, match="shorter"):
        slow.over(Samples.of([1.0]))


def test_sizes_and_scaled_figures_are_told_in_their_units() -> None:
    assert mib(3 << 19) == "1.5 MiB"
    assert Samples.of([0.1, 0.25]).told("ms", digits=0, scale=1e-3) == "175 ms (100-250)"


def _sections() -> list[report.Section]:
    first = report.Section("a", "A | B", "How.", ("tool", "s"), [("tar | zstd", "1.0")])
    first.targets = [
        report.Target("fast", ">= 2x", "2.5 x", met=True),
        report.Target("small", "<= 1.2x", "1.9 x", met=False),
    ]
    first.slower = ["tar was faster"]
    return [first, report.Section("b", "Empty", "Not measured: no disk")]


def test_the_report_calls_a_missed_target_missed_and_states_what_was_slower() -> None:
    text = report.markdown(_sections(), "python -m bench", {"machine": "m"})
    assert "| small | <= 1.2x | 1.9 x | **missed** |" in text
    assert "| fast | >= 2x | 2.5 x | met |" in text
    assert "- tar was faster" in text
    assert "Not measured: no disk" in text
    assert "| tar \\| zstd | 1.0 |" in text


def test_the_json_report_holds_the_same_targets_and_is_json() -> None:
    document = json.loads(report.document(_sections(), "python -m bench", {"machine": "m"}))
    assert document["kind"] == "BenchReport"
    assert [t["met"] for t in document["sections"][0]["targets"]] == [True, False]


def test_yardsticks_count_equal_pages_once_over_all_dumps_and_zero_pages_never(
    tmp_path: Path,
) -> None:
    draw = random.Random(1)
    noise = [draw.randbytes(4096) for _ in range(3)]
    dumps = [b"".join((noise[0], noise[1], noise[0], bytes(4096))), noise[1] + noise[2]]
    yard = Yardsticks()
    for number, pages in enumerate(dumps):
        images = tmp_path / str(number)
        images.mkdir()
        (images / "pages-1.img").write_bytes(pages)
        (images / "core-1.img").write_bytes(b"core")
        yard.add(str(images))
    assert yard.raw_bytes == sum(map(len, dumps)) + 8
    # Incompressible pages count as they are, without what zstd would add.
    assert yard.unique_bytes == 3 * 4096
    alone = [zstandard.ZstdCompressor(3).compress(b"core" + pages) for pages in dumps]
    assert yard.zstd3_bytes == pytest.approx(sum(map(len, alone)), abs=64)


def test_the_stop_is_read_from_crius_statistics(tmp_path: Path) -> None:
    # Two magics, a length, then stats_entry{dump=1{freezing_time=1, frozen_time=2, ...}}.
    inner = bytes([0x08, 0x90, 0x4E, 0x10, 0xA0, 0x8D, 0x06, 0x18, 0x05])
    message = bytes([0x0A, len(inner)]) + inner
    image = b"\0" * 8 + len(message).to_bytes(4, "little") + message
    (tmp_path / "stats-dump").write_bytes(image)
    assert tools.Criu(str(tmp_path)).stop_s() == pytest.approx((10_000 + 100_000) / 1e6)


def test_a_tree_of_files_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"12345")
    (tmp_path / "two").write_bytes(b"123")
    os.symlink("two", tmp_path / "three")
    assert tools.tree_bytes(str(tmp_path)) == 8 + len("two")
