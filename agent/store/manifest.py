"""Manifests: what an epoch consists of, and what a member's image consists of.

An epoch's manifest is JSON in an envelope; it names its members' manifests with size and digest. A
member's manifest is the length of its JSON (4 bytes), the JSON, and the page tables that the JSON
points into; it names the packs it needs with the digests of their indexes. So all of an epoch
hangs on one file whose creation is the commit.

Promises: ``decode`` after ``encode`` gives the same; whatever else is decoded, only
``errors.Corrupt`` or ``errors.UnknownFormat`` is raised, and names in what is returned are valid.
Does not: check that what a manifest names is there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from agent import errors
from agent.model import ids
from agent.model.ids import EpochId, GroupName, MemberName
from agent.model.streams import AddressSpace, FileEntry, SpaceKind
from agent.store import envelope, layout, pack, pagetable
from agent.store.digest import DIGEST_BYTES
from agent.store.fields import Fields, encode

_LENGTH_BYTES = 4
# An image file of an engine is given back in one piece: CRIU's largest are ghost files.
MAX_METADATA_BYTES = 4 << 30
_KINDS = ("process", "shmem")
_FILE_KINDS = ("file", "directory", "symlink")
_ORIGINS = ("open", "include")


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of one member or one epoch. ``new_bytes`` are pages that the base did not have,
    uncompressed; ``pages`` and ``zero_pages`` count memory only, ``raw_bytes`` everything.
    """

    raw_bytes: int = 0
    new_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.raw_bytes + other.raw_bytes,
            self.new_bytes + other.new_bytes,
            self.pages + other.pages,
            self.zero_pages + other.zero_pages,
        )


@dataclasses.dataclass(frozen=True)
class MemberRef:
    """A member's manifest as the epoch's manifest names it."""

    member: MemberName
    size_bytes: int
    digest: bytes


@dataclasses.dataclass(frozen=True)
class EpochManifest:
    """The commit. ``packs`` are all that its members name."""

    group: GroupName
    epoch: EpochId
    attempt: str
    created_s: float
    members: tuple[MemberRef, ...]
    packs: tuple[str, ...]
    totals: Totals
    stored_bytes: int
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PackRef:
    """A pack as a member's manifest names it."""

    name: str
    pages: int
    index_offset: int
    index_bytes: int
    digest: bytes

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.index_offset + self.index_bytes


@dataclasses.dataclass(frozen=True)
class Stream:
    """Bytes kept as pages from offset 0, the last one filled up with zeros."""

    size_bytes: int
    table: bytes


@dataclasses.dataclass(frozen=True)
class MemberManifest:
    """One member's image. Tables are encoded (``pagetable``), in the order of ``packs``."""

    group: GroupName
    epoch: EpochId
    member: MemberName
    packs: tuple[PackRef, ...]
    spaces: tuple[tuple[AddressSpace, bytes], ...]
    metadata: tuple[tuple[str, Stream], ...]
    files: tuple[tuple[FileEntry, Stream | None], ...]
    totals: Totals
    facts: dict[str, Any]

    def streams(self) -> list[Stream]:
        """All image files and ephemeral files."""
        streams = [stream for _, stream in self.metadata]
        return streams + [stream for _, stream in self.files if stream is not None]

    def tables(self) -> list[bytes]:
        """All page tables."""
        return [table for _, table in self.spaces] + [stream.table for stream in self.streams()]


def encode_epoch(manifest: EpochManifest) -> bytes:
    """Return the sealed manifest of an epoch."""
    body = {
        "group": manifest.group,
        "epoch": manifest.epoch,
        "attempt": manifest.attempt,
        "created_s": manifest.created_s,
        "members": encode_refs(manifest.members),
        "packs": list(manifest.packs),
        "totals": dataclasses.asdict(manifest.totals),
        "stored_bytes": manifest.stored_bytes,
        "facts": manifest.facts,
    }
    return envelope.seal(envelope.Kind.EPOCH, encode(body))


def decode_epoch(sealed: bytes, group: GroupName, epoch: EpochId) -> EpochManifest:
    """Return the manifest read under the name of this group and epoch."""
    part = layout.epoch_name(group, epoch)
    body = Fields.parse(envelope.unseal(envelope.Kind.EPOCH, sealed, part=part), part)
    attempt = body.text("attempt")
    if body.text("group") != group or body.text("epoch") != epoch or not layout.is_attempt(attempt):
        raise errors.Corrupt(f"{part} is of another epoch", part=part)
    return EpochManifest(
        group,
        epoch,
        attempt,
        body.number("created_s"),
        decode_refs(body, part),
        decode_packs(body),
        decode_totals(body, part),
        body.integer("stored_bytes"),
        body.mapping("facts"),
    )


def encode_refs(refs: tuple[MemberRef, ...]) -> list[dict[str, Any]]:
    """Return references to members' manifests as JSON values."""
    return [
        {"name": ref.member, "size_bytes": ref.size_bytes, "digest": ref.digest.hex()}
        for ref in refs
    ]


def decode_refs(body: Fields, part: str) -> tuple[MemberRef, ...]:
    """Return the references in ``members``, none of them twice."""
    members = tuple(
        MemberRef(
            _member(ref.text("name"), part),
            ref.integer("size_bytes"),
            ref.blob("digest", DIGEST_BYTES),
        )
        for ref in body.objects("members")
    )
    if len({ref.member for ref in members}) != len(members):
        raise errors.Corrupt(f"{part} names a member twice", part=part)
    return members


def decode_packs(body: Fields) -> tuple[str, ...]:
    """Return the names in ``packs``, each that of a pack."""
    packs = tuple(body.texts("packs"))
    for name in packs:
        layout.pack_attempt(name)
    return packs


def decode_totals(body: Fields, part: str) -> Totals:
    """Return the counts in ``totals``."""
    fields = Fields(body.mapping("totals"), part)
    return Totals(*(fields.integer(field.name) for field in dataclasses.fields(Totals)))


def encode_member(manifest: MemberManifest) -> bytes:
    """Return the sealed manifest of a member."""
    tables: list[bytes] = []
    at = 0

    def place(table: bytes) -> list[int]:
        nonlocal at
        tables.append(table)
        at += len(table)
        return [at - len(table), len(table)]

    body = {
        "group": manifest.group,
        "epoch": manifest.epoch,
        "member": manifest.member,
        "packs": [
            {
                "name": ref.name,
                "pages": ref.pages,
                "index_offset": ref.index_offset,
                "index_bytes": ref.index_bytes,
                "digest": ref.digest.hex(),
            }
            for ref in manifest.packs
        ],
        "spaces": [
            {"kind": space.kind, "id": space.id, "table": place(table)}
            for space, table in manifest.spaces
        ],
        "metadata": [
            {"name": name, "size_bytes": stream.size_bytes, "table": place(stream.table)}
            for name, stream in manifest.metadata
        ],
        "files": [
            _file_entry(entry) | ({} if stream is None else {"table": place(stream.table)})
            for entry, stream in manifest.files
        ],
        "totals": dataclasses.asdict(manifest.totals),
        "facts": manifest.facts,
    }
    text = encode(body)
    length = len(text).to_bytes(_LENGTH_BYTES, "little")
    return envelope.seal(envelope.Kind.MEMBER, b"".join([length, text, *tables]))


def decode_member(
    sealed: bytes, group: GroupName, epoch: EpochId, member: MemberName
) -> MemberManifest:
    """Return the manifest read under the name of this member. Its tables are checked for their
    places only; ``pagetable.decode`` checks what is in them.
    """
    part = layout.member_name(group, epoch, member)
    data = envelope.unseal(envelope.Kind.MEMBER, sealed, part=part)
    split = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < split or len(data) < _LENGTH_BYTES:
        raise errors.Corrupt(f"{part} is cut short", part=part)
    body = Fields.parse(data[_LENGTH_BYTES:split], part)
    if (body.text("group"), body.text("epoch"), body.text("member")) != (group, epoch, member):
        raise errors.Corrupt(f"{part} is of another member", part=part)

    def table(fields: Fields) -> bytes:
        offset, length = fields.pair("table")
        if offset + length > len(data) - split:
            raise errors.Corrupt(f"{part} points beyond its end", part=part)
        return data[split + offset : split + offset + length]

    spaces = tuple((_space(fields, part), table(fields)) for fields in body.objects("spaces"))
    metadata = tuple(
        (
            _file_name(fields, part),
            Stream(fields.integer("size_bytes", most=MAX_METADATA_BYTES), table(fields)),
        )
        for fields in body.objects("metadata")
    )
    files: list[tuple[FileEntry, Stream | None]] = []
    for fields in body.objects("files"):
        entry = _read_file_entry(fields, part)
        stream = Stream(entry.size_bytes, table(fields)) if entry.kind == "file" else None
        files.append((entry, stream))
    named: list[list[object]] = [
        [space for space, _ in spaces],
        [name for name, _ in metadata],
        [entry.path for entry, _ in files],
    ]
    if any(len(set(group_of)) != len(group_of) for group_of in named):
        raise errors.Corrupt(f"{part} names something twice", part=part)
    return MemberManifest(
        group,
        epoch,
        member,
        tuple(_pack_ref(fields, part) for fields in body.objects("packs")),
        spaces,
        metadata,
        tuple(files),
        decode_totals(body, part),
        body.mapping("facts"),
    )


def _member(text: str, part: str) -> MemberName:
    try:
        return ids.member_name(text)
    except errors.InvalidInput as exc:
        raise errors.Corrupt(f"{part} names an impossible member", part=part) from exc


def _space(fields: Fields, part: str) -> AddressSpace:
    kind = fields.text("kind")
    if kind not in _KINDS:
        raise errors.Corrupt(f"{part} has an unknown kind of memory", part=part)
    return AddressSpace(cast(SpaceKind, kind), fields.integer("id"))


def _pack_ref(fields: Fields, part: str) -> PackRef:
    name = fields.text("name")
    layout.pack_attempt(name)
    ref = PackRef(
        name,
        fields.integer("pages", most=pack.MAX_PACK_PAGES),
        fields.integer("index_offset", least=len(pack.HEADER)),
        fields.integer("index_bytes", least=envelope.OVERHEAD_BYTES),
        fields.blob("digest", DIGEST_BYTES),
    )
    if ref.index_bytes > pack.MAX_INDEX_BYTES:
        raise errors.Corrupt(f"{part} names an impossible pack", part=part)
    return ref


def _file_name(fields: Fields, part: str) -> str:
    """An image file's name: one path component, since an engine writes it to a folder."""
    name = fields.text("name")
    if not is_file_name(name):
        raise errors.Corrupt(f"{part} has an impossible file name", part=part)
    return name


def is_file_name(name: str) -> bool:
    """Tell whether ``name`` is one path component that names a file."""
    encodable = name.isprintable() and len(name.encode("utf-8", "surrogatepass")) <= 255
    return name not in ("", ".", "..") and "/" not in name and encodable


def is_absolute_path(path: str) -> bool:
    """Tell whether ``path`` is absolute and normal: without ``.``, ``..``, ``//`` or NUL."""
    parts = path.split("/")[1:]
    return (
        path.startswith("/")
        and "\0" not in path
        and (path == "/" or not any(p in ("", ".", "..") for p in parts))
    )


def _file_entry(entry: FileEntry) -> dict[str, Any]:
    value = dataclasses.asdict(entry)
    value["xattrs"] = [{"name": name, "value": data.hex()} for name, data in entry.xattrs]
    return value


def _read_file_entry(fields: Fields, part: str) -> FileEntry:
    path, kind, origin = fields.text("path"), fields.text("kind"), fields.text("origin")
    if not is_absolute_path(path) or kind not in _FILE_KINDS or origin not in _ORIGINS:
        raise errors.Corrupt(f"{part} has an impossible file", part=part)
    return FileEntry(
        path,
        cast(Any, kind),
        fields.integer("mode", most=0o177777),
        fields.integer("uid", most=(1 << 32) - 1),
        fields.integer("gid", most=(1 << 32) - 1),
        fields.integer("mtime_ns", least=-(1 << 63)),
        fields.integer("size_bytes", most=pagetable.MAX_PAGE),
        cast(Any, origin),
        fields.text("target"),
        tuple((item.text("name"), item.blob("value")) for item in fields.objects("xattrs")),
    )
