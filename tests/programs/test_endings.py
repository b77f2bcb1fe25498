"""Demos that end like the turn that is to be answered: read off the adapter, shown by one arm, left alone by the other."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from asyndbt_dspy.core.space import Space
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.endings import demo_endings
from asyndbt_dspy.programs.program_space import WITHHELD, DemoEnding, DemoItem, ProgramSpace
from asyndbt_dspy.programs.slots import build_space

ADAPTERS = [dspy.ChatAdapter, dspy.JSONAdapter]


def item(predictor: str, number: int = 0, shared: bool = True, **fields: Any) -> DemoItem:
    demo = dspy.Example(**fields)
    return DemoItem(f"d:{predictor}:{number}", "eu", shared, predictor, demo, None, 5, "labelled")


def user_turns(predictor: dspy.Predict, **inputs: Any) -> list[str]:
    messages = dspy.settings.adapter.format(predictor.signature, predictor.demos, inputs)
    return [one["content"] for one in messages if one["role"] == "user"]


def space_of(plain: dspy.Module, *items: DemoItem) -> ProgramSpace:
    slots = {"classify": (None,) * len(items)}
    return build_space(plain, demos=items, slots=slots, endings=demo_endings(plain, items))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_the_ending_a_demo_is_shown_as_it_would_be_asked(
    plain: dspy.Module, adapter: type[dspy.Adapter]
) -> None:
    with dspy.context(adapter=adapter()):
        space = space_of(plain, item("classify", message="I was charged twice", label="billing"))
        assert [block.kind for block in space.space.blocks] == ["instructions", "demo", "ending"]
        as_shown, as_asked = space.build((0, 1, 0)), space.build((0, 1, 1))
        shown, asked = user_turns(as_asked.classify, message="I was charged twice")
        assert shown == asked
        shown, asked = user_turns(as_shown.classify, message="I was charged twice")
        assert shown != asked and asked.startswith(shown)


def test_without_an_adapter_the_ending_is_that_of_dspys_default(plain: dspy.Module) -> None:
    found = demo_endings(plain, [item("classify", message="a", label="billing")])
    assert "[[ ## completed ## ]]" in found["classify"].text


def test_answers_of_the_demos_and_the_arms_own_example_stay_as_they_are(plain: dspy.Module) -> None:
    one = item("classify", message="I was charged twice", label="billing")
    space = space_of(plain, one)
    program = space.build((0, 1, 1))
    assert program.classify.demos[0].label == "billing"
    assert program.classify.demos[0].message.startswith("I was charged twice")
    assert one.demo.message == "I was charged twice"
    assert space.build((0, 1, 0)).classify.demos[0].message == "I was charged twice"


def test_a_demo_without_reasoning_ends_like_the_last_turn_too(kinds: dict[str, Any]) -> None:
    program = kinds["chain_of_thought"].make()
    found = demo_endings(program, [item("predict", message="a", label="billing")])
    program.predict.demos = [found["predict"].on(dspy.Example(message="a", label="billing"))]
    with dspy.context(adapter=dspy.ChatAdapter()):
        shown, asked = user_turns(program.predict, message="a")
    assert shown.endswith(asked)  # behind DSPy's preface for incomplete demos


class Unchanged(dspy.ChatAdapter):
    """Shows the last turn as it shows demos."""

    def user_message_output_requirements(self, signature: Any) -> None:
        return None


class Repeating(dspy.ChatAdapter):
    """Repeats in the last turn what it was asked: no text of the adapter's own."""

    def format_user_message_content(self, signature: Any, inputs: Any, *args: Any, **options: Any) -> str:
        text: str = super().format_user_message_content(signature, inputs, *args, **options)
        return text + f"\n\nOnce more: {inputs['message']}" if options.get("main_request") else text


@pytest.mark.parametrize("adapter", [Unchanged, Repeating, dspy.XMLAdapter])
def test_where_the_adapter_adds_no_words_of_its_own_behind_a_text_there_is_no_choice(
    plain: dspy.Module, adapter: type[dspy.Adapter]
) -> None:
    with dspy.context(adapter=adapter()):
        one = item("classify", message="a", label="billing")
        assert demo_endings(plain, [one]) == {}
        assert [block.kind for block in space_of(plain, one).space.blocks] == ["instructions", "demo"]


def test_a_last_input_that_is_no_text_takes_no_ending() -> None:
    program = dspy.Predict("question: str, choices: list[str] -> answer")
    one = item("self", question="a", choices=["b", "c"], answer="b")
    assert demo_endings(program, [one]) == {}
    ending = DemoEnding("choices", "!")
    assert ending.on(one.demo) == one.demo


def test_predictors_without_demos_have_none(kinds: dict[str, Any]) -> None:
    program = kinds["nested"].make()
    found = demo_endings(program, [item("listed[0]", message="a", topic="b")])
    assert set(found) == {"listed[0]"}


def test_an_ending_for_no_predictor_is_refused(plain: dspy.Module) -> None:
    with pytest.raises(ConfigurationError, match="no predictor of that name"):
        build_space(plain, endings={"clasify": DemoEnding("message", "!")})


def test_descriptions_say_how_demos_end_and_withhold_private_ones(plain: dspy.Module) -> None:
    space = space_of(
        plain,
        item("classify", message="a secret", label="billing", shared=False),
        item("classify", 1, message="open", label="other"),
    )
    described = space.describe((0, 1, 2, 1))["classify"]["demos"]
    ending = space.content(3, 1)
    assert described == [{"withheld": WITHHELD}, {"message": "open" + ending.text, "label": "other"}]
    assert "secret" not in ending.text and "open" not in ending.text
    assert space.arm_text(3, 1).startswith("demos end like the last turn: Respond with")


def test_a_space_with_endings_survives_json(plain: dspy.Module) -> None:
    space = space_of(plain, item("classify", message="a", label="billing")).space
    assert Space.from_dict(space.to_dict()) == space
