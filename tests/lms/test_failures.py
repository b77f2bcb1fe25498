"""What an error means for the run and for the bill."""

from __future__ import annotations

import asyncio
import itertools
import json
from http import HTTPStatus
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.utils import exceptions as public
from dspy.utils.exceptions import AdapterParseError
from metering import lm_on

from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.failures import FailureKind, Fate, classify, fate_of, retry_after_s
from asyndbt_dspy.testing.provider import Fault, Provider

TRANSIENT, EXAMPLE, ENDPOINT, PROGRAM = FailureKind


def named(name: str, **attributes: Any) -> Exception:
    """An error of an SDK that need not be installed."""
    error: Exception = type(name, (Exception,), attributes)(name)
    return error


def of_module(module: str, name: str, **attributes: Any) -> Exception:
    """As ``named``, of a class that a module is said to define."""
    return named(name, __module__=module, **attributes)


def botocores(status: int) -> Exception:
    """As botocore raises them: the status is in a dictionary."""
    response = {"Error": {"Code": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return of_module("botocore.exceptions", "ClientError", response=response)


def chained(*errors: BaseException) -> BaseException:
    """Each error raised from the next."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_every_error_of_lm15_has_its_kind() -> None:
    expected = {
        "TransportError": TRANSIENT,
        "RateLimitError": TRANSIENT,
        "TimeoutError": TRANSIENT,
        "ServerError": TRANSIENT,
        "LockTimeoutError": TRANSIENT,
        "StreamAssemblyError": TRANSIENT,
        "AuthError": ENDPOINT,
        "BillingError": ENDPOINT,
        "UnsupportedModelError": ENDPOINT,
        "NotConfiguredError": ENDPOINT,
        "UnknownModelError": ENDPOINT,
        "ContextLengthError": EXAMPLE,
        "InvalidRequestError": PROGRAM,
        "UnsupportedFeatureError": PROGRAM,
    }
    found = {name: classify(getattr(lm15, name)("said")) for name in expected if hasattr(lm15, name)}
    assert found == {name: kind for name, kind in expected.items() if name in found}
    assert len(found) >= 12


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (public.LMRateLimitError("x"), TRANSIENT),
        (public.LMServerError("x", status=503), TRANSIENT),
        (public.LMProviderError("not JSON", status=200), TRANSIENT),
        (public.LMProviderError("x", status=418), PROGRAM),
        (public.LMAuthError("x", status=401), ENDPOINT),
        (public.LMUnsupportedModelError("x", status=404), ENDPOINT),
        (public.LMInvalidRequestError("x", status=400, provider_code="content_filter"), EXAMPLE),
        (public.LMRateLimitError("x", status=429, provider_code="insufficient_quota"), ENDPOINT),
        (public.ContextWindowExceededError(message="x"), EXAMPLE),
        (named("ContentPolicyViolationError"), EXAMPLE),
        (named("NotFoundError", status_code=404), ENDPOINT),
        (named("APIError", status_code=502), TRANSIENT),
        (named("APIError", status_code=403), ENDPOINT),
        (of_module("google.genai.errors", "ClientError", code=429), TRANSIENT),
        (of_module("google.genai.errors", "ClientError", code=403), ENDPOINT),
        (of_module("google.genai.errors", "ClientError", code=400), PROGRAM),
        (of_module("google.api_core.exceptions", "ResourceExhausted", code=HTTPStatus(429)), TRANSIENT),
        (of_module("a_tool", "Failed", code=429), PROGRAM),
        (botocores(429), TRANSIENT),
        (botocores(503), TRANSIENT),
        (botocores(403), ENDPOINT),
        (botocores(400), PROGRAM),
        (asyncio.TimeoutError(), TRANSIENT),
        (ConnectionResetError(), TRANSIENT),
        (ValueError("the program's own"), PROGRAM),
        (KeyError("status"), PROGRAM),
    ],
)
def test_errors_of_dspy_sdks_and_programs(error: Exception, kind: FailureKind) -> None:
    assert classify(error) is kind


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens and your request has 5001 input tokens",
        "the request exceeds the available context size. try increasing the context size",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count exceeds the maximum number of tokens allowed",
    ],
)
def test_a_server_that_says_only_in_words_that_a_prompt_is_too_long(said: str) -> None:
    assert classify(public.LMInvalidRequestError(said, status=400)) is EXAMPLE
    assert classify(named("BadRequestError", status_code=400, __str__=lambda error: said)) is EXAMPLE
    # Words alone do not make an error an LM's, and other statuses mean what they mean.
    assert classify(ValueError(said)) is PROGRAM
    assert classify(public.LMServerError(said, status=500)) is TRANSIENT


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_a_prompt_too_long_for_a_server_is_the_examples_through_every_client(engine: str) -> None:
    said = "the request exceeds the available context size (4096 tokens), try increasing it"
    fault = Fault("status", status=400, message=said)
    with Provider(fault=lambda call: fault) as provider, pytest.raises(dspy.LMError) as caught:
        lm_on(provider, engine)("question")
    assert classify(caught.value) is EXAMPLE


def test_a_wrapped_error_has_the_kind_of_its_cause() -> None:
    wrapped = chained(RuntimeError("step 2 failed"), public.LMUnexpectedError("?"), lm15.AuthError("key"))
    assert classify(wrapped) is ENDPOINT
    in_the_handler = RuntimeError("raised while the other was handled")
    in_the_handler.__context__ = lm15.RateLimitError("busy")
    assert classify(in_the_handler) is TRANSIENT


def test_a_suppressed_context_does_not_count() -> None:
    error = ValueError("the program has its own view")
    error.__context__ = lm15.RateLimitError("busy")
    error.__suppress_context__ = True  # as `raise … from None` does
    assert classify(error) is PROGRAM


def test_an_answer_that_does_not_parse_is_the_programs_even_after_a_busy_moment() -> None:
    error = AdapterParseError("ChatAdapter", dspy.Signature("q -> a"), "no fields here")
    assert classify(chained(error, lm15.RateLimitError("earlier"))) is PROGRAM


def test_a_group_has_the_kind_of_a_member() -> None:
    group = named("ExceptionGroup", exceptions=(ValueError("a"), lm15.ServerError("b")))
    assert classify(group) is TRANSIENT


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is PROGRAM


@pytest.mark.parametrize(
    ("error", "fate"),
    [
        # Never on the wire.
        (chained(lm15.TransportError("x"), named("ConnectError"), ConnectionRefusedError()), Fate.UNSENT),
        (chained(lm15.ServerError("x", status=500), named("ClientConnectorError")), Fate.UNSENT),
        (lm15.NotConfiguredError("no key"), Fate.UNSENT),
        (lm15.UnsupportedFeatureError("x"), Fate.UNSENT),
        (BudgetExceededError("x"), Fate.UNSENT),
        # The endpoint said no.
        (lm15.RateLimitError("x", status=429), Fate.REFUSED),
        (lm15.RateLimitError("x"), Fate.REFUSED),
        (lm15.ServerError("x", status=500), Fate.REFUSED),
        (lm15.AuthError("x", status=401), Fate.REFUSED),
        (
            chained(lm15.ServerError("x", status=503), named("InternalServerError", status_code=503)),
            Fate.REFUSED,
        ),
        (botocores(429), Fate.REFUSED),
        (of_module("google.genai.errors", "ClientError", code=429), Fate.REFUSED),
        # It may have been billed.
        (of_module("aiohttp.client_exceptions", "ClientError"), Fate.CUT),
        (lm15.TransportError("x"), Fate.CUT),
        (lm15.TimeoutError("x", status=504), Fate.CUT),
        (lm15.ServerError("x"), Fate.CUT),
        (chained(lm15.ServerError("x", status=500), named("APIConnectionError", status_code=None)), Fate.CUT),
        (chained(lm15.ServerError("x", status=500), json.JSONDecodeError("x", "{", 1)), Fate.CUT),
        (chained(lm15.TimeoutError("x", status=408), named("APITimeoutError")), Fate.CUT),
        (lm15.ProviderError("x", status=200), Fate.CUT),
        (asyncio.CancelledError(), Fate.CUT),
        (ValueError("anything unknown"), Fate.CUT),
    ],
)
def test_the_fate_of_an_attempt(error: BaseException, fate: Fate) -> None:
    assert fate_of(error) is fate


def test_retry_after_is_found_where_an_sdk_has_put_it() -> None:
    assert retry_after_s(lm15.RateLimitError("x", retry_after=2)) == 2.0
    response = named("R", headers={"Retry-After": "0.5"})
    assert retry_after_s(chained(lm15.RateLimitError("x"), named("E", response=response))) == 0.5
    assert retry_after_s(lm15.RateLimitError("x")) is None
    assert retry_after_s(named("E", response=named("R", headers={"retry-after": "soon"}))) is None
