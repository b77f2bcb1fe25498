"""The other optimizers' settings: for each budget the largest documented-style setting that the budget pays for.

Every optimizer has a ladder of settings, from small to large, that follows its documentation: defaults where the budget
pays for them, its own formulas for the rest (MIPROv2's trials from its candidates), and fewer steps, candidates or
examples below. ``chosen.json`` holds, per optimizer, shape of task and budget, the rung that was chosen by *measured*
calls: the largest whose calls stay within the budget, if it uses at least 90 % of it, else the next larger one. It was
measured with an LM that answers right half of the time (``quality.py --measure-settings``), and committed before
our own constants were tuned. The calls that a run really made are in its row, and the report shows them.

GEPA takes its budget itself. Methods that only take a trainset (SIMBA, COPRO) get a class-balanced sample of it, because
they score every finalist on all of it. Bootstrap random search and GEPA score every candidate on the whole valset:
where that would leave fewer than six candidates, they get a class-balanced sample of a sixth of the budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
CHOSEN = Path(__file__).with_name("chosen.json")
SEARCHERS = ("bootstrap_rs", "mipro_v2", "simba", "gepa", "copro")
"""Optimizers with a ladder."""


@dataclass(frozen=True)
class Shape:
    """What the calls of a setting depend on: examples to validate on, and predictors of the program."""

    valid: int
    predictors: int

    def __str__(self) -> str:
        return f"valid={self.valid},predictors={self.predictors}"


@dataclass(frozen=True)
class Rung:
    """One setting, and about how many LM calls it makes."""

    settings: Settings
    calls: float


def ladder(optimizer: str, budget: int, shape: Shape) -> list[Rung]:
    """The settings of an optimizer, by their calls.

    Raises:
        KeyError: an optimizer without settings that depend on the budget.
    """
    rungs = _LADDERS[optimizer](budget, shape)
    return sorted(rungs, key=lambda rung: rung.calls)


def _bootstrap_rs(budget: int, shape: Shape) -> list[Rung]:
    valid = min(shape.valid, max(1, budget // shape.predictors // 6))
    documented = {"max_bootstrapped_demos": 4, "max_labeled_demos": 16}
    return [
        Rung(
            {**documented, "num_candidate_programs": count, "valid_examples": valid},
            shape.predictors * (valid * (count + 3) + 5 * count + 8),
        )
        for count in range(64)
    ]


def _mipro_v2(budget: int, shape: Shape) -> list[Rung]:
    documented = [_mipro_trials(candidates, shape) for candidates in range(2, 20)]
    pairs = [(2, trials) for trials in range(1, documented[0])]
    for candidates, first, end in zip(range(2, 19), documented, documented[1:], strict=False):
        pairs += [(candidates, trials) for trials in range(first, max(first + 1, end))]
    pairs += [(18, trials) for trials in range(documented[-1], 90, 3)]
    rungs = []
    for candidates, trials in pairs:
        minibatch = shape.valid > 50  # MIPROv2's own rule
        each = min(35, shape.valid) if minibatch else shape.valid
        full = shape.valid * (1 + trials // 5 + (trials % 5 != 0)) if minibatch else 0
        rungs.append(
            Rung(
                {
                    "num_candidates": candidates,
                    # Half as many instructions as demo sets, as its own presets do where demos are searched.
                    "num_instruct_candidates": max(2, candidates // 2),
                    "num_trials": trials,
                    "minibatch": minibatch,
                    "minibatch_size": each,
                    "max_bootstrapped_demos": 4,
                    "max_labeled_demos": 4,
                },
                shape.predictors * (shape.valid + each * trials + full + 5 * candidates),
            )
        )
    return rungs


def _mipro_trials(candidates: int, shape: Shape) -> int:
    """MIPROv2's documented number of trials for so many candidates (instructions and demos searched)."""
    return int(max(2 * 2 * shape.predictors * math.log2(candidates), 1.5 * candidates))


def _simba(budget: int, shape: Shape) -> list[Rung]:
    small = budget // shape.predictors < 600
    size, candidates = (8, 3) if small else (16, 4)
    rungs = []
    for steps in range(1, 9):
        for sample in range(size, 5 * size, 4):
            rollouts = steps * size * (2 * candidates + 1) + (min(steps, candidates) + 1) * sample
            rungs.append(
                Rung(
                    {
                        "bsize": size,
                        "num_candidates": candidates,
                        "max_steps": steps,
                        "max_demos": 4,
                        "train_examples": sample,
                    },
                    shape.predictors * rollouts,
                )
            )
    # Of settings of about equal cost the one with most steps and the larger sample is kept.
    best: dict[int, Rung] = {}
    for rung in rungs:
        place = int(rung.calls // (0.04 * budget))
        kept = best.get(place)
        if kept is None or rung.settings["max_steps"] >= kept.settings["max_steps"]:
            best[place] = rung
    return list(best.values())


def _copro(budget: int, shape: Shape) -> list[Rung]:
    small = budget // shape.predictors < 600
    if shape.predictors == 1:
        breadth, depth = (5, 3) if small else (10, 3)
        evaluations = breadth * depth
    else:  # every instruction of a predictor is scored again at each depth
        breadth, depth = (3, 2) if small else (5, 2)
        evaluations = shape.predictors * breadth * depth * (depth + 1) // 2
    return [
        Rung(
            {"breadth": breadth, "depth": depth, "train_examples": sample},
            shape.predictors * evaluations * sample,
        )
        for sample in range(4, 80)
    ]


def _gepa(budget: int, shape: Shape) -> list[Rung]:
    rollouts = budget // shape.predictors
    valid = min(shape.valid, max(1, rollouts // 6))
    return [Rung({"max_metric_calls": rollouts, "valid_examples": valid}, budget)]


_LADDERS: dict[str, Callable[[int, Shape], list[Rung]]] = {
    "bootstrap_rs": _bootstrap_rs,
    "mipro_v2": _mipro_v2,
    "simba": _simba,
    "gepa": _gepa,
    "copro": _copro,
}


def select(rungs: list[Rung], budget: int, measure: Callable[[Rung], float]) -> tuple[Rung, float]:
    """The rung to use, and its calls: the largest within the budget if it uses >= 90 % of it, else the next larger.

    Args:
        rungs: By their estimated calls; the walk starts at the one that the estimate would choose.
        measure: The calls that a rung really makes; taken to grow with the rungs.
    """
    known: dict[int, float] = {}

    def calls(place: int) -> float:
        if place not in known:
            known[place] = measure(rungs[place])
        return known[place]

    place = max((number for number, rung in enumerate(rungs) if rung.calls <= budget), default=0)
    while place > 0 and calls(place) > budget:
        place -= 1
    while place + 1 < len(rungs) and calls(place + 1) <= budget:
        place += 1
    if calls(place) < 0.9 * budget and place + 1 < len(rungs):
        place += 1
    return rungs[place], calls(place)


@cache
def table() -> dict[str, Any]:
    """The committed choices."""
    return json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.exists() else {}


def key(optimizer: str, budget: int, shape: Shape) -> str:
    return f"{optimizer} {budget} {shape}"


def settings_for(optimizer: str, budget: int, shape: Shape) -> Settings:
    """The committed setting; for a budget that was not measured the choice by estimated calls."""
    known = table().get(key(optimizer, budget, shape))
    if known is not None:
        return dict(known["settings"])
    return select(ladder(optimizer, budget, shape), budget, lambda rung: rung.calls)[0].settings
