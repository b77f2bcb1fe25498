"""Any LM as a pair of engines that make one attempt per call: the common ground of metering and fallback.

DSPy's own clients are reached through the LM itself, without cache and retries: which backend serves a request, its
connections and its errors stay DSPy's business, for ``engine="auto"`` and ``"litellm"``. The LM on the outside keeps
cache, retries, history and callbacks, so that each of them happens once.

Between the two goes a request in DSPy's canonical form, which has no room for what belongs to one backend alone
(``extra_body``, ``num_ctx``, ``aws_region_name``, …). Such settings stay on the LM inside, and its calls are then made with
messages, as it makes its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy.clients.backend_selection import select_backend

# Private to DSPy 3.4, as is what `LM.forward` does with them: its public result has lost why an answer ended, and counts
# tokens otherwise. test_settings_of_a_backend_reach_it_as_without_metering fails when these move.
from dspy.clients.execution import aexecute, execute, prepare
from dspy.clients.lm15_boundary import request_kwargs
from dspy.lm15 import Config, LM15Error, Request, Response, UnsupportedFeatureError, request_from_openai_chat
from dspy.utils.exceptions import LMError

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.identity import lm_identity
from asyndbt_dspy.lms.legacy_engines import as_body, legacy_engines

_CLIENT_SETTINGS = (
    "api_key",
    "api_base",
    "base_url",
    "headers",
    "extra_headers",
    "timeout",
    "api_version",
    "azure_ad_token_provider",
    "organization",
    "project",
    "extra_query",
    "custom_llm_provider",
)
"""What belongs to a connection: an LM with an engine of its own must not have them (``dspy.LM`` refuses)."""
_CALL_SETTINGS = ("n", "num_generations", "prompt_cache", "rollout_id")
"""What DSPy itself reads off a call; it reaches no backend as it is."""
_UNSEEN_CALLS = {
    "context_window_fallback_dict": "give the worker a list of LMs",
    "fallbacks": "give the worker a list of LMs",
    "max_retries": "give dspy.LM(num_retries=…)",
}
"""With them LiteLLM makes further calls within one attempt, which nobody would count."""

Each = Callable[[Callable[[], Response], int], Response]
"""``(send, number)`` makes one attempt: calls ``send``, once, and gives or raises what that does, or refuses to. ``number``, from
0, says which of an engine's models is asked: what pause one of them asks for is not the others'."""
AsyncEach = Callable[[Callable[[], Awaitable[Response]], int], Awaitable[Response]]


@dataclass(frozen=True)
class Capabilities:
    """What adapters ask an LM before they format a prompt."""

    supports_function_calling: bool
    supports_reasoning: bool
    supports_response_schema: bool
    supported_params: frozenset[str]

    @classmethod
    def of(cls, lm: dspy.BaseLM) -> Capabilities:
        return cls(
            bool(lm.supports_function_calling),
            bool(lm.supports_reasoning),
            bool(lm.supports_response_schema),
            frozenset(lm.supported_params),
        )

    def shared_with(self, other: Capabilities) -> Capabilities:
        """What both can do."""
        return Capabilities(
            self.supports_function_calling and other.supports_function_calling,
            self.supports_reasoning and other.supports_reasoning,
            self.supports_response_schema and other.supports_response_schema,
            self.supported_params & other.supported_params,
        )


class Attempts:
    """One attempt per call through an LM, in a thread or in a task.

    An engine of the user's that may ask more than once per call (a model with retries or fallbacks of its own) has
    ``complete_each(request, each)`` beside ``complete``, in both its sync and its async form, and makes every attempt through
    ``each``; ``check_attempts()`` raises where it cannot tell its attempts apart.

    Args:
        lm: Any LM; never changed.

    Raises:
        ConfigurationError: a text-completion model; it takes no requests that could be measured beforehand. Settings
            with which LiteLLM calls again by itself.
    """

    def __init__(self, lm: dspy.BaseLM) -> None:
        if getattr(lm, "model_type", "chat") == "text":
            raise ConfigurationError(
                f"{lm.model!r} has model_type='text', whose calls can be neither limited nor counted; use 'chat'"
            )
        for name, instead in _UNSEEN_CALLS.items():
            if lm.kwargs.get(name) and isinstance(getattr(lm, "engine", None), str):
                raise ConfigurationError(
                    f"{lm.model!r} has {name}={lm.kwargs[name]!r}, whose calls can be neither limited nor counted; {instead}"
                )
        self.lm = lm
        self.model = lm.model
        self._sync, self._async = _engines_of(lm)

    @property
    def is_async(self) -> bool:
        """Whether ``acomplete`` can answer."""
        return self._async is not None

    def capabilities(self) -> Capabilities:
        return Capabilities.of(self.lm)

    def own_config(self) -> Config:
        """How the LM asks where a call says nothing of it: temperature, ``max_tokens`` and the like."""
        return request_from_openai_chat(_body_of(self.lm)[0]).config

    def check_attempts(self) -> None:
        """Raise what the engine has against its attempts being told apart (``ConfigurationError``)."""
        check = getattr(self._sync, "check_attempts", None)
        if check is not None:
            check()

    def complete(self, request: Request, each: Each | None = None) -> Response:
        """One attempt in this thread.

        Args:
            each: Makes the attempt, or every one of them where the engine retries or falls back by itself.
        """
        own = self._own(request)
        if each is None:
            return self._sync.complete(own)  # type: ignore[no-any-return]
        if hasattr(self._sync, "complete_each"):
            return self._sync.complete_each(own, each)  # type: ignore[no-any-return]
        return each(lambda: self._sync.complete(own), 0)

    async def acomplete(self, request: Request, each: AsyncEach | None = None) -> Response:
        """One attempt in this task.

        Args:
            each: As of ``complete``.

        Raises:
            UnsupportedFeatureError: the LM, or its own engine, has no async side.
        """
        if self._async is None:
            raise UnsupportedFeatureError(
                f"the LM {self.model!r} has no async side; give async_engine= to its dspy.LM or aforward to its class, or "
                "run a program without aforward"
            )
        engine, own = self._async, self._own(request)
        if each is None:
            return await engine.complete(own)  # type: ignore[no-any-return]
        if hasattr(engine, "complete_each"):
            return await engine.complete_each(own, each)  # type: ignore[no-any-return]
        return await each(lambda: engine.complete(own), 0)

    def _own(self, request: Request) -> Request:
        return request if request.model == self.model else replace(request, model=self.model)


class EngineFace:
    """What ``dspy.LM`` and its adapters expect of a custom engine beside ``complete``."""

    def __init__(self, find_capabilities: Callable[[], Capabilities]) -> None:
        self._find_capabilities = find_capabilities
        self._capabilities: Capabilities | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A program is deep-copied with its LMs; money and limits are the run's, not the program's.
        return self

    def ask_capabilities(self) -> Capabilities:
        """Asked for at every call; DSPy reads tables for its answer, so once is enough."""
        if self._capabilities is None:
            self._capabilities = self._find_capabilities()
        return self._capabilities

    @property
    def supports_function_calling(self) -> bool:
        return self.ask_capabilities().supports_function_calling

    @property
    def supports_reasoning(self) -> bool:
        return self.ask_capabilities().supports_reasoning

    @property
    def supports_response_schema(self) -> bool:
        return self.ask_capabilities().supports_response_schema

    @property
    def supported_params(self) -> frozenset[str]:
        return self.ask_capabilities().supported_params

    def stream(self, request: Request) -> Any:
        """Refused: an optimizer's worker does not stream."""
        raise UnsupportedFeatureError(
            "an LM that is metered for a run does not stream; stream with the LM itself"
        )


def lm_with_engines(lm: dspy.BaseLM, engine: Any, async_engine: Any, **changes: Any) -> dspy.LM:
    """A copy of ``lm`` (its own history; same model, sampling, cache and retries) that calls these engines."""
    backends = backend_settings(lm)
    left_out = {*_CLIENT_SETTINGS, *backends}
    if not _is_managed(lm):
        kwargs = {name: value for name, value in lm.kwargs.items() if name not in left_out}
        callbacks = changes.get("callbacks", lm.callbacks)
        # Not every own LM may be cached (dspy.utils.DummyLM never is), and its answers were not before.
        return dspy.LM(
            lm.model, engine=engine, async_engine=async_engine, cache=False, callbacks=callbacks, **kwargs
        )
    without = {name: None for name in left_out if name in lm.kwargs}
    outer = lm.copy(engine=engine, async_engine=async_engine, **without, **changes)
    return with_own_cache(outer) if backends else outer


def with_own_cache(lm: dspy.LM) -> dspy.LM:
    """Keep DSPy's cached answers of this LM apart from those of LMs that look like it and answer otherwise.

    DSPy's key has every setting, and those that are ``None`` are never sent: one of them names what answers.
    """
    identity = json.dumps(lm_identity(lm), sort_keys=True)
    lm.kwargs[f"answered_by_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"] = None
    return lm


def backend_settings(lm: dspy.BaseLM) -> dict[str, Any]:
    """The settings of ``lm`` that a canonical request cannot carry, and that only its own backend understands."""
    if _is_managed(lm) and not isinstance(lm.engine, str):  # type: ignore[attr-defined]
        return {}  # an engine gets canonical requests only: what they do not carry is refused with or without us
    return _body_of(lm)[1]


def _body_of(lm: dspy.BaseLM) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a call with all settings of ``lm`` that a canonical request can carry, the others)."""
    body: dict[str, Any] = {"model": lm.model, "messages": [{"role": "user", "content": "?"}]}
    found = {}
    for name, value in lm.kwargs.items():
        if value is None or name in _CLIENT_SETTINGS or name in _CALL_SETTINGS:
            continue
        try:
            request_from_openai_chat({**body, name: value})
        except (LM15Error, LMError, TypeError, ValueError):
            found[name] = value
        else:
            body[name] = value
    return body, found


def _is_managed(lm: dspy.BaseLM) -> bool:
    """Whether DSPy runs this LM's calls through engines: a ``dspy.LM`` that overrides neither forward method."""
    if not isinstance(lm, dspy.LM):
        return False
    names = ("forward", "aforward")
    return all(name not in vars(lm) and getattr(type(lm), name) is getattr(dspy.LM, name) for name in names)


def answers_async(lm: dspy.BaseLM) -> bool:
    """Whether ``lm.acall`` can answer: not of a class with ``forward`` alone, nor with an engine without ``async_engine``."""
    if _is_managed(lm):
        return isinstance(lm.engine, str) or lm._async_engine_spec is not None
    return "aforward" in vars(lm) or type(lm).aforward is not dspy.BaseLM.aforward


def _engines_of(lm: dspy.BaseLM) -> tuple[Any, Any]:
    settings = backend_settings(lm)
    if not _is_managed(lm):
        is_async = answers_async(lm)
        if settings:
            return _WithMessages(lm, settings), _AsyncWithMessages(lm, settings) if is_async else None
        return legacy_engines(lm, is_async=is_async)
    assert isinstance(lm, dspy.LM)
    if isinstance(lm.engine, str):
        bare = lm.copy(cache=False, num_retries=0, callbacks=[])
        if settings or not _is_native(lm):
            return _WithMessages(bare, settings), _AsyncWithMessages(bare, settings)
        return _ThroughLM(bare), _AsyncThroughLM(bare)
    # `async_engine` has no public reader in DSPy 3.4; test_metered_keeps_the_async_engine fails when this name moves.
    return lm.engine, lm._async_engine_spec


def _is_native(lm: dspy.LM) -> bool:
    """Whether DSPy's own client serves ``lm``; LiteLLM spells a canonical request otherwise than the LM's own calls."""
    try:
        return bool(select_backend(lm).native)
    except UnsupportedFeatureError:
        return False  # engine="lm15" says so itself at the first call


class _ThroughLM:
    """DSPy's own clients, through an LM with an explicit request."""

    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm

    def complete(self, request: Request) -> Response:
        with _unseen():
            return self._lm(request)  # type: ignore[return-value]


class _AsyncThroughLM:
    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm

    async def complete(self, request: Request) -> Response:
        with _unseen():
            return await self._lm.acall(request)  # type: ignore[return-value]


class _WithMessages:
    """As the LM makes its own calls: with messages, and with all that it was set up with.

    Args:
        lm: Without cache and retries.
        settings: Those of the LM that no request carries.
    """

    def __init__(self, lm: dspy.BaseLM, settings: Mapping[str, Any]) -> None:
        self._lm = lm
        self._settings = settings

    def complete(self, request: Request) -> Response:
        with _unseen():
            arguments = _arguments(self._lm, request, self._settings)
            call = prepare(self._lm, None, arguments.pop("messages"), arguments)
            return self._response(execute(self._lm, call), request)

    def _response(self, result: Any, request: Request) -> Response:
        if not result.responses:  # of an LM of the older kind
            result.raw = as_body(result.raw)
        return result.typed(request, self._lm.model_type)  # type: ignore[no-any-return]


class _AsyncWithMessages(_WithMessages):
    async def complete(self, request: Request) -> Response:  # type: ignore[override]
        with _unseen():
            arguments = _arguments(self._lm, request, self._settings)
            call = prepare(self._lm, None, arguments.pop("messages"), arguments, asynchronous=True)
            return self._response(await aexecute(self._lm, call), request)


def _arguments(lm: dspy.BaseLM, request: Request, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments that amount to ``request``; what the LM was set up with and the request leaves open is unset."""
    sent = request_kwargs(request, "chat")
    if "max_completion_tokens" in sent and "max_completion_tokens" not in lm.kwargs:
        sent["max_tokens"] = sent.pop(
            "max_completion_tokens"
        )  # the older name, which is the LM's and some servers' only one
    if request.config.top_k is not None:
        sent["top_k"] = (
            request.config.top_k
        )  # no field of the OpenAI dialect; LiteLLM hands it to those who know it
    schema = sent.get("response_format", {}).get("json_schema")
    if lm.model_type == "responses" and schema is not None:
        sent["response_format"] = {"type": "json_schema", **schema}
    kept = {*_CLIENT_SETTINGS, *settings}
    return {**{name: None for name in lm.kwargs if name not in kept}, **sent}


def _unseen() -> Any:
    """The LM on the outside records history, usage and callbacks; the inner call must not do it again."""
    return dspy.context(disable_history=True, usage_tracker=None, callbacks=[], send_stream=None)
