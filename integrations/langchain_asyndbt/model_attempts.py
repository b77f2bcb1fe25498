"""The attempts within one call of a LangChain model: its ``with_retry`` and ``with_fallbacks``, with each attempt made by another.

A call of ``model.with_retry()`` may send several requests, and who counts requests must stand around each of them. So the
combination is kept, with its order, its exceptions and its waits, and only the models at its ends are replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from dspy import lm15
from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable

from asyndbt_dspy.errors import ConfigurationError
from langchain_asyndbt.failures import as_lm15_errors

Each = Callable[[Callable[[], lm15.Response], int], lm15.Response]
"""``(send, number)`` makes one attempt: calls ``send``, once, and gives or raises what that does; or raises in its place.
``number`` is that of the model that is asked, from 0."""
AsyncEach = Callable[[Callable[[], Awaitable[lm15.Response]], int], Awaitable[lm15.Response]]
Model: TypeAlias = Runnable[Any, Any]

_MAX_DEPTH = 20


def with_attempts(model: Model, each: Each | AsyncEach, to_response: Callable[[Any], lm15.Response]) -> Model:
    """``model`` with every attempt made through ``each``; to be invoked within ``as_raised``.

    Args:
        model: A model, alone or combined as ``taken_apart`` knows it.
        each: For ``invoke``; for ``ainvoke`` an async one.
        to_response: What ``each`` is shown of an answer.

    Raises:
        ConfigurationError: see ``taken_apart``.
    """
    numbers = itertools.count()
    return taken_apart(model, lambda one: _Attempt(one, each, to_response, next(numbers)))


def taken_apart(model: Model, replaced: Callable[[Model], Model], depth: int = 0) -> Model:
    """``model`` with ``replaced(one)`` in place of every model that it may ask.

    Known are bindings, retries, fallbacks (also by a sequence with models, or by what asks none), and configurable fields and
    alternatives, which are chosen at the call.

    Raises:
        ConfigurationError: a combination of another kind with a model in it: it may ask whom it likes as often as it likes.
    """

    def inner(one: Any) -> Any:
        return taken_apart(one, replaced, depth + 1)

    if isinstance(model, BaseLanguageModel):
        return replaced(model)
    if isinstance(model, DynamicRunnable):
        inner(model.default)  # refused now rather than at the call
        return _Chosen(model, inner)
    if isinstance(model, RunnableBindingBase):  # RunnableRetry is one
        return model.model_copy(update={"bound": inner(model.bound)})
    if isinstance(model, RunnableWithFallbacks):
        others = [inner(one) for one in model.fallbacks]
        return model.model_copy(update={"runnable": inner(model.runnable), "fallbacks": others})
    if isinstance(model, RunnableSequence):
        first, *middle, last = [inner(step) for step in model.steps]
        return model.model_copy(update={"first": first, "middle": middle, "last": last})
    if _holds_model(model):
        raise ConfigurationError(
            f"a {type(model).__name__} around a model may ask it several times, and these calls can be neither limited nor "
            "counted; use with_retry and with_fallbacks, or give the worker a list of LMs"
        )
    return model


@contextmanager
def as_raised() -> Iterator[None]:
    """Inside, what ``each`` raised in place of an attempt comes through retries and fallbacks at once, and out as it was."""
    try:
        yield
    except _NotMade as error:
        raise error.reason from error.reason.__cause__


class _NotMade(BaseException):
    """An attempt that was not made. No ``Exception``: retries and fallbacks of these would ask again what the budget refuses."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Attempt(Runnable[Any, Any]):
    """A model each of whose calls is made through ``each``; it answers and raises as the model does."""

    def __init__(
        self, model: Model, each: Any, to_response: Callable[[Any], lm15.Response], number: int
    ) -> None:
        self.name = model.get_name()
        self._model = model
        self._each = each
        self._to_response = to_response
        self._number = number

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Ask once."""
        made = _Made()

        def send() -> lm15.Response:
            with as_lm15_errors(), made:
                made.answer = self._model.invoke(input, config, **kwargs)
            return self._to_response(made.answer)

        try:
            self._each(send, self._number)
        except Exception as error:  # noqa: BLE001 - told apart and raised again
            refused = error
        else:
            return made.answer
        raise made.raised or _NotMade(refused)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """``invoke`` on the event loop."""
        made = _Made()

        async def send() -> lm15.Response:
            with as_lm15_errors(), made:
                made.answer = await self._model.ainvoke(input, config, **kwargs)
            return self._to_response(made.answer)

        try:
            await self._each(send, self._number)
        except Exception as error:  # noqa: BLE001 - as above
            refused = error
        else:
            return made.answer
        raise made.raised or _NotMade(refused)


class _Made:
    """What a model gave or raised, as LangChain's retries and fallbacks know it: an attempt reports in DSPy's terms."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.raised: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.raised = error if isinstance(error, Exception) else None


class _Chosen(Runnable[Any, Any]):
    """A configurable model, taken apart as the config of the call chooses it."""

    def __init__(self, model: Any, apart: Callable[[Any], Model]) -> None:
        self.name = model.get_name()
        self._model = model
        self._apart = apart

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Ask the chosen one."""
        chosen, config = self._chosen(config)
        return chosen.invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """``invoke`` on the event loop."""
        chosen, config = self._chosen(config)
        return await chosen.ainvoke(input, config, **kwargs)

    def _chosen(self, config: RunnableConfig | None) -> tuple[Model, RunnableConfig]:
        chosen, config = self._model.prepare(config)
        try:
            return self._apart(chosen), config
        except ConfigurationError as error:
            raise _NotMade(error) from error


def _holds_model(value: Any, depth: int = 0) -> bool:
    """Whether a model is somewhere within, as far as can be seen: what a function asks by a global name cannot."""
    if isinstance(value, BaseLanguageModel) or depth > _MAX_DEPTH:
        return True
    if isinstance(value, RunnableLambda):
        within: Any = value.deps
    elif isinstance(value, Runnable):
        within = vars(value).values()
    elif isinstance(value, Mapping):
        within = value.values()
    else:
        within = value if isinstance(value, list | tuple) else ()
    return any(_holds_model(one, depth + 1) for one in within)
