"""A real Kubernetes cluster inside one Linux machine: a control plane and two nodes.

Promises: ``up`` returns with both nodes, the cluster's DNS and JobSet's webhooks ready, or raises
with the end of the failing component's log; ``down`` leaves nothing, also after a crash of whoever
called ``up``; all traffic stays in network namespaces of its own, so that clusters with different
state directories do not meet.
Does not: build anything (tests/cluster/build does).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.machine import ClusterError, Machine, NodeMachine, poll, run
from tests.cluster.pki import Authority, create_signing_key

HERE = Path(__file__).resolve().parent
CONTROL_PLANE_IP = "10.201.0.1"
NODE_IPS = {"n1": "10.201.0.2", "n2": "10.201.0.3"}
POD_RANGES = {"n1": "10.202.1.0/24", "n2": "10.202.2.0/24"}
POD_RANGE = "10.202.0.0/16"
SERVICE_RANGE = "10.203.0.0/16"
API_SERVICE_IP = "10.203.0.1"
DNS_SERVICE_IP = "10.203.0.10"
SERVER = f"https://{CONTROL_PLANE_IP}:6443"
SHARED = "/srv/shared"  # where both nodes mount the shared directory
REAL_DISKS = {"ext2/ext3", "xfs", "btrfs", "f2fs", "zfs"}

__all__ = ["Cluster", "ClusterError", "Node", "cache_directory"]


def cache_directory() -> Path:
    """Where tests/cluster/build puts what it builds."""
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("CKPT_AGENT_CACHE", os.path.join(home, "ckpt-agent"))) / "cluster"


def state_directory() -> Path:
    """Where the running cluster lives: one fixed place, so that any program finds it."""
    return Path(os.environ.get("CKPT_AGENT_CLUSTER", "/var/tmp/ckpt-agent-cluster"))


class Node(NodeMachine):
    """A node: containerd, kubelet and kube-proxy run in it as services of these names.

    From Machine: exec, inside, start, kill, stop, resume, alive, tail, wait_for.
    """

    @property
    def ip(self) -> str:
        """The node's address."""
        return NODE_IPS[self.name]

    @property
    def root(self) -> Path:
        """The node's root directory as this machine sees it."""
        return Path(f"/proc/{self.pid}/root")

    def has_image(self, name: str) -> bool:
        """Whether the node's container runtime has the image of this full name."""
        return name in self.exec("ctr", "-n", "k8s.io", "images", "ls", "-q").stdout.split()

    def import_image(self, archive: Path) -> None:
        """Loads an OCI or Docker archive into the node's container runtime."""
        with open(archive, "rb") as stream:
            done = subprocess.run(
                self.inside(["ctr", "--namespace", "k8s.io", "images", "import", "-"]),
                stdin=stream,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        if done.returncode:
            raise ClusterError(f"importing {archive} on {self.name}: {done.stdout}{done.stderr}")


class Cluster:
    """The two-node cluster. As a context manager: up on entry, down on exit."""

    def __init__(self) -> None:
        self.cache = cache_directory()
        self.bin = self.cache / "bin"
        self.state = state_directory()
        self.pki = self.state / "pki"
        self.kubeconfig = self.state / "admin.kubeconfig"
        self.shared = self.state / "shared"
        self.control_plane = Machine("control-plane", self.state)
        self.nodes = {name: Node(name, self.state) for name in NODE_IPS}

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- life

    def running(self) -> bool:
        """Whether ``up`` has succeeded and the machines still run."""
        return (self.state / "ready").exists() and all(m.running() for m in self._machines())

    def up(self) -> None:
        """Starts the cluster, unless it runs. Remains of a crashed one are removed first.

        Raises: ClusterError, with the end of the failing component's log.
        """
        with self._lock():
            if self.running():
                return
            self._check_parts()
            self._remove()
            self._check_disk()
            try:
                self._boot()
                with ThreadPoolExecutor(6) as pool:
                    runtimes = {n: pool.submit(self._start_runtime, n) for n in self.nodes}
                    images = [pool.submit(self._import_after, runtimes[n], n) for n in self.nodes]
                    self._start_control_plane()
                    for name in self.nodes:
                        runtimes[name].result()
                        self._start_kubelet(name)
                    self._start_proxies()
                    self._apply_system()
                    for image in images:
                        image.result()
                self._wait_until_ready()
                (self.state / "ready").touch()
            except BaseException:
                # Remains are kept for whoever looks into a failed start, but nothing runs.
                self._stop()
                raise

    def down(self) -> None:
        """Ends the cluster and removes everything of it but what was built."""
        with self._lock():
            self._remove()

    def _machines(self) -> Iterator[Machine]:
        yield self.control_plane
        yield from self.nodes.values()

    def _stop(self) -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Machine.halt, self._machines()))

    def _remove(self) -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Machine.remove, self._machines()))
        shutil.rmtree(self.state, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One program at a time starts or ends the cluster."""
        path = self.state.with_name(self.state.name + ".lock")
        with open(path, "w") as lock:

            def taken() -> bool:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            poll(taken, "another start or end of the cluster", 600)
            yield

    def _check_parts(self) -> None:
        wanted = ["kubelet", "kube-apiserver", "kube-controller-manager", "kube-scheduler"]
        wanted += ["kube-proxy", "kubectl", "etcd", "coredns", "jobset"]
        missing = [name for name in wanted if not (self.bin / name).exists()]
        if missing or not (self.cache / "roots/node").exists():
            raise ClusterError(f"not built: {missing or 'the node root'}; run tests/cluster/build")

    def _check_disk(self) -> None:
        self.state.mkdir(parents=True)
        kind = run(["stat", "-f", "-c", "%T", self.state]).stdout.strip()
        if kind not in REAL_DISKS:
            raise ClusterError(
                f"{self.state} lies on {kind}, where nodes cannot keep containers; "
                "set CKPT_AGENT_CLUSTER to a directory on a real disk"
            )

    # ---- use

    def node(self, name: str) -> Node:
        """The node ``n1`` or ``n2``."""
        return self.nodes[name]

    def other_node(self, name: str) -> Node:
        """The node that is not ``name``."""
        return next(node for node in self.nodes.values() if node.name != name)

    def in_control_plane(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """``argv`` as a command line that sees the cluster's network and this machine's files."""
        words = [str(word) for word in argv]
        return ["nsenter", f"--net=/proc/{self.control_plane.pid}/ns/net", "--", *words]

    def run_in_control_plane(
        self,
        *argv: str | os.PathLike[str],
        stdin: str | bytes | None = None,
        timeout_s: float = 120,
        check: bool = True,
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of this machine as an administrator would: KUBECONFIG is set."""
        settings = {"KUBECONFIG": str(self.kubeconfig), **(environment or {})}
        words: list[str | os.PathLike[str]] = ["env"]
        words += [f"{key}={value}" for key, value in settings.items()]
        words += argv
        return run(self.in_control_plane(words), stdin=stdin, timeout_s=timeout_s, check=check)

    def kubectl(
        self,
        *arguments: str,
        stdin: str | bytes | None = None,
        timeout_s: float = 120,
        kubeconfig: Path | None = None,
    ) -> str:
        """Runs kubectl and returns its output. ClusterError with its messages when it fails."""
        config = ["--kubeconfig", str(kubeconfig or self.kubeconfig)]
        words = [str(self.bin / "kubectl"), *config, *arguments]
        return run(self.in_control_plane(words), stdin=stdin, timeout_s=timeout_s).stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get ... -o json``, read."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, document: str | dict[str, Any] | list[dict[str, Any]]) -> str:
        """Applies YAML text, one object, or several."""
        if isinstance(document, dict):
            document = [document]
        text = document if isinstance(document, str) else yaml.safe_dump_all(document)
        return self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def wait_for(
        self,
        what: str,
        condition: Callable[[], object],
        timeout_s: float = 60,
        pause_s: float = 0.2,
    ) -> None:
        """Returns when ``condition`` holds. A ClusterError from it counts as not yet."""
        last = ""

        def holds() -> object:
            nonlocal last
            try:
                return condition()
            except ClusterError as error:
                last = str(error)
                return False

        try:
            poll(holds, what, timeout_s, pause_s)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{last}" if last else str(error)) from error

    def wait_for_pod(
        self, pod: str, namespace: str = "default", phase: str = "Running", timeout_s: float = 60
    ) -> dict[str, Any]:
        """The pod as soon as it is in ``phase``, and Ready if that is Running."""
        found: dict[str, Any] = {}

        def there() -> bool:
            nonlocal found
            found = self.get("pod", pod, "-n", namespace)
            status = found["status"]
            ready = any(
                c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", [])
            )
            return status.get("phase") == phase and (ready or phase != "Running")

        try:
            self.wait_for(f"pod {namespace}/{pod} {phase}", there, timeout_s)
        except ClusterError as error:
            events = self.kubectl("describe", "pod", pod, "-n", namespace)
            raise ClusterError(f"{error}\n{events}") from error
        return found

    def wait_for_deployment(self, name: str, namespace: str, timeout_s: float = 90) -> None:
        """Returns when all replicas are ready; ClusterError with what their pods say otherwise."""

        def ready() -> bool:
            found = self.get("deployment", name, "-n", namespace)
            return bool(found["status"].get("readyReplicas", 0) == found["spec"]["replicas"])

        try:
            self.wait_for(f"Deployment {namespace}/{name}", ready, timeout_s)
        except ClusterError as error:
            pods = self.kubectl("describe", "pods", "-n", namespace)
            raise ClusterError(f"{error}\n{pods}") from error

    def logs(self, pod: str, namespace: str = "default", *arguments: str) -> str:
        """``kubectl logs``."""
        return self.kubectl("logs", pod, "-n", namespace, *arguments)

    def delete(self, kind: str, name: str, namespace: str = "default", *arguments: str) -> None:
        """Deletes an object if it is there and waits until it is gone."""
        self.kubectl("delete", kind, name, "-n", namespace, "--ignore-not-found", *arguments)

    def import_image(self, archive: Path) -> None:
        """Loads an OCI or Docker archive into both nodes."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.import_image(archive), self.nodes.values()))

    def user_kubeconfig(self, user: str, groups: tuple[str, ...] = ()) -> Path:
        """A kubeconfig of ``user``, who may do what RBAC says: nothing at first."""
        authority = Authority.load(self.pki, "ca")
        certificate, key = authority.issue(f"user-{user}", user, groups=groups)
        return self._write_kubeconfig(f"{user}.kubeconfig", certificate, key)

    # ---- start

    def _boot(self) -> None:
        (self.shared / "store").mkdir(parents=True)
        os.chmod(self.shared, 0o755)
        self.control_plane.boot("control-plane")
        for node in self.nodes.values():
            node.boot("node", self.cache / "roots/node", self.shared, self.bin)
        self._connect()
        self._write_pki()

    def _connect(self) -> None:
        """A bridge in the control plane's namespace joins the machines; pods' ranges are routed."""
        hub = self.control_plane.pid

        def ip(machine: Machine, *words: str) -> None:
            run(["nsenter", f"--net=/proc/{machine.pid}/ns/net", "--", "ip", *words])

        ip(self.control_plane, "link", "add", "br0", "type", "bridge")
        ip(self.control_plane, "addr", "add", f"{CONTROL_PLANE_IP}/24", "dev", "br0")
        ip(self.control_plane, "link", "set", "br0", "up")
        # Any route will do: kube-proxy rewrites the address before the route is used.
        ip(self.control_plane, "route", "add", SERVICE_RANGE, "dev", "br0")
        for name, node in self.nodes.items():
            pair = ["link", "add", name, "netns", str(hub), "type", "veth"]
            run(["ip", *pair, "peer", "name", "eth0", "netns", str(node.pid)])
            ip(self.control_plane, "link", "set", name, "master", "br0", "up")
            ip(node, "addr", "add", f"{node.ip}/24", "dev", "eth0")
            ip(node, "link", "set", "eth0", "up")
            ip(node, "route", "add", "default", "via", CONTROL_PLANE_IP)
        for name, node in self.nodes.items():
            for machine in self._machines():
                if machine is not node:
                    ip(machine, "route", "add", POD_RANGES[name], "via", node.ip)

    def _write_pki(self) -> None:
        authority = Authority.create(self.pki, "ca")
        front = Authority.create(self.pki, "front-proxy-ca")
        front.issue("front-proxy-client", "front-proxy-client")
        create_signing_key(self.pki, "sa")
        service_names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
        authority.issue(
            "apiserver",
            "kube-apiserver",
            names=(CONTROL_PLANE_IP, "127.0.0.1", API_SERVICE_IP, *service_names),
        )
        masters = ("system:masters",)
        authority.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", groups=masters)
        self._write_kubeconfig(
            "admin.kubeconfig", *authority.issue("admin", "kubernetes-admin", groups=masters)
        )
        for user in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
            groups = ("system:node-proxier",) if user == "kube-proxy" else ()
            pair = authority.issue(user, f"system:{user}", groups=groups)
            self._write_kubeconfig(f"{user}.kubeconfig", *pair)
        for name, node in self.nodes.items():
            pair = authority.issue(
                name, f"system:node:{name}", groups=("system:nodes",), names=(node.ip, name)
            )
            self._write_kubeconfig(f"{name}.kubeconfig", *pair)
        authority.issue(
            "jobset-webhook",
            "jobset-webhook",
            names=("jobset-webhook-service.jobset-system.svc",),
        )

    def _write_kubeconfig(self, file: str, certificate: Path, key: Path) -> Path:
        def data(path: Path) -> str:
            return base64.b64encode(path.read_bytes()).decode()

        authority = data(self.pki / "ca.crt")
        user = {"client-certificate-data": data(certificate), "client-key-data": data(key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "ckpt-agent",
                    "cluster": {"server": SERVER, "certificate-authority-data": authority},
                }
            ],
            "users": [{"name": "user", "user": user}],
            "contexts": [
                {"name": "ckpt-agent", "context": {"cluster": "ckpt-agent", "user": "user"}}
            ],
            "current-context": "ckpt-agent",
        }
        path = self.state / file
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def _start_control_plane(self) -> None:
        machine, pki = self.control_plane, self.pki
        machine.start(
            "etcd",
            self.bin / "etcd",
            f"--data-dir={self.state}/etcd",
            "--unsafe-no-fsync",  # the cluster does not outlive a crash of this machine
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--log-level=warn",
        )
        machine.start(
            "kube-apiserver",
            self.bin / "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--advertise-address={CONTROL_PLANE_IP}",
            "--secure-port=6443",
            f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
            f"--proxy-client-key-file={pki}/front-proxy-client.key",
            f"--service-account-key-file={pki}/sa.pub",
            f"--service-account-signing-key-file={pki}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--audit-log-path={self.state}/control-plane/log/audit.log",
            f"--audit-policy-file={HERE}/manifests/audit-policy.yaml",
        )
        machine.wait_for("kube-apiserver", self._api_ready, 90)
        machine.start(
            "kube-controller-manager",
            self.bin / "kube-controller-manager",
            f"--kubeconfig={self.state}/kube-controller-manager.kubeconfig",
            f"--service-account-private-key-file={pki}/sa.key",
            f"--root-ca-file={pki}/ca.crt",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )
        machine.start(
            "kube-scheduler",
            self.bin / "kube-scheduler",
            f"--kubeconfig={self.state}/kube-scheduler.kubeconfig",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )

    def _api_ready(self) -> bool:
        try:
            return self.kubectl("get", "--raw", "/readyz", timeout_s=10) == "ok"
        except ClusterError:
            return False

    def _start_runtime(self, name: str) -> None:
        node = self.nodes[name]
        root = node.root
        (root / "etc/kubernetes/pki").mkdir(exist_ok=True)
        (root / "var/lib/kubelet/pki").mkdir(mode=0o700)
        shutil.copy(self.pki / "ca.crt", root / "etc/kubernetes/pki/ca.crt")
        shutil.copy(self.pki / f"{name}.crt", root / "var/lib/kubelet/pki/kubelet.crt")
        shutil.copy(self.pki / f"{name}.key", root / "var/lib/kubelet/pki/kubelet.key")
        for file, kubeconfig in (("kubelet", name), ("kube-proxy", "kube-proxy")):
            shutil.copy(
                self.state / f"{kubeconfig}.kubeconfig", root / f"etc/kubernetes/{file}.conf"
            )
        (root / "etc/cni/net.d/10-pods.conflist").write_text(_cni_config(POD_RANGES[name]))
        shutil.copy(HERE / "manifests/containerd.toml", root / "etc/containerd/config.toml")
        (root / "etc/kubernetes/kubelet.yaml").write_text(_kubelet_config(node))
        node.start("containerd", "containerd")
        ready = ["ctr", "version"]
        node.wait_for("containerd", lambda: node.exec(*ready, check=False).returncode == 0, 30)

    def _import_after(self, runtime: Any, name: str) -> None:
        runtime.result()
        for archive in ("pause", "coredns", "jobset", "np"):
            self.nodes[name].import_image(self.cache / f"images/{archive}.tar")

    def _start_kubelet(self, name: str) -> None:
        node = self.nodes[name]
        node.start(
            "kubelet",
            "kubelet",
            "--config=/etc/kubernetes/kubelet.yaml",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            f"--hostname-override={name}",
            f"--node-ip={node.ip}",
        )

    def _start_proxies(self) -> None:
        """ClusterIPs work on the nodes, and for the API server's calls of webhooks."""
        config = yaml.safe_load((HERE / "manifests/kube-proxy.yaml").read_text())
        for machine in self._machines():
            is_node = isinstance(machine, Node)
            kubeconfig = "/etc/kubernetes/kube-proxy.conf"
            if not is_node:
                kubeconfig = f"{self.state}/kube-proxy.kubeconfig"
            mine = {**config, "hostnameOverride": machine.name, "clusterCIDR": POD_RANGE}
            mine["clientConnection"] = {"kubeconfig": kubeconfig}
            path = self.state / "kube-proxy.yaml"
            if is_node:
                path = self.nodes[machine.name].root / "etc/kubernetes/kube-proxy.yaml"
            path.write_text(yaml.safe_dump(mine))
            inner = "/etc/kubernetes/kube-proxy.yaml" if is_node else str(path)
            program = "kube-proxy" if is_node else str(self.bin / "kube-proxy")
            machine.start("kube-proxy", program, f"--config={inner}")

    def _apply_system(self) -> None:
        self.apply((HERE / "manifests/system.yaml").read_text())
        self.apply(_jobset(self.cache / "jobset.yaml", self.pki))

    def _wait_until_ready(self) -> None:
        for name, node in self.nodes.items():
            node.wait_for("kubelet", partial(self._node_ready, name), 90)
        self.wait_for_deployment("coredns", "kube-system")
        self.wait_for_deployment("jobset-controller-manager", "jobset-system")
        # Its replicas are ready before the way to them is: calls of its webhooks would be refused.
        self.wait_for("JobSet's webhooks to answer", self._takes_jobsets)

    def _takes_jobsets(self) -> bool:
        container = {"name": "main", "image": "localhost/np:1"}
        pod = {"spec": {"restartPolicy": "Never", "containers": [container]}}
        body = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": "probe", "namespace": "default"},
            "spec": {"replicatedJobs": [{"name": "job", "template": {"spec": {"template": pod}}}]},
        }
        self.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
        return True

    def _node_ready(self, name: str) -> bool:
        try:
            conditions = self.get("node", name)["status"]["conditions"]
        except ClusterError:
            return False
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _cni_config(pod_range: str) -> str:
    # Point-to-point links, all traffic routed: on a bridge, answers between two pods of one node
    # would bypass the rewriting of Service addresses.
    pods = {
        "type": "ptp",
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": pod_range}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [pods]})


def _kubelet_config(node: Node) -> str:
    config = yaml.safe_load((HERE / "manifests/kubelet.yaml").read_text())
    config["cgroupRoot"] = f"/{node.control_group}"  # machine_init.sh made it
    config["clusterDNS"] = [DNS_SERVICE_IP]
    text: str = yaml.safe_dump(config)
    return text


def _jobset(manifests: Path, pki: Path) -> list[dict[str, Any]]:
    """JobSet as its project ships it, but with our certificate, so that no pod has to wait until
    kubelet has brought it one that the controller made for itself.
    """
    data = {
        name: base64.b64encode((pki / file).read_bytes()).decode()
        for name, file in (
            ("ca.crt", "ca.crt"),
            ("tls.crt", "jobset-webhook.crt"),
            ("tls.key", "jobset-webhook.key"),
        )
    }
    documents = [d for d in yaml.safe_load_all(manifests.read_text()) if d]
    for document in documents:
        kind = document["kind"]
        if kind.endswith("WebhookConfiguration"):
            for webhook in document["webhooks"]:
                webhook["clientConfig"]["caBundle"] = data["ca.crt"]
        elif kind == "Secret":
            document["data"] = data
        elif kind == "ConfigMap":
            for file, text in document["data"].items():
                config = yaml.safe_load(text)
                config["internalCertManagement"] = {"enable": False}
                config["leaderElection"] = {"leaderElect": False}
                document["data"][file] = yaml.safe_dump(config)
        elif kind == "Deployment":
            container = document["spec"]["template"]["spec"]["containers"][0]
            container["image"] = "localhost/jobset:1"
            container["resources"] = {}
            container["readinessProbe"] |= {"initialDelaySeconds": 0, "periodSeconds": 1}
    return documents
