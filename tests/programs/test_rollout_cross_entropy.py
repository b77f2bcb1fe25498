"""What the LM's distribution says of a run's answer."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import numpy as np
import pytest
from dspy import lm15
from dspy.clients.cache import Cache
from one_rollout import EXAMPLE, exact, run

from asyndbt_dspy.lms.distributions import PROVIDER_DATA_KEY, record
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.preparation import report_distributions
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner


class Reporting(dspy.Module):
    """Records a distribution as an engine does, and answers."""

    def __init__(
        self, signature: Any, label: str, probabilities: dict[str, float] | None, field: str = "label"
    ) -> None:
        super().__init__()
        self.classify = dspy.Predict(signature)
        self.label, self.probabilities, self.field = label, probabilities, field

    def forward(self, message: str) -> dspy.Prediction:
        if self.probabilities is not None:
            record(self.field, self.probabilities)
        return self.classify(message=message)


def loss(
    triage: Any, label: str, probabilities: Any, metric: Any = exact, field: str = "label"
) -> float | None:
    program = Reporting(triage, label, probabilities, field)
    return run(program, metric, answers=[{"label": label}]).cross_entropy


def test_cross_entropy_of_the_right_label(triage: Any) -> None:
    shares = {"billing": 0.5, "access": 0.3, "other": 0.2}
    assert loss(triage, "billing", shares) == pytest.approx(np.log(2))
    assert loss(triage, "access", {"billing": 0.25, "access": 0.75, "other": 0.0}) == pytest.approx(np.log(4))
    assert loss(triage, "billing", {"billing": 1.0, "access": 0.0, "other": 0.0}) == 0.0
    assert loss(triage, "access", {"billing": 0.0, "access": 1.0, "other": 0.0}) == 10.0
    assert loss(triage, "access", {"billing": 1e-9, "access": 1.0, "other": 0.0}) == 10.0


def test_no_cross_entropy_without_a_distribution_over_the_final_label(triage: Any) -> None:
    shares = {"billing": 0.5, "access": 0.3, "other": 0.2}
    assert loss(triage, "billing", None) is None
    assert loss(triage, "billing", shares, field="topic") is None
    assert loss(triage, "billing", {"access": 1.0}) is None
    assert loss("message -> label", "billing", shares) is None


def test_no_cross_entropy_where_the_metric_judges_by_something_else(triage: Any) -> None:
    shares = {"billing": 0.5, "access": 0.3, "other": 0.2}
    assert loss(triage, "billing", shares, lambda gold, prediction: 0.2) is None
    assert loss(triage, "access", shares, lambda gold, prediction: 0.9) is None
    assert loss(triage, "billing", shares, lambda gold, prediction: 0.5) is not None


def test_the_last_distribution_of_the_final_field_counts(triage: Any) -> None:
    class Twice(Reporting):
        def forward(self, message: str) -> dspy.Prediction:
            record("label", {"billing": 0.1, "access": 0.9})
            return super().forward(message)

    program = Twice(triage, "billing", {"billing": 0.5, "access": 0.5})
    assert run(program).cross_entropy == pytest.approx(np.log(2))


class LabelEngine:
    """Answers "billing" and reports how sure it is, as the local engine does."""

    supports_response_schema = True
    supported_params = ("response_format",)

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: Any) -> LabelEngine:
        return self

    def complete(self, request: Any) -> lm15.Response:
        self.count += 1
        shares = {"billing": 0.25, "access": 0.5, "other": 0.25}
        record("label", shares)
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message.assistant(
                [lm15.TextPart("[[ ## label ## ]]\nbilling\n\n[[ ## completed ## ]]")]
            ),
            finish_reason="stop",
            usage=lm15.Usage(input_tokens=1, output_tokens=1, total_tokens=2),
            provider_data={PROVIDER_DATA_KEY: {"label": shares}},
        )

    def stream(self, request: Any) -> Any:
        return lm15.response_to_events(self.complete(request))

    def close(self) -> None:
        pass


def test_an_answer_from_dspys_cache_keeps_its_cross_entropy(
    plain: dspy.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a second compile of the same program would see other losses than the first."""
    monkeypatch.setattr(dspy, "cache", Cache(False, True, disk_cache_dir="", disk_size_limit_bytes=0))
    engine = LabelEngine()
    lm = dspy.LM("test/labels", engine=engine, cache=True)

    async def main() -> list[Rollout]:
        runner = RolloutRunner(exact)
        return [await runner.run(plain, EXAMPLE, lm=lm) for _ in range(2)]

    first, second = asyncio.run(main())
    assert engine.count == 1, "the second answer was to come from the cache"
    assert first.cross_entropy == second.cross_entropy == pytest.approx(np.log(4))


def test_a_failed_first_rollout_says_nothing_of_whether_there_are_distributions() -> None:
    told, silent = Rollout(1.0, cross_entropy=0.2), Rollout(1.0)
    failed, missing = Rollout(0.0, failure=FailureKind.PROGRAM), Rollout(None, failure=FailureKind.TRANSIENT)
    assert report_distributions([told, failed, missing])
    assert not report_distributions([told, silent])
    assert not report_distributions([failed, missing])
