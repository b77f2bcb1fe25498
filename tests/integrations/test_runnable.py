"""A DSPy program in LangChain: one answer however it is called, real streams, nested runs, a LangGraph node."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from typing import Any, TypedDict
from uuid import UUID

import dspy
import pytest
from dspy.lm15 import StreamDeltaEvent, StreamStartEvent, TextDelta
from langchain_asyndbt import langchain_lm, to_chat_model, to_runnable
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from scripted_chat import AsyncChatEngine, ChatEngine, chat_lm

from asyndbt_dspy.errors import ConfigurationError


def answer(request: Any) -> str:
    """A value for every field that is asked for, made of the question; inner and outer blanks."""
    ask = request.messages[-1].text
    said = re.search(r"## \]\]\n(.*?)\n", ask).group(1)
    names = [n for n in re.findall(r"`\[\[ ## (\w+) ## \]\]`", ask) if n != "completed"]
    body = "".join(f"[[ ## {n} ## ]]\n  {n} of {said}:  two  blanks,\n\nnew lines \n\n" for n in names)
    return body + "[[ ## completed ## ]]"


class Plain(dspy.Module):
    """Has no `aforward`: runs in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> idea")
        self.second = dspy.Predict("question, idea -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        idea = self.first(question=question).idea
        return self.second(question=question, idea=idea)


class AsyncOnly(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> dspy.Prediction:
        return await self.step.acall(question=question)


@pytest.mark.parametrize("program", [Plain, AsyncOnly])
def test_nothing_comes_of_an_empty_stream_as_of_langchains_own(program: Any) -> None:
    async def nothing() -> AsyncIterator[Any]:
        for value in ():
            yield value

    async def collected(runnable: Any) -> list[Any]:
        return [chunk async for chunk in runnable.atransform(nothing())]

    for runnable in (ChatPromptTemplate([("human", "{question}")]), to_runnable(program())):
        assert list(runnable.transform(iter([]))) == []
        assert asyncio.run(collected(runnable)) == []


PROGRAMS = {
    "predict": lambda: dspy.Predict("question -> answer"),
    "chain_of_thought": lambda: dspy.ChainOfThought("question -> answer"),
    "plain": Plain,
    "async_only": AsyncOnly,
}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> dspy.Module:
    return PROGRAMS[request.param]()


def added(chunks: list[Any]) -> Any:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return dict(whole)


def test_every_way_to_call_gives_the_same(program: dspy.Module) -> None:
    runnable = to_runnable(program, lm=chat_lm(answer))
    inputs = [{"question": f"q{n}"} for n in range(3)]
    expected = [runnable.invoke(value) for value in inputs]
    assert expected[0]["answer"].startswith("answer of q0:  two  blanks")
    assert runnable.batch(inputs) == expected

    async def streamed(value: dict[str, str]) -> Any:
        return added([chunk async for chunk in runnable.astream(value)])

    async def others() -> tuple[Any, ...]:
        called = [await runnable.ainvoke(value) for value in inputs]
        streams = [await streamed(value) for value in inputs]
        return called, await runnable.abatch(inputs), streams

    assert asyncio.run(others()) == (expected, expected, expected)
    assert [added(list(runnable.stream(value))) for value in inputs] == expected

    async def inside_a_loop() -> Any:
        return runnable.invoke(inputs[0]), added(list(runnable.stream(inputs[0])))

    assert asyncio.run(inside_a_loop()) == (expected[0], expected[0])


def test_tokens_come_as_they_are_written() -> None:
    lm = chat_lm(answer)
    chunks = list(to_runnable(dspy.Predict("question -> answer"), lm=lm).stream({"question": "q"}))
    assert len(chunks) > 4
    assert lm.engine.streamed == 1


class EndlessEngine(AsyncChatEngine):
    """Streams twenty words, and then waits for good; says when it is cancelled."""

    def __init__(self, engine: ChatEngine) -> None:
        super().__init__(engine)
        self.cancelled = threading.Event()

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        try:
            yield StreamStartEvent(id="r1", model=request.model)
            for word in ("[[ ## answer ## ]]\n", *(f"word {n} " for n in range(20))):
                yield StreamDeltaEvent(delta=TextDelta(text=word))
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


@pytest.mark.parametrize("made", ["runnable", "chat_model"])
def test_a_stream_that_is_no_longer_read_is_no_longer_asked_for(made: str) -> None:
    engine = ChatEngine()
    endless = EndlessEngine(engine)
    lm = dspy.LM("test/endless", engine=engine, async_engine=endless, cache=False)
    if made == "runnable":
        stream = to_runnable(dspy.Predict("question -> answer"), lm=lm).stream({"question": "q"})
    else:
        stream = to_chat_model(lm).stream("q")
    next(stream)
    assert not endless.cancelled.is_set()
    stream.close()
    assert endless.cancelled.wait(20)


def test_an_lm_that_cannot_stream_gives_one_chunk() -> None:
    lm = chat_lm(answer)

    class Silent:
        def __init__(self, engine: Any) -> None:
            self.complete = engine.complete

    class AsyncSilent:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        async def complete(self, request: Any) -> Any:
            return self._engine.complete(request)

    silent = dspy.LM(
        "test/silent", engine=Silent(lm.engine), async_engine=AsyncSilent(lm.engine), cache=False
    )
    runnable = to_runnable(dspy.Predict("question -> answer"), lm=silent)
    assert [dict(c) for c in runnable.stream({"question": "q"})] == [runnable.invoke({"question": "q"})]
    chat = to_chat_model(silent)
    assert (
        "".join(str(chunk.content) for chunk in chat.stream("[[ ## q ## ]]\nhello\n"))
        == chat.invoke("[[ ## q ## ]]\nhello\n").content
    )


class Runs(BaseCallbackHandler):
    """Keeps which run was started under which."""

    def __init__(self) -> None:
        self.parents: dict[UUID, UUID | None] = {}
        self.kinds: list[tuple[str, str, UUID, UUID | None]] = []
        self.ended: list[UUID] = []

    def note(self, kind: str, name: Any, run_id: UUID, parent_run_id: UUID | None) -> None:
        self.parents[run_id] = parent_run_id
        self.kinds.append((kind, str(name), run_id, parent_run_id))

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: Any = None, **k: Any
    ) -> None:
        self.note("chain", k.get("name"), run_id, parent_run_id)

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: UUID, parent_run_id: Any = None, **k: Any
    ) -> None:
        self.note("llm", k.get("name"), run_id, parent_run_id)

    def on_tool_start(
        self, serialized: Any, text: str, *, run_id: UUID, parent_run_id: Any = None, **k: Any
    ) -> None:
        self.note("tool", k.get("name"), run_id, parent_run_id)

    def on_llm_end(self, response: Any, *, run_id: UUID, **k: Any) -> None:
        self.ended.append(run_id)

    def root(self, run_id: UUID) -> UUID:
        while self.parents.get(run_id) is not None:
            run_id = self.parents[run_id]
        return run_id


class Parallel(dspy.Module):
    """Calls its predictor in DSPy's own threads, which do not copy LangChain's context."""

    def __init__(self) -> None:
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        pairs = [
            (self.step, dspy.Example(question=f"{question}{n}").with_inputs("question")) for n in range(4)
        ]
        answers = dspy.Parallel(num_threads=4, disable_progress_bar=True)(pairs)
        return dspy.Prediction(answer=" ".join(a.answer for a in answers))


@pytest.mark.parametrize("through_langchain", [False, True], ids=["dspy LM", "LangChain model as LM"])
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream", "batch"])
def test_llm_runs_are_nested_under_the_callers_run(how: str, through_langchain: bool) -> None:
    lm = chat_lm(answer)
    if through_langchain:
        lm = langchain_lm(to_chat_model(lm))
    # DSPy itself cannot stream from threads of a program's own.
    program, calls = (Plain(), 2) if "stream" in how else (Parallel(), 4)
    chain = RunnableLambda(lambda value: value) | to_runnable(program, lm=lm, name="program")
    runs = Runs()
    config = {"callbacks": [runs], "tags": ["t"]}
    value = {"question": "q"}
    if how == "invoke":
        chain.invoke(value, config)
    elif how == "batch":
        chain.batch([value], config)
    elif how == "stream":
        list(chain.stream(value, config))
    elif how == "ainvoke":
        asyncio.run(chain.ainvoke(value, config))
    else:

        async def consume() -> None:
            async for _ in chain.astream(value, config):
                pass

        asyncio.run(consume())
    programs = [run_id for kind, name, run_id, _ in runs.kinds if name == "program"]
    models = [(run_id, parent) for kind, _, run_id, parent in runs.kinds if kind == "llm"]
    assert len(programs) == 1
    assert len(models) == calls, "each call once"
    assert {parent for _, parent in models} == set(programs), "right under the program's run"
    assert {runs.root(run_id) for run_id, _ in models} == {runs.root(programs[0])}
    assert sorted(runs.ended) == sorted(run_id for run_id, _ in models)


def test_tools_of_a_react_program_are_runs() -> None:
    def look(word: str) -> str:
        """Look up."""
        return word

    def act(request: Any) -> str:
        ask = request.messages[-1].text
        if "next_tool_name" not in ask:
            return "[[ ## reasoning ## ]]\nr\n\n[[ ## answer ## ]]\na\n\n[[ ## completed ## ]]"
        name = "finish" if "observation_0" in ask else "look"
        args = "{}" if name == "finish" else '{"word": "w"}'
        return (
            f"[[ ## next_thought ## ]]\nt\n\n[[ ## next_tool_name ## ]]\n{name}\n\n"
            f"[[ ## next_tool_args ## ]]\n{args}\n\n[[ ## completed ## ]]"
        )

    runs = Runs()
    runnable = to_runnable(dspy.ReAct("question -> answer", tools=[look]), lm=chat_lm(act))
    assert runnable.invoke({"question": "q"}, {"callbacks": [runs]})["answer"] == "a"
    kinds = [(kind, name) for kind, name, _, _ in runs.kinds]
    assert ("tool", "look") in kinds


def test_it_is_a_langgraph_node() -> None:
    class State(TypedDict):
        question: str
        answer: str
        seen: int

    graph = StateGraph(State)
    graph.add_node("think", to_runnable(dspy.Predict("question -> answer"), lm=chat_lm(answer)))
    graph.add_node("count", lambda state: {"seen": len(state["answer"])})
    graph.add_edge(START, "think")
    graph.add_edge("think", "count")
    graph.add_edge("count", END)
    app = graph.compile()
    found = app.invoke({"question": "q", "answer": "", "seen": 0})
    assert found["answer"].startswith("answer of q")
    assert found["seen"] == len(found["answer"])
    assert asyncio.run(app.ainvoke({"question": "q", "answer": "", "seen": 0})) == found


def test_schemas_config_and_retries() -> None:
    runnable = to_runnable(dspy.ChainOfThought("question: str, n: int -> answer: float"))
    assert runnable.get_input_jsonschema()["properties"]["n"]["type"] == "integer"
    assert set(runnable.get_output_jsonschema()["properties"]) == {"reasoning", "answer"}
    assert set(to_runnable(Plain()).get_input_jsonschema()["properties"]) == {"question"}
    failures = iter([ConnectionError("once")])

    def flaky(request: Any) -> str:
        for error in failures:
            raise error
        return answer(request)

    lm = chat_lm(flaky)
    lm.num_retries = 0
    retried = to_runnable(dspy.Predict("question -> answer"), lm=lm).with_retry(stop_after_attempt=2)
    assert retried.with_config(tags=["x"]).invoke({"question": "q"})["answer"].startswith("answer")
    with pytest.raises(ConfigurationError, match="missing: \\['question'\\]"):
        to_runnable(Plain()).invoke({"other": 1})
