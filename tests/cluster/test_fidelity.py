"""What a restored pod is like: to its user, its kubelet and itself it is the one that was dumped,
in every generation, until its end.
"""

from __future__ import annotations

import copy
import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agent.cli import exits
from agent.model import optin
from tests.cluster import deployed
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt, counted, counter, followed

# Looks at everything it should have, at each step. With /dev/shm, a volume on disk that it shares
# with the other containers, one in memory, a file that has lost its name, environment, and what
# the init container prepared (a line that must stay one, and a ticket that was used up).
LIFE = r"""
import mmap, os, signal, sys, time
own, disk = sys.argv[1], sys.argv[2] == 'volumes'

def end(number, frame):
    os.write(1, b'\nending\n')
    time.sleep(1.5)
    os.write(1, b'ended\n')
    os._exit(7)

signal.signal(signal.SIGTERM, end)
open('/var/tmp/up', 'w').close()
block = os.urandom(1 << 20)
known = hash(block)
gone = open('/var/tmp/gone', 'w+b')
gone.write(block)
os.unlink('/var/tmp/gone')
if disk:
    shm = os.open('/dev/shm/' + own, os.O_RDWR | os.O_CREAT)
    os.ftruncate(shm, 1 << 20)
    area = mmap.mmap(shm, 1 << 20)
    area[:] = block
    journal = open('/memory/' + own, 'a')
    shared = open('/disk/' + own, 'a')
    if os.path.exists('/disk/ticket'):
        os.unlink('/disk/ticket')
environment = dict(os.environ)
number, hoard = 0, []
while True:
    gone.seek(0)
    assert hash(gone.read()) == known
    assert os.environ == environment and os.environ['MARK'] == own
    assert not [name for name in environment if name.startswith('CKPT_AGENT')]
    if disk:
        assert hash(area[:]) == known
        assert os.path.samestat(os.fstat(shm), os.stat('/dev/shm/' + own))
        assert os.path.samestat(os.fstat(shared.fileno()), os.stat('/disk/' + own))
        assert open('/disk/prepared').read() == 'once\n'
        assert not os.path.exists('/disk/ticket')
        print(number, file=journal, flush=True)
        print(number, file=shared, flush=True)
        assert open('/disk/' + own).read() == open('/memory/' + own).read()
    # In one write: others write into the same pipe.
    print(f'{number}\n', end='')
    number += 1
    while os.path.exists('/var/tmp/eat'):
        hoard.append(os.urandom(1 << 20))
    time.sleep(0.05)
"""
# Waits for the workload, which a placeholder has not, and would run a second time in it.
STARTED = "until test -e /var/tmp/up; do sleep 0.1; done; echo started >> /var/tmp/started"
PREPARE = "echo once >> /disk/prepared; echo used > /disk/ticket"


def container(name: str, volumes: bool) -> dict[str, Any]:
    mounts = [
        {"name": "disk", "mountPath": "/disk"},
        {"name": "memory", "mountPath": "/memory"},
    ]
    return {
        "name": name,
        "image": "localhost/np:1",
        "imagePullPolicy": "Never",
        "command": ["python3", "-u", "-c", LIFE, name, "volumes" if volumes else "none"],
        "env": [{"name": "MARK", "value": name}],
        "resources": {"limits": {"memory": "96Mi"}},
        "volumeMounts": mounts if volumes else [],
    }


def rich(name: str, namespace: str, *, volumes: bool) -> dict[str, Any]:
    """A pod with two containers, a sidecar, and an init container."""
    pod = counter(name, namespace)
    pod["metadata"]["annotations"] = {optin.CONTAINERS: "main,second,side"}
    spec = pod["spec"]
    spec["terminationGracePeriodSeconds"] = 20
    prepare = container("prepare", True) | {"command": ["sh", "-c", PREPARE]}
    spec["initContainers"] = [prepare, container("side", volumes) | {"restartPolicy": "Always"}]
    main = container("main", volumes)
    often = {"periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 5}
    main["readinessProbe"] = often | {"exec": {"command": ["test", "!", "-e", "/var/tmp/busy"]}}
    alive = "test -e /var/tmp/up && ! test -e /var/tmp/sick"  # which no placeholder is
    main["livenessProbe"] = often | {"exec": {"command": ["sh", "-c", alive]}}
    main["lifecycle"] = {
        "postStart": {"exec": {"command": ["sh", "-c", STARTED]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo stopping > /proc/1/fd/1"]}},
    }
    spec["containers"] = [main, container("second", volumes)]
    spec["volumes"] = [
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
    ]
    return pod


CONTAINERS = ("main", "second", "side")


def reached(cluster: Cluster, namespace: str, pod: str, name: str) -> int:
    """The last number that the container has logged; each is logged once."""
    lines = cluster.logs(pod, namespace, "-c", name).split()
    assert lines == [str(int(lines[0]) + n) for n in range(len(lines))] if lines else True, lines
    return int(lines[-1]) if lines else -1


def assert_live(cluster: Cluster, namespace: str, pod: str, least: dict[str, int]) -> None:
    """Every container counts on from ``least``, which is brought up to date, and none was
    restarted.
    """
    for name in CONTAINERS:

        def further(name: str = name) -> bool:
            now = reached(cluster, namespace, pod, name)
            return now > least.get(name, 0) + 3

        cluster.wait_for(f"{name} to count on", further, 30)
        least[name] = reached(cluster, namespace, pod, name)
    found = cluster.wait_for_pod(pod, namespace)["status"]
    statuses = [*found["containerStatuses"], *found["initContainerStatuses"]]
    assert {each["restartCount"] for each in statuses} == {0}


def sh(cluster: Cluster, namespace: str, pod: str, name: str, script: str) -> str:
    words = ("exec", pod, "-n", namespace, "-c", name, "--", "sh", "-c", script)
    return cluster.kubectl(*words).strip()


def statuses(cluster: Cluster, namespace: str, pod: str) -> dict[str, Any]:
    found = cluster.get("pod", pod, "-n", namespace)["status"]
    both = [*found["containerStatuses"], *found.get("initContainerStatuses", [])]
    return {each["name"]: each for each in both}


def ended(cluster: Cluster, namespace: str, pod: str, name: str) -> dict[str, Any]:
    """How a container ended that was started anew since, and counts again from the beginning."""

    def again() -> bool:
        status = statuses(cluster, namespace, pod)[name]
        return bool(status["restartCount"] == 1 and status["state"].get("running"))

    cluster.wait_for(f"{name} to be started anew", again, 60)
    cluster.wait_for("a count", lambda: reached(cluster, namespace, pod, name) > 0, 30)
    assert cluster.logs(pod, namespace, "-c", name).split()[0] == "0"
    how: dict[str, Any] = statuses(cluster, namespace, pod)[name]["lastState"]["terminated"]
    return how


def ready(cluster: Cluster, namespace: str, pod: str) -> bool:
    return bool(statuses(cluster, namespace, pod)["main"]["ready"])


def assert_ends_as_any_pod(cluster: Cluster, namespace: str, pod: str) -> None:
    """Probes, limits, signals and statuses are those of a pod that was never restored."""
    assert sh(cluster, namespace, pod, "main", "echo $MARK $(cat /proc/1/comm)") == "main hold"
    assert sh(cluster, namespace, pod, "main", "cat /var/tmp/started") == "started"

    sh(cluster, namespace, pod, "main", "touch /var/tmp/busy")
    cluster.wait_for("readiness to be lost", lambda: not ready(cluster, namespace, pod), 20)
    sh(cluster, namespace, pod, "main", "rm /var/tmp/busy")
    cluster.wait_for("readiness", lambda: ready(cluster, namespace, pod), 20)

    sh(cluster, namespace, pod, "second", "touch /var/tmp/eat")
    how = ended(cluster, namespace, pod, "second")
    assert (how["reason"], how["exitCode"]) == ("OOMKilled", 137)

    sh(cluster, namespace, pod, "main", "touch /var/tmp/sick")
    how = ended(cluster, namespace, pod, "main")
    assert (how["reason"], how["exitCode"]) == ("Error", 7)
    said = cluster.logs(pod, namespace, "-c", "main", "--previous").split()
    assert [word for word in said if word.isalpha()] == ["stopping", "ending", "ended"]


def assert_leaves_nothing(cluster: Cluster, namespace: str, pod: str) -> None:
    """Its end is that of its processes: after their last word, long before they would be killed."""
    found = cluster.get("pod", pod, "-n", namespace)
    node, uid = cluster.node(found["spec"]["nodeName"]), found["metadata"]["uid"]
    with followed(cluster, namespace, pod, "side") as log:
        cluster.kubectl("delete", "pod", pod, "-n", namespace, "--timeout=60s")
        assert log.text().split()[-2:] == ["ending", "ended"]

    def left() -> str:
        return node.exec(
            *("sh", "-c"),
            f"grep -l {uid} /proc/[0-9]*/cgroup /proc/mounts; ls -d /var/lib/kubelet/pods/{uid};"
            f"find /sys/fs/cgroup -name '*{uid}*'",
            check=False,
        ).stdout

    cluster.wait_for("the node to be as before", lambda: not left(), 30)


def placement(cluster: Cluster, namespace: str, pod: str) -> dict[str, Any]:
    """Where the pod is, by the API server's word."""
    found = cluster.get("pod", pod, "-n", namespace)
    return {
        "pod": found["metadata"]["name"],
        "podUid": found["metadata"]["uid"],
        "node": found["spec"]["nodeName"],
        "addresses": sorted(each["ip"] for each in found["status"]["podIPs"]),
    }


def test_a_pod_of_several_containers_goes_on_in_every_generation_and_ends_as_it_would_have(
    agents: Cluster, namespace: str
) -> None:
    pod = "rich" + "-with.a-name" * 16  # a kubelet's own files allow for hardly more
    agents.apply(rich(pod, namespace, volumes=True))
    agents.wait_for_pod(pod, namespace)
    least: dict[str, int] = {}
    assert_live(agents, namespace, pod, least)
    for node in ("n2", "n1", "n2"):
        before = placement(agents, namespace, pod)
        moved = ckpt(agents, "migrate", f"pod/{pod}", "--to", node, "-n", namespace).document()
        assert_live(agents, namespace, pod, least)
        assert (moved["was"], moved["now"]) == (before, placement(agents, namespace, pod))
    assert moved["now"]["node"] == "n2"
    assert_ends_as_any_pod(agents, namespace, pod)
    assert_leaves_nothing(agents, namespace, pod)


def test_a_pod_that_its_kubelet_checkpointed_goes_on_in_every_generation(
    agents: Cluster, namespace: str
) -> None:
    pod = "rich"
    agents.apply(rich(pod, namespace, volumes=False))
    agents.wait_for_pod(pod, namespace)
    least: dict[str, int] = {}
    assert_live(agents, namespace, pod, least)
    dump = ("dump", f"pod/{pod}", "--engine", "kubelet", "-n", namespace, "--quiet")
    name = ckpt(agents, *dump).document()["name"]
    ckpt(agents, "restore", name, "--node", "n2", "--replace", "-n", namespace).document()
    assert_live(agents, namespace, pod, least)
    # What CRIU cannot take in a kubelet's way is refused before anything stops.
    refused = ckpt(agents, *dump)
    assert refused.status == exits.REFUSED
    assert refused.error()["hint"] == "use the container engine"
    for node in ("n1", "n2"):
        ckpt(agents, "migrate", f"pod/{pod}", "--to", node, "-n", namespace).document()
        assert_live(agents, namespace, pod, least)
    assert_leaves_nothing(agents, namespace, pod)


def placeholder(pod: dict[str, Any], image: str, name: str, node: str) -> dict[str, Any]:
    """Another pod like ``pod``, to restore ``image`` into."""
    made = copy.deepcopy(pod)
    made["metadata"] |= {"name": name, "annotations": {optin.RESTORE: image}}
    made["spec"]["affinity"] = counter(name, "", node)["spec"]["affinity"]
    return made


def test_what_does_not_fit_is_refused_at_once_with_every_reason(
    agents: Cluster, namespace: str
) -> None:
    pod = counter("job", namespace, MEMORY_MB="40")
    pod["spec"]["volumes"] = [{"name": "data", "emptyDir": {}}]
    pod["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    agents.apply(pod)
    agents.wait_for_pod("job", namespace)
    image = ckpt(agents, "dump", "pod/job", "-n", namespace).document()["name"]
    other = placeholder(pod, image, "other", "n2")
    (main,) = other["spec"]["containers"]
    main |= {
        "image": deployed.IMAGE,
        "imagePullPolicy": "Never",
        "resources": {"limits": {"memory": "24Mi"}},
        "volumeMounts": [{"name": "data", "mountPath": "/elsewhere"}],
    }
    agents.apply(other)
    refused = ckpt(agents, "restore", image, "--pod", "other", "-n", namespace, "--quiet")
    assert refused.status == exits.REFUSED
    facts = refused.error()["facts"]
    for part in ("at the dump it was sha256:", "nothing is mounted at /data", "limit is 24 MiB"):
        assert len([reason for reason in facts["reasons"] if part in reason]) == 1
    assert len(facts["reasons"]) == 3
    # From the request to the answer, as the agent measured it.
    assert facts["refused_after_s"] > 0
    # It waits on, and was not touched.
    assert sh(agents, namespace, "other", "main", "ls -A /elsewhere") == ""
    assert statuses(agents, namespace, "other")["main"]["restartCount"] == 0


def test_one_image_makes_one_pod_unless_asked_again(agents: Cluster, namespace: str) -> None:
    pod = counter("job", namespace)
    agents.apply(pod)
    agents.wait_for_pod("job", namespace)
    image = ckpt(agents, "dump", "pod/job", "-n", namespace).document()["name"]
    agents.apply([placeholder(pod, image, name, node) for name, node in (("a", "n1"), ("b", "n2"))])
    words = ("restore", image, "-n", namespace, "--quiet")
    with ThreadPoolExecutor(2) as pool:
        tries = {name: pool.submit(ckpt, agents, *words, "--pod", name) for name in ("a", "b")}
        ran = {name: each.result() for name, each in tries.items()}
    (won,) = [name for name, each in ran.items() if each.status == exits.DONE]
    (lost,) = [name for name, each in ran.items() if each.status == exits.REFUSED]
    assert "--again" in ran[lost].error()["hint"]
    uid = agents.get("pod", won, "-n", namespace)["metadata"]["uid"]
    assert ran[lost].error()["facts"]["pod_uid"] == uid
    assert ckpt(agents, *words, "--pod", lost, "--again").document()["pod"] == lost
    for name in ("a", "b"):
        before = counted(agents, namespace, name)[-1]
        agents.wait_for("more", lambda: counted(agents, namespace, name)[-1] > before, 30)  # noqa: B023


def test_images_of_a_deleted_namespace_are_told_of_and_can_be_removed(agents: Cluster) -> None:
    gone = f"test-{secrets.token_hex(4)}"
    agents.kubectl("create", "namespace", gone)
    account = ("serviceaccount", "default", "-n", gone)
    agents.wait_for("the default ServiceAccount", lambda: agents.get(*account), 30)
    agents.apply(counter("job", gone))
    agents.wait_for_pod("job", gone)
    image = ckpt(agents, "dump", "pod/job", "-n", gone).document()["name"]
    agents.kubectl("delete", "namespace", gone, "--timeout=60s")

    def told() -> str:
        checks = json.loads(ckpt(agents, "doctor", "-n", "default").out)["checks"]
        lines = {each["name"]: each["found"] for each in checks}
        return str(lines["n1/namespaces"])

    assert gone in told()
    listed = ckpt(agents, "list", "-n", gone).document()["items"]
    assert [each["name"] for each in listed] == [image]
    ckpt(agents, "delete", image, "-n", gone).document()
    assert gone not in told()
