"""Open files that have lost the name they were opened by, but have another one somewhere.

CRIU gives such a file a name for the time being, ``link_remap.N`` beside the old one, stores that
name, and takes it away again when the tree runs on: the image alone could never be restored. So
the content travels with the image under that name; a restore puts it back, and CRIU opens it and
takes the name away.

Promises: such a file is restored with its content, owner and mode.
Does not: join the restored file with the other name again; they are two files from then on.
"""

from __future__ import annotations

import os
import stat

from agent import errors
from agent.engines.criu import images
from agent.model.streams import FileEntry, MemberSink


def collect(folder: str, sink: MemberSink) -> int:
    """Store the content behind every such name in the images of ``folder``, while the tree stands
    still; return how many there were.

    Raises:
        errors.DumpFailed: one of them cannot be read.
        errors.VolumeError: from the sink.
    """
    if not os.path.exists(os.path.join(folder, "remap-fpath.img")):
        return 0
    remaps = images.read(
        folder, "remap-fpath", "remap-fpath.img", images.messages.remap_file_path_entry
    )
    linked = {remap.remap_id for remap in remaps if remap.remap_type == images.messages.LINKED}
    if not linked:
        return 0
    names = sorted(
        {
            str(entry.reg.name)
            for entry in images.read(folder, "files", "files.img", images.messages.file_entry)
            if entry.id in linked and entry.HasField("reg")
        }
    )
    for name in names:
        _store(name, sink)
    return len(names)


def _store(path: str, sink: MemberSink) -> None:
    try:
        with open(path, "rb", buffering=0) as content:
            info = os.fstat(content.fileno())
            entry = FileEntry(
                path=path,
                kind="file",
                mode=stat.S_IMODE(info.st_mode),
                uid=info.st_uid,
                gid=info.st_gid,
                mtime_ns=info.st_mtime_ns,
                size_bytes=info.st_size,
                origin="open",
            )
            sink.file(entry, content)
    except OSError as exc:
        raise errors.DumpFailed(
            f"cannot read {path}: {exc.strerror}",
            hint="close the file that lost its name, or give it its name back",
            path=path,
        ) from exc
