"""Spaces, constants, budgets and what a server refuses before it starts."""

from __future__ import annotations

import dataclasses
import json
import math
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pytest

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.core.config import DEFAULT, PRESETS, AlgorithmConfig, resolve
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.testing.toys import small_space

LOWER = Block("p/instructions", "p", "instructions", (Arm(""), Arm("i:1")))
UPPER = Block("p/demos/0", "p", "demo", (Arm(""), Arm("d:1", "eu", shared=False)))


@pytest.mark.parametrize("preset", PRESETS)
def test_constants_survive_json(preset: str) -> None:
    config = PRESETS[preset]
    assert AlgorithmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_staleness": 0}, "max_staleness=0 must be >= 1"),
        ({"active_workers": 0}, "active_workers=0 must be >= 1"),
        ({"penalty": -0.1}, "penalty=-0.1 must be >= 0"),
        ({"penalty": float("nan")}, "penalty=nan must be a finite number"),
        ({"floor": 1.0}, r"floor=1.0 must be in \[0, 1\)"),
        ({"effect_trust": 1.1}, r"effect_trust=1.1 must be in \[0, 1\]"),
        ({"policy": "score_function", "draws": 1, "example_baseline": False}, "draws=1 must be >= 2"),
        ({"hypergradient": True}, "policy='posterior' must be 'score_function' with hypergradient"),
        (
            {"hypergradient": True, "policy": "score_function", "buffered_lower": False},
            "buffered_lower=False must be True with hypergradient",
        ),
    ],
)
def test_constants_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        dataclasses.replace(DEFAULT, **changes)


def test_one_draw_is_enough_with_a_baseline() -> None:
    assert dataclasses.replace(DEFAULT, policy="score_function", draws=1).draws == 1


def test_a_space_survives_json_and_knows_its_levels() -> None:
    space = small_space(3, private=[1])
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert space.student == (0, 0, 0)
    assert [block.name for block in space.lower] == ["toy/instructions"]
    assert space.is_shared((1, 1, 2))
    assert not space.is_shared((1, 3, 0))


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ((LOWER, LOWER), "used twice: \\['p/instructions'\\]"),
        ((UPPER, LOWER), "must come before demo"),
        (
            (Block("p/i", "p", "instructions", (Arm(""), Arm("i:1", shared=False))),),
            "every worker draws the arms of \\['p/i'\\]",
        ),
    ],
)
def test_spaces_that_cannot_be(blocks: tuple[Block, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Space(blocks)


def test_a_block_needs_an_arm() -> None:
    with pytest.raises(ConfigurationError, match="has 0 arms"):
        Block("p/i", "p", "instructions", ())


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        ((0,), "has 2 arms here, got 1"),
        ((0, 2), "has arms 0..1, got 2"),
        ((-1, 0), "got -1"),
        ((0.0, 0), "got 0.0"),
    ],
)
def test_candidates_that_do_not_exist(candidate: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Space((LOWER, UPPER)).check(candidate)


def test_arms_may_be_numpy_integers_and_come_back_as_plain_ones() -> None:
    checked = Space((LOWER, UPPER)).check((np.int64(1), np.int64(0)))
    assert checked == (1, 0)
    assert {type(arm) for arm in checked} == {int}


def members(count: int, name: str = "w") -> list[Member]:
    return [Member(f"{name}{number}", ((0,),)) for number in range(count)]


@pytest.mark.parametrize(
    ("team", "changes", "calls", "says"),
    [
        ([], {}, None, "0 workers"),
        ([Member("eu", ((0,),))] * 2, {}, None, "used twice: \\['eu'\\]"),
        (members(2), {"active_workers": 3}, None, "active_workers=3 exceeds the 2 workers"),
        (members(4), {"aggregator": "trimmed_mean", "trim": 2}, None, "trim=2 cuts 4 of 4 workers"),
        (members(1), {}, -1, "calls=-1 must be >= 0"),
    ],
)
def test_teams_that_cannot_work(
    team: list[Member], changes: dict[str, Any], calls: int | None, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ServerState(Space((LOWER, UPPER)), team, dataclasses.replace(DEFAULT, **changes), calls)


@pytest.mark.parametrize(
    "changes", [{"metric_calls": 300}, {"seconds": 1.5}, {"metric_calls": 1, "seconds": 9}]
)
def test_budgets(changes: dict[str, Any]) -> None:
    assert dataclasses.asdict(Budget(**changes)) | changes == dataclasses.asdict(Budget(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "sets no cap at all"),
        ({"metric_calls": 0}, "metric_calls=0"),
        ({"metric_calls": -5}, "metric_calls=-5"),
        ({"metric_calls": 1.5}, "must be a whole number"),
        ({"metric_calls": True}, "must be a positive, finite number"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"seconds": "60"}, "seconds='60'"),
    ],
)
def test_budgets_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Budget(**changes)


@pytest.mark.parametrize(
    ("active_workers", "max_staleness", "is_free", "expected"),
    [
        (None, None, True, (4, 64, True, False)),  # active, tau, nobody waits, tau follows
        (None, None, False, (4, 64, False, False)),
        (None, 7, True, (4, 7, False, False)),
        (None, "auto", True, (4, 64, False, True)),
        ("auto", 7, False, (4, 7, True, False)),
        ("auto", "auto", True, (4, 64, True, True)),
        (7, None, True, (7, 64, False, False)),
    ],
)
def test_who_waits_where_little_is_said(
    active_workers: int | Literal["auto"] | None,
    max_staleness: int | Literal["auto"] | None,
    is_free: bool,
    expected: tuple[int, int, bool, bool],
) -> None:
    config = resolve(DEFAULT, 7, active_workers, max_staleness, is_free=is_free)
    assert config.auto_active == config.keep_busy
    assert (config.active_workers, config.max_staleness, config.keep_busy, config.auto_staleness) == expected


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ((0, None), "active_workers=0 must be between 1 and the number of workers, 7"),
        ((8, None), "active_workers=8 must be between 1 and the number of workers, 7"),
        (("some", None), "active_workers='some' must be a number, 'auto' or None"),
        ((None, "late"), "max_staleness='late' must be a number, 'auto' or None"),
        ((2.5, None), "active_workers=2.5 must be a whole number"),
        ((None, True), "max_staleness=True must be a whole number"),
    ],
)
def test_waiting_that_cannot_be_is_refused(said: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        resolve(DEFAULT, 7, *said)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"active_workers": 2}, (2, 64, False, False)),
        ({"active_workers": 2, "max_staleness": 1}, (2, 1, False, False)),
        ({"keep_busy": False}, (4, 64, True, False)),
        ({"auto_active": False}, (4, 64, False, True)),
    ],
)
def test_constants_that_the_user_set_stay_as_they_are(
    overrides: dict[str, Any], expected: tuple[int, int, bool, bool]
) -> None:
    config = resolve(dataclasses.replace(DEFAULT, **overrides), 7, None, None, said=overrides)
    assert (config.active_workers, config.max_staleness, config.auto_active, config.keep_busy) == expected


def test_numbers_of_numpy_and_whole_floats_are_numbers() -> None:
    assert resolve(DEFAULT, 7, np.int64(2), 3.0).to_dict() == resolve(DEFAULT, 7, 2, 3).to_dict()  # type: ignore[arg-type]
    config = dataclasses.replace(DEFAULT, draws=np.int64(3), penalty=np.float64(0.5), race=np.bool_(False))  # type: ignore[arg-type]
    assert [type(one) for one in (config.draws, config.penalty, config.race)] == [int, float, bool]
    budget = Budget(metric_calls=1e3, lm_calls=np.int64(5), seconds=np.float64(2.5), dollars=Decimal("0.5"))  # type: ignore[arg-type]
    assert dataclasses.astuple(budget) == (1000, 2.5, 5, None, 0.5)
    assert [type(one) for one in dataclasses.astuple(budget)] == [int, float, int, type(None), float]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aggregator": "trimmed"}, "aggregator='trimmed' is none of .*'trimmed_mean'"),
        ({"aggregator": "trimmed_mean"}, "trim=0 must be >= 1 with aggregator='trimmed_mean'"),
        ({"policy": None}, "policy=None is none of"),
        ({"race_candidates": 1.5}, "race_candidates=1.5 must be a whole number"),
        ({"minibatch": True}, "minibatch=True must be a whole number"),
        ({"race": 1}, "race=1 must be True or False"),
        ({"penalty": math.inf}, "penalty=inf must be a finite number"),
        ({"gradient_clip": math.nan}, "gradient_clip=nan must be a number"),
        ({"lower_step": "0.1"}, "lower_step='0.1' must be a finite number"),
        ({"importance_limit": 0.5}, "importance_limit=0.5 must be >= 1, or 0"),
    ],
)
def test_constants_of_another_kind_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        dataclasses.replace(DEFAULT, **changes)
