"""Hostile bytes in every parser of what a volume holds: no other error than the store's own, no
hang, no large allocation, and no name that leads out.

Inputs are good files, mutated, most of them sealed again with a fitting digest so that the parser
behind the digest sees them, as if somebody had written them on purpose. The seed is in every
failure; ``CKPT_TEST_SEED`` sets it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from agent import errors
from agent.model import ids
from agent.model.streams import AddressSpace
from agent.store import codec, envelope, intents, layout, manifest, pack, pagetable
from agent.store.digest import digest
from agent.store.reader import MemberReader
from agent.store.repository import Store
from agent.volumes import names
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.images import GROUP, MEMBER, NOW_S

SEED = int(os.environ.get("CKPT_TEST_SEED", "20261121"))
EPOCH = ids.epoch_id("20260131-235959-0a1b2c")
ATTEMPT = "20260131-235959-0a1b2c-0123456789abcdef"
_MOST_GROWTH_KB = 200 << 10

Parse = Callable[[bytes], object]
_HOSTILE: tuple[Any, ...] = (
    -1, 0, 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**400, 1.5, float("inf"), float("nan"),
    1e308, True, None, "", "/", "..", "../../etc/passwd", "/etc/passwd", "packs/../../x/0",
    f"packs/{ATTEMPT}/0", f"packs/{ATTEMPT}/-1", "a\0b", "\udc80", "x" * 5000, [], {}, [[]],
    {"a": {}}, [0, 0], [0, 2**62], [2**62, 2**62], [-1, 5], "00" * 32, "zz",
)  # fmt: skip


def _member_sealed() -> tuple[MemoryVolume, bytes]:
    volume = MemoryVolume()
    with Store.open(volume, create=True).begin(GROUP, now_s=NOW_S) as writer:
        images.write(writer, images.simple(1, 30))
        writer.commit({})
        epoch = writer.epoch
    sealed = volume.read(layout.member_name(GROUP, epoch, MEMBER))
    found = manifest.decode_member(sealed, GROUP, epoch, MEMBER)
    return volume, manifest.encode_member(_with_epoch(found))


def _with_epoch(found: manifest.MemberManifest) -> manifest.MemberManifest:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return manifest.MemberManifest(**{**values, "epoch": EPOCH})


def _mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        at = rng.randrange(len(mutated) + 1)
        match rng.randrange(7):
            case 0:
                mutated[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                mutated[at : at + rng.choice([1, 2, 4, 8])] = b""
            case 2:
                mutated[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8, 40]))
            case 3:
                del mutated[at:]
            case 4:
                width = rng.choice([2, 4, 8])
                value = rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63])
                mutated[at : at + width] = (value % 256**width).to_bytes(width, "little")
            case 5:
                other = rng.randrange(len(mutated) + 1)
                mutated[at : at + 16] = mutated[other : other + 16]
            case _:
                mutated += mutated[: rng.randrange(64)]
    return bytes(mutated)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(items):
        yield value, key
        if isinstance(below, dict | list):
            yield from _places(below)


def _mutate_json(rng: random.Random, text: bytes) -> bytes:
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(_places(value))
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case _:
                container[key] = copy.deepcopy(rng.choice(_HOSTILE))
    return json.dumps(value).encode()


def _resealed(kind: int, body: bytes) -> bytes:
    header = struct.pack("<8sHHIQ", envelope.MAGIC, envelope.FORMAT_VERSION, kind, 0, len(body))
    return header + body + digest(header + body)


def _run(
    seed: str,
    count: int,
    good: bytes,
    mutate: Callable[[random.Random, bytes], bytes],
    parse: Parse,
) -> None:
    parse(good)
    rng = random.Random(f"{SEED} {seed}")
    refused = 0
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        hostile = mutate(rng, good)
        try:
            parse(hostile)
        except errors.CkptError:
            refused += 1
        except BaseException as exc:
            raise AssertionError(
                f"seed {SEED}, {seed} number {number}: {type(exc).__name__} for {hostile!r}"
            ) from exc
    assert refused > count // 4, "the mutations hardly ever do harm"
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < _MOST_GROWTH_KB


def _in_envelope(
    mutate: Callable[[random.Random, bytes], bytes], kind: envelope.Kind
) -> Callable[[random.Random, bytes], bytes]:
    def sealed_again(rng: random.Random, sealed: bytes) -> bytes:
        return _resealed(kind, mutate(rng, envelope.unseal(kind, sealed, part="")))

    return sealed_again


def _parse_epoch(data: bytes) -> None:
    found = manifest.decode_epoch(data, GROUP, EPOCH)
    for ref in found.members:
        names.components(layout.member_name(GROUP, EPOCH, ref.member))
    for name in found.packs:
        assert names.components(name)[0] == "packs"


def _parse_intent(data: bytes) -> None:
    for name in intents.decode(data, ATTEMPT).packs:
        assert names.components(name)[0] == "packs"


def _epoch_sealed() -> bytes:
    refs = (manifest.MemberRef(MEMBER, 5, bytes(32)),)
    packs = (layout.pack_name(ATTEMPT, 0),)
    totals = manifest.Totals(1, 2, 3, 4)
    return manifest.encode_epoch(
        manifest.EpochManifest(GROUP, EPOCH, ATTEMPT, 1.5, refs, packs, totals, 7, {"a": [1]})
    )


def _intent_sealed() -> bytes:
    volume = MemoryVolume()
    packs = (layout.pack_name(ATTEMPT, 0),)
    owner = intents.Owner.myself()
    intents.announce(volume, intents.Intent(ATTEMPT, "write", owner, GROUP, EPOCH, packs))
    return volume.read(layout.intent_name(ATTEMPT))


def _index_sealed() -> bytes:
    blocks = np.array([3, 2])
    return pack.encode(
        pack.PackIndex(
            blocks,
            np.array([100, 8192]),
            np.array([1, 0], dtype=np.uint8),
            bytes(64),
            np.arange(10, dtype=np.uint64).reshape(5, 2),
        )
    )


def _table() -> bytes:
    rows = [(5, 3, 1, 0, 0), (8, 2, 0, -1, 0), (1 << 40, 4, 2, 1, 6), (1 << 41, 1, 0, 0, 9)]
    return pagetable.encode(pagetable.Table(*np.array(rows, dtype=np.int64).T))


def _mutate_table(rng: random.Random, data: bytes) -> bytes:
    """Change the columns and compress them again, or the frame itself."""
    if rng.random() < 0.2:
        return _mutate_bytes(rng, data)
    runs = int.from_bytes(data[:4], "little")
    columns = _mutate_bytes(rng, codec.decompress(data[4:], runs * 24))
    if rng.random() < 0.8:
        columns = columns[: runs * 24].ljust(runs * 24, b"\0")
    return data[:4] + codec.compress(columns)


def test_seventy_thousand_hostile_small_files() -> None:
    kind = envelope.Kind
    epoch, intent, index = _epoch_sealed(), _intent_sealed(), _index_sealed()

    def parse_index(data: bytes) -> object:
        return pack.decode(data, part="")

    def parse_table(data: bytes) -> object:
        return pagetable.decode(data, [10, 10])

    def parse_block(data: bytes) -> object:
        return codec.restore(int.from_bytes(data[:1], "little"), data[1:], 8192)

    block = bytes([1]) + codec.compress(images.page(1) + images.page(2))
    _run("raw epoch", 5000, epoch, _mutate_bytes, _parse_epoch)
    _run("epoch bytes", 10_000, epoch, _in_envelope(_mutate_bytes, kind.EPOCH), _parse_epoch)
    _run("epoch json", 10_000, epoch, _in_envelope(_mutate_json, kind.EPOCH), _parse_epoch)
    _run("intent bytes", 5000, intent, _in_envelope(_mutate_bytes, kind.INTENT), _parse_intent)
    _run("intent json", 5000, intent, _in_envelope(_mutate_json, kind.INTENT), _parse_intent)
    _run("index", 15_000, index, _in_envelope(_mutate_bytes, kind.PACK_INDEX), parse_index)
    _run("table", 15_000, _table(), _mutate_table, parse_table)
    _run("block", 5000, block, _mutate_bytes, parse_block)


def test_twenty_five_thousand_hostile_members_are_read_as_a_restore_would() -> None:
    """What passes the parser is read: memory, image files and ephemeral files."""
    volume, sealed = _member_sealed()

    def parse(data: bytes) -> None:
        found = manifest.decode_member(data, GROUP, EPOCH, MEMBER)
        for ref in found.packs:
            assert names.components(ref.name)[0] == "packs"
        assert all(manifest.is_file_name(name) for name, _ in found.metadata)
        assert all(manifest.is_absolute_path(entry.path) for entry, _ in found.files)
        reader = MemberReader(volume, found)
        for space in reader.spaces():
            reader.runs(space)
            if number_of_pages(reader, space) < 1000:
                for _ in reader.read(space):
                    pass
        for name, stream in found.metadata:
            if stream.size_bytes < 1 << 20:
                reader.metadata_file(name)

    def number_of_pages(reader: MemberReader, space: AddressSpace) -> int:
        return sum(run.pages for run in reader.runs(space))

    def mutate_json(rng: random.Random, data: bytes) -> bytes:
        body = envelope.unseal(envelope.Kind.MEMBER, data, part="")
        split = 4 + int.from_bytes(body[:4], "little")
        text = _mutate_json(rng, body[4:split])
        resized = len(text).to_bytes(4, "little") + text + body[split:]
        return _resealed(envelope.Kind.MEMBER, resized)

    _run("member json", 12_000, sealed, mutate_json, parse)
    in_envelope = _in_envelope(_mutate_bytes, envelope.Kind.MEMBER)
    _run("member bytes", 8000, sealed, in_envelope, parse)
    _run("raw member", 5000, sealed, _mutate_bytes, parse)


def test_five_thousand_hostile_first_files() -> None:
    volume = MemoryVolume()
    Store.open(volume, create=True)
    sealed = volume.read(layout.STORE)

    def parse(data: bytes) -> None:
        hostile = MemoryVolume()
        hostile.put(layout.STORE, data)
        Store.open(hostile)

    _run("store raw", 1000, sealed, _mutate_bytes, parse)
    _run("store bytes", 2000, sealed, _in_envelope(_mutate_bytes, envelope.Kind.STORE), parse)
    _run("store json", 2000, sealed, _in_envelope(_mutate_json, envelope.Kind.STORE), parse)


def test_a_small_frame_that_claims_or_holds_a_huge_size_is_not_unpacked() -> None:
    bomb = codec.compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors.Corrupt):
        codec.decompress(bomb, 4096)
    claims = (pagetable.MAX_RUNS + 1).to_bytes(4, "little") + bomb
    with pytest.raises(errors.Corrupt):
        pagetable.decode(claims, [])
    with pytest.raises(errors.Corrupt):
        codec.decompress(zlib.compress(bytes(4096)), 4096)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 50 << 10


def test_json_that_nests_without_end_is_refused() -> None:
    for text in (b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5000, b"{}" * 2, b"\xff", b"NaN"):
        with pytest.raises(errors.Corrupt):
            manifest.decode_epoch(_resealed(envelope.Kind.EPOCH, text), GROUP, EPOCH)


@pytest.mark.parametrize(
    "name",
    ["../../etc/shadow", "/etc/shadow", "packs/..", f"packs/{ATTEMPT}/../../store", "store",
     f"packs/{ATTEMPT}/0/", f"packs/{ATTEMPT}/00", f"packs/{ATTEMPT}/0\n", f"intents/{ATTEMPT}"],
)  # fmt: skip
def test_a_manifest_cannot_name_anything_but_packs(name: str) -> None:
    sealed = _epoch_sealed()
    body = json.loads(envelope.unseal(envelope.Kind.EPOCH, sealed, part=""))
    body["packs"] = [name]
    hostile = _resealed(envelope.Kind.EPOCH, json.dumps(body).encode())
    with pytest.raises(errors.Corrupt):
        manifest.decode_epoch(hostile, GROUP, EPOCH)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\0", "x" * 256])
def test_an_image_file_cannot_be_named_like_a_path(name: str) -> None:
    _, sealed = _member_sealed()
    body = envelope.unseal(envelope.Kind.MEMBER, sealed, part="")
    split = 4 + int.from_bytes(body[:4], "little")
    value = json.loads(body[4:split])
    value["metadata"][0]["name"] = name
    text = json.dumps(value).encode()
    hostile = len(text).to_bytes(4, "little") + text + body[split:]
    with pytest.raises(errors.Corrupt):
        manifest.decode_member(_resealed(envelope.Kind.MEMBER, hostile), GROUP, EPOCH, MEMBER)


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_an_unknown_version_is_told_apart_from_damage(version: int) -> None:
    for kind in envelope.Kind:
        body = b"laid out in another way"
        header = struct.pack("<8sHHIQ", envelope.MAGIC, version, kind, 9, 3)
        with pytest.raises(errors.UnknownFormat) as caught:
            envelope.unseal(kind, header + body, part="some part")
        assert caught.value.facts["version"] == version
        whole = struct.pack("<8sHHIQ", envelope.MAGIC, version, kind, 0, len(body)) + body
        with pytest.raises(errors.UnknownFormat):
            envelope.unseal(kind, whole + digest(whole), part="some part")


def test_a_flipped_version_is_damage_and_not_another_version() -> None:
    sealed = bytearray(envelope.seal(envelope.Kind.STORE, b"body"))
    for bit in range(16):
        sealed[8 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(errors.Corrupt):
            envelope.unseal(envelope.Kind.STORE, bytes(sealed), part="x")
        sealed[8 + bit // 8] ^= 1 << bit % 8
