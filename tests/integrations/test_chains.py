"""Every construct of a chain: the DSPy form answers as the chain does, and what comes back is the same chain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from langchain_asyndbt import langchain_lm, to_program
from langchain_asyndbt.chain_program import ChainProgram
from langchain_asyndbt.chain_walk import replace
from langchain_asyndbt.datasets import example_form
from langchain_asyndbt.messages import openai_tool_choice
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import (
    CommaSeparatedListOutputParser,
    JsonOutputParser,
    MarkdownListOutputParser,
    NumberedListOutputParser,
    PydanticOutputParser,
    StrOutputParser,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field
from scripted_chat import chat_lm

from asyndbt_dspy.errors import ExportError


class Review(BaseModel):
    """A rated review."""

    label: str
    stars: int


class Model(BaseChatModel):
    """Answers by a function of the messages and of what is bound; keeps what it was asked."""

    answer: Callable[[list[BaseMessage], dict], AIMessage]
    asked: list[Any] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, *, tool_choice: Any = None, **kwargs: Any) -> Runnable:
        return self.bind(tools=[convert_to_openai_tool(t) for t in tools], tool_choice=tool_choice, **kwargs)

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        kwargs.pop("ls_structured_output_format", None)
        self.asked.append((list(messages), {**kwargs, "stop": stop}))
        return ChatResult(generations=[ChatGeneration(message=self.answer(messages, kwargs))])


def of_prompt(form: Callable[[str], str] = str) -> Callable[..., AIMessage]:
    """An answer that depends on every message, so that another prompt is another answer."""

    def answer(messages: list[BaseMessage], bound: dict) -> AIMessage:
        said = "|".join(f"{m.type}:{m.content}:{getattr(m, 'tool_calls', '')}" for m in messages)
        return AIMessage(content=form(f"{len(messages)}.{sum(said.encode()) % 997}"))

    return answer


def with_tool(name: str, args: Callable[[str], dict]) -> Callable[..., AIMessage]:
    def answer(messages: list[BaseMessage], bound: dict) -> AIMessage:
        assert name in json.dumps(bound["tools"])
        value = of_prompt()(messages, bound).content
        return AIMessage(content="", tool_calls=[{"name": name, "args": args(value), "id": "c1"}])

    return answer


def model(form: Callable[[str], str] = str) -> Model:
    return Model(answer=of_prompt(form), asked=[])


def chat(*messages: Any, **kwargs: Any) -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages(
        list(messages) or [("system", "Classify {{it}}."), ("human", "Review: {text}")], **kwargs
    )


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return word


class Retriever(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(page_content=f"about {query}")]


def texts(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


REVIEW = {"label": "good", "stars": 4}
TEXT = {"text": "fine {braces} <b>"}


def structured() -> Runnable:
    return Model(answer=with_tool("Review", lambda v: {"label": v, "stars": 3})).with_structured_output(
        Review
    )


def raw_structured() -> Runnable:
    scripted = Model(answer=with_tool("Review", lambda v: {"label": v, "stars": 3}))
    return scripted.with_structured_output(Review, include_raw=True)


# fmt: off
# ruff: noqa: E501 - one construct a line reads best
# name -> (chain, input, demo's input of the first prompt, demo's output)
CONSTRUCTS: dict[str, tuple[Callable[[], Runnable], Any, dict, Any]] = {
    "string": (lambda: chat() | model() | StrOutputParser(), TEXT, TEXT, "good"),
    "no_parser": (lambda: chat() | model(), TEXT, TEXT, "good"),
    "json": (lambda: chat() | model(lambda v: f'{{"v": "{v}"}}') | JsonOutputParser(), TEXT, TEXT, {"a": [1, {"b": None}]}),
    "pydantic": (
        lambda: chat() | model(lambda v: f'{{"label": "{v}", "stars": 1}}') | PydanticOutputParser(pydantic_object=Review),
        TEXT, TEXT, REVIEW,
    ),
    "comma_list": (lambda: chat() | model(lambda v: f"a, {v}") | CommaSeparatedListOutputParser(), TEXT, TEXT, ["x", "y z"]),
    "numbered_list": (lambda: chat() | model(lambda v: f"1. {v}") | NumberedListOutputParser(), TEXT, TEXT, ["x", "y"]),
    "markdown_list": (lambda: chat() | model(lambda v: f"- {v}") | MarkdownListOutputParser(), TEXT, TEXT, ["x", "y"]),
    "no_system": (lambda: chat(("human", "Review: {text}")) | model() | StrOutputParser(), TEXT, TEXT, "good"),
    "literal_system": (
        lambda: chat(SystemMessage("Literal {text} braces."), ("human", "{text}")) | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "system_variables": (
        lambda: chat(("system", "Answer in {language}."), ("human", "{text}")) | model() | StrOutputParser(),
        {**TEXT, "language": "Latin"}, {**TEXT, "language": "Greek"}, "bonum",
    ),
    "placeholder": (
        lambda: chat(("system", "Chat."), MessagesPlaceholder("history"), ("human", "{text}")) | model() | StrOutputParser(),
        {**TEXT, "history": [HumanMessage("hi"), AIMessage("hello")]},
        {**TEXT, "history": [("human", "old")]}, "good",
    ),
    "optional_placeholder": (
        lambda: chat(MessagesPlaceholder("history", optional=True), ("human", "{text}")) | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "partial": (lambda: chat(("system", "In {language}."), ("human", "{text}")).partial(language="Latin") | model(), TEXT, TEXT, "good"),
    "partial_function": (
        lambda: ChatPromptTemplate([("human", "{day} {text}")], partial_variables={"day": lambda: "Monday"}) | model(),
        TEXT, TEXT, "good",
    ),
    "mustache": (
        lambda: chat(("system", "Be {brief}."), ("human", "{{text}}"), template_format="mustache") | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "bind": (lambda: chat() | model().bind(stop=["\n"]) | StrOutputParser(), TEXT, TEXT, "good"),
    "bind_tools": (
        lambda: chat() | Model(answer=with_tool("lookup", lambda v: {"word": v})).bind_tools([lookup]),
        TEXT, TEXT, AIMessage("", tool_calls=[{"name": "lookup", "args": {"word": "x"}, "id": "1"}]),
    ),
    "structured": (lambda: chat() | structured(), TEXT, TEXT, REVIEW),
    "structured_raw": (
        lambda: chat() | raw_structured(), TEXT, TEXT,
        AIMessage("", tool_calls=[{"name": "Review", "args": REVIEW, "id": "1"}]),
    ),
    "prefill": (lambda: chat(("human", "{text}"), ("ai", "Label:")) | model() | StrOutputParser(), TEXT, TEXT, "good"),
    "own_examples": (
        lambda: chat(("system", "S"), ("human", "ex"), ("ai", "yes"), ("human", "{text}")) | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "few_shot": (
        lambda: chat(
            ("system", "S"),
            FewShotChatMessagePromptTemplate(examples=[{"i": "1", "o": "2"}], example_prompt=chat(("human", "{i}"), ("ai", "{o}"))),
            ("human", "{text}"),
        ) | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "text_prompt": (lambda: PromptTemplate.from_template("Review: {text}\nLabel:") | model() | StrOutputParser(), TEXT, TEXT, "good"),
    "config": (
        lambda: (chat().with_config(tags=["p"]) | model().with_config(tags=["m"]) | StrOutputParser()).with_config(
            run_name="named", tags=["t"], metadata={"k": 1}
        ),
        TEXT, TEXT, "good",
    ),
    "retry_and_fallbacks": (
        lambda: (chat() | model().with_retry() | StrOutputParser()).with_fallbacks([chat() | model() | StrOutputParser()]),
        TEXT, TEXT, "good",
    ),
    "several_prompts": (
        lambda: {"topic": chat() | model() | StrOutputParser(), "text": lambda d: d["text"]}
        | chat(("system", "Second."), ("human", "{topic} {text}")) | model() | StrOutputParser(),
        TEXT, TEXT, "good",
    ),
    "parallel": (
        lambda: RunnableParallel(a=chat() | model() | StrOutputParser(), b=chat(("human", "B {text}")) | model()),
        TEXT, TEXT, "good",
    ),
    "one_prompt_two_models": (
        lambda: chat() | RunnableParallel(a=model(), b=model(lambda v: v * 2) | StrOutputParser()),
        TEXT, TEXT, AIMessage("good"),
    ),
    "branch": (
        lambda: RunnableBranch(
            (lambda d: "fine" in d["text"], chat() | model() | StrOutputParser()), chat(("human", "other {text}")) | model()
        ),
        TEXT, TEXT, "good",
    ),
    "retrieval": (
        lambda: {"context": Retriever() | texts, "question": RunnablePassthrough()}
        | chat(("system", "Use {context}"), ("human", "{question}")) | model() | StrOutputParser(),
        "what?", {"context": "c", "question": "q"}, "good",
    ),
    "assign": (
        lambda: RunnablePassthrough.assign(label=chat() | model() | StrOutputParser()) | RunnableLambda(lambda d: d["label"]),
        TEXT, TEXT, "good",
    ),
}
# fmt: on


def run(program: ChainProgram, value: Any) -> Any:
    if not isinstance(value, dict):
        program.plan.input_key = "question"
        value = {"question": value}
    plain = program(**value)["output"]
    assert comparable(plain) == comparable(asyncio.run(program.acall(**value))["output"]), "sync and async"
    return plain


def comparable(value: Any) -> Any:
    """Messages without ids and usage, which differ from call to call."""
    if isinstance(value, BaseMessage):
        return (value.type, value.content, getattr(value, "tool_calls", None))
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    return value


@pytest.fixture(params=CONSTRUCTS)
def construct(request: pytest.FixtureRequest) -> tuple[Runnable, Any, dict, Any]:
    make, value, inputs, output = CONSTRUCTS[request.param]
    return make(), value, inputs, output


def test_the_dspy_form_answers_as_the_chain(construct: tuple) -> None:
    chain, value, _, _ = construct
    expected = chain.invoke(value)
    assert comparable(run(to_program(chain), value)) == comparable(expected)


def test_an_unchanged_program_gives_an_equal_chain_with_the_same_parts(construct: tuple) -> None:
    chain, value, _, _ = construct
    back = to_program(chain).to_chain()
    assert type(back) is type(chain)
    assert comparable(back.invoke(value)) == comparable(chain.invoke(value))
    assert back.get_input_jsonschema() == chain.get_input_jsonschema()
    assert back.get_output_jsonschema() == chain.get_output_jsonschema()
    assert (back.config if hasattr(back, "config") else None) == (
        chain.config if hasattr(chain, "config") else None
    )
    assert [id(m) for m in models_of(back)] == [id(m) for m in models_of(chain)], "the very same models"


def test_demos_and_instructions_are_sent_by_both_forms_alike(construct: tuple) -> None:
    chain, value, inputs, output = construct
    program = to_program(chain)
    name, predictor = program.named_predictors()[0]
    aliases = {v: f for f, v in program.prompt_adapter(name)._variables.items()}
    field = next(iter(predictor.signature.output_fields))
    predictor.demos = [dspy.Example(**{aliases[k]: v for k, v in inputs.items()}, **{field: output})]
    text = predictor.signature.instructions
    predictor.signature = predictor.signature.with_instructions(f"{text}\nThink twice.")
    by_program = run(program, value)
    sent = sent_by(chain)
    back = program.to_chain()
    by_chain = back.invoke(value)
    assert comparable(by_chain) == comparable(by_program)
    assert comparable(by_chain) != comparable(chain.invoke(value)), "the demo reaches the model"
    assert any("Think twice." in str(messages) for messages, _ in sent)
    prompt = program.prompt_adapter(name).prompt(predictor.signature.instructions, [dict(predictor.demos[0])])
    before = program.prompt_adapter(name).slots.prompt
    assert set(prompt.input_variables) == set(before.input_variables)
    assert type(prompt) is type(before)


def test_prompts_with_demos_can_be_written_and_read(construct: tuple) -> None:
    chain, value, inputs, output = construct
    program = to_program(chain)
    adapter = program.prompt_adapter(program.named_predictors()[0][0])
    prompt = adapter.slots.filled(None, [(inputs, output)])
    if any(callable(v) for v in prompt.partial_variables.values()) or "FewShot" in repr(prompt):
        # LangChain cannot write the chain's own prompt either.
        with pytest.raises(NotImplementedError):
            loads(dumps(adapter.slots.prompt), allowed_objects="core")
        return
    again = loads(dumps(prompt), allowed_objects="core")
    values = value if isinstance(value, dict) else inputs
    known = {**inputs, **values}
    assert again.invoke(known) == prompt.invoke(known)


def models_of(chain: Runnable) -> list[Any]:
    found: list[Any] = []

    def visit(site: Any) -> Any:
        found.extend(call.model for call in site.calls)
        return site.prompt, [[c.model, c.parser] if c.parser is not None else [c.model] for c in site.calls]

    replace(chain, visit)
    return found


def sent_by(chain: Runnable) -> list[Any]:
    found = []
    for runnable in models_of(chain):
        while not isinstance(runnable, Model):
            runnable = runnable.bound
        found += runnable.asked
    return found


def test_bound_settings_reach_the_model() -> None:
    chain = CONSTRUCTS["bind"][0]()
    to_program(chain)(**TEXT)
    assert sent_by(chain)[-1][1]["stop"] == ["\n"]


@pytest.fixture
def classifier() -> Runnable:
    """A chain whose answer is a forced tool call."""
    return Model(answer=with_tool("Review", lambda v: {"label": v, "stars": 3})).bind_tools([Review])


def test_another_lm_is_asked_with_what_the_chain_binds(classifier: Any) -> None:
    other = Model(answer=with_tool("Review", lambda v: {"label": "other", "stars": 1}))
    own = classifier.bound.bind(**classifier.kwargs, stop=["END"]).bind(tool_choice="required")
    program = to_program(chat() | own)
    with dspy.context(lm=langchain_lm(other)):
        assert program(**TEXT).output.tool_calls[0]["args"]["label"] == "other"
        asyncio.run(program.acall(**TEXT))
    for _, bound in other.asked:
        assert [tool["function"]["name"] for tool in bound["tools"]] == ["Review"]
        assert bound["tool_choice"] == "any"
        assert bound["stop"] == ["END"]
    assert classifier.bound.asked == []


ONLY_REVIEW = {"type": "function", "function": {"name": "Review"}}


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("auto", "auto", ()),
        ("none", "none", ()),
        ("required", "required", ()),
        ("any", "required", ()),
        (True, "required", ()),
        ("Review", "required", ("Review",)),
        (ONLY_REVIEW, "required", ("Review",)),
        ({"type": "auto"}, "auto", ()),
        ({"type": "any"}, "required", ()),
        ({"type": "tool", "name": "Review"}, "required", ("Review",)),
    ],
)
def test_another_lm_takes_the_tool_choice_of_any_provider(
    classifier: Any, choice: Any, mode: str, allowed: tuple[str, ...]
) -> None:
    lm = chat_lm()
    program = to_program(chat() | classifier.bind(tool_choice=choice))
    with dspy.context(lm=lm):
        program(**TEXT)
    sent = lm.engine.requests[0].config.tool_choice
    assert (sent.mode, tuple(sent.allowed)) == (mode, allowed)


def test_a_tool_choice_of_no_known_form_stays_as_it_is() -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [ONLY_REVIEW]}}
    for choice in (ONLY_REVIEW, allowed, {"mode": "ANY"}, 3):
        assert openai_tool_choice(choice) is choice


@pytest.mark.parametrize("name", ["base", "dspy_text", "demos", "output", "class"])
def test_variables_may_have_names_that_dspy_takes(name: str) -> None:
    chain = chat(("system", "Classify."), ("human", f"{{{name}}} {{text}}")) | model() | StrOutputParser()
    program = to_program(chain)
    example = example_form(program.plan, input_keys=None, input_key=None, output_key=None).examples(
        [{"inputs": {name: "given", "text": "t"}, "outputs": {"label": "a"}}]
    )[0]
    found = program(**dict(example.inputs().items()))
    assert found.output == chain.invoke({name: "given", "text": "t"})


def test_a_chain_may_give_fields_that_dspy_takes() -> None:
    chain = RunnableParallel(
        {"base": chat() | model() | StrOutputParser(), "self": RunnableLambda(lambda value: 1)}
    )
    found = to_program(chain)(**TEXT)
    assert found.output == {"base": found["base"], "self": 1}


SYSTEM_TEXTS = [
    # (template, format, instructions, what the model reads)
    ("f-string", "In {language}.", "Speak {language}! {{literal}}", "Speak Latin! {literal}"),
    ("f-string", "In {language}.", 'In {language}: {"a": {"b": {}}}.', 'In Latin: {"a": {"b": {}}}.'),
    ("f-string", "In {language}.", "In {language}, {{tongue}} {x}.", "In Latin, {tongue} {x}."),
    ("f-string", "In {language}.", "In {{{language}}} or {x}.", "In {Latin} or {x}."),
    ("f-string", "In {language}.", "In {tongue}.", "In {tongue}.\n\nlanguage: Latin"),
    ("f-string", "In {language}.", "Answer.", "Answer.\n\nlanguage: Latin"),
    ("f-string", "In {language}.", "In {language", "In {language\n\nlanguage: Latin"),
    ("f-string", "Classify.", 'Return {"label": 1} for {text}.', 'Return {"label": 1} for {text}.'),
    ("mustache", "In {{language}}.", 'Speak {{language}}: {"a": {{x}}}', 'Speak Latin: {"a": {{x}}}'),
    ("mustache", "In {{language}}.", "Answer {{#x}}.", "Answer {{#x}}.\n\nlanguage: Latin"),
    ("jinja2", "In {{ language }}.", "{{language}} {% if %} {{x}} {#}", "Latin {% if %} {{x}} {#}"),
    ("jinja2", "In {{ language }}.", "Answer {{.", "Answer {{.\n\nlanguage: Latin"),
]


@pytest.mark.parametrize(("form", "template", "instructions", "read"), SYSTEM_TEXTS)
def test_instructions_keep_the_variables_and_their_other_braces_are_literal(
    form: Any, template: str, instructions: str, read: str
) -> None:
    if form == "jinja2":
        pytest.importorskip("jinja2")
    text = "{text}" if form == "f-string" else "{{text}}"
    prompt = ChatPromptTemplate([("system", template), ("human", text)], template_format=form)
    scripted = model()
    program = to_program(prompt | scripted | StrOutputParser())
    program.prompt.signature = program.prompt.signature.with_instructions(instructions)
    inputs = {"text": "a", **({"language": "Latin"} if "language" in template else {})}
    program(**inputs)
    program.to_chain().invoke(inputs)
    assert [messages[0].content for messages, _ in scripted.asked] == [read, read]
    assert program.to_chain().get_input_jsonschema() == (prompt | scripted).get_input_jsonschema()


def test_a_demo_that_the_chain_would_not_read_back_is_refused() -> None:
    program = to_program(CONSTRUCTS["pydantic"][0]())
    program.prompt.demos = [dspy.Example(text="t", output={"label": "no stars"})]
    with pytest.raises(ExportError, match="reads it back"):
        program.to_chain()


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (RunnableLambda(lambda value: value), "no prompt"),
        (chat() | RunnableLambda(lambda value: value) | model(), "followed by"),
        (RunnableParallel(p=chat()) | RunnableLambda(lambda v: v["p"]) | model(), "not followed by a model"),
        (chat() | RunnableParallel(value=RunnablePassthrough(), answer=model()), "no model"),
    ],
)
def test_what_cannot_be_optimized_is_refused_with_the_reason(chain: Runnable, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        to_program(chain)


def test_copies_of_a_program_share_the_chain_and_run_apart() -> None:
    chain = CONSTRUCTS["string"][0]()
    program = to_program(chain)
    copy = program.deepcopy()
    copy.prompt.demos = [dspy.Example(text="a", output="b")]
    assert copy.plan is program.plan

    async def both() -> list[Any]:
        return await asyncio.gather(*(p.acall(**TEXT) for p in (program, copy) * 20))

    answers = [answer["output"] for answer in asyncio.run(both())]
    assert len(set(answers[::2])) == len(set(answers[1::2])) == 1
    assert answers[0] != answers[1]
