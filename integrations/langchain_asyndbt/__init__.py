"""LangChain and AsynDBT, both ways.

``optimize_chain`` optimizes the prompts of a LangChain chain; ``to_prompt`` and ``to_runnable`` bring a DSPy
program to LangChain; ``langchain_lm`` and ``to_chat_model`` do the same for models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ChainProgram": "langchain_asyndbt.chain_program",
    "DSPyChatModel": "langchain_asyndbt.chat_model",
    "aoptimize_chain": "langchain_asyndbt.optimize",
    "langchain_lm": "langchain_asyndbt.worker_lm",
    "load_prompt": "langchain_asyndbt.prompt_export",
    "optimize_chain": "langchain_asyndbt.optimize",
    "prompt_inputs": "langchain_asyndbt.prompt_export",
    "response_format": "langchain_asyndbt.prompt_export",
    "to_chat_model": "langchain_asyndbt.chat_model",
    "to_parser": "langchain_asyndbt.prompt_export",
    "to_program": "langchain_asyndbt.chain_program",
    "to_prompt": "langchain_asyndbt.prompt_export",
    "to_runnable": "langchain_asyndbt.runnable",
}

__all__ = [
    "ChainProgram",
    "DSPyChatModel",
    "aoptimize_chain",
    "langchain_lm",
    "load_prompt",
    "optimize_chain",
    "prompt_inputs",
    "response_format",
    "to_chat_model",
    "to_parser",
    "to_program",
    "to_prompt",
    "to_runnable",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "langchain_core":
            raise
        remedy = "pip install 'asyndbt-dspy[langchain]'"
        raise ModuleNotFoundError(f"{name} needs {error.name}: {remedy}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from langchain_asyndbt.chain_program import ChainProgram, to_program
    from langchain_asyndbt.chat_model import DSPyChatModel, to_chat_model
    from langchain_asyndbt.optimize import aoptimize_chain, optimize_chain
    from langchain_asyndbt.prompt_export import (
        load_prompt,
        prompt_inputs,
        response_format,
        to_parser,
        to_prompt,
    )
    from langchain_asyndbt.runnable import to_runnable
    from langchain_asyndbt.worker_lm import langchain_lm
