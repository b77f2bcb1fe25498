"""`compile` improves every predictor of every kind of program, and leaves the student as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import dspy
import kit
import pytest

from asyndbt_dspy import Worker

TEST = kit.examples(30, start=300)


def predictors_of(kind: str) -> int:
    return len(kit.KINDS[kind]().named_predictors())


@pytest.mark.parametrize("kind", kit.KINDS)
def test_every_predictor_gets_new_instructions(kind: str) -> None:
    student, lm = kit.KINDS[kind](), kit.color_lm(predictors=predictors_of(kind))
    before, objects = kit.state_of(student), [id(one) for _, one in student.named_predictors()]
    optimizer = kit.optimizer(mode="instructions", instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=lm):
        optimized = optimizer.compile(student, trainset=kit.examples(72))
        # The scripted LM is right on every item only if every predictor was changed.
        assert kit.score(optimized, TEST) == 1.0
        assert kit.score(student, TEST) < 0.5
    assert {one.signature.instructions for _, one in optimized.named_predictors()} == {kit.MAGIC}
    assert kit.state_of(student) == before
    assert [id(one) for _, one in student.named_predictors()] == objects
    assert not {id(one) for _, one in optimized.named_predictors()} & set(objects)
    assert type(optimized) is type(student)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_both_levels_change_and_the_saved_program_answers_the_same(kind: str, tmp_path: Path) -> None:
    student, lm = kit.KINDS[kind](), kit.color_lm(predictors=predictors_of(kind))
    before = kit.state_of(student)
    optimizer = kit.optimizer(instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=lm):
        optimized = optimizer.compile(student, trainset=kit.examples(72))
        assert kit.score(optimized, TEST) >= kit.score(student, TEST) + 0.4
        optimized.save(str(tmp_path / "program.json"))
        again = kit.KINDS[kind]()
        again.load(str(tmp_path / "program.json"))
        answers = [kit.run(optimized, one.message) for one in TEST]
        assert [kit.run(again, one.message) for one in TEST] == answers
    assert kit.state_of(again) == kit.state_of(optimized)
    changed = dict(optimized.named_predictors())
    for name, predictor in student.named_predictors():
        new = changed[name]
        assert new.signature.instructions != predictor.signature.instructions or new.demos, name
    assert kit.state_of(student) == before
    assert not any(getattr(one, "_compiled", False) for _, one in optimized.named_sub_modules())


def test_every_predictor_has_blocks_for_instructions_and_demos() -> None:
    student = kit.TwoSteps()
    optimizer = kit.optimizer()
    with dspy.context(lm=kit.color_lm(predictors=2)):
        optimizer.compile(student, trainset=kit.examples(72))
    blocks = set(optimizer.result.curve[0].z)
    assert blocks == {"topic/instructions", "sort/instructions"}
    arms = len(optimizer.result.candidates[0].arms)
    # Two instructions, four free slots, one slot per class, an order and an ending per predictor.
    assert arms == 2 + 4 + 3 + 2 + 2


def test_a_predictor_keeps_its_own_lm_and_worker_lms_do_not_leak() -> None:
    own, surrounding = kit.color_lm("own", predictors=2), kit.color_lm("surrounding", predictors=2)
    theirs = [kit.color_lm(f"worker-{number}", predictors=2) for number in range(2)]
    student = kit.TwoSteps()
    student.sort.lm = own
    workers = [
        Worker(f"w{number}", kit.examples(36, start=36 * number), lm=lm) for number, lm in enumerate(theirs)
    ]
    optimizer = kit.optimizer(workers=workers, instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=surrounding):
        optimized = optimizer.compile(student)
    assert kit.calls_of(surrounding) == 0
    assert kit.calls_of(own) > 0
    assert all(kit.calls_of(lm) > 0 for lm in theirs)
    assert student.sort.lm is own
    assert student.topic.lm is None
    assert optimized.sort.lm is own
    assert optimized.topic.lm is None
    asked = [kit.calls_of(lm) for lm in theirs]
    with dspy.context(lm=surrounding):
        assert kit.score(optimized, TEST) == 1.0
    assert [kit.calls_of(lm) for lm in theirs] == asked
    assert kit.calls_of(surrounding) > 0


def test_the_lm_given_to_set_lm_stays_with_the_program() -> None:
    mine, student = kit.color_lm("mine"), kit.KINDS["ChainOfThought"]()
    student.set_lm(mine)
    optimized = kit.optimizer(instructions=kit.texts_for(student, kit.MAGIC)).compile(
        student, trainset=kit.examples(48)
    )
    assert [predictor.lm for _, predictor in optimized.named_predictors()] == [mine]
    assert student.get_lm() is mine
    assert kit.score(optimized, TEST) == 1.0


def test_the_student_is_returned_as_it_was_when_nothing_beats_it() -> None:
    student = dspy.Predict(kit.Sort.with_instructions(kit.MAGIC))
    student.demos = [dspy.Example(message="item 1", label="green")]
    before = kit.state_of(student)
    optimizer = kit.optimizer(instructions=kit.texts_for(student, "Guess.", "Say red."))
    with dspy.context(lm=kit.color_lm()):
        optimized = optimizer.compile(student, trainset=kit.examples(48))
    assert kit.state_of(optimized) == before
    assert optimized is not student
    assert optimizer.result.winner == "student"
    assert "Nothing beat the student" in str(optimizer.result)


def test_changing_the_returned_program_changes_neither_student_nor_a_second_compile() -> None:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=kit.color_lm()):
        first = optimizer.compile(student, trainset=kit.examples(48))
        expected = kit.state_of(first)
        for demo in first.demos:
            demo["message"] = "spoiled"
        first.demos.clear()
        second = optimizer.compile(student, trainset=kit.examples(48))
    assert kit.state_of(second) == expected
    assert not student.demos


def test_traces_of_a_teacher_become_demos() -> None:
    """A teacher with other predictors and an LM of its own; only what fits the student's predictors is used."""

    class Teacher(kit.TwoSteps):
        def __init__(self) -> None:
            super().__init__()
            self.extra = dspy.Predict(kit.Topic)

    teacher, student = Teacher(), kit.TwoSteps()
    wise = kit.color_lm("wise", predictors=2)
    teacher.set_lm(wise)
    for _, predictor in teacher.named_predictors():
        predictor.signature = predictor.signature.with_instructions(kit.MAGIC)
    before = kit.state_of(teacher)
    optimizer = kit.optimizer(mode="demos")
    with dspy.context(lm=(own := kit.color_lm(predictors=2))):
        optimizer.compile(student, trainset=kit.examples(72), teacher=teacher)
    assert kit.calls_of(wise) > 0
    demos = [one for asked in kit.requests_of(own) for one in asked if one["role"] == "assistant"]
    assert any("clear" in one["content"] for one in demos), "no student was shown what the teacher wrote"
    assert kit.state_of(teacher) == before


def test_a_student_that_knows_one_class_gets_demos_of_all() -> None:
    """No example holds what the last predictor reads, so its demos are traces: of answers that were wrong with the label."""

    class Choose(dspy.Signature):
        """Choose by the topic."""

        topic: str = dspy.InputField()
        label: Literal["red", "green", "blue"] = dspy.OutputField()

    class Passing(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.topic = dspy.Predict(kit.Topic)
            self.choose = dspy.Predict(Choose)

        def forward(self, message: str) -> dspy.Prediction:
            return self.choose(topic=self.topic(message=message).topic)

    def script(messages: list[dict[str, str]]) -> str:
        number, knows = kit.number_in(messages), len(kit.labels_shown(messages)) == 3
        return kit.answer(messages, topic=f"item {number}", label=kit.right_label(number) if knows else "red")

    student = Passing()
    with dspy.context(lm=kit.make_lm(script)):
        optimized = kit.optimizer(mode="demos").compile(student, trainset=kit.examples(72))
        assert kit.score(student, TEST) < 0.5
        assert kit.score(optimized, TEST) == 1.0
    for demo in optimized.choose.demos:
        number = int(demo.topic.removeprefix("item "))
        assert demo.label == kit.right_label(number)


@pytest.mark.parametrize("options", [{"bootstrap": False}, {"mode": "instructions"}])
def test_traces_that_only_the_proposer_needs_are_no_demos(options: dict[str, Any]) -> None:
    proposer = kit.make_lm(lambda messages: kit.answer(messages, new_instructions=kit.MAGIC), "proposer")
    lm = kit.color_lm(predictors=2)
    with dspy.context(lm=lm):
        kit.optimizer(proposer=proposer, **options).compile(kit.TwoSteps(), trainset=kit.examples(72))
    shown = [one for asked in kit.requests_of(lm) for one in asked if one["role"] == "assistant"]
    assert not any("topic" in one["content"] for one in shown)


@pytest.mark.parametrize("options", [{"mode": "demos"}, {"instructions": {"self": [kit.MAGIC]}}])
def test_a_proposer_that_has_nothing_to_write_costs_nothing(options: dict[str, Any]) -> None:
    proposer = kit.make_lm(lambda messages: kit.answer(messages, new_instructions=kit.MAGIC), "proposer")
    searched = []
    for one in (None, proposer):
        optimizer = kit.optimizer(proposer=one, **options)
        with dspy.context(lm=kit.color_lm()):
            optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(72))
        searched.append([type(record.event).__name__ for record in optimizer.recorded])
    assert kit.calls_of(proposer) == 0
    assert searched[0] == searched[1], "no rollout is taken from the search for failures that nobody is shown"


def test_a_proposer_writes_instruction_arms_from_observed_failures() -> None:

    def propose(messages: list[dict[str, str]]) -> str:
        return kit.answer(messages, new_instructions=f"{kit.MAGIC} Name the message's label.")

    def metric(gold: dspy.Example, prediction: dspy.Prediction) -> dspy.Prediction:
        right = gold.label == prediction.label
        return dspy.Prediction(score=float(right), feedback="" if right else "feedback: look closer")

    proposer = kit.make_lm(propose, "proposer")
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(metric=metric, mode="instructions", proposer=proposer, tips=["be brief"])
    with dspy.context(lm=kit.color_lm()):
        optimized = optimizer.compile(student, trainset=kit.examples(72))
    assert kit.MAGIC in optimized.signature.instructions
    for part in ("feedback: look closer", "be brief", "Sort the message.", "item "):
        assert part in kit.text_of(proposer)
    assert optimizer.result.metric_calls <= 120


@pytest.mark.parametrize("teacher", [None, dspy.Predict(kit.Sort)])
def test_it_is_a_part_of_better_together(teacher: dspy.Module | None) -> None:
    """DSPy's optimizer of optimizers passes a teacher on in a list, and evaluates what each part returns."""
    student, lm = dspy.Predict(kit.Sort), kit.color_lm()
    for one in (student, teacher):
        if one is not None:
            one.set_lm(lm)
    both = dspy.BetterTogether(metric=kit.metric, ours=kit.optimizer(), theirs=dspy.LabeledFewShot(k=1))
    with dspy.context(lm=lm):
        better = both.compile(
            student, trainset=kit.examples(72), teacher=teacher, strategy="theirs -> ours", seed=0
        )
        assert kit.score(better, TEST) == 1.0
    assert not better.flag_compilation_error_occurred
    assert better.candidate_programs[0]["strategy"] == "theirs -> ours"
