"""What makes two LMs the same where their address comes from the environment."""

from __future__ import annotations

import json
from typing import Any

import dspy
import pytest

from asyndbt_dspy.lms.fallback import fallback
from asyndbt_dspy.lms.identity import lm_identity
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.scripted import scripted_lm

NAMES = ("OPENAI_API_BASE", "OPENAI_BASE_URL", "ANTHROPIC_API_BASE", "ANTHROPIC_BASE_URL")


@pytest.fixture(autouse=True)
def without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def plain_lm(**settings: Any) -> dspy.LM:
    return dspy.LM("openai/m", api_key="k", temperature=0.0, max_tokens=5, **settings)


def test_without_an_address_anywhere_an_lm_is_what_it_was_in_older_journals() -> None:
    assert lm_identity(plain_lm()) == {
        "model": "openai/m",
        "type": "chat",
        "endpoint": None,
        "engine": "auto",
        "sampling": {"max_tokens": 5, "temperature": 0.0},
    }
    assert lm_identity(plain_lm(api_base="http://host/v1/"))["endpoint"] == "http://host/v1"
    assert lm_identity(plain_lm(base_url="http://host/v1"))["endpoint"] == "http://host/v1"


@pytest.mark.parametrize("name", NAMES[:2])
def test_another_server_in_the_environment_is_another_lm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, found = plain_lm(), []
    for address in ("http://a/v1", "http://b/v1"):
        monkeypatch.setenv(name, address)
        assert lm_identity(lm)["endpoint"] == address
        assert lm_identity(lm) == lm_identity(plain_lm(api_base=address))
        wrapped = fallback([metered(lm, ledger=Ledger(), worker="a")])
        assert lm_identity(wrapped) == lm_identity(lm)
        found.append(lm_identity(lm))
    assert found[0] != found[1]


def test_of_an_address_in_the_environment_no_secret_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:secret@host/v1?token=secret")
    assert lm_identity(plain_lm())["endpoint"] == "http://host/v1"
    assert "secret" not in json.dumps(lm_identity(plain_lm()))


def test_an_lm_that_does_not_read_the_environment_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lms = [
        plain_lm(api_base="http://host/v1"),
        plain_lm(engine="lm15"),
        dspy.LM("anthropic/m"),
        scripted_lm(lambda messages: "ok"),
    ]
    before = [lm_identity(lm) for lm in lms]
    for name in ("OPENAI_BASE_URL", "SCRIPTED_BASE_URL"):
        monkeypatch.setenv(name, "http://other/v1")
    assert [lm_identity(lm) for lm in lms] == before
