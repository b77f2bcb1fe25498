"""Find the prompts of a chain, and put something else in their places.

``replace`` walks through what LangChain composes runnables of. Where a prompt is followed by a model (and a parser),
a visitor says what comes there. Everything else stays the very object it was: retrieval, functions, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableParallel,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase, RunnableEachBase
from langchain_core.runnables.passthrough import RunnableAssign
from langchain_core.runnables.router import RouterRunnable

from asyndbt_dspy.errors import ExportError
from langchain_asyndbt.worker_lm import base_model

MAX_DEPTH = 100
STRUCTURED_KEYS = ("ls_structured_output_format", "structured_output_format", "response_format")


@dataclass(frozen=True)
class PromptSite:
    """One prompt of a chain with the models that it is sent to.

    Attributes:
        prompt: The prompt.
        calls: One per model that follows: usually one, several where a parallel step follows.
        is_last: Whether the chain's output is what the one call gives, or holds it under ``key``.
        key: Where the chain gives a dictionary; else ``None``.
    """

    prompt: BasePromptTemplate[Any]
    calls: tuple[ModelSite, ...]
    is_last: bool
    key: str | None = None


@dataclass(frozen=True)
class ModelSite:
    """A model after a prompt, and the parser after the model.

    Attributes:
        model: The model with its bindings.
        parser: ``None`` where the message itself goes on.
    """

    model: Runnable[Any, Any]
    parser: Runnable[Any, Any] | None


Visitor = Callable[[PromptSite], "tuple[Runnable[Any, Any], Sequence[Sequence[Runnable[Any, Any]]]]"]
"""What comes in place of a prompt, and the steps in place of each (model, parser) of its calls."""


def replace(chain: Runnable[Any, Any], visit: Visitor) -> Runnable[Any, Any]:
    """The chain with what ``visit`` gives in place of its prompts, models and parsers.

    Raises:
        ExportError: a prompt that is not followed by a model.
    """
    return _walk(chain, visit, is_last=True, depth=0)


def bound_prompt(runnable: Any) -> BasePromptTemplate[Any] | None:
    """The prompt inside bindings (``with_config``), ``None`` if there is none."""
    while isinstance(runnable, RunnableBindingBase):
        runnable = runnable.bound
    return runnable if isinstance(runnable, BasePromptTemplate) else None


def rebound(runnable: Any, prompt: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """``runnable`` with ``prompt`` inside its bindings."""
    if isinstance(runnable, RunnableBindingBase):
        return runnable.model_copy(update={"bound": rebound(runnable.bound, prompt)})
    return prompt


def _walk(runnable: Any, visit: Visitor, *, is_last: bool, depth: int, key: str | None = None) -> Any:
    if depth > MAX_DEPTH:
        raise ExportError(f"the chain is nested deeper than {MAX_DEPTH} levels")
    if bound_prompt(runnable) is not None:
        raise ExportError(
            f"prompt {_name(runnable)} is not followed by a model, so its answers cannot be scored"
        )
    if base_model(runnable) is not None:
        return runnable

    def inner(item: Any, last: bool = False, key: str | None = key) -> Any:
        return _walk(item, visit, is_last=last, depth=depth + 1, key=key)

    if isinstance(runnable, RunnableSequence):
        return _walk_steps(runnable, visit, is_last=is_last, depth=depth, key=key)
    if isinstance(runnable, RunnableParallel):
        # A chain that ends so gives a dictionary of what the steps give. Dictionaries inside it have no keys of their own here.
        steps = {
            name: inner(step, is_last and key is None, key=name) for name, step in runnable.steps__.items()
        }
        return _changed(runnable, steps__=(dict(runnable.steps__), steps))
    if isinstance(runnable, RunnableBranch):
        # All branches give the chain's output; conditions run as they are.
        branches = [(condition, inner(step, is_last)) for condition, step in runnable.branches]
        default = inner(runnable.default, is_last)
        return _changed(
            runnable, branches=(list(runnable.branches), branches), default=(runnable.default, default)
        )
    if isinstance(runnable, RunnableAssign):
        return _changed(runnable, mapper=(runnable.mapper, inner(runnable.mapper, is_last)))
    if isinstance(runnable, RunnableBindingBase):
        return _changed(runnable, bound=(runnable.bound, inner(runnable.bound, is_last)))
    if isinstance(runnable, RunnableEachBase):
        return _changed(runnable, bound=(runnable.bound, inner(runnable.bound)))
    if isinstance(runnable, RunnableWithFallbacks):
        first = inner(runnable.runnable, is_last)
        fallbacks = [inner(item, is_last) for item in runnable.fallbacks]
        return _changed(
            runnable,
            runnable=(runnable.runnable, first),
            fallbacks=(list(runnable.fallbacks), fallbacks),
        )
    if isinstance(runnable, RouterRunnable):
        routes = {name: inner(route, is_last) for name, route in runnable.runnables.items()}
        return _changed(runnable, runnables=(dict(runnable.runnables), routes))
    return runnable


def _walk_steps(sequence: Any, visit: Visitor, *, is_last: bool, depth: int, key: str | None) -> Any:
    steps = list(sequence.steps)
    done: list[Any] = []
    index = 0
    while index < len(steps):
        prompt = bound_prompt(steps[index])
        if prompt is None:
            last = is_last and index == len(steps) - 1
            done.append(_walk(steps[index], visit, is_last=last, depth=depth + 1, key=key))
            index += 1
            continue
        if index + 1 == len(steps):
            raise ExportError(
                f"prompt {_name(prompt)} is not followed by a model, so its answers cannot be scored"
            )
        replaced, used = _site(prompt, steps[index:], visit, is_last, key)
        # The prompt keeps its own config and tags.
        done += [rebound(steps[index], replaced[0]), *replaced[1:]]
        index += used
    if all(new is old for new, old in zip(done, steps, strict=False)) and len(done) == len(steps):
        return sequence
    return sequence.model_copy(update={"first": done[0], "middle": done[1:-1], "last": done[-1]})


def _site(
    prompt: Any, steps: list[Any], visit: Visitor, is_last: bool, key: str | None
) -> tuple[list[Any], int]:
    """What comes in place of the prompt at ``steps[0]`` and its calls, and how many steps that takes up."""
    following = steps[1]
    if base_model(following) is not None:
        parser = steps[2] if len(steps) > 2 and _is_parser(steps[2], following) else None
        used = 3 if parser is not None else 2
        site = PromptSite(prompt, (ModelSite(following, parser),), is_last and used == len(steps), key)
        new_prompt, calls = visit(site)
        return [new_prompt, *calls[0]], used
    if isinstance(following, RunnableParallel):
        return _parallel_site(prompt, following, visit), 2
    raise ExportError(
        f"prompt {_name(prompt)} is followed by {_name(following)}, not by a model, so its answers cannot be scored; "
        "put such steps before the prompt or after the model"
    )


def _parallel_site(prompt: Any, parallel: Any, visit: Visitor) -> list[Any]:
    """A prompt that goes to several models at once, or to one whose raw message is kept beside what is parsed."""
    sites, rests = [], []
    for name, step in parallel.steps__.items():
        steps = list(step.steps) if isinstance(step, RunnableSequence) else [step]
        if base_model(steps[0]) is None:
            raise ExportError(
                f"prompt {_name(prompt)} goes to step {name!r} ({_name(steps[0])}), which is no model, beside models; "
                "put that step before the prompt"
            )
        parser = steps[1] if len(steps) > 1 and _is_parser(steps[1], steps[0]) else None
        sites.append(ModelSite(steps[0], parser))
        rests.append(steps[2 if parser is not None else 1 :])
    new_prompt, calls = visit(PromptSite(prompt, tuple(sites), False))
    values: dict[str, Any] = {}
    for name, call, rest in zip(parallel.steps__, calls, rests, strict=True):
        chosen = [*call, *rest]
        values[name] = chosen[0] if len(chosen) == 1 else RunnableSequence(*chosen)
    return [new_prompt, parallel.model_copy(update={"steps__": values})]


def _is_parser(step: Any, model: Any) -> bool:
    """An output parser; after a model that is held to a schema, whatever follows (some providers use functions)."""
    if isinstance(step, BaseOutputParser):
        return True
    kwargs = getattr(model, "kwargs", None) or {}
    is_prompt_like = bound_prompt(step) is not None or base_model(step) is not None
    is_composed = isinstance(
        step, RunnableSequence | RunnableParallel | RunnableWithFallbacks | RunnableBranch
    )
    return any(key in kwargs for key in STRUCTURED_KEYS) and not is_prompt_like and not is_composed


def _changed(runnable: Any, /, **fields: tuple[Any, Any]) -> Any:
    """A copy with the new values, or the runnable itself where none is new."""
    updates = {name: new for name, (old, new) in fields.items() if not _same(old, new)}
    return runnable.model_copy(update=updates) if updates else runnable


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        return all(old[name] is new[name] for name in old)
    if isinstance(old, list):
        return all(_same(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, tuple):
        return all(a is b for a, b in zip(old, new, strict=True))
    return old is new


def _name(runnable: Any) -> str:
    return repr(getattr(runnable, "name", None) or type(runnable).__name__)
