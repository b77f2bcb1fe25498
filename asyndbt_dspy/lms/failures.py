"""The one home of error classification: what a failed rollout means for the run.

======================  ===================================================  ==========================================
kind                    errors                                               what follows
======================  ===================================================  ==========================================
TRANSIENT               429, 5xx, timeouts, broken connections               missing; the worker tries on
EXAMPLE                 content filter, context too long                     missing for this example and candidate
ENDPOINT                401, 403, 404, unknown model, no credit              missing; after a few the worker is set aside
PROGRAM                 everything else, answers that do not parse included  the program's own failure: failure score
======================  ===================================================  ==========================================

Missing is never zero: a candidate must not lose because a provider was busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum


class FailureKind(str, Enum):
    """See the table above."""

    TRANSIENT = "transient"
    EXAMPLE = "example"
    ENDPOINT = "endpoint"
    PROGRAM = "program"


_BY_NAME = {
    # Most specific first: an error is looked up along its method resolution order. Names of DSPy, LM15, LiteLLM, OpenAI,
    # httpx, aiohttp and botocore, so that none of them has to be imported.
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
    "LMStreamAssemblyError": FailureKind.TRANSIENT,
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

_CONTENT_FILTER_CODES = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


def classify(error: BaseException) -> FailureKind:
    """The kind of ``error``, or of the first of its causes (or of an exception group's members) that has one."""
    for one in _causes(error):
        kind = _kind_of(one)
        if kind is not None:
            return kind
    return FailureKind.PROGRAM


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, then what it was raised from, then the members of groups; each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        waiting += list(getattr(one, "exceptions", ()))


def _kind_of(error: BaseException) -> FailureKind | None:
    code = str(getattr(error, "provider_code", None) or getattr(error, "code", None) or "").lower()
    if code in _CONTENT_FILTER_CODES:
        return FailureKind.EXAMPLE
    for cls in type(error).__mro__:
        if cls.__name__ in _BY_NAME:
            return _BY_NAME[cls.__name__]
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    if isinstance(status, int):
        if 500 <= status < 600:
            return FailureKind.TRANSIENT
        return _BY_STATUS.get(status)
    if isinstance(error, (TimeoutError, ConnectionError)):
        return FailureKind.TRANSIENT
    # asyncio.TimeoutError is a class of its own on Python 3.10.
    return FailureKind.TRANSIENT if type(error).__name__ == "TimeoutError" else None
