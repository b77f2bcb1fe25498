"""The caller's LangChain run, carried through DSPy, so that runs below it are nested under it."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from langchain_core.callbacks import CallbackManager
from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config

from langchain_asyndbt.messages import from_request

CONFIG_SETTING = "langchain_run_config"
"""Key in ``dspy.settings``: DSPy copies its settings into its threads, where context variables may be lost."""

TRACED_SETTING = "langchain_traced"
"""Key in ``dspy.settings``: this call is reported by a LangChain model around it."""

TRACES_ITSELF = "traces_in_langchain"
"""Attribute of an engine whose calls already are LangChain runs."""


def child_config() -> RunnableConfig | None:
    """The config for a run below the caller's: LangChain's own context, else the one in DSPy's settings."""
    if ensure_config().get("callbacks") is not None:
        return None
    config: RunnableConfig | None = dspy.settings.get(CONFIG_SETTING, None)
    return config


class LLMRuns(BaseCallback):
    """A DSPy callback that reports each LM call as a chat model run, and each tool call as a tool run.

    Args:
        callbacks: The parent run's child callbacks.
        tags: Tags of the runs.
        metadata: Metadata of the runs.
    """

    def __init__(self, callbacks: Any, tags: list[str] | None, metadata: dict[str, Any] | None) -> None:
        self._manager = CallbackManager.configure(
            inheritable_callbacks=callbacks, inheritable_tags=tags, inheritable_metadata=metadata
        )
        self._runs: dict[str, Any] = {}

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        traces_itself = getattr(getattr(instance, "engine", None), TRACES_ITSELF, False)
        if traces_itself or dspy.settings.get(TRACED_SETTING, False):
            return
        serialized = {
            "name": str(getattr(instance, "model", type(instance).__name__)),
            "lc": 1,
            "type": "not_implemented",
        }
        model = str(getattr(instance, "model", ""))
        runs = self._manager.on_chat_model_start(
            serialized,
            [_messages(inputs)],
            invocation_params={"model": model, "_type": "dspy"},
            name=model or None,
        )
        self._runs[call_id] = runs[0]

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        run = self._runs.pop(call_id, None)
        if run is None:
            return
        if exception is not None:
            run.on_llm_error(exception)
            return
        generations = [ChatGeneration(message=_answer(output)) for output in _listed(outputs)]
        run.on_llm_end(LLMResult(generations=[generations]))

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        name = str(getattr(instance, "name", type(instance).__name__))
        run = self._manager.on_tool_start({"name": name}, str(inputs.get("kwargs", inputs)), name=name)
        self._runs[call_id] = run

    def on_tool_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        run = self._runs.pop(call_id, None)
        if run is None:
            return
        if exception is not None:
            run.on_tool_error(exception)
        else:
            run.on_tool_end(str(outputs))


def _messages(inputs: dict[str, Any]) -> list[BaseMessage]:
    request = inputs.get("request") or inputs.get("prompt")
    if hasattr(request, "messages"):
        return list(from_request(request))
    if inputs.get("messages"):
        return convert_to_messages(inputs["messages"])
    return convert_to_messages([("human", str(inputs.get("prompt") or ""))])


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _answer(output: Any) -> AIMessage:
    if isinstance(output, dict):
        return AIMessage(content=output.get("text") or "")
    text = getattr(getattr(output, "message", None), "text", None)
    return AIMessage(content=text if text is not None else str(output or ""))
