"""``optimize_chain`` end to end on scripted models; examples and metrics in every form."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import pytest
from langchain_asyndbt import aoptimize_chain, optimize_chain, to_program
from langchain_asyndbt.datasets import (
    ExampleForm,
    example_form,
    infer_labels,
    source_of,
    warn_of_unwritable,
)
from langchain_asyndbt.metrics import as_dspy_metric
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import PydanticOutputParser, StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough
from pydantic import BaseModel, Field

from asyndbt_dspy import Budget
from asyndbt_dspy.deploy import load_artifact, read_artifact, save_artifact
from asyndbt_dspy.errors import ArtifactError, ConfigurationError
from asyndbt_dspy.programs.demos import labelled_demos

WORDS = ["red apple", "green tree", "blue sky", "red car", "green frog", "blue sea"]
LABELS = {"red": "warm", "green": "calm", "blue": "cold"}
DATA = [{"text": f"{word} {n}", "label": LABELS[word.split()[0]]} for n in range(8) for word in WORDS]


class Copycat(BaseChatModel):
    """Answers as the demo with the same first word does; without one it does not know."""

    asked: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "copycat"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.asked.append(list(messages))
        first = str(messages[-1].content).split()[1]
        answer = "unknown"
        for human, ai in pairwise(messages):
            if ai.type == "ai" and str(human.content).split()[1] == first:
                answer = str(ai.content)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(answer))])


def chain_of(model: Any) -> Runnable:
    prompt = ChatPromptTemplate([("system", "Name the mood."), ("human", "Text: {text}")])
    return (prompt | model | StrOutputParser()).with_config(tags=["mine"], run_name="mood")


def dspy_metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return prediction.output == gold.label


def run_metric(run: Any, example: Any) -> dict:
    return {"key": "right", "score": run.outputs["output"] == example.outputs["label"]}


def named_metric(inputs: dict, outputs: dict, reference_outputs: dict) -> bool:
    assert set(inputs) == {"text"}
    assert set(reference_outputs) == {"label"}
    return outputs["output"] == reference_outputs["label"]


def named_metric_of(key: str) -> Callable[..., bool]:
    return lambda outputs, reference_outputs: outputs[key] == reference_outputs[key]


async def async_metric(outputs: dict, reference_outputs: dict) -> float:
    return float(outputs["output"] == reference_outputs["label"])


FORMS: dict[str, Callable[[dict], Any]] = {
    "dictionary": dict,
    "langsmith": lambda row: {"inputs": {"text": row["text"]}, "outputs": {"label": row["label"]}},
    "langsmith_object": lambda row: SimpleNamespace(
        inputs={"text": row["text"]}, outputs={"label": row["label"]}
    ),
    "dspy": lambda row: dspy.Example(**row).with_inputs("text"),
}
METRICS = [dspy_metric, run_metric, named_metric, async_metric]


def score(chain: Runnable) -> float:
    answers = chain.batch([{"text": row["text"]} for row in DATA])
    return sum(a == row["label"] for a, row in zip(answers, DATA, strict=True)) / len(DATA)


@pytest.mark.parametrize(("form", "metric"), zip(FORMS, METRICS, strict=True))
def test_the_same_chain_comes_back_better(form: str, metric: Callable[..., Any]) -> None:
    model = Copycat(asked=[])
    chain = chain_of(model)
    kept: dict[str, Any] = {}
    optimized = optimize_chain(
        chain,
        metric=metric,
        trainset=[FORMS[form](row) for row in DATA],
        budget=Budget(metric_calls=150),
        progress=False,
        on_done=lambda optimizer, program: kept.update(
            result=optimizer.result, program=program, options=optimizer.options
        ),
    )
    assert score(chain) == 0.0
    assert score(optimized) == 1.0, "one demo per label is all it takes"
    assert kept["result"].metric_calls <= 150
    assert not kept["options"].demo_ending, "the chain's own template adds nothing to the last turn"
    assert type(optimized) is type(chain)
    assert optimized.config == chain.config
    assert optimized.get_input_jsonschema() == chain.get_input_jsonschema()
    assert optimized.bound.middle[0] is model
    answers = [kept["program"](text=row["text"]).output for row in DATA]
    assert answers == optimized.batch([{"text": row["text"]} for row in DATA]), "both forms, answer by answer"


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda chain: RunnablePassthrough.assign(label=chain),
        lambda chain: RunnableParallel(label=chain, text=lambda inputs: inputs["text"]),
    ],
)
def test_a_chain_that_gives_a_dictionary_comes_back_better(wrapped: Callable[[Any], Runnable]) -> None:
    chain, kept = wrapped(chain_of(Copycat(asked=[]))), {}
    optimized = optimize_chain(
        chain,
        metric=named_metric_of("label"),
        trainset=DATA,
        input_keys=["text"],
        budget=Budget(metric_calls=150),
        progress=False,
        on_done=lambda optimizer, program: kept.update(program=program),
    )
    answers = optimized.batch([{"text": row["text"]} for row in DATA])
    assert [answer["label"] for answer in answers] == [row["label"] for row in DATA]
    assert [answer["text"] for answer in answers] == [row["text"] for row in DATA]
    again = to_program(chain, labels=["calm", "cold", "warm"])
    assert (
        kept["program"].prompt.signature.output_fields.keys() == again.prompt.signature.output_fields.keys()
    )
    assert again.prompt.signature.output_fields["output_label"].annotation == Literal["calm", "cold", "warm"]


def test_every_key_of_a_dictionary_has_its_own_demos(caplog: pytest.LogCaptureFixture) -> None:
    mood, size = (
        chain_of(Copycat()),
        ChatPromptTemplate([("human", "{text}")]) | Copycat() | StrOutputParser(),
    )
    chain = RunnableParallel(mood=mood, size=size)
    rows = [{"text": "a", "mood": "warm", "size": "big"}, {"text": "b", "mood": "cold"}]
    examples = form_of(chain).examples(rows)
    program = to_program(chain)
    shown = [
        (item.predictor, dict(item.demo.items())) for item in labelled_demos(program, examples, worker="all")
    ]
    assert shown == [
        ("prompt", {"text": "a", "output_mood": "warm"}),
        ("prompt", {"text": "b", "output_mood": "cold"}),
        ("prompt_2", {"text": "a", "output_size": "big"}),
    ]
    warn_of_unwritable(program.plan, examples)
    assert "1 of 2 examples cannot be demos: no output 'size'" in caplog.text
    with pytest.raises(ConfigurationError, match=r"'mood', 'size'"):
        to_program(chain, labels=["warm", "cold"])


def test_the_only_output_is_the_answer_of_the_only_key_whatever_its_name() -> None:
    chain = RunnablePassthrough.assign(mood=chain_of(Copycat()))
    row = {"text": "t", "label": "warm", "why": "red"}
    assert form_of(chain).examples([{"text": "t", "label": "warm"}])[0]["output_mood"] == "warm"
    assert form_of(chain, output_key="label").examples([row])[0]["output_mood"] == "warm"
    assert "output_mood" not in form_of(chain).examples([row])[0]


@pytest.mark.parametrize(
    "chain",
    [
        chain_of(Copycat()) | RunnableLambda(str.strip),
        ChatPromptTemplate([("human", "{text}")]) | Copycat() | (lambda message: message.content),
        RunnableParallel(raw=chain_of(Copycat()))
        | RunnablePassthrough.assign(parsed=lambda found: found["raw"]),
    ],
)
def test_where_a_step_may_change_the_last_answer_outputs_and_labels_are_not_taken_for_it(
    chain: Runnable, caplog: pytest.LogCaptureFixture
) -> None:
    examples = ExampleForm(("text",)).examples(DATA)
    warn_of_unwritable(to_program(chain).plan, examples)
    assert "a step after it may change them" in caplog.text
    caplog.clear()
    warn_of_unwritable(to_program(chain).plan, ExampleForm(("text",)).examples([{"text": "t"}]))
    assert not caplog.records, "without outputs there is nothing to say"
    with pytest.raises(ConfigurationError, match="a step after it may change them"):
        to_program(chain, labels=["calm", "cold"])


def test_aoptimize_chain_on_a_running_loop() -> None:
    chain = chain_of(Copycat(asked=[]))

    async def both() -> Runnable:
        return await aoptimize_chain(
            chain, metric=dspy_metric, trainset=DATA, budget=Budget(metric_calls=120), progress=False
        )

    assert score(asyncio.run(both())) == 1.0


def test_a_chain_program_is_saved_and_loaded_as_any_other(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chain = chain_of(Copycat(asked=[]))
    kept: dict[str, Any] = {}
    optimized = optimize_chain(
        chain, metric=dspy_metric, trainset=DATA, budget=Budget(metric_calls=120), progress=False,
        on_done=lambda optimizer, program: kept.update(result=optimizer.result, program=program),
    )  # fmt: skip
    path = save_artifact(kept["program"], tmp_path / "a", result=kept["result"], trainset=None)
    student = to_program(chain, labels=["calm", "cold", "warm"])
    caplog.clear()
    with dspy.context(adapter=dspy.JSONAdapter()):
        again = load_artifact(path, student=student).to_chain()
    assert not caplog.records, "the chain's own format goes with it, whatever DSPy's adapter is"
    assert again.bound.first == optimized.bound.first
    assert read_artifact(path).manifest["scores"]["optimized"]["score"] == 1.0
    with pytest.raises(ArtifactError, match="'calm', 'cold', 'warm'"):
        load_artifact(path, student=to_program(chain))


def test_chains_whose_input_is_no_dictionary() -> None:
    model = Copycat(asked=[])
    inner = ChatPromptTemplate([("human", "Text: {text} {note}")]) | model | StrOutputParser()
    chain = {"text": RunnablePassthrough(), "note": lambda text: "!"} | inner
    optimized = optimize_chain(
        chain,
        metric=dspy_metric,
        trainset=DATA,
        input_key="text",
        budget=Budget(metric_calls=60),
        progress=False,
    )
    assert isinstance(optimized.invoke("red apple"), str)
    assert "red apple" in str(model.asked[-1][-1].content)


class Mood(BaseModel):
    mood: str


def form_of(chain: Runnable, **options: Any) -> ExampleForm:
    return example_form(
        to_program(chain).plan, **{"input_keys": None, "input_key": None, "output_key": None, **options}
    )


def test_examples_without_inputs_are_refused_with_the_way_to_write_them() -> None:
    form = form_of(chain_of(Copycat()))
    with pytest.raises(ConfigurationError, match="input_keys"):
        form.examples([{"sentence": "x", "label": "y"}])
    with pytest.raises(ConfigurationError, match="int"):
        form.examples([3])
    with pytest.raises(ConfigurationError, match="no output 'mood'"):
        form_of(chain_of(Copycat()), output_key="mood").examples([DATA[0]])
    with pytest.raises(ConfigurationError, match="trainset"):
        optimize_chain(chain_of(Copycat()), metric=dspy_metric)


def test_what_langsmith_exports_beside_inputs_and_outputs_is_ignored() -> None:
    row = {
        "inputs": {"text": "t"},
        "outputs": {"label": "a"},
        "id": "1",
        "created_at": "today",
        "source_run_id": None,
    }
    (example,) = form_of(chain_of(Copycat())).examples([row])
    assert dict(example.items()) == {"text": "t", "label": "a", "output": "a"}


def test_inputs_may_have_the_names_of_langsmiths_keys() -> None:
    prompt = ChatPromptTemplate([("human", "{inputs} {outputs}")])
    row = {"inputs": "a", "outputs": "b", "label": "c"}
    (example,) = form_of(prompt | Copycat()).examples([row])
    assert dict(example.inputs().items()) == {"inputs": "a", "outputs": "b"}
    assert example.output == "c"


def test_evaluators_get_inputs_and_outputs_of_one_name_as_they_were_written() -> None:
    given: list[Any] = []

    def evaluate(run: Any, example: Any, inputs: dict, outputs: dict, reference_outputs: dict) -> bool:
        given.append((inputs, reference_outputs, run.inputs, example.inputs, example.outputs))
        return outputs["output"] == reference_outputs["text"]

    prompt = ChatPromptTemplate([("system", "Name the mood."), ("human", "Text: {text} {base}")])
    chain = prompt | Copycat() | StrOutputParser()
    rows = [
        {"inputs": {"text": r["text"], "base": "b"}, "outputs": {"text": r["label"], "why": "w"}}
        for r in DATA
    ]
    kept: dict[str, Any] = {}
    optimize_chain(
        chain, metric=evaluate, trainset=rows, output_key="text", budget=Budget(metric_calls=150), progress=False,
        on_done=lambda optimizer, program: kept.update(program=program),
    )  # fmt: skip
    assert kept["program"](text="red apple", var_base="b").output == "warm"
    for inputs, reference, of_run, of_example, outputs in given:
        assert inputs == of_run == of_example
        assert reference == outputs
        assert {"inputs": inputs, "outputs": reference} in rows


@pytest.mark.parametrize(
    "made", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), lambda e: e.copy()]
)
def test_copies_of_an_example_remember_what_was_written(made: Callable[[Any], Any]) -> None:
    row = {"inputs": {"text": "a"}, "outputs": {"text": "b"}}
    (example,) = form_of(chain_of(Copycat())).examples([row])
    copied = made(example)
    assert source_of(copied) == ({"text": "a"}, {"text": "b"})
    assert copied.toDict() == {"text": "a", "output": "b"}


def test_several_outputs_are_one_answer_unless_one_is_named() -> None:
    row = {"text": "t", "label": "a", "why": "b"}
    chain = chain_of(Copycat())
    assert form_of(chain).examples([row])[0].output == {"label": "a", "why": "b"}
    assert form_of(chain, output_key="label").examples([row])[0].output == "a"


def test_labels_are_found_where_answers_repeat() -> None:
    examples = form_of(chain_of(Copycat())).examples(DATA)
    assert infer_labels(examples) == ["calm", "cold", "warm"]
    assert infer_labels(examples[:3]) is None
    assert infer_labels([dspy.Example(output={"a": 1})] * 4) is None


def test_outputs_that_cannot_be_demos_are_none(caplog: pytest.LogCaptureFixture) -> None:
    chain = ChatPromptTemplate([("human", "{text}")]) | Copycat() | PydanticOutputParser(pydantic_object=Mood)
    plan = to_program(chain).plan
    examples = form_of(chain).examples([{"text": "a", "o": {"mood": "x"}}, {"text": "b", "o": {"other": 1}}])
    with caplog.at_level(logging.WARNING):
        warn_of_unwritable(plan, examples)
    assert "1 of 2 examples" in caplog.text
    demos = labelled_demos(to_program(chain), examples, worker="all")
    assert [item.demo.text for item in demos] == ["a"]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (True, True),
        (0.5, 0.5),
        ({"key": "k", "score": 0.25}, 0.25),
        (SimpleNamespace(score=1, comment=None), 1),
        ({"results": [{"score": 1}, {"score": 0}]}, 0.5),
        ([{"key": "a", "score": 1}], 1.0),
    ],
)
def test_results_of_langsmith_evaluators_are_read(returned: Any, expected: float) -> None:
    metric = as_dspy_metric(lambda outputs, reference_outputs: returned)
    gold = dspy.Example(text="t", label="a", output="a").with_inputs("text")
    assert metric(gold, dspy.Prediction(output="a")) == expected


class Judge:
    async def __call__(self, outputs: dict, reference_outputs: dict) -> dict:
        return {"score": float(outputs["output"] == reference_outputs["label"])}


def test_an_evaluator_may_be_an_object_with_an_async_call() -> None:
    optimized = optimize_chain(
        chain_of(Copycat()),
        metric=Judge(),
        trainset=DATA,
        budget=Budget(metric_calls=150),
        progress=False,
    )
    assert score(optimized) == 1.0


class Obedient(BaseChatModel):
    """Names moods where the system message has some words."""

    words: str

    @property
    def _llm_type(self) -> str:
        return "obedient"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        mood = LABELS[str(messages[-1].content).split()[1]]
        answer = mood if self.words in str(messages[0].content) else "unknown"
        return ChatResult(generations=[ChatGeneration(message=AIMessage(answer))])


def test_instructions_of_the_user_may_hold_braces() -> None:
    optimized = optimize_chain(
        chain_of(Obedient(words='like {"mood": "calm"}.')),
        metric=dspy_metric,
        trainset=DATA,
        mode="instructions",
        instructions={"prompt": ['Write JSON like {"mood": "calm"}.']},
        budget=Budget(metric_calls=120),
        progress=False,
    )
    assert score(optimized) == 1.0


@pytest.mark.parametrize("text", ["Name the mood.", "Name the mood in {tongue}.", "In {language"])
def test_instructions_of_the_user_that_lack_a_variable_are_refused(text: str) -> None:
    model = Copycat()
    prompt = ChatPromptTemplate([("system", "Name the mood in {language}."), ("human", "Text: {text}")])
    options: dict[str, Any] = {
        "metric": dspy_metric,
        "trainset": [{**row, "language": "English"} for row in DATA],
        "instructions": {"prompt": ["In {language}: name the mood.", text]},
        "progress": False,
    }
    with pytest.raises(ConfigurationError, match=r"'prompt' leave out the variables \['language'\]"):
        optimize_chain(prompt | model | StrOutputParser(), **options)
    with pytest.raises(ConfigurationError, match="language"):
        asyncio.run(aoptimize_chain(prompt | model | StrOutputParser(), **options))
    assert model.asked == []


def test_comments_become_feedback_and_dspy_metrics_stay_as_they_are() -> None:
    metric = as_dspy_metric(lambda run, example: {"score": 0.5, "comment": "half"})
    found = metric(dspy.Example(text="t", output="a").with_inputs("text"), dspy.Prediction(output="a"))
    assert (found.score, found.feedback) == (0.5, "half")
    assert as_dspy_metric(dspy_metric) is dspy_metric
