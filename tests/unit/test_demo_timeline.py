"""The demo's table tells what the dumps, the kill and the restore were like."""

from __future__ import annotations

from demo import timeline
from demo.cli import Dump


def _story() -> timeline.Story:
    def dump(raw: int, new: int, stored: int) -> Dump:
        return Dump("demo@x", raw, new, stored, stop_s=0.05, durable_s=0.8, wall_s=1.0)

    return timeline.Story(
        dumps=(
            timeline.Dumped(2.0, 100, dump(400_000_000, 300_000_000, 100_000_000), 0.06),
            timeline.Dumped(4.0, 200, dump(400_000_000, 50_000_000, 60_000_000), 0.07),
        ),
        plain=timeline.Plain(5.0, 250, 410_000_000, 0.9),
        killed_s=6.0,
        killed_step=300,
        restore_s=6.5,
        stepping_s=7.0,
        resumed_step=212,
        ended_s=9.0,
        verify_took_s=0.2,
    )


def test_the_table_adds_up_the_dumps_and_counts_the_lost_steps() -> None:
    lines = timeline.table(_story()).splitlines()
    first, total = (" ".join(lines[i].split()) for i in (1, 3))
    assert first == "2.0 s 100 dump 1 50 ms 60 ms 400.0 MB 300.0 MB 100.0 MB 4.0 0.8 s"
    assert total == "all dumps 800.0 MB 160.0 MB 5.0"
    assert " ".join(lines[4].split()) == "5.0 s 250 criu dump, to memory 900 ms 410.0 MB"
    assert "300  kill -9 of every process" in lines[5]
    assert "212  trains again, 89 steps are done anew" in lines[7]


def test_columns_stand_below_their_heads() -> None:
    head, first, *_ = timeline.table(_story()).splitlines()
    for column, cell in (("stop", "50 ms"), ("stored", "100.0 MB"), ("ratio", "4.0")):
        assert head.index(column) + len(column) == first.index(cell) + len(cell)
