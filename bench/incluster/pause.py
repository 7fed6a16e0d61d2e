"""How long a pod stands still, by its job's own clock, against what else there is for pods.

Promises: all dump the same job, or one like it, in turns; the job's longest pause without any dump
is told beside them.
Does not: count what is done when the job runs again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import oncluster
from bench.figures import Samples
from bench.incluster import workload
from bench.machine import warm
from bench.report import Section, Target
from tests.cluster.cluster import Cluster

_NODE = "n1"
_HELD, _ORDINARY = "paced", "ordinary"
_SHARE_PER_S = 0.01
_IDLE_S = 1.0
_RATIO = 50.0
_TMPFS = "/run/bench-criu"
# Where containerd has runc keep its state of what a kubelet runs.
_RUNC = ("runc", "--root", "/run/containerd/runc/k8s.io")
_HOW = (
    "A job in a pod writes to 1 % of its pages a second and watches its clock. In turns:"
    " `ckpt-agent dump pod/NAME` of a pod with the label and of one without; `runc checkpoint"
    " --leave-running` of the first, which is how container runtimes call `criu dump`, to tmpfs;"
    " and the kubelet's own checkpoint of it, which is the same through containerd, to the node's"
    " disk, and packs an archive. Memory was touched before each."
)


class _Pods:
    """The two of them."""

    def __init__(self, cluster: Cluster, namespace: str, memory_mib: int) -> None:
        self._cluster, self._namespace, self._memory_mib = cluster, namespace, memory_mib

    def start(self) -> None:
        """Start both."""
        bodies = [
            workload.pod(*(name, _NODE, self._memory_mib, _SHARE_PER_S), opted_in=name == _HELD)
            for name in (_HELD, _ORDINARY)
        ]
        workload.start(self._cluster, self._namespace, *bodies)

    def paused(self, name: str, act: Callable[[], object]) -> float:
        """The longest pause of ``name`` while ``act`` ran."""
        since_s = time.time()
        act()
        return workload.longest_s(self._cluster, self._namespace, name, since_s)

    def dump(self, name: str) -> dict[str, Any]:
        """By the agent."""
        return oncluster.ckpt(
            self._cluster, self._namespace, "dump", f"pod/{name}", "--engine=container"
        )

    def way(self, image: str) -> dict[str, Any]:
        """What an image tells of its stop."""
        found: dict[str, Any] = oncluster.ckpt(self._cluster, self._namespace, "show", image)
        return {"stop": found["detail"][0]["stop"]}

    def runc(self) -> None:
        """By ``criu dump``, to tmpfs."""
        pod = self._cluster.get("pod", _HELD, "-n", self._namespace)
        (status,) = pod["status"]["containerStatuses"]
        container = status["containerID"].partition("://")[2]
        node = self._cluster.node(_NODE)
        folders = (f"--image-path={_TMPFS}/image", f"--work-path={_TMPFS}/work")
        node.exec(*_RUNC, "checkpoint", "--leave-running", *folders, container, timeout_s=120)
        node.exec("rm", "-r", f"{_TMPFS}/image", f"{_TMPFS}/work")

    def kubelet(self) -> None:
        """By the kubelet."""
        oncluster.kubelet_checkpoint(self._cluster, _NODE, f"{self._namespace}/{_HELD}/main")


def measure(cluster: Cluster, namespace: str, pairs: int, memory_mib: int) -> Section:
    """All in turns, ``pairs`` times."""
    pods = _Pods(cluster, namespace, memory_mib)
    pods.start()
    first_s = {
        name: pods.paused(name, functools.partial(pods.dump, name)) for name in (_HELD, _ORDINARY)
    }
    turns: dict[str, tuple[str, Callable[[], object]]] = {
        "nothing": (_HELD, lambda: time.sleep(_IDLE_S)),
        "held": (_HELD, lambda: made.append(pods.dump(_HELD))),
        "runc": (_HELD, pods.runc),
        "ordinary": (_ORDINARY, lambda: made.append(pods.dump(_ORDINARY))),
        "kubelet": (_HELD, pods.kubelet),
    }
    made: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {name: [] for name in turns}
    with _tmpfs(cluster):
        for number in range(pairs):
            for name in turns if number % 2 == 0 else reversed(turns):
                warm(2 * memory_mib << 20)
                found[name].append(pods.paused(*turns[name]))
    ways = [pods.way(each["name"]) | {"stop_s": each["stopSeconds"]} for each in made[-2:]]
    return _told(
        memory_mib, {name: Samples.of(each) for name, each in found.items()}, first_s, ways
    )


@contextlib.contextmanager
def _tmpfs(cluster: Cluster) -> Iterator[None]:
    node = cluster.node(_NODE)
    node.exec("mkdir", "-p", _TMPFS)
    node.exec("mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", _TMPFS)
    try:
        yield
    finally:
        node.exec("umount", _TMPFS)


def _told(
    memory_mib: int,
    found: dict[str, Samples],
    first_s: dict[str, float],
    ways: list[dict[str, Any]],
) -> Section:
    def ms(name: str) -> str:
        return found[name].told("ms", 1, 1e-3)

    ratios = {name: found["runc"].over(found[name]) for name in ("held", "ordinary")}
    of_kubelet = found["kubelet"].over(found["held"])
    return Section(
        "pause",
        f"Longest pause of a pod of {memory_mib} MiB",
        _HOW,
        ("what", "the job's longest pause", "criu dump to tmpfs / this"),
        [
            ("nothing", ms("nothing"), ""),
            ("ckpt-agent dump", ms("held"), ratios["held"].told("", 1)),
            (
                "ckpt-agent dump, pod without the label",
                ms("ordinary"),
                ratios["ordinary"].told("", 1),
            ),
            ("criu dump to tmpfs, by runc", ms("runc"), ""),
            ("the kubelet's checkpoint, to disk", ms("kubelet"), ""),
            *(
                (f"first dump by ckpt-agent, {name} pod", f"{span_s * 1e3:.1f} ms", "")
                for name, span_s in first_s.items()
            ),
        ],
        [
            _target(
                "longest pause in a container", "criu dump to tmpfs", ratios["held"], ms("held")
            ),
            _target(
                *("longest pause in a container without the label", "criu dump to tmpfs"),
                *(ratios["ordinary"], ms("ordinary")),
            ),
            _target(
                *("longest pause in a container", "the kubelet's checkpoint"),
                *(of_kubelet, ms("held")),
            ),
        ],
        data={
            "first_s": first_s,
            "ways": ways,
            **{f"{name}_s": each.document() for name, each in found.items()},
        },
    )


def _target(measure: str, other: str, ratio: Samples, told: str) -> Target:
    required = f"<= 1/{_RATIO:g} of {other}"
    return Target(measure, required, f"1/{ratio.median:.1f}; {told}", ratio.median >= _RATIO)
