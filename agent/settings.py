"""Settings: what a person or a deployment decides, from flags, the environment and a file.

Promises: ``merge`` is pure; a flag beats the environment, which beats the file, which beats the
default; every error names the flag, variable, or file and line it is about. A ``Settings`` value
is complete, checked and immutable.
Does not: touch the store or CRIU; whether the paths exist is found out where they are used.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import posixpath
from collections.abc import Callable, Mapping
from typing import Any

import platformdirs

from agent import errors
from agent.model import values

OUTPUTS = ("table", "wide", "json", "yaml", "name")
ENV_PREFIX = "CKPT_AGENT_"
FILE_NAME = "config.yaml"

# Nearer than this in difflib's ratio and a key is offered as "did you mean".
_NEAR = 0.5


def _output(value: object, base: str) -> str:
    text = values.as_text(value)
    if text not in OUTPUTS:
        raise errors.InvalidInput(
            f"there is no output format {text!r}", hint=f"use one of {', '.join(OUTPUTS)}"
        )
    return text


_DEFAULT_STORE = values.StoreUrl("file", "/var/lib/ckpt-agent/store")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set. ``KEYS`` are the names in the file (a field's name without
    its unit); the variable is ``CKPT_AGENT_`` and the key in capitals.
    """

    store: values.StoreUrl = _DEFAULT_STORE
    """The store's place, a path or URL. The default is where the Filesystem Hierarchy Standard
    puts a program's state; a job that may move to another node wants a shared directory."""

    stores: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """``node``: more places for images beside ``store``, absolute paths by name. Pods and
    namespaces choose among them; ``store`` is the one called ``default``, for those that say
    nothing, unless this names another ``default``."""

    criu: str | None = None
    """The CRIU program. None: beside this Python, then in PATH, since set-up puts a new enough
    one there."""

    work_dir: str = "/var/lib/ckpt-agent/work"
    """Scratch for CRIU's logs and metadata images while it runs: a few MiB a dump, removed
    afterwards. Not /tmp, where others could put names before us."""

    criu_bundle: str = "/usr/local/lib/ckpt-agent/bundle"
    """The directory that CRIU is started from inside containers (scripts/criu-bundle makes one);
    where the agent's image has it."""

    output: str = "table"
    """How results are printed: table, wide, json, yaml or name. A person reads by default."""

    dump_deadline_s: float = 600.0
    """Seconds until a capture is given up and the job runs on. Ten minutes hold the largest host
    memory seen (1 TiB at 2 GB/s); a stuck dump must not stop a job for longer."""

    restore_deadline_s: float = 600.0
    """Seconds until a restore is given up and undone; as for a dump."""

    ghost_limit_bytes: int = 1 << 30
    """Largest unlinked open file that travels with an image, in bytes. CRIU's own 1 MiB fails for
    ordinary temporary files; above 1 GiB something is usually wrong."""

    precopy: bool = True
    """Whether a job's memory is copied while it runs, so that it stops only for what it wrote last.
    Where that cannot be done, a dump takes the plain way by itself."""

    precopy_cpu_percent: int = 10
    """How much of the cores that this program may use it takes for that, in percent, while the job
    computes: as far as half of what is idle goes, and of one core in any case. The job is to keep
    nine tenths of its speed. 100: no limit."""

    precopy_rate_bytes: int | None = None
    """How many bytes of memory it reads a second for that, and so writes at most. None: as many as
    come; for a volume that others need as well."""

    criu_log_level: int = 2
    """How much CRIU logs, 0 to 4. Errors and warnings are all that a failure report quotes, and
    level 4 slows the stop."""

    keep_last: int | None = None
    """``prune`` keeps this many newest epochs of each group. None: nothing is removed unless the
    command says what to keep."""

    keep_within_s: float | None = None
    """``prune`` keeps epochs younger than this many seconds. None: as above."""

    use_cluster: bool = False
    """Whether the verbs mean a cluster where nothing else says so. Off: a host's own processes
    and store are what the program was first for."""

    kubeconfig: str | None = None
    """Where the cluster's address and the caller's identity are. None: as kubectl finds it, or the
    ServiceAccount of the pod that this runs in."""

    context: str | None = None
    """The context in it. None: its current one."""

    namespace: str | None = None
    """The namespace of pods and images. None: the context's."""

    agent_namespace: str = "ckpt-agent"
    """The namespace that the agents run in; deploy/daemonset's own."""

    agent_selector: str = "app.kubernetes.io/name=ckpt-agent-node"
    """The labels of the agents' pods; deploy/daemonset's own."""

    agent_address: str | None = None
    """An agent's address, ``host:port``, for callers that reach it directly. None: a port-forward
    through the API server, which every caller can be allowed."""

    agent_ca: str | None = None
    """A file with the authority that agents' certificates are checked against. None: what the
    cluster publishes in the ConfigMap ckpt-agent-ca."""

    agent_silence_s: float = 3.0
    """Seconds that an agent may be silent while a group stands still; then the epoch is given up
    and the others run again. They do after half of it if its connection is refused. An agent that
    captures beside six busy processes on two cores was silent for up to 2 s."""

    schedule_deadline_s: float = 120.0
    """Seconds that a replacement pod may take to be given a node. A scheduler needs less than one;
    two minutes let a person make room."""

    image: str | None = None
    """The image that the webhook takes ``hold`` from. None: the one that it runs in itself."""

    leaf_lifetime_s: float = 30 * 86400.0
    """How long a certificate of our own authority is good. A month: a stolen one ends soon, and
    an admission service that is down is noticed before."""

    leaf_renew_before_s: float = 10 * 86400.0
    """How long before its end it is replaced: a third of its life, as cert-manager does."""

    ca_lifetime_s: float = 365 * 86400.0
    """How long our own authority is good."""

    ca_renew_before_s: float = 90 * 86400.0
    """How long before its end its successor is made."""

    trust_overlap_s: float = 3600.0
    """How long a new authority is published before it signs, and an old one after. The kubelet
    brings changes of a Secret into pods within two minutes; an hour allows for a node that was
    cut off."""

    node_name: str | None = None
    """The node that ``node`` serves, as the API server calls it. There is no default: a wrong
    guess would act on another node's pods."""

    runtime_socket: str = "/run/containerd/containerd.sock"
    """Where the container runtime listens; containerd's own default."""

    tls_dir: str = "/etc/ckpt-agent/tls"
    """Holds tls.crt, tls.key and ca.crt of ``node``: where the DaemonSet mounts its Secret."""

    token_port: int = 7443
    """``node`` takes callers with a bearer token here."""

    certificate_port: int = 7444
    """``node`` takes callers with a client certificate here."""

    kubelet_address: str | None = None
    """This node's kubelet, by an address that its certificate names. None: the kubelet's
    checkpoints are not used."""

    kubelet_trust: str = "cert:/var/lib/kubelet/pki/kubelet.crt"
    """How its certificate is known: ``ca:PATH``, ``cert:PATH`` or ``sha256:FINGERPRINT``. The
    default is the certificate that a kubelet makes itself, where nobody gives it one."""

    kubelet_checkpoints: str = "/var/lib/kubelet/checkpoints"
    """Where the kubelet puts archives: below its root directory."""

    runc_conf: str = "/etc/criu/runc.conf"
    """Where runc finds options for CRIU; ``node`` adds a block of its own while it runs, if it may
    use the kubelet's checkpoints. The place is runc's."""

    probe_port: int = 7445
    """``node`` and ``coordinator`` tell the kubelet here whether they live (/livez) and serve, or
    could (/readyz)."""

    work_kept_free_percent: int = 10
    """An archive that comes to ``node`` is refused if less than this part of its disk
    (``work_dir``) would stay free. Below a tenth a kubelet begins to evict pods (evictionHard
    nodefs.available<10%); set it where the kubelets are told otherwise."""

    parallel: int = 2
    """Dumps and restores that ``node`` does at once. Two fill the page cache and the volume of
    most nodes; each more makes the others' stops longer."""

    use_coordinator: bool = False
    """Whether verbs about a JobSet ask the cluster's coordinator instead of being one. Off: that
    needs nothing more than the agents. On, an operation outlives the command that asked for it."""

    coordinator_selector: str = "app.kubernetes.io/name=ckpt-agent-coordinator"
    """The labels of the coordinator's pods; deploy/daemonset's own."""

    coordinator_address: str | None = None
    """The coordinator's address, ``host:port``, for callers that reach it directly. None: a
    port-forward to the replica that serves."""

    coordinator_token_port: int = 7543
    """``coordinator`` takes callers with a bearer token here."""

    coordinator_certificate_port: int = 7544
    """``coordinator`` takes callers with a client certificate here."""

    coordinator_parallel: int = 32
    """Operations that ``coordinator`` runs at once, each of another group; the others wait. Each
    takes some threads for each pod of its group."""

    operation_deadline_s: float = 3600.0
    """Seconds after which ``coordinator`` gives up what can be given up, where the request does
    not say. An hour holds the longest wait for a turn behind other operations."""

    caller_rate_per_s: float = 20.0
    """Calls a second that ``coordinator`` and ``node`` take from one caller in the long run: a
    scheduler that looks after thousands of jobs makes a few; each costs the API server a question
    or two. What a coordinator says to the pods of an epoch does not count."""

    caller_burst: int = 200
    """Calls that one caller may make at once before that holds."""

    caller_streams: int = 16
    """Operations that one caller may watch at once, at ``coordinator``, or have under way, at
    ``node``; each holds a thread there."""

    shutdown_grace_s: float = 25.0
    """How long ``node`` lets operations give up when told to end: the usual 30 s of a pod, less
    what the end itself takes."""


@dataclasses.dataclass(frozen=True)
class _Key:
    field: str
    read: Callable[[object, str], Any]
    flag: str


_KEYS = {
    "store": _Key("store", values.store_url, "--store"),
    "stores": _Key("stores", values.stores, "--stores"),
    "criu": _Key("criu", values.path, "--criu"),
    "work_dir": _Key("work_dir", values.path, "--work-dir"),
    "criu_bundle": _Key("criu_bundle", values.path, "--criu-bundle"),
    "output": _Key("output", _output, "--output"),
    "dump_deadline": _Key("dump_deadline_s", values.duration_s, "--deadline"),
    "restore_deadline": _Key("restore_deadline_s", values.duration_s, "--deadline"),
    "ghost_limit": _Key("ghost_limit_bytes", values.size_bytes, "--ghost-limit"),
    "precopy": _Key("precopy", values.yes, "--precopy"),
    "precopy_cpu": _Key("precopy_cpu_percent", values.share, "--precopy-cpu"),
    "precopy_rate": _Key("precopy_rate_bytes", values.rate_bytes, "--precopy-rate"),
    "criu_log_level": _Key("criu_log_level", values.criu_log_level, "--criu-log-level"),
    "keep_last": _Key("keep_last", values.count, "--keep-last"),
    "keep_within": _Key("keep_within_s", values.duration_s, "--keep-within"),
    "use_cluster": _Key("use_cluster", values.yes, "kubectl ckpt"),
    "kubeconfig": _Key("kubeconfig", values.path, "--kubeconfig"),
    "context": _Key("context", values.word, "--context"),
    "namespace": _Key("namespace", values.word, "--namespace"),
    "agent_namespace": _Key("agent_namespace", values.word, "--agent-namespace"),
    "agent_selector": _Key("agent_selector", values.word, "--agent-selector"),
    "agent_address": _Key("agent_address", values.word, "--agent-address"),
    "agent_ca": _Key("agent_ca", values.path, "--agent-ca"),
    "agent_silence": _Key("agent_silence_s", values.duration_s, "--agent-silence"),
    "schedule_deadline": _Key("schedule_deadline_s", values.duration_s, "--schedule-deadline"),
    "image": _Key("image", values.word, "--image"),
    "leaf_lifetime": _Key("leaf_lifetime_s", values.duration_s, "--leaf-lifetime"),
    "leaf_renew_before": _Key("leaf_renew_before_s", values.duration_s, "--leaf-renew-before"),
    "ca_lifetime": _Key("ca_lifetime_s", values.duration_s, "--ca-lifetime"),
    "ca_renew_before": _Key("ca_renew_before_s", values.duration_s, "--ca-renew-before"),
    "trust_overlap": _Key("trust_overlap_s", values.duration_s, "--trust-overlap"),
    "node_name": _Key("node_name", values.word, "--node-name"),
    "runtime_socket": _Key("runtime_socket", values.path, "--runtime-socket"),
    "tls_dir": _Key("tls_dir", values.path, "--tls-dir"),
    "token_port": _Key("token_port", values.port, "--token-port"),
    "certificate_port": _Key("certificate_port", values.port, "--certificate-port"),
    "kubelet_address": _Key("kubelet_address", values.word, "--kubelet-address"),
    "kubelet_trust": _Key("kubelet_trust", values.word, "--kubelet-trust"),
    "kubelet_checkpoints": _Key("kubelet_checkpoints", values.path, "--kubelet-checkpoints"),
    "runc_conf": _Key("runc_conf", values.path, "--runc-conf"),
    "probe_port": _Key("probe_port", values.port, "--probe-port"),
    "work_kept_free": _Key("work_kept_free_percent", values.percent, "--work-kept-free"),
    "parallel": _Key("parallel", values.count, "--parallel"),
    "use_coordinator": _Key("use_coordinator", values.yes, "--coordinator"),
    "coordinator_selector": _Key("coordinator_selector", values.word, "--coordinator-selector"),
    "coordinator_address": _Key("coordinator_address", values.word, "--coordinator-address"),
    "coordinator_token_port": _Key(
        "coordinator_token_port", values.port, "--coordinator-token-port"
    ),
    "coordinator_certificate_port": _Key(
        "coordinator_certificate_port", values.port, "--coordinator-certificate-port"
    ),
    "coordinator_parallel": _Key("coordinator_parallel", values.count, "--parallel"),
    "operation_deadline": _Key("operation_deadline_s", values.duration_s, "--operation-deadline"),
    "caller_rate": _Key("caller_rate_per_s", values.rate_per_s, "--caller-rate"),
    "caller_burst": _Key("caller_burst", values.count, "--caller-burst"),
    "caller_streams": _Key("caller_streams", values.count, "--caller-streams"),
    "shutdown_grace": _Key("shutdown_grace_s", values.duration_s, "--shutdown-grace"),
}
KEYS = tuple(_KEYS)


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A configuration file as read: ``entries`` map each key to its value and line."""

    path: str
    entries: Mapping[str, tuple[object, int]]


def parse_file(path: str, text: str) -> ConfigFile:
    """Read the YAML ``text`` of the file ``path``: one mapping of known keys.

    Raises:
        errors.InvalidInput: not YAML, not a mapping, a key twice, or an unknown key.
    """
    import yaml  # a service without a file does without

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise errors.InvalidInput(
            f"{path}{line}: this is not YAML",
            hint="write one 'key: value' a line; see docs/cli.md",
            path=path,
        ) from exc
    if root is None:
        return ConfigFile(path, {})
    if not isinstance(root, yaml.MappingNode):
        raise errors.InvalidInput(
            f"{path} line 1: not a mapping of keys to values",
            hint="write one 'key: value' a line; see docs/cli.md",
            path=path,
        )
    entries: dict[str, tuple[object, int]] = {}
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key not in _KEYS:
            raise errors.InvalidInput(
                f"{path} line {line}: there is no key {key!r}", hint=_nearest(key), path=path
            )
        if key in entries:
            raise errors.InvalidInput(
                f"{path} line {line}: {key!r} was already set in line {entries[key][1]}",
                hint="remove one of the two",
                path=path,
            )
        entries[key] = (values[key], line)
    return ConfigFile(path, entries)


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), KEYS, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known keys are {', '.join(KEYS)}"


def merge(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    file: ConfigFile | None,
    *,
    cwd: str,
) -> Settings:
    """Return the settings that hold: for each key the flag's value, else the variable's, else the
    file's, else the default. ``flags`` are by key, None where not given. Relative paths are taken
    from ``cwd``, and in the file from its own directory.

    Raises:
        errors.InvalidInput: a value does not make sense; the message names where it came from.
    """
    chosen: dict[str, Any] = {}
    for key, known in _KEYS.items():
        variable = ENV_PREFIX + key.upper()
        if flags.get(key) is not None:
            value, base, origin = flags[key], cwd, known.flag
        elif environ.get(variable):
            value, base, origin = environ[variable], cwd, variable
        elif file and key in file.entries:
            value, line = file.entries[key]
            base, origin = posixpath.dirname(file.path), f"{file.path} line {line}, key {key!r}"
        else:
            continue
        try:
            chosen[known.field] = known.read(value, base)
        except errors.InvalidInput as exc:
            raise errors.InvalidInput(
                f"{origin}: {exc.message}", hint=exc.hint, key=key, origin=origin
            ) from exc
    return Settings(**chosen)


def default_paths() -> tuple[str, str]:
    """Where a configuration file is looked for: the user's, then the machine's."""
    return (
        posixpath.join(platformdirs.user_config_dir("ckpt-agent"), FILE_NAME),
        posixpath.join(platformdirs.site_config_dir("ckpt-agent"), FILE_NAME),
    )


def read_file(path: str | None) -> ConfigFile | None:
    """Read the configuration file ``path``, or the first default one that exists if None.

    Raises:
        errors.NotFound: a named file is not there.
        errors.InvalidInput: it cannot be read or does not make sense.
    """
    for candidate in (path,) if path else default_paths():
        try:
            with open(candidate, encoding="utf-8") as stream:
                text = stream.read()
        except FileNotFoundError as exc:
            if path:
                raise errors.NotFound(
                    f"there is no configuration file {path}",
                    hint="correct --config or CKPT_AGENT_CONFIG",
                    path=path,
                ) from exc
        except (OSError, UnicodeDecodeError) as exc:
            raise errors.InvalidInput(
                f"cannot read the configuration file {candidate}: {exc}",
                hint="make it a readable UTF-8 text file",
                path=candidate,
            ) from exc
        else:
            return parse_file(os.path.abspath(candidate), text)
    return None


def load(flags: Mapping[str, object], config: str | None, environ: Mapping[str, str]) -> Settings:
    """Merge ``flags``, ``environ`` and the file (``config``, else ``CKPT_AGENT_CONFIG``, else a
    default one). Raises as ``merge`` and ``read_file``.
    """
    file = read_file(config or environ.get(ENV_PREFIX + "CONFIG") or None)
    return merge(flags, environ, file, cwd=os.getcwd())
