"""Streams of a DSPy program's text outputs, as chunks that add up to its prediction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.streaming import StreamListener, StreamResponse
from langchain_core.runnables.utils import AddableDict

from langchain_asyndbt.chat_model import can_stream

STREAMED_ADAPTERS = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
"""DSPy can tell the fields apart in a stream of these formats."""


class FieldChunk(AddableDict):
    """A part of the outputs. Chunks add up: texts are joined, other values replace each other.

    Attributes:
        replaces: Whether it stands for all that came before: where the streamed text and the answer differ (an
            answer that was read in another format at a second attempt).
    """

    def __init__(self, *args: Any, replaces: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaces = replaces

    def __add__(self, other: Any) -> FieldChunk:
        if getattr(other, "replaces", False):
            return FieldChunk(other)
        added = FieldChunk(self)
        for name, value in other.items():
            both_texts = isinstance(added.get(name), str) and isinstance(value, str)
            added[name] = added[name] + value if both_texts else value
        return added

    def __radd__(self, other: Any) -> FieldChunk:
        return FieldChunk(other) + self


async def streamed(
    program: dspy.Module,
    inputs: dict[str, Any],
    *,
    is_async: bool,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> AsyncIterator[FieldChunk]:
    """Run ``program`` and give its outputs in chunks.

    Args:
        program: Its text outputs that one predictor alone writes come as the LM writes them, where LM and format
            can be streamed.
        inputs: Its keyword arguments.
        is_async: Whether it runs on the event loop.
        context: Entered around the run, in the run's own task.
    """
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    ended = object()

    async def run() -> None:
        # A task of its own: DSPy's streams open scopes that must not span the caller's tasks.
        try:
            with context():
                listeners = _listeners(program)
                stream = dspy.streamify(program, stream_listeners=listeners, is_async_program=is_async)
                if not listeners:
                    await pieces.put(await _whole(program, inputs, is_async))
                    return
                async for piece in stream(**inputs):
                    await pieces.put(piece)
        finally:
            await pieces.put(ended)

    task = asyncio.create_task(run())
    shown = _Shown()
    try:
        while (piece := await pieces.get()) is not ended:
            if isinstance(piece, StreamResponse):
                chunk = shown.add(piece.signature_field_name, piece.chunk)
                if chunk:
                    yield chunk
            elif isinstance(piece, dspy.Prediction):
                yield shown.rest(dict(piece.items()))
            elif isinstance(piece, dict):
                yield FieldChunk(piece)
        await task
    finally:
        task.cancel()


async def _whole(program: dspy.Module, inputs: dict[str, Any], is_async: bool) -> Any:
    return await program.acall(**inputs) if is_async else await asyncio.to_thread(program, **inputs)


def _listeners(program: dspy.Module) -> list[StreamListener]:
    """One per text output that exactly one predictor writes, as far as its LM can stream."""
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    if type(adapter) not in STREAMED_ADAPTERS:
        return []
    writers: dict[str, list[Any]] = {}
    for name, predictor in program.named_predictors():
        for output, info in predictor.signature.output_fields.items():
            if info.annotation is str:
                writers.setdefault(output, []).append((name, predictor))
    found = []
    for output, predictors in writers.items():
        if len(predictors) != 1:
            continue
        name, predictor = predictors[0]
        lm = predictor.lm or dspy.settings.lm
        if lm is not None and can_stream(lm, asynchronous=True) and can_stream(lm, asynchronous=False):
            found.append(StreamListener(output, predict=predictor, predict_name=name))
    return found


@dataclass
class _Shown:
    """What was given of each field so far.

    Attributes:
        texts: The text that was given.
        held: Blanks that came after it: inside the text or at its end, which DSPy's parsers strip from the answer.
    """

    texts: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, piece: str) -> FieldChunk | None:
        """The next chunk, ``None`` where there is nothing to give yet."""
        text = self.held.get(name, "") + piece
        if not self.texts.get(name):
            text = text.lstrip()
        new = text.rstrip()
        self.held[name] = text[len(new) :]
        if not new:
            return None
        self.texts[name] = self.texts.get(name, "") + new
        return FieldChunk({name: new})

    def rest(self, outputs: dict[str, Any]) -> FieldChunk:
        """What was not given yet, so that all chunks together are ``outputs``."""
        for name, text in self.texts.items():
            if not isinstance(outputs.get(name), str) or not outputs[name].startswith(text):
                return FieldChunk(outputs, replaces=True)
        rest = {n: value[len(self.texts[n]) :] if n in self.texts else value for n, value in outputs.items()}
        return FieldChunk(
            {name: value for name, value in rest.items() if value != "" or name not in self.texts}
        )
