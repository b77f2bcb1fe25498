"""Every improvement of ours is a switch that changes a recorded decision when it is flipped (issue: ablations)."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, PRESETS, AlgorithmConfig
from asyndbt_dspy.core.messages import StepRequest
from asyndbt_dspy.engines.protocols import Recorded
from asyndbt_dspy.engines.simulated import SimulatedEngine, work_delays
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines

GRADIENTS = {"policy": "score_function", "geometry": "euclidean", "lower_step": 0.05, "upper_step": 0.05}

SWITCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "policy": ("score_function", {}),
    "geometry": ("euclidean", {}),
    "normalise": (False, {}),
    "example_baseline": (False, GRADIENTS),
    "common_examples": (False, {}),
    "split_levels": (True, {}),
    "hypergradient": (True, GRADIENTS),
    "buffered_lower": (False, {"plane_period": 5}),
    "rekey_planes": (False, {}),
    "share_credit": (False, {}),
    "share_effects": (False, {}),
    "effect_trust": (0.5, {}),
    "stale_step": (False, {}),
    "importance_limit": (0.0, GRADIENTS),
    "clip_consensus": (False, {}),
    "aggregator": ("sign", {}),
    "share_demos": (False, {"iterations": 3}),
    "race": (False, {}),
    "keep_busy": (True, {"active_workers": 2}),
    "auto_active": (True, {"active_workers": 2}),
    "auto_staleness": (True, {"max_staleness": 2}),
    "balance": (False, {}),
    "race_soft": (0.0, {}),
    "loss": ("cross_entropy", {}),
    "exploration": (1.0, {}),
    "missing_is_zero": (True, {}),
    "repeats": (True, {}),
}
"""Field -> (its other value, what else the base needs for the switch to have a say)."""


def some_missing(worker: str, candidate: tuple[int, ...], example: int, held_out: bool) -> float | None:
    return (
        None
        if (example + 2 * sum(candidate)) % 11 == 5
        else additive_score(worker, candidate, example, held_out)
    )


def decisions(config: AlgorithmConfig) -> list[Any]:
    """What was asked to be scored, what z the workers were told, and what won."""
    server, workers = small_machines(config, calls=700, examples=12, held_out=8, use_distributions=True)
    table = TableEvaluator(some_missing, cross_entropies=True)
    told: list[Any] = []

    def watch(recorded: Recorded) -> None:
        if isinstance(recorded.event, StepRequest):
            told.append(recorded.event.consensus.tolist())

    engine = SimulatedEngine(work_delays({"w2": 3.0}))
    asyncio.run(engine.run(server, workers, table, [watch]))
    asked = [(one.worker, one.candidates, one.examples, one.held_out) for one in table.requests]
    standings = server.race.standings() if server.race is not None else ()
    advantages = [
        (one.candidate, round(one.advantage, 12)) for one in standings if np.isfinite(one.advantage)
    ]
    return [asked, told, advantages, server.winner]


@pytest.mark.parametrize("name", SWITCHES)
def test_flipping_it_changes_a_recorded_decision(name: str) -> None:
    other, needs = SWITCHES[name]
    base = dataclasses.replace(DEFAULT, **needs)
    assert getattr(base, name) != other
    assert decisions(base) != decisions(dataclasses.replace(base, **{name: other}))


def test_equal_configurations_decide_alike() -> None:
    assert decisions(DEFAULT) == decisions(DEFAULT)


def test_every_improvement_named_in_the_configuration_is_a_switch_here() -> None:
    text = AlgorithmConfig.__doc__ or ""
    marked = re.findall(r"^ {8}(\w+):(?:(?!^ {8}\w+).)*?\[O", text, flags=re.M | re.S)
    assert len(marked) > 12
    assert set(marked) <= set(SWITCHES)


@pytest.mark.parametrize("aggregator", ["trimmed_mean", "median"])
def test_robust_merging_of_effects_changes_what_is_told(aggregator: Any) -> None:
    robust = dataclasses.replace(DEFAULT, aggregator=aggregator, trim=1)
    assert decisions(DEFAULT) != decisions(robust)


# --------------------------------------------------------------------------- the machinery is live


def z_and_planes(config: AlgorithmConfig) -> tuple[list[float], int, float]:
    server, workers = small_machines(config, calls=1200, examples=12, held_out=8)
    most, largest = 0, 0.0

    def watch(recorded: Recorded) -> None:
        nonlocal most, largest
        most = max(most, len(server.planes))
        largest = max([largest, *(plane.multiplier for plane in server.planes)])

    asyncio.run(
        SimulatedEngine(work_delays({"w2": 2.0})).run(
            server, workers, TableEvaluator(additive_score), [watch]
        )
    )
    return server.z.tolist(), most, largest


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("active_workers", [1, 2, 3])
def test_planes_are_added_get_a_multiplier_and_change_the_consensus(preset: str, active_workers: int) -> None:
    config = dataclasses.replace(PRESETS[preset], active_workers=active_workers)
    z, planes, multiplier = z_and_planes(config)
    without, none, _ = z_and_planes(dataclasses.replace(config, plane_iterations=0))
    assert planes >= 1
    assert multiplier > 0
    assert none == 0
    assert z != without


def test_planes_alone_change_the_consensus() -> None:
    """The same rounds and calls, but planes that weigh nothing: what differs is the planes' push, not the rounds."""
    config = PRESETS["paper"]
    z, _, multiplier = z_and_planes(config)
    weightless, planes, nothing = z_and_planes(dataclasses.replace(config, plane_step=0.0, plane_drop=0.0))
    assert planes >= 1
    assert (multiplier > 0, nothing) == (True, 0.0)
    assert z != weightless
