"""Storages: what may be configured, which one a pod's images go to, and where an image is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model import ids, optin, storage

NAMES = ("default", "fast")


def says(name: str) -> dict[str, str]:
    return {optin.STORAGE: name}


# What is configured.


def test_the_setting_adds_storages_to_the_default_one_or_takes_its_place() -> None:
    assert storage.configured("/s/a/", {}) == {"default": "/s/a"}
    more = storage.read("fast=/s/b/, big = /t")
    assert list(storage.configured("/s/a", more)) == ["default", "fast", "big"]
    assert storage.configured("/s/a", more)["fast"] == "/s/b"
    assert storage.configured("/s/a", storage.read("default=/d")) == {"default": "/d"}


@pytest.mark.parametrize(
    "text",
    ["fast", "fast=", "=/b", "fast=b", "Fast=/b", "a/b=/c", "fast=/b,fast=/c", "fast=/b=/c,x"],
)
def test_what_is_no_list_of_storages_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        storage.read(text)


@pytest.mark.parametrize(
    "text",
    ["fast=/s/a/inner", "fast=/s", "fast=/s/a", "fast=/s/x/../a/b", "fast=/", "x=/t/y,z=/t"],
)
def test_no_storage_lies_within_another(text: str) -> None:
    with pytest.raises(errors.InvalidInput, match="lies inside"):
        storage.configured("/s/a", storage.read(text))


# Who chooses.


def test_the_pod_chooses_before_its_namespace_and_that_before_the_agent() -> None:
    assert storage.choose(NAMES, says("fast"), says("default")).name == "fast"
    assert storage.choose(NAMES, {}, says("fast")) == storage.Choice("fast", "namespace")
    assert storage.choose(NAMES, {}, {}) == storage.Choice("default", "agent")


@pytest.mark.parametrize("name", ["slow", "", "/stores/b", "../b", "Fast", "fast "])
def test_a_name_that_the_agent_does_not_have_is_refused_with_those_it_has(name: str) -> None:
    for pod, namespace in ((says(name), {}), ({}, says(name)), (says(name), says("fast"))):
        with pytest.raises(errors.InvalidInput, match="does not have") as caught:
            storage.choose(NAMES, pod, namespace)
        assert "default, fast" in caught.value.hint


@given(st.text(max_size=10), st.text(max_size=10))
def test_whatever_is_asked_for_only_a_configured_storage_is_chosen(
    pod: str, namespace: str
) -> None:
    for words in (says(pod), {}):
        try:
            choice = storage.choose(NAMES, words, says(namespace))
        except errors.InvalidInput:
            continue
        assert choice.name in NAMES


def test_the_pods_of_one_image_must_say_the_same() -> None:
    assert storage.agreed({}) == ""
    assert storage.agreed({"a": {}, "b": {"other": "x"}}) == ""
    assert storage.agreed({"a": says("fast"), "b": says("fast")}) == "fast"
    for other in ({}, says("default"), says("")):
        with pytest.raises(errors.InvalidInput, match="same storage") as caught:
            storage.agreed({"a": says("fast"), "b": other})
        assert caught.value.facts["reasons"] == [
            "a: fast",
            f"b: {other.get(optin.STORAGE) or 'nothing'}",
        ]
    with pytest.raises(errors.InvalidInput):
        storage.agreed({"a": says("")})


# Where an image is.

EPOCHS = [ids.EpochId(f"2026013{day}-000000-0a1b2{day}") for day in range(3)]


def test_a_group_is_its_newest_image_wherever_it_lies() -> None:
    assert storage.find("job", {"a": EPOCHS[:1], "b": EPOCHS[1:2]}, {}) == ("b", EPOCHS[1])
    assert storage.find("job", {"a": EPOCHS[2:], "b": EPOCHS[1:2]}, {}) == ("a", EPOCHS[2])


def test_a_beginning_must_fit_one_image_of_all_storages() -> None:
    both = {"a": EPOCHS[:1], "b": EPOCHS[1:2]}
    with pytest.raises(errors.NotFound, match="any of 2"):
        storage.find("job@2026013", both, {})
    assert storage.find("job@2026013", {"a": EPOCHS[:1], "b": []}, {}) == ("a", EPOCHS[0])


def test_an_image_in_two_storages_must_be_told_apart() -> None:
    for image in ("job", f"job@{EPOCHS[0]}"):
        with pytest.raises(errors.NotFound, match="storages a, b"):
            storage.find(image, {"a": EPOCHS[:1], "b": EPOCHS[:1]}, {})


def test_nothing_is_nothing() -> None:
    with pytest.raises(errors.NotFound, match="no image"):
        storage.find("job", {"a": [], "b": []}, {})


def test_while_a_storage_is_away_only_a_full_name_is_sure() -> None:
    here, away = {"a": EPOCHS[:1]}, {"b": "it does not answer"}
    assert storage.find(f"job@{EPOCHS[0]}", here, away) == ("a", EPOCHS[0])
    for image in ("job", "job@2026", f"job@{EPOCHS[0][:-1]}", f"job@{EPOCHS[1]}"):
        matching = {"a": [epoch for epoch in EPOCHS[:1] if image in f"job@{epoch}"]}
        with pytest.raises(errors.VolumeGone, match="b: it does not answer"):
            storage.find(image, matching, away)
