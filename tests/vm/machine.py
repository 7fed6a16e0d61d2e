"""A virtual machine with an older kernel and this machine's own root file system, read-only.

Promises: ``run`` ends with the machine, within its time, whatever the command does; what it writes
is in memory and gone then.
Does not: go quickly where the processor's own virtualization is not to be had: everything is
emulated then, some thirty times slower.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

from tests.host.packages import CACHE

HERE = Path(__file__).resolve().parent
_PARTS = CACHE / "vm"
_MEMORY_MIB = 3072
_PATH_PROCESSORS = ("/sys/module/kvm_intel", "/sys/module/kvm_amd")


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a command ended; ``status`` is None if it did not within its time."""

    status: int | None
    output: str


def accelerated() -> bool:
    """Whether the processor runs the machine. A /dev/kvm of another kind is slower than none: it
    emulates every kernel that was not made for it.
    """
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and any(map(os.path.exists, _PATH_PROCESSORS))


def build() -> None:
    """Get what it is made of, once. Raises ``subprocess.SubprocessError``."""
    subprocess.run([HERE / "build"], check=True, timeout=1800)


def run(command: str, folder: Path, timeout_s: float) -> Ran:
    """Run a command of bash as root on the older kernel; ``folder`` is empty."""
    shutil.copy(HERE / "guest", folder / "guest")
    (folder / "command").write_text(command)
    (folder / "modules").write_text(str(_PARTS / "root"))
    # QEMU 7.2 mixes up the AVX registers of processes that take turns: numpy.argsort was wrong one
    # time in four there, and programs crashed. This processor has none.
    emulated = ["tcg,thread=multi", "-cpu", "Nehalem"]
    accelerator = ["kvm", "-cpu", "host"] if accelerated() else emulated
    argv = ["qemu-system-x86_64", "-accel", *accelerator]
    argv += ["-smp", "2", "-m", str(_MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none"]
    argv += ["-serial", f"file:{folder / 'console'}", "-device", "virtio-rng-pci"]
    argv += ["-kernel", str(_PARTS / "vmlinuz"), "-initrd", str(_PARTS / "initrd")]
    argv += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"]
    shares = (("root", "/", ",readonly=on,multidevs=remap"), ("vm", str(folder), ""))
    for tag, path, more in shares:
        argv += ["-fsdev", f"local,id={tag},path={path},security_model=none{more}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as machine:
        try:
            machine.wait(timeout_s)
        except subprocess.TimeoutExpired:
            machine.kill()
    status = folder / "status"
    told = [folder / name for name in ("console", "output")]
    return Ran(
        int(status.read_text()) if status.exists() else None,
        "".join(each.read_text(errors="replace") for each in told if each.exists()),
    )
