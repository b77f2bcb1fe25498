"""Any LM as a pair of engines that make one attempt per call: the common ground of metering and fallback.

DSPy's own clients are reached through the LM itself, with an explicit request and without cache and retries: which
backend serves a request, its connections and its errors stay DSPy's business, for ``engine="auto"`` and ``"litellm"``.
The LM on the outside keeps cache, retries, history and callbacks, so that each of them happens once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy.clients.engines import AsyncLegacyEngine, LegacyEngine
from dspy.lm15 import Request, Response, UnsupportedFeatureError

from asyndbt_dspy.errors import ConfigurationError

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

    Args:
        lm: Any LM; never changed.

    Raises:
        ConfigurationError: a text-completion model; it takes no requests that could be measured beforehand.
    """

    def __init__(self, lm: dspy.BaseLM) -> None:
        if getattr(lm, "model_type", "chat") == "text":
            raise ConfigurationError(
                f"{lm.model!r} has model_type='text', whose calls can be neither limited nor counted; use 'chat'"
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

    def complete(self, request: Request) -> Response:
        """One attempt in this thread."""
        return self._sync.complete(self._own(request))  # type: ignore[no-any-return]

    async def acomplete(self, request: Request) -> Response:
        """One attempt in this task.

        Raises:
            UnsupportedFeatureError: the LM, or its own engine, has no async side.
        """
        if self._async is None:
            raise UnsupportedFeatureError(
                f"the LM {self.model!r} has no async side; give async_engine= to its dspy.LM or aforward to its class, or "
                "run a program without aforward"
            )
        return await self._async.complete(self._own(request))  # type: ignore[no-any-return]

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
    if _is_managed(lm):
        without_client = {name: None for name in _CLIENT_SETTINGS if name in lm.kwargs}
        return lm.copy(engine=engine, async_engine=async_engine, **without_client, **changes)
    kwargs = {name: value for name, value in lm.kwargs.items() if name not in _CLIENT_SETTINGS}
    callbacks = changes.get("callbacks", lm.callbacks)
    # Not every own LM may be cached (dspy.utils.DummyLM never is), and its answers were not before.
    return dspy.LM(
        lm.model, engine=engine, async_engine=async_engine, cache=False, callbacks=callbacks, **kwargs
    )


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
    if not _is_managed(lm):
        with warnings.catch_warnings():
            # DSPy 3.4 has no other way to an LM of the old kind, and drops both together in 3.5.
            warnings.simplefilter("ignore", DeprecationWarning)
            return LegacyEngine(lm), AsyncLegacyEngine(lm) if answers_async(lm) else None
    assert isinstance(lm, dspy.LM)
    if isinstance(lm.engine, str):
        bare = lm.copy(cache=False, num_retries=0, callbacks=[])
        return _ThroughLM(bare), _AsyncThroughLM(bare)
    # `async_engine` has no public reader in DSPy 3.4; test_metered_keeps_the_async_engine fails when this name moves.
    return lm.engine, lm._async_engine_spec


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


def _unseen() -> Any:
    """The LM on the outside records history, usage and callbacks; the inner call must not do it again."""
    return dspy.context(disable_history=True, usage_tracker=None, callbacks=[], send_stream=None)
