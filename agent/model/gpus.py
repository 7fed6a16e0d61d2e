"""Which device files are GPUs', and what it means for a dump that a process uses them.

Promises: pure; decided by the names that the drivers give their files below /dev.
Does not: know a process that used a GPU and has let go of all of these files.
"""

from __future__ import annotations

from collections.abc import Iterable

from agent.model.hooks import RELEASE_GPU

# NVIDIA's (nvidia0, nvidiactl, nvidia-uvm, nvidia-caps/), AMD's (kfd), anybody's (dri), Windows's.
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/dxg")

CURE = (
    "let the job release the GPU for the time of the dump, in a pod by a pre hook called"
    f" {RELEASE_GPU} (docs/hooks.md); from a CUDA job NVIDIA's cuda-checkpoint --toggle takes it"
    " and gives it back, after a restore as well"
)


def used(paths: Iterable[str]) -> tuple[str, ...]:
    """The GPUs' files among those that a process has open or maps, each once."""
    return tuple(sorted({path for path in paths if path.startswith(DEVICES)}))


def reason(devices: Iterable[str]) -> str:
    """Why a process that uses ``devices`` cannot be dumped."""
    return f"uses a GPU ({', '.join(devices)}), and what it holds there cannot be captured"
