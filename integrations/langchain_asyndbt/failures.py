"""What went wrong at a model, in the other side's words: LangChain's errors and DSPy's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import dspy
from dspy import lm15
from langchain_core import exceptions as lc

TO_LM15: tuple[tuple[type[BaseException], type[lm15.LM15Error]], ...] = (
    (lc.ContextOverflowError, lm15.ContextLengthError),
    (lc.ModelRateLimitError, lm15.RateLimitError),
    (lc.ModelTimeoutError, lm15.TimeoutError),
    (lc.ModelConnectionError, lm15.TransportError),
    (lc.ModelAPIError, lm15.ServerError),
    (lc.ModelAuthenticationError, lm15.AuthError),
    (lc.ModelPermissionDeniedError, lm15.AuthError),
    (lc.ModelNotFoundError, lm15.UnsupportedModelError),
    (lc.ModelInvalidRequestError, lm15.InvalidRequestError),
    (TimeoutError, lm15.TimeoutError),
    (ConnectionError, lm15.TransportError),
)

BY_STATUS: dict[int, type[lm15.LM15Error]] = {
    400: lm15.InvalidRequestError,
    401: lm15.AuthError,
    402: lm15.BillingError,
    403: lm15.AuthError,
    404: lm15.UnsupportedModelError,
    408: lm15.TimeoutError,
    409: lm15.InvalidRequestError,
    413: lm15.InvalidRequestError,
    422: lm15.InvalidRequestError,
    429: lm15.RateLimitError,
    504: lm15.TimeoutError,
}
SERVER_ERRORS = range(500, 600)

TO_LANGCHAIN: tuple[tuple[type[BaseException], type[lc.ModelError]], ...] = (
    (dspy.ContextWindowExceededError, lc.ContextOverflowError),
    (dspy.LMRateLimitError, lc.ModelRateLimitError),
    (dspy.LMTimeoutError, lc.ModelTimeoutError),
    (dspy.LMTransportError, lc.ModelConnectionError),
    (dspy.LMServerError, lc.ModelAPIError),
    (dspy.LMAuthError, lc.ModelAuthenticationError),
    (dspy.LMUnsupportedModelError, lc.ModelNotFoundError),
    (dspy.LMInvalidRequestError, lc.ModelInvalidRequestError),
)


@contextmanager
def as_lm15_errors() -> Iterator[None]:
    """Inside, errors of a LangChain model become lm15's, so that DSPy retries what can be retried.

    An error that says nothing of its cause stays as it is: DSPy does not retry it.
    """
    try:
        yield
    except lm15.LM15Error:
        raise
    except Exception as error:
        # Integrations wrap what a provider's client raised in errors of their own that say nothing of it.
        status = next((found for one in _causes(error) if (found := _status(one)) is not None), None)
        kind = next((ours for theirs, ours in TO_LM15 if isinstance(error, theirs)), None)
        if kind is None and status is not None:
            kind = BY_STATUS.get(status) or (lm15.ServerError if status in SERVER_ERRORS else None)
        if kind is None:
            raise
        raise kind(str(error), status=status, retry_after=_retry_after(error)) from error


@contextmanager
def as_langchain_errors() -> Iterator[None]:
    """Inside, errors of a DSPy LM become LangChain's, as its integrations raise them."""
    try:
        yield
    except dspy.LMError as error:
        kind = next((theirs for ours, theirs in TO_LANGCHAIN if isinstance(error, ours)), None)
        if kind is None:
            raise
        raise kind(str(error)) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, each once."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and not any(one is other for other in seen):
        seen.append(one)
        yield one
        one = one.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status, from wherever a client keeps it."""
    response = getattr(error, "response", None)
    for holder in (error, response):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int) and not isinstance(status, bool):
            return status
    # Google's clients, and botocore's.
    metadata = response.get("ResponseMetadata") if isinstance(response, Mapping) else None
    for status in (getattr(error, "code", None), (metadata or {}).get("HTTPStatusCode")):
        if isinstance(status, int) and 400 <= status < 600:
            return int(status)
    return None


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the server asked to wait, from its header."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    try:
        seconds = float(headers["retry-after"]) if headers else None
    except (KeyError, TypeError, ValueError):
        return None
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None
