"""Which store a pod's images go to."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model import optin, storage

STORES = {"default": "/stores/a", "fast": "/stores/b"}


def test_the_pod_chooses_before_its_namespace_and_that_before_the_default() -> None:
    fast, usual = {optin.STORE: "fast"}, {optin.STORE: "default"}
    assert storage.choose(STORES, fast, usual) == storage.Choice("fast", "/stores/b", "pod")
    assert storage.choose(STORES, {}, fast) == storage.Choice("fast", "/stores/b", "namespace")
    assert storage.choose(STORES, {}, {}) == storage.Choice("default", "/stores/a", "default")


@pytest.mark.parametrize("name", ["slow", "", "/stores/b", "../b", "Fast"])
def test_a_name_that_the_agent_does_not_know_is_refused_with_those_it_does(name: str) -> None:
    for pod, namespace in (({optin.STORE: name}, {}), ({}, {optin.STORE: name})):
        with pytest.raises(errors.InvalidInput, match="does not have") as caught:
            storage.choose(STORES, pod, namespace)
        assert "default, fast" in caught.value.hint


@given(st.text(max_size=10), st.text(max_size=10))
def test_whatever_is_asked_only_a_configured_store_is_chosen(pod: str, namespace: str) -> None:
    try:
        choice = storage.choose(STORES, {optin.STORE: pod}, {optin.STORE: namespace})
    except errors.InvalidInput:
        return
    assert STORES[choice.name] == choice.path


def test_the_configuration_adds_stores_to_the_default_one() -> None:
    assert storage.read_stores("", "/s/a/") == {"default": "/s/a"}
    assert storage.read_stores("fast=/s/b/, big = /t", "/s/a") == {
        "default": "/s/a",
        "fast": "/s/b",
        "big": "/t",
    }


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "fast=",
        "=/b",
        "fast=b",
        "Fast=/b",
        "fast=/b,fast=/c",
        "default=/b",
        "fast=/s/a/inner",
        "fast=/s",
        "fast=/s/a",
        "fast=/s/x/../a/b",
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        storage.read_stores(text, "/s/a")


@given(st.text(max_size=12))
def test_a_namespaces_directory_lies_right_below_its_store(namespace: str) -> None:
    choice = storage.Choice("fast", "/stores/b", "pod")
    try:
        found = choice.directory(namespace)
    except errors.InvalidInput:
        return
    assert posixpath.dirname(posixpath.normpath(found)) == "/stores/b"


def test_a_namespace_cannot_name_a_way_out() -> None:
    for name in ("", ".", "..", "a/b", "../b", "/etc", "A", "a" * 64):
        with pytest.raises(errors.InvalidInput):
            storage.Choice("fast", "/stores/b", "pod").directory(name)
