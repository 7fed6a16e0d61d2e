"""What CRIU 4.2 stores wrongly, set right in the images before a restore.

Promises: only what is named here changes; an image without such a case stays byte for byte.
Does not: repair damage.
"""

from __future__ import annotations

import os

from agent.engines.criu import images


def mend(folder: str, *, accept_changed: bool) -> None:
    """Set the images in ``folder`` right.

    A periodic timerfd whose expiry nobody has read yet has no next expiry in the kernel's account
    of it until it is read; CRIU restores that as a disarmed timer, which is silent for ever. It is
    given one interval to its next expiry.

    With ``accept_changed``, files may have other sizes than at the dump.

    Raises:
        errors.Corrupt: ``files.img`` cannot be understood.
    """
    path = os.path.join(folder, "files.img")
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        raw = file.read()
    entries = images.load("files", "files.img", raw, images.messages.file_entry)
    changed = False
    for entry in entries:
        if entry.HasField("tfd"):
            timer = entry.tfd
            periodic = timer.isec or timer.insec
            if timer.ticks and periodic and not timer.vsec and not timer.vnsec:
                timer.vsec, timer.vnsec = timer.isec, timer.insec
                changed = True
        if accept_changed and entry.HasField("reg"):
            for field in ("size", "checksum", "checksum_config", "build_id"):
                entry.reg.ClearField(field)
            changed = True
    if changed:
        with open(path, "wb") as file:
            file.write(images.dump("files", entries))
