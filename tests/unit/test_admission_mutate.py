"""The webhook's patch: what a labelled pod gets, what it keeps, and what is left as it is."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.admission import mutate
from agent.model import optin
from agent.model.intent import Intent
from tests import jsonpatch

IMAGE = "registry.example/ckpt-agent:1"
SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
HELD = ["/.ckpt-agent/hold", "auto"]


def pod(*containers: dict[str, Any], annotations: dict[str, str] | None = None, **spec: Any) -> Any:
    metadata: dict[str, Any] = {"name": "job", "labels": {optin.LABEL: optin.ENABLED, "app": "x"}}
    if annotations is not None:
        metadata["annotations"] = annotations
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": list(containers) or [container("main")], **spec},
    }


def container(name: str, command: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "image": "job:1", "command": command or ["/bin/work"], **more}


def patched(before: Any, intent: Intent | None = None) -> Any:
    """The pod as the API server stores it; asserts that a second call changes nothing more."""
    after = jsonpatch.apply(before, mutate.mutate(before, image=IMAGE, intent=intent).patch)
    assert mutate.mutate(after, image=IMAGE, intent=intent).patch == []
    return after


def warnings(before: Any) -> str:
    return "\n".join(mutate.mutate(before, image=IMAGE).warnings)


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def test_a_pod_without_the_label_is_left_as_it_is() -> None:
    plain = pod()
    for labels in ({}, {optin.LABEL: "disabled"}, {optin.LABEL: ""}, None):
        plain["metadata"]["labels"] = labels
        assert mutate.mutate(plain, image=IMAGE) == mutate.Mutation([])


def test_a_labelled_pod_gets_volume_installer_mount_environment_and_command() -> None:
    after = patched(pod(container("main", ["python3", "train.py"], args=["--lr", "$(LR)"])))
    spec = after["spec"]
    assert spec["volumes"] == [{"name": "ckpt-agent", "emptyDir": {}}]
    (installer,) = spec["initContainers"]
    assert installer["image"] == IMAGE
    assert installer["command"] == ["/usr/local/lib/ckpt-agent/hold", "install", "/.ckpt-agent"]
    (main,) = spec["containers"]
    assert main["command"] == [*HELD, "python3", "train.py"]
    assert main["args"] == ["--lr", "$(LR)"]
    assert main["volumeMounts"] == [{"name": "ckpt-agent", "mountPath": "/.ckpt-agent"}]
    restore, name = main["env"]
    assert restore["name"] == "CKPT_AGENT_RESTORE"
    assert restore["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['ckpt-agent.dev/restore']"
    )
    assert name == {"name": "CKPT_AGENT_CONTAINER", "value": "main"}
    assert after["metadata"]["annotations"] == {SAFE_TO_EVICT: "ckpt-agent"}


def test_the_volume_keeps_no_node_from_being_scaled_down() -> None:
    for said, then in (("cache", "cache,ckpt-agent"), ("", "ckpt-agent"), ("ckpt-agent", None)):
        after = patched(pod(annotations={SAFE_TO_EVICT: said}))
        assert after["metadata"]["annotations"] == {SAFE_TO_EVICT: then or said}


def test_the_installer_satisfies_the_restricted_pod_security_level() -> None:
    (installer,) = patched(pod())["spec"]["initContainers"]
    context = installer["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def quality_of_service(spec: dict[str, Any]) -> str:
    """Kubernetes' rule, over all containers and init containers."""
    parts = [c.get("resources", {}) for c in [*spec["containers"], *spec.get("initContainers", [])]]
    asks = [
        {k: v for k, v in part.get(kind, {}).items() if k in ("cpu", "memory")}
        for part in parts
        for kind in ("requests", "limits")
    ]
    if not any(asks):
        return "BestEffort"
    limited = all({"cpu", "memory"} <= part.get("limits", {}).keys() for part in parts)
    equal = all(part.get("requests", part.get("limits")) == part.get("limits") for part in parts)
    return "Guaranteed" if limited and equal else "Burstable"


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, "BestEffort"),
        ({"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}}, "BestEffort"),
        ({"requests": {"cpu": "1"}}, "Burstable"),
        ({"limits": {"cpu": "1", "memory": "1Gi"}}, "Guaranteed"),
    ],
)
def test_the_quality_of_service_class_stays(resources: dict[str, Any], expected: str) -> None:
    before = pod(container("main", resources=resources))
    assert quality_of_service(before["spec"]) == expected
    assert quality_of_service(patched(before)["spec"]) == expected


def test_what_the_pod_has_is_kept_in_its_order() -> None:
    before = pod(
        container(
            "main",
            env=[{"name": "A", "value": "1"}],
            volumeMounts=[{"name": "data", "mountPath": "/data"}],
        ),
        volumes=[{"name": "data", "emptyDir": {}}],
        initContainers=[{"name": "prepare", "image": "i"}],
    )
    spec = patched(before)["spec"]
    assert names(spec["volumes"]) == ["data", "ckpt-agent"]
    assert names(spec["initContainers"]) == ["ckpt-agent-hold", "prepare"]
    assert names(spec["containers"][0]["env"])[0] == "A"
    assert names(spec["containers"][0]["volumeMounts"]) == ["data", "ckpt-agent"]
    assert spec["initContainers"][1] == before["spec"]["initContainers"][0]


def test_only_the_containers_of_the_annotation_are_held() -> None:
    before = pod(container("a"), container("b"), annotations={optin.CONTAINERS: " b ,"})
    first, second = patched(before)["spec"]["containers"]
    assert first == before["spec"]["containers"][0]
    assert second["command"] == [*HELD, "/bin/work"]


def test_a_sidecar_is_held_when_named_and_what_it_needs_is_installed_before_it() -> None:
    sidecar = container("log", restartPolicy="Always")
    before = pod(
        initContainers=[container("prepare"), sidecar],
        annotations={optin.CONTAINERS: "main,log,prepare"},
    )
    spec = patched(before)["spec"]
    assert names(spec["initContainers"]) == ["ckpt-agent-hold", "prepare", "log"]
    assert spec["initContainers"][1] == before["spec"]["initContainers"][0]
    assert spec["initContainers"][2]["command"] == [*HELD, "/bin/work"]
    assert (
        "prepare: the pod has no such container or sidecar"
        in (
            jsonpatch.apply(before, mutate.mutate(before, image=IMAGE).patch)["metadata"][
                "annotations"
            ][optin.NOT_HELD]
        )
    )


def test_a_sidecar_that_the_pods_start_waits_for_is_not_held() -> None:
    """A placeholder could not pass its probe, and the containers that wait for it would never
    start to wait for their restore.
    """
    sidecar = container("log", restartPolicy="Always", startupProbe={"exec": {"command": ["x"]}})
    before = pod(initContainers=[sidecar], annotations={optin.CONTAINERS: "main,log"})
    after = patched(before)["spec"]
    assert after["initContainers"][1] == sidecar
    assert after["containers"][0]["command"][:2] == HELD
    assert "startupProbe" in warnings(before)


def test_a_sidecar_that_another_webhook_puts_first_moves_behind_the_installer() -> None:
    after = patched(
        pod(initContainers=[container("prepare")], annotations={optin.CONTAINERS: "main,proxy"})
    )
    proxy = container("proxy", restartPolicy="Always")
    after["spec"]["initContainers"].insert(0, proxy)
    spec = patched(after)["spec"]
    assert names(spec["initContainers"]) == ["ckpt-agent-hold", "proxy", "prepare"]
    assert spec["initContainers"][1]["command"] == [*HELD, "/bin/work"]


def test_a_container_that_another_webhook_adds_later_is_held_at_the_next_call() -> None:
    after = patched(pod())
    after["spec"]["containers"].insert(0, container("barrier"))
    again = patched(after)["spec"]["containers"]
    assert [c["command"] for c in again] == [[*HELD, "/bin/work"]] * 2
    assert names(again[0]["env"]) == names(again[1]["env"])


def test_a_container_without_command_starts_as_usual_and_the_pod_says_so() -> None:
    proxy = {"name": "proxy", "image": "proxy:1", "args": ["serve"]}
    before = pod(container("main"), proxy)
    after = patched(before)
    assert after["spec"]["containers"][1] == proxy
    assert after["spec"]["containers"][0]["command"][:2] == HELD
    assert "proxy" in warnings(before)
    assert optin.ENTRYPOINT in warnings(before)
    assert "proxy" in after["metadata"]["annotations"][optin.NOT_HELD]


def test_a_pod_whose_only_container_has_no_command_is_changed_by_nothing_but_the_note() -> None:
    before = pod({"name": "main", "image": "i", "command": []})
    after = patched(before)
    assert after["spec"] == before["spec"]


def test_the_annotation_can_say_what_an_image_runs() -> None:
    words = {"main": ["/usr/bin/tini", "--", "$(HOME)"]}
    before = pod(
        {"name": "main", "image": "i", "args": ["x"]},
        annotations={optin.ENTRYPOINT: json.dumps(words)},
    )
    (main,) = patched(before)["spec"]["containers"]
    # The kubelet makes $(HOME) of $$(HOME), which an image's entrypoint means literally.
    assert main["command"] == [*HELD, "/usr/bin/tini", "--", "$$(HOME)"]
    assert main["args"] == ["x"]


def test_hooks_do_nothing_in_a_placeholder() -> None:
    hooks = {
        "postStart": {"exec": {"command": ["sh", "-c", "register"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "sleep 15"]}},
    }
    (main,) = patched(pod(container("main", lifecycle=hooks)))["spec"]["containers"]
    held = ["/.ckpt-agent/hold", "hook", "sh", "-c"]
    assert main["lifecycle"] == {
        "postStart": {"exec": {"command": [*held, "register"]}},
        "preStop": {"exec": {"command": [*held, "sleep 15"]}},
    }
    others = {"postStart": {"sleep": {"seconds": 1}}, "preStop": {"httpGet": {"port": 80}}}
    (main,) = patched(pod(container("main", lifecycle=others)))["spec"]["containers"]
    assert main["lifecycle"] == others


def test_a_liveness_probe_begins_when_a_workload_runs() -> None:
    liveness = {"httpGet": {"port": 80}}
    (main,) = patched(pod(container("main", livenessProbe=liveness)))["spec"]["containers"]
    assert main["startupProbe"]["exec"] == {"command": ["/.ckpt-agent/hold", "running"]}
    assert main["livenessProbe"] == liveness
    own = {"httpGet": {"port": 81}}
    both = container("main", livenessProbe=liveness, startupProbe=own)
    (main,) = patched(pod(both))["spec"]["containers"]
    assert main["startupProbe"] == own
    sidecar = container("main", livenessProbe=liveness, restartPolicy="Always")
    chosen = {optin.CONTAINERS: "main"}
    before = pod(container("other"), initContainers=[sidecar], annotations=chosen)
    assert "startupProbe" not in patched(before)["spec"]["initContainers"][1]


def test_the_note_goes_when_its_reason_goes() -> None:
    before = pod(annotations={optin.NOT_HELD: "main: old", "keep": "1"})
    assert patched(before)["metadata"]["annotations"] == {"keep": "1", SAFE_TO_EVICT: "ckpt-agent"}


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"hostPID": True}, "hostPID"),
        ({"shareProcessNamespace": True}, "shareProcessNamespace"),
        ({"hostNetwork": True}, "hostNetwork"),
        ({"hostIPC": True}, "hostIPC"),
        ({"hostUsers": False}, "hostUsers"),
        ({"os": {"name": "windows"}}, "Windows"),
        ({"nodeSelector": {"kubernetes.io/os": "windows"}}, "Windows"),
        ({"volumes": [{"name": "ckpt-agent", "secret": {"secretName": "x"}}]}, "no emptyDir"),
    ],
)
def test_a_pod_that_cannot_be_held_is_left_with_a_warning(spec: dict[str, Any], word: str) -> None:
    before = pod(**spec)
    after = patched(before)
    assert after["spec"] == before["spec"]
    assert word in warnings(before)
    assert word in after["metadata"]["annotations"][optin.NOT_HELD]


def test_every_reason_is_told_at_once() -> None:
    text = warnings(pod(hostPID=True, hostNetwork=True, annotations={}))
    assert "hostPID" in text
    assert "hostNetwork" in text


def test_a_static_pod_is_left() -> None:
    before = pod(annotations={"kubernetes.io/config.mirror": "x"})
    assert patched(before) == before
    assert "static pod" in warnings(before)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"tty": True}, "terminal"),
        ({"command": ["/usr/lib/systemd/systemd"]}, "init system"),
        ({"command": ["/sbin/init"]}, "init system"),
        ({"stdin": True}, "standard input"),
        ({"volumeMounts": [{"name": "data", "mountPath": "/.ckpt-agent/"}]}, "mounted"),
        (
            {
                "volumeMounts": [
                    {"name": "ckpt-agent", "mountPath": "/.ckpt-agent", "readOnly": True}
                ]
            },
            "mounted",
        ),
        ({"lifecycle": {"postStart": {"httpGet": {"port": 80}}}}, "postStart"),
        ({"lifecycle": {"postStart": {"tcpSocket": {"port": 80}}}}, "postStart"),
        ({"env": [{"name": "CKPT_AGENT_RESTORE", "value": ""}]}, "CKPT_AGENT_RESTORE"),
        ({"env": [{"name": "CKPT_AGENT_CONTAINER", "value": "b"}]}, "CKPT_AGENT_CONTAINER"),
    ],
)
def test_a_container_that_cannot_be_held_is_left_with_a_warning(
    more: dict[str, Any], word: str
) -> None:
    before = pod(container("main") | more, container("other"))
    after = patched(before)["spec"]["containers"]
    assert after[0] == before["spec"]["containers"][0]
    assert after[1]["command"][:2] == HELD
    assert word in warnings(before)


def test_an_unknown_name_in_the_annotation_is_warned_of() -> None:
    assert "gone" in warnings(pod(annotations={optin.CONTAINERS: "main,gone"}))


@pytest.mark.parametrize(
    "annotations",
    [
        {optin.CONTAINERS: ","},
        {optin.CONTAINERS: "Main"},
        {optin.CONTAINERS: "a b"},
        {optin.ENTRYPOINT: "/bin/sh"},
        {optin.ENTRYPOINT: '{"main": "/bin/sh"}'},
        {optin.ENTRYPOINT: '{"main": []}'},
        {optin.ENTRYPOINT: "[" * 100000},
    ],
)
def test_an_annotation_that_makes_no_sense_is_named(annotations: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidInput, match=next(iter(annotations))):
        mutate.mutate(pod(annotations=annotations), image=IMAGE)


@pytest.mark.parametrize(
    "broken",
    [
        {"metadata": []},
        {"metadata": {"labels": {optin.LABEL: optin.ENABLED}}, "spec": {"containers": {}}},
        {"metadata": {"labels": {optin.LABEL: optin.ENABLED}}, "spec": {"containers": [1]}},
        {"metadata": {"labels": {optin.LABEL: optin.ENABLED}}, "spec": []},
    ],
)
def test_what_is_no_pod_is_refused_as_such(broken: Any) -> None:
    with pytest.raises(errors.InvalidInput):
        mutate.mutate(broken, image=IMAGE)


# Any pod: the fields that the webhook reads, present or not, in every combination.
_name = st.sampled_from(["main", "proxy", "log", "ckpt-agent-hold"])
_env = st.lists(
    st.sampled_from(
        [
            {"name": "A", "value": "1"},
            {"name": "CKPT_AGENT_CONTAINER", "value": "main"},
            {"name": "CKPT_AGENT_RESTORE", "value": "x"},
        ]
    ),
    max_size=2,
)
_mounts = st.lists(
    st.sampled_from(
        [
            {"name": "data", "mountPath": "/data"},
            {"name": "ckpt-agent", "mountPath": "/.ckpt-agent"},
            {"name": "data", "mountPath": "/.ckpt-agent"},
        ]
    ),
    max_size=2,
)
_words = st.lists(st.text(max_size=5), max_size=3)
_hook: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda words: {"exec": {"command": words}}, _words
) | st.just({"httpGet": {}})


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={key: value | st.none() for key, value in fields.items()}
    )


def _joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


_container = st.builds(
    _joined,
    st.fixed_dictionaries({"name": _name, "image": st.just("i")}),
    _maybe(
        command=_words,
        args=_words,
        env=_env,
        volumeMounts=_mounts,
        tty=st.booleans(),
        livenessProbe=st.just({"httpGet": {"port": 80}}),
        startupProbe=st.just({"httpGet": {"port": 81}}),
        lifecycle=_maybe(postStart=_hook, preStop=_hook),
        restartPolicy=st.just("Always"),
        resources=st.just({"requests": {"cpu": "1"}}),
    ),
)
_containers = st.lists(_container, max_size=3, unique_by=lambda c: c["name"])
_pods = st.builds(
    lambda metadata, spec: {"metadata": metadata, "spec": spec},
    st.builds(
        _joined,
        st.just({"labels": {optin.LABEL: optin.ENABLED}}),
        _maybe(
            annotations=st.dictionaries(
                st.sampled_from([optin.CONTAINERS, "other/x", optin.NOT_HELD, SAFE_TO_EVICT]),
                st.sampled_from(["main", "main,log", "proxy"]),
            )
        ),
    ),
    _maybe(
        containers=_containers,
        initContainers=_containers,
        volumes=st.lists(
            st.sampled_from(
                [{"name": "data", "emptyDir": {}}, {"name": "ckpt-agent", "emptyDir": {}}]
            ),
            max_size=2,
            unique_by=lambda v: v["name"],
        ),
        hostPID=st.booleans(),
    ),
)


def _kept(before: Any, after: Any, path: str = "") -> None:
    """Assert that everything of ``before`` is in ``after``, lists in the same order."""
    if before is None or before in ([], {}):
        return
    if isinstance(before, dict):
        for key, value in before.items():
            if path.endswith("/annotations") and key in (optin.NOT_HELD, SAFE_TO_EVICT):
                continue
            _kept(value, after[key], f"{path}/{key}")
    elif isinstance(before, list):
        if path.endswith("/initContainers"):  # the installer may have moved
            before, after = (
                [c for c in side if c["name"] != optin.INIT_CONTAINER] for side in (before, after)
            )
        if before and isinstance(before[0], dict) and "name" in before[0]:
            old = [entry for entry in after if _names_one_of(entry, before)]
            assert len(old) == len(before)
            for left, right in zip(before, old, strict=True):
                _kept(left, right, f"{path}/*")
        else:
            assert after[len(after) - len(before) :] == before
            assert len(after) - len(before) in (0, len(HELD))
    else:
        assert before == after


def _names_one_of(entry: Any, entries: list[Any]) -> bool:
    keys = ("name", "mountPath")
    return any(all(entry.get(k) == other.get(k) for k in keys) for other in entries)


@given(_pods)
def test_any_pod_keeps_all_it_had_and_a_second_call_changes_nothing(before: Any) -> None:
    untouched = copy.deepcopy(before)
    mutation = mutate.mutate(before, image=IMAGE)
    assert before == untouched
    after = jsonpatch.apply(before, json.loads(json.dumps(mutation.patch)))
    _kept(before, after)
    again = mutate.mutate(after, image=IMAGE)
    assert again.patch == []
    assert again.warnings == mutation.warnings


@given(_pods)
def test_any_held_container_finds_what_it_needs(before: Any) -> None:
    spec = jsonpatch.apply(before, mutate.mutate(before, image=IMAGE).patch)["spec"]
    init = spec.get("initContainers") or []
    everything = [*init, *(spec.get("containers") or [])]
    for position, part in enumerate(everything):
        if (part.get("command") or [])[:2] != HELD:
            continue
        assert optin.VOLUME in names(spec["volumes"])
        assert optin.INIT_CONTAINER in names(init[:position])
        assert {"name": "ckpt-agent", "mountPath": "/.ckpt-agent"} in part["volumeMounts"]
        assert {"CKPT_AGENT_RESTORE", "CKPT_AGENT_CONTAINER"} <= set(names(part["env"]))


# JobSets that shall come back.


def rank(completion: int, **spec: Any) -> Any:
    """A pod as the Job controller makes it for a JobSet."""
    found = pod(**spec)
    found["metadata"]["labels"] |= {
        "jobset.sigs.k8s.io/jobset-name": "train",
        "jobset.sigs.k8s.io/replicatedjob-name": "worker",
        "jobset.sigs.k8s.io/job-index": "0",
    }
    found["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": str(completion)}
    return found


IN_IMAGE = "jobset.train@20260131-235959-0a1b2c"


def test_a_pod_of_a_jobset_that_shall_come_back_waits_on_its_own_node() -> None:
    intent = Intent(IN_IMAGE, nodes={"worker-0-0": "n2", "worker-0-1": "n1"})
    for completion, node in ((0, "n2"), (1, "n1")):
        after = patched(rank(completion), intent)
        assert after["metadata"]["annotations"][optin.RESTORE] == IN_IMAGE
        required = after["spec"]["affinity"]["nodeAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        pin = {"key": "metadata.name", "operator": "In", "values": [node]}
        assert required == {"nodeSelectorTerms": [{"matchFields": [pin]}]}


def test_a_pod_without_a_node_of_its_own_goes_where_the_scheduler_likes() -> None:
    after = patched(rank(2), Intent(IN_IMAGE, nodes={"worker-0-0": "n2"}))
    assert after["metadata"]["annotations"][optin.RESTORE] == IN_IMAGE
    assert "affinity" not in after["spec"]


def test_a_pod_of_which_nothing_can_be_held_is_not_said_to_wait() -> None:
    after = patched(rank(0, hostPID=True), Intent(IN_IMAGE))
    assert optin.RESTORE not in after["metadata"]["annotations"]


def test_what_a_pod_requires_of_its_node_stays_beside_the_node() -> None:
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    spread: dict[str, Any] = {"preferredDuringSchedulingIgnoredDuringExecution": []}
    affinity = {
        "podAntiAffinity": spread,
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [zone]},
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n9"]}]},
                ]
            }
        },
    }
    after = patched(rank(0, affinity=affinity), Intent(IN_IMAGE, nodes={"worker-0-0": "n2"}))
    pin = {"key": "metadata.name", "operator": "In", "values": ["n2"]}
    found = after["spec"]["affinity"]
    assert found["podAntiAffinity"] == spread
    assert found["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == {
        "nodeSelectorTerms": [
            {"matchExpressions": [zone], "matchFields": [pin]},
            {"matchFields": [pin]},
        ]
    }
