"""Every engine of the package passes the conformance suite, and all take the same decisions."""

from __future__ import annotations

import math

import pytest

from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import Engine, Evaluator
from asyndbt_dspy.engines.simulated import SimulatedEngine
from asyndbt_dspy.testing.conformance import (
    Delays,
    EngineConformance,
    VirtualTime,
    scripted_delays,
    scripted_scenarios,
)


class TestSimulated(EngineConformance):
    eager = False
    resumed_delays = staticmethod(scripted_delays)

    def build(
        self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf
    ) -> tuple[Engine, Evaluator]:
        return SimulatedEngine(delays, answer_timeout_s=answer_timeout_s, eager=self.eager), evaluator


class TestEager(TestSimulated):
    eager = True


class TestLocal(EngineConformance):
    def build(
        self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf
    ) -> tuple[Engine, Evaluator]:
        virtual = VirtualTime(evaluator, delays, answer_timeout_s)
        return LocalEngine(answer_timeout_s=answer_timeout_s, clock=virtual.clock), virtual


@pytest.fixture(scope="module")
def reference() -> dict[str, list[str]]:
    return scripted_scenarios(TestSimulated())


@pytest.mark.parametrize("suite", [TestEager, TestLocal])
def test_the_same_scenario_gives_the_same_decisions_in_every_engine(
    suite: type[EngineConformance], reference: dict[str, list[str]]
) -> None:
    found = scripted_scenarios(suite())
    for name, decisions in reference.items():
        assert len(decisions) > 40, name
        assert found[name] == decisions, name
