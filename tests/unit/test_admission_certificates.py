"""Certificates of the project: when they are due, what they are good for, how they are kept."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import socket
import ssl
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import errors
from agent.admission import certificates, keeper, rotation, server
from agent.admission.certificates import Pair
from agent.admission.rotation import Due, Inventory, Issued, Policy
from agent.kube import leases, secrets
from tests.fakes.objects import Objects

DAY_S = 86400.0
NOW_S = 1.8e9
POLICY = Policy(30 * DAY_S, 10 * DAY_S, 365 * DAY_S, 90 * DAY_S, 3600.0)
NAMES = keeper.names("ckpt-agent")


# When.


def authority(identity: str = "a", made_s: float = NOW_S, life_s: float = 365 * DAY_S) -> Issued:
    return Issued(identity, made_s, made_s + life_s, identity)


def leaf(signer: str = "a", made_s: float = NOW_S, life_s: float = 30 * DAY_S) -> Issued:
    return Issued(f"leaf-{made_s}", made_s, made_s + life_s, signer)


def test_with_nothing_there_an_authority_and_a_certificate_are_made() -> None:
    assert rotation.due(Inventory(), NOW_S, POLICY) == Due(replace=True, leaf=True)


def test_nothing_is_due_when_all_is_fresh() -> None:
    assert rotation.due(Inventory(authority(), leaf=leaf()), NOW_S + DAY_S, POLICY) == Due()


def test_a_certificate_is_replaced_before_its_end() -> None:
    have = Inventory(authority(), leaf=leaf())
    assert not rotation.due(have, NOW_S + 20 * DAY_S - 1, POLICY).leaf
    assert rotation.due(have, NOW_S + 20 * DAY_S, POLICY).leaf


def test_a_successor_is_published_before_it_signs() -> None:
    have = Inventory(authority(), leaf=leaf(made_s=NOW_S + 274 * DAY_S))
    at_s = NOW_S + 275 * DAY_S
    assert rotation.due(have, at_s, POLICY) == Due(prepare=True)
    have = dataclasses.replace(have, coming=authority("b", at_s))
    assert rotation.due(have, at_s + 3599, POLICY) == Due()
    assert rotation.due(have, at_s + 3600, POLICY) == Due(promote=True, leaf=True)


def test_an_old_authority_is_trusted_until_its_last_certificate_is_gone_everywhere() -> None:
    have = Inventory(authority("b"), retired=(authority("a", NOW_S - DAY_S),), leaf=leaf("b"))
    assert rotation.due(have, NOW_S + 3599, POLICY) == Due()
    assert rotation.due(have, NOW_S + 3600, POLICY) == Due(forget=frozenset({"a"}))


def test_a_certificate_of_an_authority_that_does_not_sign_is_replaced() -> None:
    assert rotation.due(Inventory(authority("b"), leaf=leaf("a")), NOW_S, POLICY) == Due(leaf=True)


def test_after_a_long_absence_the_successor_signs_at_once() -> None:
    ended = authority("a", NOW_S - 400 * DAY_S)
    have = Inventory(ended, coming=authority("b", NOW_S - 50 * DAY_S), leaf=leaf("a"))
    assert rotation.due(have, NOW_S, POLICY) == Due(promote=True, leaf=True)


def test_a_certificate_that_ends_with_its_authority_is_not_made_again_and_again() -> None:
    ending = authority(made_s=NOW_S - 364 * DAY_S)
    last = Issued("leaf", NOW_S - DAY_S, ending.not_after_s, "a")
    have = Inventory(ending, coming=authority("b", NOW_S), leaf=last)
    assert rotation.due(have, NOW_S, POLICY) == Due()


@pytest.mark.parametrize(
    "times",
    [
        (30, 30, 365, 90, 1),
        (30, 10, 90, 90, 1),
        (30, 10, 365, 90, 5),
        (30, 10, 365, 5, 2.5),
    ],
)
def test_lifetimes_that_leave_no_time_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(errors.InvalidInput, match="leave no time"):
        Policy(*times)


_numbers = itertools.count()


def _done(have: Inventory, due: Due, now_s: float, policy: Policy) -> Inventory:
    """What a keeper makes of it, in numbers only."""

    def fresh() -> Issued:
        return authority(f"ca-{next(_numbers)}", now_s, policy.authority_lifetime_s)

    current, coming, retired, served = have.current, have.coming, have.retired, have.leaf
    if (due.replace or due.promote) and current:
        retired = (current, *retired)
    if due.promote:
        current, coming = coming, None
    if due.replace:
        current, coming = fresh(), None
    if due.prepare:
        coming = fresh()
    retired = tuple(
        old for old in retired if old.identity not in due.forget and now_s < old.not_after_s
    )
    if due.leaf:
        assert current is not None
        life_s = min(policy.leaf_lifetime_s, current.not_after_s - now_s)
        served = leaf(current.identity, now_s, life_s)
    return Inventory(current, coming, retired, served)


@st.composite
def _policies(draw: Any) -> Policy:
    overlap_s = draw(st.floats(10, 1e4))
    renew_s = overlap_s * draw(st.floats(2.5, 6))
    leaf_s = renew_s * draw(st.floats(1.2, 5))
    ca_renew_s = overlap_s * draw(st.floats(2.5, 6))
    ca_s = ca_renew_s * draw(st.floats(1.2, 4))
    return Policy(leaf_s, renew_s, ca_s, ca_renew_s, overlap_s)


def _trusted(have: Inventory) -> list[Issued]:
    return [each for each in (have.current, have.coming, *have.retired) if each]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    _policies(),
    st.lists(st.floats(0.01, 0.2), min_size=20, max_size=120),
    st.floats(1, 2),
    st.integers(5, 200),
)
def test_copies_as_old_as_the_overlap_understand_each_other_at_every_moment(
    policy: Policy, steps: list[float], faster: float, lost_at: int
) -> None:
    """A client with old authorities and a server with an old certificate, at any two moments no
    further apart than the overlap; also when the key of the authority is lost at some time.
    """
    have, now_s = Inventory(), NOW_S
    seen: list[tuple[float, frozenset[str], Issued]] = []
    for number, step in enumerate(steps):
        if number == lost_at and have.current:
            # What clients trust tells of it, not of its key.
            have = dataclasses.replace(have, current=None, coming=None, retired=(*_trusted(have),))
        due = rotation.due(have, now_s, policy)
        have = _done(have, due, now_s, policy)
        again = rotation.due(have, now_s, policy)
        assert again == Due(), "doing what is due leaves nothing due"
        assert have.leaf is not None
        seen.append((now_s, frozenset(each.identity for each in _trusted(have)), have.leaf))
        for then_s, authorities, served in seen:
            if now_s - then_s <= policy.overlap_s:
                assert served.signer in seen[-1][1]
                assert have.leaf.signer in authorities
                assert served.usable(now_s)
        seen = [entry for entry in seen if now_s - entry[0] <= policy.overlap_s]
        # A keeper that looks often enough against the spare time that the policy gives it.
        spare_s = min(
            policy.overlap_s,
            policy.leaf_renew_before_s - 2 * policy.overlap_s,
            policy.authority_renew_before_s - 2 * policy.overlap_s,
        )
        now_s += spare_s * step * faster


@given(_policies(), st.lists(st.floats(0.001, 3), min_size=1, max_size=30))
def test_whatever_was_missed_the_next_look_brings_a_usable_state(
    policy: Policy, steps: list[float]
) -> None:
    have, now_s = Inventory(), NOW_S
    for step in steps:
        have = _done(have, rotation.due(have, now_s, policy), now_s, policy)
        assert have.current is not None
        assert have.leaf is not None
        assert have.current.usable(now_s)
        assert have.leaf.usable(now_s)
        assert have.leaf.signer == have.current.identity
        assert len(have.retired) <= len(steps)
        assert rotation.due(have, now_s, policy) == Due()
        now_s += policy.authority_lifetime_s * step


# What they are good for.


def handshake(pair: Pair, bundle: bytes, name: str) -> None:
    """Shake hands in memory with OpenSSL on both sides, as of now."""
    client = ssl.create_default_context(cadata=bundle.decode())
    ends = socket.socketpair()
    with ends[0], ends[1]:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [
            client.wrap_bio(to_client, to_server, server_hostname=name),
            server.tls_context(pair).wrap_bio(to_server, to_client, server_side=True),
        ]
        for _ in range(10):
            waiting = 0
            for side in sides:
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    waiting += 1
            if not waiting:
                return
    raise AssertionError("the handshake did not end")


def real_now_s() -> float:
    import time

    return time.time()


@pytest.fixture(scope="module")
def ca() -> Pair:
    return certificates.new_authority(real_now_s(), DAY_S)


@pytest.mark.parametrize("name", NAMES)
def test_a_server_is_believed_under_each_of_its_names(ca: Pair, name: str) -> None:
    handshake(certificates.new_leaf(ca, NAMES, real_now_s(), DAY_S), ca.certificate, name)


def test_a_server_is_not_believed_under_another_name_or_authority(ca: Pair) -> None:
    made = certificates.new_leaf(ca, NAMES, real_now_s(), DAY_S)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, ca.certificate, "other.ckpt-agent.svc")
    other = certificates.new_authority(real_now_s(), DAY_S)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, other.certificate, "localhost")
    handshake(made, certificates.bundle((other, ca)), "localhost")


def test_a_servers_certificate_neither_signs_others_nor_shows_a_client(ca: Pair) -> None:
    made = certificates.new_leaf(ca, NAMES, real_now_s(), DAY_S)
    found = x509.load_pem_x509_certificate(made.certificate)
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [usage._name for usage in usages] == ["serverAuth"]
    forged = certificates.new_leaf(made, NAMES, real_now_s(), DAY_S)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(
            Pair(forged.certificate + made.certificate, forged.key), ca.certificate, "localhost"
        )


def test_no_certificate_outlives_its_authority() -> None:
    ca = certificates.new_authority(NOW_S, 100.0)
    assert certificates.new_leaf(ca, NAMES, NOW_S, 200.0).issued.not_after_s == NOW_S + 100


def test_what_is_written_reads_back_the_same() -> None:
    ca = certificates.new_authority(NOW_S, DAY_S)
    assert certificates.read_authority(ca.certificate, ca.key) == ca
    made = certificates.new_leaf(ca, NAMES, NOW_S, DAY_S)
    assert certificates.read_leaf(made.certificate, made.key, NAMES, [ca]) == made
    assert made.issued.signer == ca.issued.identity
    assert made.issued.made_s == NOW_S
    assert certificates.read_bundle(certificates.bundle((ca, made))) == (
        Pair(ca.certificate),
        Pair(made.certificate),
    )


def test_no_key_is_shown(ca: Pair) -> None:
    assert "PRIVATE" not in repr(ca)


def _rsa_key() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def test_texts_that_do_not_fit_together_are_none() -> None:
    ca = certificates.new_authority(NOW_S, DAY_S)
    made = certificates.new_leaf(ca, NAMES, NOW_S, DAY_S)
    other = certificates.new_authority(NOW_S, DAY_S)
    half = ca.certificate[: len(ca.certificate) // 2]
    for certificate, key in (
        (b"", b""),
        (half, ca.key),
        (ca.certificate, b"nonsense"),
        (ca.certificate, other.key),
        (ca.certificate, _rsa_key()),
        (made.certificate, made.key),
    ):
        assert certificates.read_authority(certificate, key) is None
    for certificate, key, names, authorities in (
        (b"", b"", NAMES, [ca]),
        (made.certificate, other.key, NAMES, [ca]),
        (made.certificate, made.key, ("other",), [ca]),
        (made.certificate, made.key, NAMES, [other]),
        (made.certificate, made.key, NAMES, []),
        (ca.certificate, ca.key, NAMES, [ca]),
    ):
        assert certificates.read_leaf(certificate, key, names, authorities) is None
    assert certificates.read_bundle(b"\xff") == certificates.read_bundle(half) == ()


# How they are kept.

SECRET = "/api/v1/namespaces/ckpt-agent/secrets/"
MAP = "/api/v1/namespaces/ckpt-agent/configmaps/ckpt-agent-ca"
WEBHOOK = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/ckpt-agent"


@pytest.fixture
def cluster() -> Objects:
    made = Objects()
    webhooks = [{"name": "pods.ckpt-agent.dev", "clientConfig": {"service": {"name": "x"}}}]
    made.put(WEBHOOK, {"metadata": {"name": "ckpt-agent"}, "webhooks": webhooks})
    return made


def make_keeper(cluster: Objects, policy: Policy = POLICY) -> keeper.Keeper:
    return keeper.Keeper(cluster, "ckpt-agent", policy)


def secret(cluster: Objects, name: str, key: str) -> bytes:
    return base64.b64decode(cluster.found[SECRET + name]["data"][key])


def trusted(cluster: Objects) -> bytes:
    """What clients trust; asserts that it is the same wherever they look."""
    bundle = str(cluster.found[MAP]["data"]["ca.crt"]).encode()
    (webhook,) = cluster.found[WEBHOOK]["webhooks"]
    assert base64.b64decode(webhook["clientConfig"]["caBundle"]) == bundle
    assert secret(cluster, "ckpt-agent-tls", "ca.crt") == bundle
    return bundle


def served(cluster: Objects) -> Pair:
    found = make_keeper(cluster).served()
    assert found is not None
    return found


def test_a_keeper_brings_an_empty_cluster_certificates_that_work(cluster: Objects) -> None:
    make_keeper(cluster).keep(real_now_s())
    handshake(served(cluster), trusted(cluster), "ckpt-agent-admission.ckpt-agent.svc")
    (webhook,) = cluster.found[WEBHOOK]["webhooks"]
    assert webhook["clientConfig"]["service"] == {"name": "x"}


def test_a_keeper_with_nothing_to_do_writes_nothing(cluster: Objects) -> None:
    make_keeper(cluster).keep(NOW_S)
    del cluster.writes[:]
    assert make_keeper(cluster).keep(NOW_S + 60) == Due()
    assert cluster.writes == []


def test_what_was_removed_or_changed_by_hand_is_mended(cluster: Objects) -> None:
    make_keeper(cluster).keep(NOW_S)
    before = served(cluster), trusted(cluster)
    del cluster.found[MAP]
    cluster.found[WEBHOOK]["webhooks"][0]["clientConfig"]["caBundle"] = ""
    make_keeper(cluster).keep(NOW_S + 1)
    assert (served(cluster), trusted(cluster)) == before
    del cluster.found[SECRET + "ckpt-agent-tls"]
    make_keeper(cluster).keep(NOW_S + 2)
    assert trusted(cluster) == before[1]
    cluster.found[SECRET + "ckpt-agent-ca"]["data"]["tls.key"] = "not base64"
    make_keeper(cluster).keep(NOW_S + 3)
    assert trusted(cluster) != before[1]
    assert before[1] in trusted(cluster)
    assert served(cluster).issued.signer in {
        pair.issued.identity for pair in certificates.read_bundle(trusted(cluster))
    }


def test_a_lost_authority_is_replaced_through_the_same_steps(cluster: Objects) -> None:
    make_keeper(cluster).keep(NOW_S)
    lost, old = trusted(cluster), served(cluster)
    del cluster.found[SECRET + "ckpt-agent-ca"]
    make_keeper(cluster).keep(NOW_S + 1)
    assert served(cluster) == old, "nobody trusts the successor yet"
    assert lost in trusted(cluster)
    assert lost != trusted(cluster)
    make_keeper(cluster).keep(NOW_S + 3600)
    assert served(cluster) == old
    make_keeper(cluster).keep(NOW_S + 3601)
    assert served(cluster) != old
    make_keeper(cluster).keep(NOW_S + 7200)
    assert lost in trusted(cluster)
    make_keeper(cluster).keep(NOW_S + 7201)
    assert lost not in trusted(cluster)


def test_a_stolen_authority_is_trusted_no_more(cluster: Objects) -> None:
    make_keeper(cluster).keep(NOW_S)
    stolen, old = trusted(cluster), served(cluster)
    del cluster.found[SECRET + "ckpt-agent-ca"], cluster.found[MAP]
    make_keeper(cluster).keep(NOW_S + 1)
    assert stolen not in trusted(cluster)
    assert served(cluster) != old


def test_a_cluster_without_the_webhook_still_gets_certificates() -> None:
    bare = Objects()
    make_keeper(bare).keep(NOW_S)
    assert make_keeper(bare).served() is not None


def test_a_server_that_came_later_is_named_without_a_new_authority(
    cluster: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(keeper, "_SERVICES", ("ckpt-agent-node", "ckpt-agent-admission"))
        make_keeper(cluster).keep(real_now_s())
        old, believed = served(cluster), trusted(cluster)
    assert make_keeper(cluster).keep(real_now_s()) == Due(leaf=True)
    assert trusted(cluster) == believed
    assert served(cluster) != old
    for name in NAMES:
        handshake(served(cluster), believed, name)
    assert "ckpt-agent-coordinator.ckpt-agent.svc" in NAMES
    assert make_keeper(cluster).keep(real_now_s()) == Due()


def test_others_keys_and_labels_are_kept(cluster: Objects) -> None:
    cluster.put(MAP, {"metadata": {"name": "x", "labels": {"a": "b"}}, "data": {"k": "v"}})
    make_keeper(cluster).keep(NOW_S)
    assert cluster.found[MAP]["metadata"]["labels"] == {"a": "b"}
    assert cluster.found[MAP]["data"]["k"] == "v"


def test_an_authority_is_rotated_through_all_its_steps(cluster: Objects) -> None:
    kept = make_keeper(cluster)
    kept.keep(NOW_S)
    (first,) = certificates.read_bundle(trusted(cluster))
    happened: list[Due] = []
    now_s = NOW_S + 274.9 * DAY_S
    while len(happened) < 3:
        now_s += 1800
        due = kept.keep(now_s)
        happened += [due] if due.prepare or due.promote or due.forget else []
        bundle = certificates.read_bundle(trusted(cluster))
        assert served(cluster).issued.signer in {pair.issued.identity for pair in bundle}
    assert [(due.prepare, due.promote, bool(due.forget)) for due in happened] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    (second,) = certificates.read_bundle(trusted(cluster))
    assert second != first


def _verifies(cluster: Objects) -> None:
    """Assert that whatever is served, and was ever published, is trusted where it is published."""
    if SECRET + "ckpt-agent-tls" not in cluster.found:
        return
    signer = served(cluster).issued.signer
    text = str(cluster.found[MAP]["data"]["ca.crt"]).encode()
    assert signer in {pair.issued.identity for pair in certificates.read_bundle(text)}
    (webhook,) = cluster.found[WEBHOOK]["webhooks"]
    believed = certificates.read_bundle(base64.b64decode(webhook["clientConfig"]["caBundle"]))
    assert signer in {pair.issued.identity for pair in believed}


@pytest.mark.parametrize("fail_at", range(14))
def test_a_keeper_that_ends_between_any_two_requests_leaves_trust_before_use(
    cluster: Objects, fail_at: int
) -> None:
    """At every step of a rotation, one keeper ends after so many requests; another goes on."""
    times = [NOW_S, NOW_S + 275 * DAY_S, NOW_S + 275 * DAY_S + 3600, NOW_S + 276 * DAY_S]
    for now_s in times:
        cluster.fail_at = fail_at
        try:
            make_keeper(cluster).keep(now_s)
        except errors.Unreachable:
            cluster.fail_at = None
            _verifies(cluster)
        cluster.fail_at = None
        make_keeper(cluster).keep(now_s)
        _verifies(cluster)
        trusted(cluster)


def test_of_two_keepers_at_once_one_is_told(cluster: Objects) -> None:
    before = secrets.read_secret(cluster, "ckpt-agent", "ckpt-agent-ca")
    make_keeper(cluster).keep(NOW_S)
    with pytest.raises(errors.Conflict):
        secrets.write_secret(cluster, "ckpt-agent", "ckpt-agent-ca", {}, before)
    before = secrets.read_secret(cluster, "ckpt-agent", "ckpt-agent-ca")
    make_keeper(cluster).keep(NOW_S + 275 * DAY_S)
    with pytest.raises(errors.Conflict):
        secrets.write_secret(cluster, "ckpt-agent", "ckpt-agent-ca", {}, before)
    assert "PRIVATE" not in repr(before)


# Whose turn it is.


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [1000.0]
    monkeypatch.setattr("agent.host.clock.monotonic_s", lambda: now_s[0])
    return now_s


def candidate(cluster: Objects, name: str) -> leases.Lease:
    return leases.Lease(cluster, "ckpt-agent", "turn", holder=name, duration_s=30)


def test_a_lease_is_held_by_one_until_it_is_silent(cluster: Objects, ticking: list[float]) -> None:
    one, two = candidate(cluster, "one"), candidate(cluster, "two")
    assert one.hold()
    assert not two.hold()
    for _ in range(5):
        ticking[0] += 20
        assert one.hold()
        assert not two.hold()
    ticking[0] += 29
    assert not two.hold()
    ticking[0] += 1
    assert two.hold()
    assert not one.hold()


def test_a_lease_that_was_let_go_is_free_at_once(cluster: Objects, ticking: list[float]) -> None:
    one, two = candidate(cluster, "one"), candidate(cluster, "two")
    assert one.hold()
    two.release()
    assert not two.hold()
    one.release()
    assert two.hold()


def test_a_candidate_that_comes_later_waits_the_whole_time(
    cluster: Objects, ticking: list[float]
) -> None:
    """The other's clock tells nothing: only silence that was observed counts."""
    assert candidate(cluster, "gone").hold()
    ticking[0] += 1000
    late = candidate(cluster, "late")
    assert not late.hold()
    ticking[0] += 30
    assert late.hold()
