"""Instruction arms from a proposer LM and from the shipped guidance; the vocabulary of the paper's preset."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.utils.dummies import DummyLM
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.programs.proposals import (
    GUIDANCE,
    TIPS,
    guidance_instructions,
    pmi_vocabulary,
    propose_instructions,
)
from asyndbt_dspy.programs.rollout import Rollout

STUDENT_TEXT = "Sort the message into a queue."


class Tickets(dspy.Module):
    """Sorts the mail of a bicycle shop."""

    def __init__(self, signature: Any) -> None:
        super().__init__()
        self.summarize = dspy.Predict("message -> summary")
        self.classify = dspy.Predict(signature)


def propose(student: dspy.Module, answers: list[str], **options: Any) -> tuple[list[str], DummyLM]:
    lm = DummyLM([{"new_instructions": answer} for answer in answers])
    options = {"predictor": "classify", "count": len(answers), **options}
    predictor = options.pop("predictor")
    return asyncio.run(propose_instructions(student, predictor, lm=lm, **options)), lm


def prompts(lm: DummyLM) -> list[str]:
    return ["\n".join(message["content"] for message in entry["messages"]) for entry in lm.history]


def test_guidance_is_appended_on_a_new_line() -> None:
    assert 8 <= len(GUIDANCE) == len(set(GUIDANCE)) <= 12
    assert guidance_instructions("Do it.") == [f"Do it.\n{sentence}" for sentence in GUIDANCE]
    assert guidance_instructions("") == list(GUIDANCE)


def test_proposals_are_returned_and_the_student_is_untouched(plain: dspy.Module) -> None:
    texts, lm = propose(plain, ["Sort by who must act.", "Choose the queue whose team can help."])
    assert texts == ["Sort by who must act.", "Choose the queue whose team can help."]
    assert len(lm.history) == 2
    assert plain.classify.signature.instructions == STUDENT_TEXT


def test_the_proposer_sees_program_data_tips_and_failures(triage: Any, examples: list[dspy.Example]) -> None:
    failed = Rollout(score=0.0, feedback="A refund is billing.", prediction=dspy.Prediction(label="other"))
    broken = Rollout(score=0.0, error="ValueError: no label")
    _, lm = propose(
        Tickets(triage),
        ["One."],
        examples=examples,
        failures=[(examples[3], failed), (examples[1], broken)],
        tips=["Be brief about it."],
    )
    (prompt,) = prompts(lm)
    for needle in (
        "Sorts the mail of a bicycle shop.",
        "Step classify: message -> label  <- this step",
        "Step summarize: message -> summary",
        "label is one of: billing, access, other",
        "6 examples.",
        "billing: 2, access: 2, other: 2",
        STUDENT_TEXT,
        "Be brief about it.",
        'Refund my order", "label": "billing"} the program answered {"label": "other"}, score 0',
        "Feedback: A refund is billing.",
        "Error: ValueError: no label",
    ):
        assert needle in prompt, needle


def test_only_what_the_caller_passes_is_shown(plain: dspy.Module, examples: list[dspy.Example]) -> None:
    plain.classify.demos = [dspy.Example(message="SECRET of a private worker", label="other")]
    _, lm = propose(plain, ["One."], examples=examples[:2])
    assert "SECRET" not in prompts(lm)[0] and examples[2].message not in prompts(lm)[0]


def test_proposals_differ_in_aim_and_examples_and_the_seed_repeats_them(
    plain: dspy.Module, examples: list[dspy.Example]
) -> None:
    first = prompts(propose(plain, ["a", "b", "c"], examples=examples)[1])
    again = prompts(propose(plain, ["a", "b", "c"], examples=examples)[1])
    other = prompts(propose(plain, ["a", "b", "c"], examples=examples, seed=1)[1])
    assert len(set(first)) == 3 and first == again and first != other


def test_without_tips_the_shipped_ones_are_used(plain: dspy.Module) -> None:
    given = prompts(propose(plain, ["a", "b"], tips=())[1])
    assert [tip in prompt for tip, prompt in zip(TIPS, given, strict=False)] == [True, True]


def test_what_cannot_be_used_is_replaced_by_guidance(plain: dspy.Module, caplog: Any) -> None:
    unusable = ["", STUDENT_TEXT.upper(), "Good one.", "good  one.", "x" * 5000]
    texts, _ = propose(plain, unusable)
    assert texts == ["Good one.", *guidance_instructions(STUDENT_TEXT)[:4]]
    (record,) = caplog.records
    message = record.getMessage()
    assert "4 of 5" in message and "1 x empty" in message and "2 x a repeat" in message
    assert "longer than 4000 characters" in message


@pytest.mark.parametrize("nothing", [None, "", "  \n", "None", "null", '"None"', "N/A", "none."])
@pytest.mark.parametrize("known", [None, [STUDENT_TEXT]])  # of the setup, and of the search
def test_no_text_is_no_instruction(plain: dspy.Module, nothing: Any, known: Any) -> None:
    answers = iter([nothing, "Sort by who must act."])

    class Writer(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
            text = json.dumps({"new_instructions": next(answers)})
            message = SimpleNamespace(content=text)
            return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage={}, model="writer")

    with dspy.context(adapter=dspy.JSONAdapter()):
        found = asyncio.run(
            propose_instructions(plain, "classify", lm=Writer("writer"), count=2, known=known)
        )
    assert [one for one in found if one not in guidance_instructions(STUDENT_TEXT)] == [
        "Sort by who must act."
    ]


def test_fences_and_quotes_are_taken_off(plain: dspy.Module) -> None:
    texts, _ = propose(plain, ["```text\nSort it.\n```", '"Sort it well."', '\'Tis "fine"'])
    assert texts == ["Sort it.", "Sort it well.", '\'Tis "fine"']


def test_marked_field_names_must_survive(triage: Any) -> None:
    marked = dspy.Predict(triage.with_instructions("Given `message`, write {label}."))
    texts, _ = propose(marked, ["Sort it.", "From the message find the label."], predictor="self")
    assert texts == [
        "From the message find the label.",
        *guidance_instructions(marked.signature.instructions)[:1],
    ]


def test_templates_with_braces_are_fine(plain: dspy.Module) -> None:
    assert propose(plain, ['Answer like {"label": "{x}"} does.'])[0] == ['Answer like {"label": "{x}"} does.']


def test_a_react_agent_keeps_its_list_of_tools(kinds: Any) -> None:
    agent = kinds["react"].make()
    student_text = agent.react.signature.instructions
    assert "lookup" in student_text
    texts, _ = propose(agent, ["Think twice about `message`."], predictor="react")
    assert texts == [f"{student_text}\nThink twice about `message`."]


def test_a_proposer_that_fails_is_replaced_by_guidance(plain: dspy.Module, caplog: Any) -> None:
    lm = DummyLM([])  # out of answers: every call raises
    texts = asyncio.run(propose_instructions(plain, "classify", lm=lm, count=3))
    assert texts == guidance_instructions(STUDENT_TEXT)[:3]
    assert len([r for r in caplog.records if r.name.startswith("asyndbt_dspy")]) == 1
    assert "3 of 3" in caplog.text


def test_a_refused_call_is_not_swallowed(plain: dspy.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Any, **inputs: Any) -> Any:
        raise RuntimeError("engine") from BudgetExceededError("0 dollars left")

    monkeypatch.setattr(dspy.Predict, "acall", refuse)
    with pytest.raises(BudgetExceededError, match="0 dollars left"):
        propose(plain, ["a"])


def test_bad_arguments(plain: dspy.Module) -> None:
    with pytest.raises(ConfigurationError, match=r"'sort'.*\['classify'\]"):
        propose(plain, ["a"], predictor="sort")
    with pytest.raises(ConfigurationError, match="got -1"):
        propose(plain, ["a"], count=-1)
    assert propose(plain, [], count=0)[0] == []


class TestVocabulary:
    @staticmethod
    def texts(*texts: str) -> list[dspy.Example]:
        return [dspy.Example(text=text, label="SECRETLABEL").with_inputs("text") for text in texts]

    def test_words_that_go_together_stay_together(self) -> None:
        repeated = self.texts(*["New York is big, York is not!", "the new york area", "a b c d"] * 6)
        found = pmi_vocabulary(repeated, "label", 10)
        assert "a b c d" in found
        assert all(ngram == ngram.lower() and not ngram.endswith("!") for ngram in found)
        assert "secretlabel" not in " ".join(found)

    def test_counts_by_hand(self) -> None:
        # Words: a 4, b 4, x 2, y 2; 8 pairs: ab 4, bx 2, by 2. PMI: ab log(8·4/16), bx and by log(8·2/8):
        # all .69, so every word stands alone.
        assert pmi_vocabulary(self.texts("a b x", "a b y", "a b x", "a b y"), "label", 9) == [
            "a",
            "b",
            "x",
            "y",
        ]
        # Three pairs, each twice: PMI = log(6·2/4) = 1.1, so each stays whole. Two pairs: log(4·2/4) = .69.
        assert pmi_vocabulary(self.texts("a b", "c d", "e f", "a b", "c d", "e f"), "label", 9) == [
            "a b",
            "c d",
            "e f",
        ]
        assert pmi_vocabulary(self.texts("a b", "c d", "a b", "c d"), "label", 9) == ["a", "b", "c", "d"]

    def test_the_most_frequent_come_first_and_the_list_is_cut(self) -> None:
        examples = self.texts(*["common"] * 9, *["rare"] * 7, *["odd"])
        assert pmi_vocabulary(examples, "label", 2) == ["common", "rare"]
        assert pmi_vocabulary(examples, "label", 3) == ["common", "rare", "odd"]
        assert pmi_vocabulary([], "label", 3) == []

    def test_long_pieces_are_left_out(self) -> None:
        assert pmi_vocabulary(self.texts("a b c d e f"), "label", 5) == []
        assert pmi_vocabulary(self.texts("a b c d e"), "label", 5) == ["a b c d e"]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.text("ab c!", max_size=12), max_size=12), st.randoms(use_true_random=False))
    def test_the_order_of_examples_does_not_matter(self, texts: list[str], rng: random.Random) -> None:
        found = pmi_vocabulary(self.texts(*texts), "label", 6)
        shuffled = list(texts)
        rng.shuffle(shuffled)
        assert pmi_vocabulary(self.texts(*shuffled), "label", 6) == found
        assert len(found) == len(set(found)) <= 6
        assert all(ngram.strip() == ngram != "" for ngram in found)
