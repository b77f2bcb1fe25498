"""The one home of error classification: what a failed LM call means for the run, and for the bill.

======================  ===================================================  ==========================================
kind                    errors                                               what follows
======================  ===================================================  ==========================================
TRANSIENT               429, 5xx, timeouts, broken connections, a reply      missing; the worker tries on
                        that is no JSON
EXAMPLE                 content filter, context too long                     missing for this example and candidate
ENDPOINT                401, 403, 404, unknown model, no credit              missing; after a few the worker is out
PROGRAM                 everything else, answers that do not parse included  the program's own failure: failure score
======================  ===================================================  ==========================================

Missing is never zero: a candidate must not lose because a provider was busy. ``BudgetExceededError`` is no failure at
all: the call was not made, and the run hears of it (see ``call_watch``).

======================  ===================================================  ==========================================
fate of an attempt      how it is known                                      what it costs
======================  ===================================================  ==========================================
UNSENT                  no connection, or refused here before any I/O        nothing; it never was on the wire
REFUSED                 the endpoint answered with an error status           an attempt, but no tokens
CUT                     everything else: timeout, cut connection, a reply    an attempt, and all that was reserved
                        that is no JSON, a gateway's 502 and 504
======================  ===================================================  ==========================================
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any


class FailureKind(str, Enum):
    """See the first table above."""

    TRANSIENT = "transient"
    EXAMPLE = "example"
    ENDPOINT = "endpoint"
    PROGRAM = "program"


class Fate(str, Enum):
    """See the second table above."""

    UNSENT = "unsent"
    REFUSED = "refused"
    CUT = "cut"


_BY_NAME = {
    # An error is looked up along its method resolution order, most specific class first. Names of DSPy, LM15, LiteLLM,
    # OpenAI, httpx, aiohttp and botocore, so that none of them has to be imported.
    "AdapterParseError": FailureKind.PROGRAM,
    "ContextWindowExceededError": FailureKind.EXAMPLE,
    "ContextLengthError": FailureKind.EXAMPLE,
    "ContentPolicyViolationError": FailureKind.EXAMPLE,
    "ContentFilterFinishReasonError": FailureKind.EXAMPLE,
    "LMAuthError": FailureKind.ENDPOINT,
    "LMBillingError": FailureKind.ENDPOINT,
    "LMNotConfiguredError": FailureKind.ENDPOINT,
    "LMUnsupportedModelError": FailureKind.ENDPOINT,
    "AuthError": FailureKind.ENDPOINT,
    "BillingError": FailureKind.ENDPOINT,
    "NotConfiguredError": FailureKind.ENDPOINT,
    "UnknownModelError": FailureKind.ENDPOINT,
    "UnsupportedModelError": FailureKind.ENDPOINT,
    "AuthenticationError": FailureKind.ENDPOINT,
    "PermissionDeniedError": FailureKind.ENDPOINT,
    "NotFoundError": FailureKind.ENDPOINT,
    "LMRateLimitError": FailureKind.TRANSIENT,
    "LMTimeoutError": FailureKind.TRANSIENT,
    "LMServerError": FailureKind.TRANSIENT,
    "LMTransportError": FailureKind.TRANSIENT,
    "LMLockTimeoutError": FailureKind.TRANSIENT,
    "LockTimeoutError": FailureKind.TRANSIENT,
    "LMStreamAssemblyError": FailureKind.TRANSIENT,
    "StreamAssemblyError": FailureKind.TRANSIENT,
    "RateLimitError": FailureKind.TRANSIENT,
    "ServerError": FailureKind.TRANSIENT,
    "InternalServerError": FailureKind.TRANSIENT,
    "ServiceUnavailableError": FailureKind.TRANSIENT,
    "BadGatewayError": FailureKind.TRANSIENT,
    "APIConnectionError": FailureKind.TRANSIENT,
    "APITimeoutError": FailureKind.TRANSIENT,
    "Timeout": FailureKind.TRANSIENT,
    "TransportError": FailureKind.TRANSIENT,
    "HTTPTransportError": FailureKind.TRANSIENT,
    "ClientConnectionError": FailureKind.TRANSIENT,
    "ClientPayloadError": FailureKind.TRANSIENT,
    "IncompleteRead": FailureKind.TRANSIENT,
}

_BY_STATUS = {
    401: FailureKind.ENDPOINT,
    402: FailureKind.ENDPOINT,
    403: FailureKind.ENDPOINT,
    404: FailureKind.ENDPOINT,
    408: FailureKind.TRANSIENT,
    409: FailureKind.TRANSIENT,
    413: FailureKind.EXAMPLE,
    425: FailureKind.TRANSIENT,
    429: FailureKind.TRANSIENT,
}

_BY_CODE = {
    # A code says more than the class and the status that it came with.
    "content_filter": FailureKind.EXAMPLE,
    "content_policy_violation": FailureKind.EXAMPLE,
    "responsibleaipolicyviolation": FailureKind.EXAMPLE,
    "context_length_exceeded": FailureKind.EXAMPLE,
    "exceed_context_size_error": FailureKind.EXAMPLE,
    "insufficient_quota": FailureKind.ENDPOINT,
    "invalid_api_key": FailureKind.ENDPOINT,
    "model_not_found": FailureKind.ENDPOINT,
}

_TOO_LONG = (
    # vLLM, llama.cpp, TGI, Anthropic and Gemini say it in words only: their 400 has neither class nor code for it.
    "maximum context length",
    "context length of",
    "the model's context length",
    "available context size",
    "context window",
    "context limit",
    "prompt is too long",
    "maximum number of tokens allowed",
    "`inputs` tokens + `max_new_tokens` must be",
)

_UNSENT_NAMES = frozenset(
    (
        "ConnectError",
        "ConnectTimeout",
        "ClientConnectorError",
        "ConnectionRefusedError",
        "gaierror",
        "LMConfigurationError",
        "LMNotConfiguredError",
        "LMUnsupportedFeatureError",
        "ConfigurationError",
        "CapabilityError",
        "BudgetExceededError",
    )
)
_CUT_NAMES = frozenset(
    (
        "TransportError",
        "LMTransportError",
        "APIConnectionError",
        "TimeoutException",
        "ReadError",
        "ProtocolError",
        "ClientError",
        "StreamAssemblyError",
        "LMStreamAssemblyError",
        "CancelledError",
    )
)
# aiohttp's of this name are cut connections; Google's and botocore's are answers, and have a status.
_ANSWERED_NAMES = frozenset(("ClientError",))
# A class that stands for an answer of the endpoint, also where an engine gives no status with it.
_REFUSED_NAMES = frozenset(
    (
        "LMRateLimitError",
        "LMAuthError",
        "LMBillingError",
        "LMInvalidRequestError",
        "LMUnsupportedModelError",
        "RateLimitError",
        "AuthError",
        "BillingError",
        "InvalidRequestError",
        "ContextWindowExceededError",
    )
)
_GATEWAY_CUTS = frozenset({408, 499, 502, 504, *range(520, 528)})
"""Statuses that an intermediary sends while the model may have answered, and the provider have billed."""


def classify(error: BaseException) -> FailureKind:
    """The kind of an LM's ``error``, or of the first of its causes (or of an exception group's members) that has one."""
    for one in causes(error):
        kind = _kind_of(one)
        if kind is not None:
            return kind
    return FailureKind.PROGRAM


_LM_PACKAGES = (
    "dspy.clients",
    "dspy.utils.dummies",
    "dspy.utils.exceptions",
    "lm15",
    "litellm",
    "openai",
    "anthropic",
    "google.genai",
    "google.generativeai",
    "google.api_core",
    "vertexai",
    "cohere",
    "mistralai",
    "groq",
    "ollama",
    "together",
    "huggingface_hub",
    "langchain_core.language_models",
    "asyndbt_dspy.lms",
)
"""Where calls of LMs are made. ``langchain_openai`` and its like go through ``langchain_core``."""


def kind_of(error: BaseException) -> FailureKind:
    """The kind of a failed run: of the LM only if an LM's client raised it or what it comes from, or has such errors.

    A program's or a tool's own ``NotFoundError`` or 404 is a failure of the program, whatever such an error of a provider
    would mean.
    """
    return classify(error) if any(map(_is_of_an_lm, causes(error))) else FailureKind.PROGRAM


def _is_of_an_lm(error: BaseException) -> bool:
    frames = (str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return _has_an_lms_class(error) or any(map(_is_of_an_lm_package, frames))


def _has_an_lms_class(error: BaseException) -> bool:
    return any(_is_of_an_lm_package(cls.__module__) for cls in type(error).__mro__)


def _is_of_an_lm_package(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in _LM_PACKAGES)


def fate_of(error: BaseException) -> Fate:
    """What became of the attempt that ended in ``error``; in doubt it was sent and will be billed."""
    chain = list(causes(error))
    if any(_is_named(one, _UNSENT_NAMES) for one in chain):
        return Fate.UNSENT
    if any(_was_cut(one) for one in chain):
        return Fate.CUT
    statuses = [status for one in chain if (status := _status(one)) is not None]
    if statuses:
        answered = all(status >= 400 and status not in _GATEWAY_CUTS for status in statuses)
        return Fate.REFUSED if answered else Fate.CUT
    return Fate.REFUSED if any(_is_named(one, _REFUSED_NAMES) for one in chain) else Fate.CUT


def is_rate_limited(error: BaseException) -> bool:
    """Whether the endpoint said that it is too much (429)."""
    return any(
        _status(one) == 429 or _is_named(one, frozenset({"RateLimitError", "LMRateLimitError"}))
        for one in causes(error)
    )


def retry_after_s(error: BaseException) -> float | None:
    """Seconds that the endpoint asked to wait, from wherever an SDK has put them; ``None`` where it did not ask."""
    for one in causes(error):
        headers = getattr(getattr(one, "response", None), "headers", None)
        for said in (getattr(one, "retry_after", None), _header(headers, "retry-after")):
            try:
                seconds = float(said)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                continue
            if math.isfinite(seconds) and seconds >= 0:
                return seconds
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, then what it was raised from, then the members of groups; each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        context = None if one.__suppress_context__ else one.__context__
        waiting += [cause for cause in (one.__cause__, context) if cause is not None]
        waiting += list(getattr(one, "exceptions", ()))


def _kind_of(error: BaseException) -> FailureKind | None:
    code = str(getattr(error, "provider_code", None) or getattr(error, "code", None) or "").lower()
    if code in _BY_CODE:
        return _BY_CODE[code]
    for cls in type(error).__mro__:
        if cls.__name__ in _BY_NAME:
            return _BY_NAME[cls.__name__]
    status = _status(error)
    if status is not None:
        if 500 <= status < 600:
            return FailureKind.TRANSIENT
        if 200 <= status < 300:
            # Only a provider's error carries a status: the endpoint said yes and sent something unreadable.
            return FailureKind.TRANSIENT
        if status == 400 and any(words in str(error).lower() for words in _TOO_LONG):
            return FailureKind.EXAMPLE
        return _BY_STATUS.get(status)
    if isinstance(error, (TimeoutError, ConnectionError)):
        return FailureKind.TRANSIENT
    # asyncio.TimeoutError is a class of its own on Python 3.10.
    return FailureKind.TRANSIENT if type(error).__name__ == "TimeoutError" else None


def _was_cut(error: BaseException) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError, json.JSONDecodeError)):
        # LM15's TimeoutError is also raised for a status: then the status decides.
        return _status(error) is None
    if _is_named(error, _ANSWERED_NAMES) and _status(error) is not None:
        return False
    return _is_named(error, _CUT_NAMES)


def _is_named(error: BaseException, names: frozenset[str]) -> bool:
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    for name in ("status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and not isinstance(status, bool):
            return status
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        return _error_status((response.get("ResponseMetadata") or {}).get("HTTPStatusCode"))
    # Google's clients; elsewhere a `code` may be anything.
    return _error_status(getattr(error, "code", None)) if _has_an_lms_class(error) else None


def _error_status(value: Any) -> int | None:
    return int(value) if isinstance(value, int) and 400 <= value < 600 else None


def _header(headers: Any, name: str) -> str | None:
    items = headers.items() if hasattr(headers, "items") else ()
    return next((str(value) for key, value in items if str(key).lower() == name), None)
