"""The presets and ablations end to end, and the bilevel machinery at work in a real compile."""

from __future__ import annotations

import dataclasses
from typing import Any

import dspy
import kit
import numpy as np
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError
from asyndbt_dspy.compilation import make_config
from asyndbt_dspy.core.messages import RoundRequest, StepReply, StepRequest

TEST = kit.examples(30, start=300)

# Small minibatches: many iterations, and so planes, for few calls.
LIVE: dict[str, dict[str, Any]] = {
    "default": {"workers": 3, "budget": Budget(metric_calls=160), "config": {"minibatch": 3}},
    "paper": {"workers": 2, "budget": Budget(metric_calls=210), "config": {"minibatch": 2}, "fragments": 3},
}


def compiled(preset: str, **options: Any) -> tuple[AsynDBT, dspy.Module]:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(preset=preset, instructions=kit.texts_for(student, kit.MAGIC), **options)
    with dspy.context(lm=kit.make_lm(kit.two_levels)):
        return optimizer, optimizer.compile(student, trainset=kit.examples(60))


def with_config(preset: str, **changes: Any) -> AsynDBT:
    options = LIVE[preset]
    optimizer, _ = compiled(preset, **{**options, "config": {**options["config"], **changes}})
    return optimizer


@pytest.fixture(scope="module")
def live() -> dict[str, AsynDBT]:
    with dspy.context(adapter=dspy.JSONAdapter()):
        return {preset: with_config(preset) for preset in LIVE}


@pytest.mark.parametrize("preset", LIVE)
def test_planes_are_added_bind_and_change_z(preset: str, live: dict[str, AsynDBT]) -> None:
    curve = live[preset].result.curve
    without = with_config(preset, plane_step=0.0).result.curve  # the same run, but every lambda stays 0
    assert max(one.active_cuts for one in curve) >= 1
    binding = next(number for number, one in enumerate(curve) if one.multipliers > 0)
    assert not any(one.multipliers for one in without)
    # Equal to the last bit until a plane binds, different from then on.
    assert [one.z for one in curve[:binding]] == [one.z for one in without[:binding]]
    assert any(one.z != other.z for one, other in zip(curve[binding:], without[binding:], strict=False))


@pytest.mark.parametrize("preset", LIVE)
def test_workers_receive_what_the_planes_push(preset: str, live: dict[str, AsynDBT]) -> None:
    requests = [one.event for one in live[preset].recorded if isinstance(one.event, StepRequest)]
    assert any(np.any(one.plane_push) for one in requests)
    assert any(np.any(one.duals) for one in requests)
    assert not np.any(requests[0].plane_push)


@pytest.mark.parametrize("preset", LIVE)
def test_p_q_z_and_staleness_move(preset: str, live: dict[str, AsynDBT]) -> None:
    optimizer = live[preset]
    first, last = optimizer.result.curve[0], optimizer.result.curve[-1]
    assert first.z != last.z
    replies = [one.event for one in optimizer.recorded if isinstance(one.event, StepReply)]
    assert any(not np.array_equal(one.lower, replies[0].lower) for one in replies)
    assert any(late for one in optimizer.result.curve for late in one.staleness), "some answer was late"
    assert all(late < 15 for one in optimizer.result.curve for late in one.staleness)


def test_only_the_paper_preset_runs_rounds_with_all_workers(live: dict[str, AsynDBT]) -> None:
    rounds = {
        preset: [one for one in optimizer.recorded if isinstance(one.event, RoundRequest)]
        for preset, optimizer in live.items()
    }
    assert not rounds["default"]
    assert len(rounds["paper"]) >= 2
    assert live["default"].result.candidates[0].score is not None, "raced"
    assert live["paper"].result.candidates[0].score is None, "decoded, not raced"


def test_the_paper_preset_writes_words_behind_the_instructions() -> None:
    """With steps large enough to see: the search space is the paper's."""
    optimizer, program = compiled("paper", fragments=3, budget=Budget(metric_calls=100))
    names = set(optimizer.result.curve[-1].z)
    assert names == {"self/instructions", *(f"self/fragments/{slot}" for slot in range(3))}
    described = [one.program["self"]["instructions"] for one in optimizer.result.candidates if one.won]
    assert described == [program.signature.instructions]


def test_cendbt_is_one_worker_without_consensus() -> None:
    optimizer, _ = compiled("cendbt", workers=1, fragments=2)
    requests = [one.event for one in optimizer.recorded if isinstance(one.event, StepRequest)]
    assert requests and not any(np.any(one.plane_push) or np.any(one.duals) for one in requests)
    assert {late for one in optimizer.result.curve for late in one.staleness} == {0}
    assert not any(one.active_cuts for one in optimizer.result.curve)
    with pytest.raises(ConfigurationError, match="workers=1"):
        kit.optimizer(preset="cendbt", workers=2)


@pytest.mark.parametrize(("mode", "changes"), [("instructions", (True, False)), ("demos", (False, True))])
def test_a_mode_changes_only_its_level(mode: str, changes: tuple[bool, bool]) -> None:
    student_text = kit.Sort.instructions
    optimizer, program = compiled("default", mode=mode)
    assert (program.signature.instructions != student_text, bool(program.demos)) == changes
    student = dspy.Predict(kit.Sort)
    with dspy.context(lm=kit.make_lm(kit.two_levels)):
        assert kit.score(program, TEST) > kit.score(student, TEST)
    assert optimizer.result.settings["mode"] == mode


def test_synchronous_runs_have_no_late_answers() -> None:
    budget = Budget(metric_calls=300)
    optimizer, _ = compiled("default", workers=3, active_workers=3, max_staleness=1, budget=budget)
    assert {late for one in optimizer.result.curve for late in one.staleness} == {0}
    active = [len(one.active) for one in optimizer.result.curve]
    # The last calls of a budget, and what is given back of them, need not reach all workers.
    assert len(active) >= 4
    assert set(active[:-2]) == {3}
    assert optimizer.result.settings["algorithm"]["active_workers"] == 3


def test_s_and_tau_may_be_automatic() -> None:
    optimizer, _ = compiled("default", workers=3, active_workers="auto", max_staleness="auto")
    algorithm = optimizer.result.settings["algorithm"]
    assert [algorithm[name] for name in ("auto_active", "auto_staleness", "keep_busy")] == [True] * 3
    with pytest.raises(ConfigurationError, match="must be a number"):
        compiled("default", workers=3, max_staleness="much")


def test_fewer_demos_per_class_and_none() -> None:
    for per_class in (0, 2):
        optimizer, program = compiled("default", demos_per_class=per_class)
        shown = [demo["label"] for demo in program.demos]
        assert all(shown.count(label) <= per_class for label in kit.LABELS)
        blocks = len(optimizer.result.candidates[0].arms)
        assert blocks == 1 + 3 * per_class + 2 * (per_class > 0)  # with the order and the ending of demos


def test_the_settings_in_the_result_repeat_the_run() -> None:
    optimizer, _ = compiled("default", config={"minibatch": 5, "draws": 3})
    recorded = optimizer.result.settings["algorithm"]
    assert (recorded["minibatch"], recorded["draws"]) == (5, 3)
    assert set(recorded) == {field.name for field in dataclasses.fields(optimizer.config)}


@pytest.mark.parametrize(
    ("options", "nobody_waits", "balanced"),
    [
        ({}, True, True),
        ({"deterministic": True}, False, False),
        ({"max_staleness": 8}, False, True),
        ({"active_workers": 2}, False, True),
        ({"preset": "paper"}, False, False),
    ],
)
def test_nobody_waits_where_nothing_was_said_of_it(
    options: dict[str, Any], nobody_waits: bool, balanced: bool
) -> None:
    config = make_config(AsynDBT(lambda gold, pred, trace=None: 1.0, **options), 3)
    assert (config.auto_active, config.keep_busy) == (nobody_waits, nobody_waits)
    assert config.balance == balanced
