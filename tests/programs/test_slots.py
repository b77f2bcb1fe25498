"""A student becomes a space, and every candidate of it becomes a program again."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import types
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.utils.dummies import DummyLM
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.checks import check_inputs
from asyndbt_dspy.programs.copies import copy_program
from asyndbt_dspy.programs.demos import labelled_demos
from asyndbt_dspy.programs.proposals import guidance_instructions
from asyndbt_dspy.programs.slots import (
    DemoItem,
    FragmentSlots,
    ProgramSpace,
    build_space,
    demo_orders,
    demo_slots,
)


def item(
    message: str,
    label: str,
    *,
    home: str = "eu",
    shared: bool = True,
    predictor: str = "classify",
    key: str | None = None,
    index: int | None = None,
) -> DemoItem:
    return DemoItem(
        key=key or f"d:{home}:{predictor}:{message}",
        home=home,
        shared=shared,
        predictor=predictor,
        demo=dspy.Example(message=message, label=label),
        stratum=label,
        tokens=5,
        source="labelled",
        example_index=index,
    )


@pytest.fixture
def space(plain: dspy.Module) -> ProgramSpace:
    """Instructions (3 arms), then demos of billing, access and other: two workers and a private one."""
    return build_space(
        plain,
        instructions={"classify": ["Sort it.", "Sort it well."]},
        demos=[
            item("eu pays", "billing", index=4),
            item("us pays", "billing", home="us"),
            item("lab pays", "billing", home="lab", shared=False, index=0),
            item("us enters", "access", home="us"),
            item("lab enters", "access", home="lab", shared=False, index=1),
        ],
        slots=demo_slots(plain),
    )


def state(program: dspy.Module) -> dict[str, Any]:
    return copy.deepcopy(program.dump_state())


def test_blocks_and_arms(space: ProgramSpace) -> None:
    assert [(b.name, b.kind, len(b.arms), b.stratum) for b in space.space.blocks] == [
        ("classify/instructions", "instructions", 3, None),
        ("classify/demos/billing/0", "demo", 4, "billing"),
        ("classify/demos/access/0", "demo", 3, "access"),
        ("classify/demos/other/0", "demo", 1, "other"),
    ]
    assert [arm.key for arm in space.space.blocks[0].arms] == ["", "i:classify:1", "i:classify:2"]
    assert "pays" not in json.dumps([a.home for b in space.space.blocks for a in b.arms])
    assert "Sort it" not in json.dumps(space.space.to_dict()), (
        "the space travels to the server: no text in it"
    )


def test_every_kind_gets_blocks_for_every_predictor_and_builds(
    kind: Any, examples: list[dspy.Example]
) -> None:
    student = kind.make()
    names = [name for name, _ in student.named_predictors()]
    before = state(student)
    demos = [
        DemoItem(
            f"b:eu:{name}:0",
            "eu",
            True,
            name,
            dspy.Example(augmented=True, message="m"),
            None,
            3,
            "bootstrapped",
        )
        for name in names
    ]
    made = build_space(
        student,
        instructions={name: [f"New text of {name}."] for name in names},
        demos=demos,
        slots=dict.fromkeys(names, (None,)),
    )
    program = made.build([1] * len(made.space.blocks))
    for name, predictor in program.named_predictors():
        assert predictor.signature.instructions == f"New text of {name}."
        assert [demo.toDict() for demo in predictor.demos] == [{"augmented": True, "message": "m"}]
    assert [name for name, _ in program.named_predictors()] == names
    assert state(student) == before, "the student was changed"
    assert state(made.build(made.space.student)) == before
    # It runs, and its prompts carry the new texts.
    lm = DummyLM(kind.answers)
    with dspy.context(lm=lm):
        if hasattr(type(program), "forward"):
            answer = program(message="My card was charged twice")
        else:
            answer = asyncio.run(program.acall(message="My card was charged twice"))
    assert answer.label == "billing"
    assert all("New text of " in entry["messages"][0]["content"] for entry in lm.history)


def test_student_candidate_keeps_the_students_own_demos(plain: dspy.Module) -> None:
    own = dspy.Example(message="own", label="other")
    plain.classify.demos = [own]
    made = build_space(
        plain, demos=[item("new", "billing")], slots=demo_slots(plain), instructions={"classify": ["T"]}
    )
    assert made.build(made.space.student).classify.demos == [own]
    assert made.build((1, 0, 0, 0)).classify.demos == [own], (
        "no demo slot is filled, so the student's demos stay"
    )
    assert [demo.message for demo in made.build((0, 1, 0, 0)).classify.demos] == ["new"]
    assert made.describe((0, 0, 0, 0))["classify"]["demos"] == [{"message": "own", "label": "other"}]
    assert plain.classify.demos == [own]


def test_demos_come_in_block_order(space: ProgramSpace) -> None:
    program = space.build((0, 2, 1, 0))
    assert [demo.message for demo in program.classify.demos] == ["us pays", "us enters"]


def test_a_demo_in_two_slots_is_shown_once(plain: dspy.Module) -> None:
    demos = [item("a", "billing"), item("b", "access"), item("a", "billing", home="us")]
    made = build_space(plain, demos=demos, slots={"classify": (None, None, None)})
    assert [demo.message for demo in made.build((0, 1, 1, 2)).classify.demos] == ["a", "b"]
    same_text_of_two_workers = made.build((0, 1, 3, 0)).classify.demos
    assert [demo.message for demo in same_text_of_two_workers] == ["a"]


def test_one_key_per_demo_whatever_the_slot(plain: dspy.Module) -> None:
    made = build_space(plain, demos=[item("a", "billing")], slots=demo_slots(plain, demos_per_class=2))
    first, second = [block for block in made.space.upper if block.stratum == "billing"]
    assert first.arms == second.arms


def test_allowed_arms(space: ProgramSpace) -> None:
    assert space.allowed("eu", "own") == ((0, 1), (0, 1), (0,)), "access is filled from what others share"
    assert space.allowed("us", "own") == ((0, 2), (0, 1), (0,))
    assert space.allowed("lab", "own") == ((0, 3), (0, 2), (0,))
    assert space.allowed("eu", "all") == ((0, 1, 2), (0, 1), (0,))
    assert space.allowed("lab", "all") == ((0, 1, 2, 3), (0, 1, 2), (0,))
    assert space.allowed("newcomer", "own") == space.allowed("newcomer", "all") == ((0, 1, 2), (0, 1), (0,))
    with pytest.raises(ConfigurationError, match="'mine'"):
        space.allowed("eu", "mine")  # type: ignore[arg-type]


def test_private_demos_are_withheld_from_descriptions(space: ProgramSpace) -> None:
    private = (0, 3, 2, 0)
    assert "lab" not in json.dumps(space.describe(private)).replace("label", "")
    assert "lab" not in space.arm_text(1, 3)
    assert "lab pays" in json.dumps(space.describe(private, reveal_private=True))
    assert space.arm_text(1, 3, reveal_private=True) == "message: lab pays\nlabel: billing"
    assert space.arm_text(1, 1) == "message: eu pays\nlabel: billing"
    assert space.arm_text(0, 0) == "Sort the message into a queue."
    assert space.arm_text(0, 1) == "Sort it."
    assert space.arm_text(1, 0) == ""
    with pytest.raises(ConfigurationError, match=r"0\.\.2"):
        space.arm_text(0, 3)
    with pytest.raises(ConfigurationError, match=r"0\.\.3"):
        space.arm_text(4, 0)


def test_shown_examples(space: ProgramSpace) -> None:
    assert space.shown_examples((0, 1, 1, 0), "eu") == {4}
    assert space.shown_examples((0, 3, 2, 0), "lab") == {0, 1}
    assert space.shown_examples((0, 3, 2, 0), "eu") == set()


def test_build_is_cached_and_fresh_is_not(space: ProgramSpace) -> None:
    chosen = (1, 1, 0, 0)
    kept = space.build(chosen)
    assert space.build(list(chosen)) is kept
    fresh = space.build(chosen, fresh=True)
    assert fresh is not kept and state(fresh) == state(kept)
    fresh.classify.demos[0].message = "changed"
    fresh.classify.demos.clear()
    assert [demo.message for demo in space.build(chosen).classify.demos] == ["eu pays"]


def test_changing_the_student_later_changes_nothing(plain: dspy.Module, space: ProgramSpace) -> None:
    plain.classify.signature = plain.classify.signature.with_instructions("Something else.")
    plain.classify.demos = [dspy.Example(message="late", label="other")]
    assert (
        space.build(space.space.student).classify.signature.instructions == "Sort the message into a queue."
    )
    assert space.build(space.space.student).classify.demos == []


def test_a_predictors_own_lm_is_the_same_object(with_own_lm: dspy.Module) -> None:
    lm = with_own_lm.classify.lm
    made = build_space(with_own_lm, instructions={"classify": ["New."]}, slots=demo_slots(with_own_lm))
    assert made.build((1, 0, 0, 0)).classify.lm is lm
    assert made.build(made.space.student).classify.lm is lm
    assert with_own_lm.classify.lm is lm


def test_a_program_that_cannot_be_deep_copied_still_builds(plain: dspy.Module) -> None:
    plain.lock = threading.Lock()
    plain.notes = {"seen": []}
    plain.classify.lm = DummyLM([{"label": "other"}])
    plain.listed = [dspy.Predict("message -> topic", connection=threading.Lock())]
    made = build_space(plain, instructions={"classify": ["New."]})
    for program in (copy_program(plain), made.build((0, 0)), made.build((1, 0))):
        assert program is not plain and program.classify is not plain.classify
        assert program.listed[0] is not plain.listed[0]
        assert program.classify.lm is plain.classify.lm and program.lock is plain.lock
        assert program.notes == plain.notes and program.notes is not plain.notes


def test_lms_in_containers_and_large_arrays_stay_one(plain: dspy.Module) -> None:
    plain.judges = {"strict": [DummyLM([{"label": "a"}]), DummyLM([{"label": "b"}])]}
    plain.index = types.SimpleNamespace(vectors=np.zeros((300, 1024), dtype="float32"), weights=np.zeros(3))
    program = build_space(plain).build((0,))
    assert program.judges is not plain.judges
    assert [
        one is other for one, other in zip(program.judges["strict"], plain.judges["strict"], strict=True)
    ] == [
        True,
        True,
    ]
    assert program.index is not plain.index and program.index.vectors is plain.index.vectors
    assert program.index.weights is not plain.index.weights


def test_attributes_may_answer_questions_as_they_like(plain: dspy.Module) -> None:
    class Config(dict):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    class Odd:
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            raise LookupError(name)

    plain.settings, plain.odd = Config(model="m"), Odd()
    assert build_space(plain).build((0,)).settings == {"model": "m"}


def test_a_shared_predictor_stays_shared(kinds: Any) -> None:
    made = build_space(kinds["shared"].make(), instructions={"first": ["New."]})
    program = made.build((1,))
    assert program.first is program.second
    assert [block.predictor for block in made.space.blocks] == ["first"]


def test_repeated_instructions_are_dropped(plain: dspy.Module) -> None:
    texts = ["New.", "Sort the message into a queue.", "New. ", "", " ", "Other."]
    made = build_space(plain, instructions={"classify": texts})
    assert [made.arm_text(0, arm) for arm in range(3)] == ["Sort the message into a queue.", "New.", "Other."]
    assert len(made.space.blocks[0].arms) == 3


def test_fragments_become_a_note(plain: dspy.Module) -> None:
    made = build_space(
        plain, fragments=FragmentSlots(3, ("red", "green", "red")), instructions={"classify": ["T."]}
    )
    assert [b.name for b in made.space.blocks] == ["classify/instructions"] + [
        f"classify/fragments/{slot}" for slot in range(3)
    ]
    assert [len(block.arms) for block in made.space.blocks[1:]] == [3, 3, 3]
    assert made.build((0, 2, 0, 1)).classify.signature.instructions == (
        "Sort the message into a queue.\nNote: green red"
    )
    assert made.build((1, 0, 0, 1)).classify.signature.instructions == "T.\nNote: red"
    assert made.build(made.space.student).classify.signature.instructions == "Sort the message into a queue."
    assert made.describe((1, 1, 1, 0))["classify"]["instructions"] == "T.\nNote: red red"


def test_demo_slots_per_kind(kinds: Any) -> None:
    labels = ("billing", "access", "other")
    assert demo_slots(kinds["predict"].make()) == {"self": labels}
    assert demo_slots(kinds["predict"].make(), demos_per_class=2) == {"self": labels * 2}
    assert demo_slots(kinds["predict"].make(), demos_per_class=0) == {"self": ()}
    assert demo_slots(kinds["predict"].make(), max_classes=2, demo_slots=3) == {"self": (None,) * 3}
    assert demo_slots(kinds["react"].make()) == {
        "react": ("lookup", "finish") * 2,  # about demo_slots in all
        "extract.predict": labels,
    }
    nested = demo_slots(kinds["nested"].make(), demo_slots=2)
    assert nested == {
        "inner.predict": labels,
        "listed[0]": (None, None),
        "named['urgency']": ("True", "False"),
    }
    with pytest.raises(ConfigurationError, match=r"demos_per_class must be 0 or more, got -1"):
        demo_slots(kinds["predict"].make(), demos_per_class=-1)


def test_orders_put_every_class_first_and_last_with_every_other() -> None:
    orders = demo_orders(("a", "b", "c"))
    assert orders[0] == (0, 1, 2)
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert {(order[0], order[-1]) for order in orders} == {
        (i, j) for i in range(3) for j in range(3) if i != j
    }
    # two slots of one class: sequences of classes are told apart, not of slots
    shown = [tuple("abab"[slot] for slot in order) for order in demo_orders(("a", "b", "a", "b"))]
    assert len(set(shown)) == len(shown)
    assert {"".join(one) for one in shown} >= {"abab", "baba", "aabb", "bbaa"}
    assert len(demo_orders(tuple("abcdefghijkl"))) <= 36
    assert demo_orders((None, None)) == [(0, 1), (1, 0)]


def test_an_order_shows_the_demos_in_its_sequence(plain: dspy.Module) -> None:
    items = [item("m0", "billing", key="k0"), item("m1", "access", key="k1"), item("m2", "other", key="k2")]
    made = build_space(
        plain, demos=items, slots={"classify": ("billing", "access", "other")}, search_order=True
    )
    block = made.space.blocks[-1]
    assert block.kind == "order"
    for number, arm in enumerate(block.arms):
        program = made.build((0, 1, 1, 1, number))
        shown = [demo["message"] for demo in program.named_predictors()[0][1].demos]
        assert shown == [f"m{slot}" for slot in arm.order or (0, 1, 2)]


def test_what_does_not_fit_is_refused(plain: dspy.Module, space: ProgramSpace) -> None:
    with pytest.raises(ConfigurationError, match=r"\['clasify'\].*\['classify'\]"):
        build_space(plain, instructions={"clasify": ["x"]})
    with pytest.raises(ConfigurationError, match="two different demos have the key 'k'"):
        build_space(plain, demos=[item("a", "billing", key="k"), item("b", "billing", key="k")])
    with pytest.raises(ConfigurationError, match=r"arms 0\.\.2, got 3"):
        space.build((3, 0, 0, 0))
    with pytest.raises(ConfigurationError, match="slots=0"):
        FragmentSlots(0, ("a",))


def test_concurrent_runs_of_one_program_do_not_mix(examples: list[dspy.Example], plain: dspy.Module) -> None:
    demos = labelled_demos(plain, examples, worker="eu")
    made = build_space(plain, demos=demos, slots=demo_slots(plain))
    program = made.build((0, 1, 1, 1))
    lm = DummyLM({example.message: {"label": example.label} for example in examples})

    async def run() -> list[str]:
        with dspy.context(lm=lm):
            calls = [program.classify.acall(message=example.message) for example in examples]
            return [answer.label for answer in await asyncio.gather(*calls)]

    assert asyncio.run(run()) == [example.label for example in examples]


def test_descriptions_are_plain_json(queue: Any) -> None:
    signature = dspy.Signature("message -> note").append("label", dspy.OutputField(), type_=queue)
    student = dspy.Predict(signature)
    demo = dspy.Example(augmented=True, message=["a", "b"], note="n", label=queue.ACCESS)
    arm = DemoItem("b:eu:self:0", "eu", True, "self", demo, "access", 4, "bootstrapped")
    made = build_space(student, demos=[arm], slots=demo_slots(student, demos_per_class=1))
    described = made.describe((0, 0, 1))
    assert json.loads(json.dumps(described)) == described
    assert described["self"]["demos"] == [{"message": ["a", "b"], "note": "n", "label": "access"}]
    assert made.build((0, 0, 1)).demos[0].label is queue.ACCESS


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_described_is_what_is_built(data: st.DataObject) -> None:
    student = dspy.Predict("message -> label: bool")
    student.demos = [dspy.Example(message="own", label="own")] if data.draw(st.booleans()) else []
    texts = data.draw(st.lists(st.text(max_size=5), max_size=3))
    numbers = data.draw(st.lists(st.integers(0, 4), max_size=6))
    demos = [
        item(
            f"m{number}", str(number % 2 == 0), home=f"w{number % 3}", shared=number % 3 > 0, predictor="self"
        )
        for number in numbers
    ]
    words = FragmentSlots(2, ("red", "green")) if data.draw(st.booleans()) else None
    slots = {"self": data.draw(st.lists(st.sampled_from(["True", "False", None]), max_size=4))}
    made = build_space(student, instructions={"self": texts}, demos=demos, slots=slots, fragments=words)
    candidate = [data.draw(st.integers(0, len(block.arms) - 1)) for block in made.space.blocks]
    program = made.build(candidate)
    described = made.describe(candidate, reveal_private=True)["self"]
    assert program.signature.instructions == described["instructions"]
    assert [demo.toDict() for demo in program.demos] == described["demos"]
    shown = [demo["message"] for demo in described["demos"]]
    assert len(shown) == len(set(shown)), "a demo was shown twice"
    if not any(candidate):
        assert program.dump_state() == student.dump_state()
    for worker in ("w0", "w1", "w2"):
        own, everything = made.allowed(worker, "own"), made.allowed(worker, "all")
        for block, few, all_of_them in zip(made.space.upper, own, everything, strict=True):
            assert few[0] == all_of_them[0] == 0 and set(few) <= set(all_of_them)
            arms = [block.arms[number] for number in all_of_them[1:]]
            assert all(arm.shared or arm.home == worker for arm in arms)


def test_secrets_of_a_private_worker_reach_no_text(
    plain: dspy.Module, examples: list[dspy.Example], caplog: pytest.LogCaptureFixture
) -> None:
    secrets = [
        dspy.Example(message=f"SECRET{number} " * (1 if number else 500), label=label).with_inputs("message")
        for number, label in enumerate(("billing", "access", "other", "SECRETLABEL"))
    ]
    check_inputs(plain, secrets, valset=secrets, context_tokens=512)
    private = labelled_demos(plain, secrets, worker="lab", shared=False)
    made = build_space(
        plain,
        demos=[*labelled_demos(plain, examples, worker="eu"), *private],
        slots=demo_slots(plain),
        instructions={"classify": guidance_instructions("Sort it.")},
    )
    texts = [json.dumps(made.space.to_dict()), caplog.text]
    for number, block in enumerate(made.space.blocks):
        for arm in range(len(block.arms)):
            chosen = [0] * len(made.space.blocks)
            chosen[number] = arm
            texts += [made.arm_text(number, arm), json.dumps(made.describe(chosen))]
            for worker in ("eu", "us"):
                for pool in ("own", "all"):
                    if block.kind == "demo" and arm in made.allowed(worker, pool)[number - 1]:
                        texts += [str(made.build(chosen).classify.demos)]
    assert len(private) == 3 and caplog.records
    assert not [text for text in texts if "SECRET" in text]
