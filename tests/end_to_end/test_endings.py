"""An LM that reads demos only where they look like what it is asked: the search finds out, and the program shows it."""

from __future__ import annotations

import itertools

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT


def reminded(messages: list[dict[str, str]]) -> str:
    """Right where demos of two classes end with the adapter's reminder; ``red`` elsewhere."""
    alike = [
        answer
        for asked, answer in itertools.pairwise(messages)
        if asked["role"] == "user" and "Respond with" in asked["content"]
    ]
    knows = len({label for label in kit.LABELS for one in alike if f'"{label}"' in one["content"]}) >= 2
    number = kit.number_in(messages)
    return kit.answer(messages, label=kit.right_label(number) if knows else "red")


def compiled(**options: object) -> tuple[AsynDBT, dspy.Module]:
    with dspy.context(lm=kit.make_lm(reminded, "reminded"), adapter=dspy.JSONAdapter()):
        optimizer = kit.optimizer(**options)
        program = optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
        assert optimizer.result is not None
        return optimizer, program


def test_demos_end_like_the_last_turn_where_that_helps(tmp_path: object) -> None:
    _, program = compiled()
    assert program.demos and all("Respond with a JSON object" in demo.message for demo in program.demos)
    lm = kit.make_lm(reminded, "deployed")
    loaded = dspy.Predict(kit.Sort)
    program.save(f"{tmp_path}/program.json")
    loaded.load(f"{tmp_path}/program.json")
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert kit.score(loaded, kit.examples(12, start=100)) == 1.0


@pytest.mark.parametrize("options", [{"demo_ending": False}, {"preset": "paper"}])
def test_where_it_is_turned_off_demos_stay_as_they_are(options: dict[str, object]) -> None:
    optimizer, program = compiled(**options)
    assert all("Respond with" not in demo.message for demo in program.demos)
    shown = [demo for row in optimizer.result.candidates for demo in row.program["self"]["demos"]]
    assert all("Respond with" not in demo["message"] for demo in shown)
