"""Whose model is asked when a chain is optimized: the chain's own, a worker's or the one around it, and what caps its calls."""

from __future__ import annotations

import dspy
import pytest
from langchain_asyndbt import langchain_lm, optimize_chain, to_program
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from test_optimize_chain import DATA, Copycat, chain_of, dspy_metric, score

from asyndbt_dspy import AsynDBT, Budget, Price, Worker
from asyndbt_dspy.errors import ConfigurationError


def test_workers_ask_their_own_model_and_the_chain_keeps_its_own() -> None:
    own, other = Copycat(asked=[]), Copycat(asked=[])
    workers = [
        Worker("a", trainset=DATA[:24], lm=langchain_lm(other, model="langchain/other")),
        Worker("b", trainset=DATA[24:], lm=langchain_lm(other, model="langchain/other"), share_demos=False),
    ]
    chain = chain_of(own)
    optimized = optimize_chain(
        chain, metric=dspy_metric, workers=workers, budget=Budget(metric_calls=120), progress=False
    )
    assert own.asked == []
    assert other.asked
    assert optimized.bound.middle[0] is own


def test_workers_without_examples_get_a_part_of_the_trainset() -> None:
    models = [Copycat(asked=[]), Copycat(asked=[])]
    workers = [Worker(name, lm=langchain_lm(one, model=name)) for name, one in zip("ab", models, strict=True)]
    optimized = optimize_chain(
        chain_of(Copycat(asked=[])),
        metric=dspy_metric,
        trainset=DATA,
        workers=workers,
        budget=Budget(metric_calls=120),
        progress=False,
    )
    assert score(optimized) == 1.0
    assert all(one.asked for one in models)


@pytest.mark.parametrize("is_surrounded", [False, True])
def test_a_cap_on_calls_holds_for_the_chains_own_model(is_surrounded: bool) -> None:
    own, ambient = Copycat(asked=[]), Copycat(asked=[])
    around = langchain_lm(ambient, model="langchain/ambient") if is_surrounded else None
    with dspy.context(lm=around):
        optimized = optimize_chain(
            chain_of(own),
            metric=dspy_metric,
            trainset=DATA,
            budget=Budget(lm_calls=150),
            progress=False,
        )
        assert 60 < len(own.asked) <= 150
        assert ambient.asked == []
        before = len(own.asked)
        assert score(optimized) == 1.0  # its calls are not counted any more
        assert len(own.asked) > before


@pytest.mark.parametrize("budget", [Budget(tokens=10_000), Budget(dollars=1.0)])
def test_a_cap_that_cannot_be_kept_by_the_chains_own_model_is_refused_before_it_is_asked(
    budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = Copycat(asked=[]), Copycat(asked=[])
    prompt = ChatPromptTemplate([("system", "Name the mood."), ("human", "Text: {text}")])
    chain = prompt | own.with_fallbacks([other]) | StrOutputParser()
    with pytest.raises(
        ConfigurationError, match=r"has no max_tokens.*own model.*Worker\(…, lm=langchain_lm"
    ) as caught:
        optimize_chain(chain, metric=dspy_metric, trainset=DATA, budget=budget, progress=False)
    assert "dspy.LM" not in str(caught.value)
    assert own.asked == other.asked == []
    assert "counts as failure" not in caplog.text and "count as failures" not in caplog.text


@pytest.mark.parametrize(
    "budget", [Budget(metric_calls=60, tokens=10**6), Budget(metric_calls=60, dollars=1.0)]
)
def test_what_is_advised_where_the_chains_own_model_has_no_bound_works(budget: Budget) -> None:
    own = Copycat(asked=[])
    worker = Worker("w", lm=langchain_lm(own, max_tokens=50), price=Price(1.0, 1.0))
    optimized = optimize_chain(
        chain_of(own), metric=dspy_metric, trainset=DATA, workers=[worker], budget=budget, progress=False
    )
    assert len(own.asked) > 40
    assert score(optimized) == 1.0


def test_where_workers_ask_other_models_the_chains_own_one_may_have_no_bound() -> None:
    own, other = Copycat(asked=[]), Copycat(asked=[])
    worker = Worker(
        "w", lm=langchain_lm(other, model="langchain/other", max_tokens=50), price=Price(1.0, 1.0)
    )
    optimize_chain(
        chain_of(own),
        metric=dspy_metric,
        trainset=DATA,
        workers=[worker],
        budget=Budget(metric_calls=60, dollars=1.0),
        progress=False,
    )
    assert own.asked == []
    assert len(other.asked) > 40


def test_a_chain_as_a_program_is_answered_and_limited_by_the_lm_around_it() -> None:
    own, around = Copycat(asked=[]), Copycat(asked=[])
    optimizer = AsynDBT(
        lambda gold, pred, trace=None: pred.output == gold.label,
        budget=Budget(metric_calls=40),
        requests_per_minute=1e6,
        progress=False,
    )
    data = [dspy.Example(**one).with_inputs("text") for one in DATA]
    with dspy.context(lm=langchain_lm(around, model="langchain/around")):
        optimizer.compile(to_program(chain_of(own), labels=["calm", "cold", "warm"]), trainset=data)
    assert own.asked == []
    assert sum(line["attempts"] for line in optimizer.result.spending.values()) == len(around.asked) > 30


def test_an_lm_configured_around_it_is_not_asked_instead_of_the_chains_model() -> None:
    ambient, own = Copycat(asked=[]), Copycat(asked=[])
    with dspy.context(lm=langchain_lm(ambient, model="langchain/ambient")):
        optimize_chain(
            chain_of(own), metric=dspy_metric, trainset=DATA, budget=Budget(metric_calls=60), progress=False
        )
    assert own.asked
    assert ambient.asked == []
