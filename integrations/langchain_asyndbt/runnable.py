"""``to_runnable``: a DSPy program as a LangChain runnable, with streams, callbacks and nested runs."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import dspy
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import BaseModel, ConfigDict, create_model
from pydantic_core import PydanticUndefined

from asyndbt_dspy.errors import ConfigurationError
from langchain_asyndbt.own_loop import from_own_loop
from langchain_asyndbt.streams import FieldChunk, streamed
from langchain_asyndbt.tracing import CONFIG_SETTING, LLMRuns


class ProgramRunnable(Runnable[Any, dict[str, Any]]):
    """A DSPy program as a runnable: a dictionary of inputs in, a dictionary of outputs out.

    Inputs that the program does not know are left out, so that it works as a LangGraph node on the whole state.

    Attributes:
        program: Runs as it is; its LMs, limits and demos are its own.
    """

    def __init__(
        self,
        program: dspy.Module,
        *,
        name: str | None,
        input_type: type[BaseModel],
        output_type: type[BaseModel],
        settings: Mapping[str, Any],
    ) -> None:
        self.program = program
        self.name = name or type(program).__name__
        self._input_type = input_type
        self._output_type = output_type
        self._settings = dict(settings)

    @property
    def InputType(self) -> Any:
        """The type of the inputs."""
        return self._input_type

    @property
    def OutputType(self) -> Any:
        """The type of the outputs."""
        return self._output_type

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """The inputs as a Pydantic model."""
        return self._input_type

    def get_output_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """The outputs as a Pydantic model."""
        return self._output_type

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Run the program."""
        return self._call_with_config(self._run, input, config)

    async def ainvoke(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Run the program on the event loop; a plain program runs in a thread."""
        return await self._acall_with_config(self._arun, input, config)

    def stream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """Chunks that add up to what ``invoke`` gives; text outputs come as the LM writes them."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """``stream`` on the event loop."""

        async def once() -> AsyncIterator[Any]:
            yield input

        async for chunk in self.atransform(once(), config, **kwargs):
            yield chunk

    def transform(
        self, input: Iterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """``stream`` of what comes before; waits until the inputs are whole."""
        yield from self._transform_stream_with_config(input, self._stream, config)

    async def atransform(
        self, input: AsyncIterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """``transform`` on the event loop."""
        async for chunk in self._atransform_stream_with_config(input, self._astream, config):
            yield chunk

    def _run(self, value: Any, config: RunnableConfig) -> dict[str, Any]:
        inputs = self._inputs(value)
        with self._context(config):
            if _runs_async_only(self.program):
                return _outputs(_run_now(self.program.acall(**inputs)))
            return _outputs(self.program(**inputs))

    async def _arun(self, value: Any, config: RunnableConfig) -> dict[str, Any]:
        inputs = self._inputs(value)
        with self._context(config):
            if runs_async(self.program):
                return _outputs(await self.program.acall(**inputs))
            return _outputs(await asyncio.to_thread(self.program, **inputs))

    def _stream(
        self, values: Iterator[Any], run_manager: Any, config: RunnableConfig
    ) -> Iterator[FieldChunk]:
        given = list(values)
        if not given:  # as of LangChain's own runnables: nothing comes of nothing
            return
        inputs = self._inputs(_joined(given))
        with self._context(config):
            # The thread of the loop copies this context, so DSPy's settings and LangChain's run go with it.
            chunks = from_own_loop(lambda: streamed(self.program, inputs, is_async=runs_async(self.program)))
        yield from chunks

    async def _astream(
        self, values: AsyncIterator[Any], run_manager: Any, config: RunnableConfig
    ) -> AsyncIterator[FieldChunk]:
        given = [value async for value in values]
        if not given:
            return
        inputs = self._inputs(_joined(given))
        async for chunk in streamed(
            self.program, inputs, is_async=runs_async(self.program), context=lambda: self._context(config)
        ):
            yield chunk

    def _inputs(self, value: Any) -> dict[str, Any]:
        names = self._input_type.model_fields
        if isinstance(value, BaseModel):
            value = {name: getattr(value, name) for name in type(value).model_fields}
        elif not isinstance(value, Mapping) and hasattr(value, "__dict__") and not isinstance(value, str):
            value = vars(value)
        if not isinstance(value, Mapping):
            if len(names) != 1:
                raise ConfigurationError(
                    f"inputs are {list(names)}; got a {type(value).__name__}, give a dictionary"
                )
            return {next(iter(names)): value}
        if not names:
            return dict(value)
        missing = [name for name, field in names.items() if field.is_required() and name not in value]
        if missing:
            raise ConfigurationError(f"inputs are {list(names)}; missing: {missing}, got {list(value)}")
        return {name: value[name] for name in names if name in value}

    def _context(self, config: RunnableConfig) -> AbstractContextManager[Any]:
        config = ensure_config(config)
        runs = LLMRuns(config.get("callbacks"), config.get("tags"), config.get("metadata"))
        child: RunnableConfig = {
            key: config[key]  # type: ignore[literal-required, misc]
            for key in ("callbacks", "tags", "metadata", "configurable")
            if config.get(key)
        }
        known = [callback for callback in dspy.settings.callbacks if not isinstance(callback, LLMRuns)]
        return dspy.context(**self._settings, callbacks=[*known, runs], **{CONFIG_SETTING: child})


def to_runnable(
    program: dspy.Module,
    *,
    name: str | None = None,
    lm: dspy.BaseLM | None = None,
    adapter: dspy.Adapter | None = None,
    input_type: type[BaseModel] | None = None,
    output_type: type[BaseModel] | None = None,
) -> Runnable[Any, dict[str, Any]]:
    """A DSPy program as a LangChain runnable, for chains and as a LangGraph node.

    Args:
        program: Not copied.
        name: Of its runs; default: the program's class.
        lm: For predictors without an own LM; default: that of ``dspy.settings`` when it runs.
        adapter: Likewise.
        input_type: Schema of the inputs; default: from the signature or from the arguments of ``forward``.
        output_type: Schema of the outputs; default: from the signature, else anything.
    """
    settings = {key: value for key, value in (("lm", lm), ("adapter", adapter)) if value is not None}
    return ProgramRunnable(
        program,
        name=name,
        input_type=input_type or _input_model(program),
        output_type=output_type or _output_model(program),
        settings=settings,
    )


def runs_async(program: dspy.Module) -> bool:
    """Whether ``program.acall`` runs what ``program(...)`` runs: not where a subclass overrides ``forward`` alone."""
    for cls in type(program).__mro__:
        if "aforward" in vars(cls):
            return True
        if "forward" in vars(cls):
            return False
    return False


def _runs_async_only(program: dspy.Module) -> bool:
    return not hasattr(type(program), "forward")


def _run_now(coroutine: Any) -> Any:
    """The result of a coroutine, in a loop of its own where one runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)

    async def once() -> AsyncIterator[Any]:
        yield await coroutine

    return next(from_own_loop(once))


def _outputs(prediction: Any) -> dict[str, Any]:
    if isinstance(prediction, Mapping):
        return dict(prediction)
    if isinstance(prediction, dspy.Prediction):
        return dict(prediction.items())
    return {"output": prediction}


def _joined(values: list[Any]) -> Any:
    joined = values[0]
    for value in values[1:]:
        joined = joined + value
    return joined


def _signature(program: dspy.Module) -> Any:
    own = getattr(program, "signature", None)
    if own is not None and hasattr(own, "input_fields"):
        return own
    predictors = program.predictors()
    # ChainOfThought and the like: one predictor whose inputs are the program's.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(program))
    return predictors[0].signature if len(predictors) == 1 and takes_any else None


def _parameters(program: dspy.Module) -> list[inspect.Parameter]:
    cls = type(program)
    function = getattr(cls, "forward", None) or getattr(cls, "aforward", None)
    return list(inspect.signature(function).parameters.values())[1:] if function is not None else []


def _input_model(program: dspy.Module) -> type[BaseModel]:
    signature = _signature(program)
    fields: dict[str, Any] = {}
    if signature is not None:
        for name, info in signature.input_fields.items():
            default = ... if info.default is PydanticUndefined else info.default
            fields[name] = (info.annotation, default)
    else:
        for parameter in _parameters(program):
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                default = ... if parameter.default is parameter.empty else parameter.default
                fields[parameter.name] = (Any, default)
    return _model(f"{type(program).__name__}Input", fields)


def _output_model(program: dspy.Module) -> type[BaseModel]:
    signature = _signature(program)
    outputs = signature.output_fields if signature is not None else {}
    fields = {name: (info.annotation, ...) for name, info in outputs.items()}
    return _model(f"{type(program).__name__}Output", fields)


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    config = ConfigDict(arbitrary_types_allowed=True, extra="allow")
    return create_model(name, __config__=config, **fields)
