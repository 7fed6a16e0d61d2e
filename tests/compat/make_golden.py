"""Makes the golden stores of the current format version; run by hand when a version is new, or has
something new in it:

    python -m tests.compat.make_golden tests/compat/store-v1
    python -m tests.compat.make_golden --joint tests/compat/joint-v1

Golden stores are never made again: that a program reads what an older one wrote is what they show.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys

from agent.model import ids
from agent.model.streams import AddressSpace
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests import images

GROUP = ids.group_name("training")
RANK_0, RANK_1 = ids.member_name("rank-0"), ids.member_name("rank-1")
_NOISE = hashlib.shake_256(b"noise").digest(9000)


def _image(step: int) -> images.Image:
    def member(rank: int) -> images.MemberImage:
        shared = tuple(range(1, 9))
        own = tuple(range(100 + rank * 10, 106 + rank * 10))
        process = ((1024, 5, (*shared, 0, 0, *own)), (1 << 35, 0, (500 + step, 501 + step)))
        return images.MemberImage(
            {AddressSpace("process", 40 + rank): process,
             AddressSpace("shmem", 3): ((0, 1, (700, 0, 701)),)},
            {"inventory.img": b"\x14\x2b", "core-40.img": _NOISE, "empty.img": b""},
            {"/data/log": b"step\n" * (1000 + step), "/data/ä b": b"x"},
            {"engine": "test", "rank": rank, "step": step, "text": "ä \u2028"},
        )  # fmt: skip

    return {RANK_0: member(0), RANK_1: member(1)}


EPOCHS = tuple(_image(step) for step in range(2))


def main(root: str) -> None:
    store = Store.open(DirectoryVolume(root, create=True), create=True)
    for step, image in enumerate(EPOCHS):
        with store.begin(GROUP, now_s=images.NOW_S + 60 * step) as epoch:
            images.write(epoch, image)
            epoch.commit({"step": step})


def joint(root: str) -> None:
    """Each member by a writer of its own: an epoch that is committed, one that is abandoned, one
    that is not decided and whose writers are gone.
    """
    store = Store.open(DirectoryVolume(root, create=True), create=True)
    for step, outcome in enumerate(("committed", "abandoned", "undecided")):
        epoch = store.new_epoch(GROUP, now_s=images.NOW_S + 60 * step)
        with contextlib.ExitStack() as stack:
            writers = []
            for name, member in EPOCHS[min(step, 1)].items():
                writer = stack.enter_context(
                    store.join(GROUP, epoch, now_s=images.NOW_S + 60 * step)
                )
                images.write(writer, {name: member})
                writers.append(writer)
            parts = [writer.finish() for writer in writers]
            if outcome == "committed":
                store.commit_joint(GROUP, epoch, parts, {"step": step}, now_s=images.NOW_S)
            for writer in writers if outcome != "undecided" else []:
                writer.keep() if outcome == "committed" else writer.drop()


if __name__ == "__main__":
    if sys.argv[1] == "--joint":
        joint(sys.argv[2])
    else:
        main(sys.argv[1])
