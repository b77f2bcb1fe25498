"""The Bayesian model of arm effects, against dense algebra and against known worths."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.decoding import decode, finalists
from asyndbt_dspy.core.effects import EffectKeys, EffectModel
from asyndbt_dspy.core.messages import Send, StepRequest
from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.core.shared_effects import SharedEffects, pool_factors
from asyndbt_dspy.core.simplex import rows_of
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.testing.toys import small_machines, small_space, step_reply

SPACE = small_space(2)
HELPS = "text:toy/instructions:1"


def observed(seed: int = 0, count: int = 60, noise: float = 0.05) -> EffectModel:
    """Losses of an additive world: instruction 1 helps by .2, demo arm 3 helps by .1, examples differ by far more."""
    rng = np.random.default_rng(seed)
    model = EffectModel(EffectKeys.of(SPACE, share_credit=True))
    difficulty = rng.uniform(0, 1, 10)
    for _ in range(count):
        candidate = (int(rng.integers(4)), int(rng.integers(5)), 0)
        example = int(rng.integers(10))
        loss = (
            difficulty[example] - 0.2 * (candidate[0] == 1) - 0.1 * (candidate[1] == 3) + noise * rng.normal()
        )
        model.observe(candidate, example, float(loss))
    model.fit()
    return model


def test_effects_are_found_under_unequal_examples() -> None:
    model = observed(count=300)
    good, deviation = model.effect(HELPS)
    other, _ = model.effect("text:toy/instructions:2")
    assert good - other == pytest.approx(-0.2, abs=4 * deviation)
    assert good < -0.05
    best, _ = model.value((1, 3, 0))
    student, _ = model.value((0, 0, 0))
    assert best < student


def test_the_posterior_is_that_of_dense_algebra() -> None:
    """Mean and variance of every parameter, with what others learned as a further Gaussian factor."""
    model = observed(count=40)
    outside = np.zeros((2, len(model.keys.shared)))
    outside[:, 2] = (30.0, -3.0)
    outside[:, -1] = (12.0, 6.0)
    model.merge(outside)
    model.fit(0)
    size = len(model.names)
    scale = max(model.square / model.count - (model.moment[model.names["mean"]] / model.count) ** 2, 1e-4)
    prior, natural = np.zeros(size), model.moment / model.noise
    for name, place in model.names.items():
        group = name.partition(":")[0]
        prior[place] = 1.0 / (100.0 * scale if group == "mean" else model.variances[group])
    for column, key in enumerate(model.keys.shared):
        if outside[0, column]:
            prior[model.names[key]] += outside[0, column]
            natural[model.names[key]] += outside[1, column]
    covariance = np.linalg.inv(model.gram / model.noise + np.diag(prior))
    for name, place in model.names.items():
        mean, deviation = model.effect(name)
        assert mean == pytest.approx(float(covariance[place] @ natural), abs=1e-8), name
        assert deviation == pytest.approx(float(np.sqrt(covariance[place, place])), rel=1e-6), name


def test_a_factor_is_the_posterior_over_its_cavity() -> None:
    model = observed()
    factor = model.factor()
    for column, key in enumerate(model.keys.shared):
        mean, deviation = model.effect(key)
        precision, weighted = factor[:, column]
        assert precision >= 0
        if precision:
            group = key.partition(":")[0]
            assert 1.0 / deviation**2 == pytest.approx(precision + 1.0 / model.variances[group])
            assert mean / deviation**2 == pytest.approx(weighted)


def test_nothing_observed_is_nothing_shared_and_the_prior_stands() -> None:
    model = EffectModel(EffectKeys.of(SPACE, share_credit=True))
    model.fit()
    assert not model.factor().any()
    assert model.sample(np.random.default_rng(0)).shape == (0,)
    assert model.effect(HELPS) == (0.0, model.prior_variance("text:x") ** 0.5)
    mean, deviation = model.value((1, 0, 0))
    assert mean == 0.0
    assert deviation > 0


def test_a_worker_without_data_of_its_own_takes_over_what_others_learned() -> None:
    teacher = observed(count=200)
    pupil = EffectModel(teacher.keys)
    pupil.merge(teacher.factor())
    pupil.fit(0)
    assert pupil.effect(HELPS)[0] < -0.05
    assert pupil.value((1, 3, 0))[0] < pupil.value((2, 0, 0))[0]
    assert len(pupil.sample(np.random.default_rng(0))) == len(pupil.names)
    # What was taken over is not sent back.
    np.testing.assert_allclose(pupil.factor(), 0.0, atol=1e-6)


def test_samples_have_the_posteriors_mean_and_spread() -> None:
    model = observed()
    rng = np.random.default_rng(1)
    draws = np.array([model.sample(rng) for _ in range(4000)])
    place = model.names[HELPS]
    mean, deviation = model.effect(HELPS)
    assert draws[:, place].mean() == pytest.approx(mean, abs=4 * deviation / 60)
    assert draws[:, place].std() == pytest.approx(deviation, rel=0.1)


def test_parameters_met_since_the_last_fit_have_their_prior() -> None:
    model = observed(count=5)
    model.observe((3, 0, 0), 99, 0.5)
    mean, deviation = model.effect("example:99")
    assert (mean, deviation) == (0.0, model.prior_variance("example:99") ** 0.5)
    assert model.value((3, 0, 0))[1] > 0
    model.factor()  # of the fitted ones only


def test_credit_is_shared_over_slots_or_not() -> None:
    together = EffectKeys.of(SPACE, share_credit=True)
    apart = EffectKeys.of(SPACE, share_credit=False)
    assert together.arms[1][1] == together.arms[2][1]
    assert apart.arms[1][1] != apart.arms[2][1]
    assert together.of_candidate((0, 0, 0)) == {}
    assert together.of_candidate((2, 1, 0)) == {
        "text:toy/instructions:2": 1.0,
        "arm:toy:d:w0:0": 1.0,
        "shown:toy": 1.0,
    }


def test_which_classes_are_shown_how_often_and_how_late_is_known_of_a_candidate() -> None:
    def slot(name: str, stratum: str) -> Block:
        return Block(name, "p", "demo", (Arm(""), Arm(f"d:{name}")), stratum)

    orders = (Arm(""), Arm("o:1", order=(2, 0, 1)))
    keys = EffectKeys.of(
        Space((slot("0", "a"), slot("1", "b"), slot("2", "a"), Block("o", "p", "order", orders))), True
    )
    whole = keys.of_candidate((1, 1, 1, 0))
    assert (whole["count:p:0:a"], whole["count:p:0:b"]) == (2.0, 1.0)
    assert whole["recent:p:0:a"] == pytest.approx(1.0 + 0.6**2)
    assert whole["recent:p:0:b"] == pytest.approx(0.6)
    assert {"first:p:0:a", "last:p:0:a"} <= set(whole)
    turned = keys.of_candidate((1, 1, 1, 1))
    assert {"first:p:0:a", "last:p:0:b", "order:o:1"} <= set(turned)
    assert "last:p:0:a" not in turned
    # an empty slot is not shown, whatever its place
    assert "last:p:0:a" in keys.of_candidate((1, 0, 1, 1))
    assert set(keys.shared) >= {name for name in turned if not name.startswith("order:o:0")}


def test_the_order_of_demos_is_a_choice_of_its_own() -> None:
    order = Block("toy/order", "toy", "order", (Arm(""), Arm("o:1")))
    keys = EffectKeys.of(Space((*SPACE.blocks, order)), share_credit=True)
    assert keys.of_candidate((0, 0, 0, 1)) == {"order:toy/order:1": 1.0}
    assert "order:toy/order:1" in keys.shared


def test_private_arms_have_no_shared_parameter() -> None:
    keys = EffectKeys.of(small_space(2, private=[1]), share_credit=True)
    assert not any("d:w1" in name for name in keys.shared)
    assert any("d:w0" in name for name in keys.shared)


# --------------------------------------------------------------------------- merging and decoding


FACTORS = np.array([[[2.0, 1.0], [-2.0, 1.0]], [[2.0, 0.0], [-2.0, 0.0]], [[4.0, 0.0], [400.0, 0.0]]])
"""Three senders, two parameters: means (-1, 1), (-1, unknown), (100: a liar, unknown)."""


def test_factors_add_up_and_the_median_withstands_a_liar() -> None:
    total = pool_factors(DEFAULT, FACTORS)
    np.testing.assert_allclose(total, [[8.0, 1.0], [396.0, 1.0]])
    robust = pool_factors(dataclasses.replace(DEFAULT, aggregator="median"), FACTORS)
    np.testing.assert_allclose(robust, [[8.0, 1.0], [-8.0, 1.0]])
    few = pool_factors(dataclasses.replace(DEFAULT, aggregator="median"), FACTORS[:2])
    np.testing.assert_allclose(few, [[4.0, 1.0], [-4.0, 1.0]])


def shared(factors: np.ndarray, **changes: Any) -> SharedEffects:
    made = SharedEffects(dataclasses.replace(DEFAULT, **changes), len(factors), factors.shape[2])
    for number, own in enumerate(factors):
        made.store(number, own)
    return made


def test_each_worker_gets_what_the_others_know() -> None:
    made = shared(FACTORS, effect_trust=0.5)
    assert made.of_others(rows_of((0,)))[0, 1, 0] == 199.0
    made.forget(2)
    merged = made.of_others(rows_of((0, 1, 2)))
    np.testing.assert_allclose(merged[0], [[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(merged[1], [[1.0, 0.5], [-1.0, 0.5]])
    assert made.of_others(rows_of(())).shape == (0, 2, 2)
    assert shared(FACTORS[:, :, :0]).of_others(rows_of((0, 1, 2))).shape == (3, 2, 0)


def test_what_nobody_is_sure_of_stays_nothing_whatever_means_are_claimed() -> None:
    claimed = np.zeros((3, 2, 1))
    claimed[:2, 1] = 1.5e308  # no precision, and a sum that overflows
    with np.errstate(over="ignore"):
        assert shared(claimed).of_others(rows_of((2,))).tolist() == [[[0.0], [0.0]]]


@pytest.mark.parametrize("aggregator", ["mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8, 9])
def test_what_is_prepared_once_is_what_the_others_pool(aggregator: str, workers: int) -> None:
    rng = np.random.default_rng(workers)
    precision = rng.uniform(1, 5, (workers, 6)) * (rng.random((workers, 6)) < 0.7)
    factors = np.stack([precision, precision * rng.integers(-2, 3, (workers, 6))], axis=1)  # ties as well
    made = shared(factors, aggregator=aggregator, trim=int(aggregator == "trimmed_mean"))
    for round_ in range(3):
        numbers = list(range(workers))
        pooled = [pool_factors(made._config, np.delete(made.factors, number, axis=0)) for number in numbers]
        expected = np.stack(pooled) * made._config.effect_trust
        np.testing.assert_allclose(made.of_others(rows_of(numbers)), expected, atol=1e-12)
        np.testing.assert_allclose(made.of_others(rows_of([workers - 1])), expected[-1:], atol=1e-12)
        np.testing.assert_array_equal(made.of_others(rows_of([0])), made.of_others(rows_of(numbers))[:1])
        made.store(round_ % workers, factors[-1] * 2.0)
    made.forget(0)
    left = [pool_factors(made._config, np.delete(made.factors, number, axis=0)) for number in range(workers)]
    np.testing.assert_allclose(
        made.of_others(rows_of(range(workers))), np.stack(left) * made._config.effect_trust, atol=1e-12
    )


class Counted(np.ndarray):
    """Counts what is done with all workers' rows at once."""

    passes = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        Counted.passes += any(isinstance(one, Counted) and len(one) == len(FACTORS) for one in inputs)
        plain = [one.view(np.ndarray) if isinstance(one, Counted) else one for one in inputs]
        return getattr(ufunc, method)(*plain, **options)


@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_requests_between_two_changes_share_what_is_done_for_all_workers(aggregator: str) -> None:
    made = shared(FACTORS, aggregator=aggregator)
    made.factors, Counted.passes = made.factors.view(Counted), 0
    made.of_others(rows_of((1,)))
    first = Counted.passes
    assert first > 0
    made._sorted, made._rank = made._sorted.view(Counted), made._rank.view(Counted)
    for _ in range(50):
        made.of_others(rows_of((1,)))
    assert Counted.passes == first
    made.store(0, FACTORS[1])
    assert made.of_others(rows_of((2,)))[0, 0, 0] == 4.0
    made.forget(0)
    assert made.of_others(rows_of((2,)))[0, 0, 0] == 2.0
    assert Counted.passes == 3 * first


def nominated(*rows: tuple[tuple[int, ...], float]) -> list[Nomination]:
    return [Nomination(candidate, value, 0.1, 5) for candidate, value in rows]


KEYS = EffectKeys.of(SPACE, share_credit=True)
ALLOWED = ((range(5), range(5)), (range(5), range(5)))
KNOWN = np.zeros((2, 2, len(KEYS.shared)))
KNOWN[:, :, KEYS.shared.index("arm:toy:d:w0:0")] = (500.0, -100.0)
KNOWN[:, :, KEYS.shared.index("arm:toy:d:w1:1")] = (500.0, -50.0)


def test_finalists_begin_with_what_was_run_and_hold_the_merged_program_and_every_nomination_once() -> None:
    rows = [nominated(((1, 2, 0), -0.2), ((0, 0, 0), 0.0)), nominated(((1, 2, 0), -0.2), ((3, 0, 4), -0.3))]
    found = finalists(SPACE, DEFAULT, KEYS, (2,), rows, KNOWN, ALLOWED)
    assert found[0] == (3, 0, 4)
    # (2, 1, 4): the consensus text with the best demo of either worker, not one twice
    assert set(found) == {(1, 2, 0), (3, 0, 4), (2, 0, 4), (2, 2, 0), (0, 0, 0), (2, 1, 4)}
    assert len(set(found)) == len(found)
    alone = finalists(
        SPACE, dataclasses.replace(DEFAULT, share_demos=False), KEYS, (2,), rows, KNOWN, ALLOWED
    )
    assert alone[0] == (2, 0, 4)
    blind = finalists(SPACE, DEFAULT, KEYS, (2,), rows, KNOWN[:, :, :0], ALLOWED)
    assert blind[0] == (3, 0, 4)
    assert finalists(SPACE, DEFAULT, KEYS, (2,), [], KNOWN[:, :, :0], ALLOWED) == ()


def test_demos_that_hurt_or_that_may_not_leave_stay_out_of_the_merged_program() -> None:
    hurting = KNOWN.copy()
    hurting[:, 1] *= -1
    assert finalists(SPACE, DEFAULT, KEYS, (2,), [], hurting, ALLOWED)[0] == (2, 0, 0)
    private = small_space(2, private=[0, 1])
    keys = EffectKeys.of(private, share_credit=True)
    factors = np.full((1, 2, len(keys.shared)), -1.0)
    factors[:, 0] = 10.0
    assert finalists(private, DEFAULT, keys, (2,), [], factors, ALLOWED)[0] == (2, 0, 0)


def test_the_program_without_a_race() -> None:
    """argmax z with the best worker's argmax q (paper; each worker nominates it first), or with the merged demos."""
    rows = [nominated(((1, 2, 0), -0.1), ((3, 3, 3), -0.9)), nominated(((0, 0, 4), -0.2))]
    paper = dataclasses.replace(DEFAULT, share_demos=False)
    assert decode(SPACE, paper, KEYS, (2,), rows, KNOWN, ALLOWED) == (2, 0, 4)
    assert decode(SPACE, paper, KEYS, (2,), [[], []], KNOWN, ALLOWED) == (2, 0, 0)
    assert decode(SPACE, DEFAULT, KEYS, (2,), rows, KNOWN, ALLOWED) == (2, 1, 4)
    assert decode(SPACE, DEFAULT, KEYS, (2,), rows, KNOWN[:, :, :0], ALLOWED) == (2, 0, 4)


def test_a_space_without_demos_decodes_to_its_instructions() -> None:
    space = Space((Block("i", "p", "instructions", (Arm(""), Arm("i:1"))),))
    keys = EffectKeys.of(space, share_credit=True)
    factors = np.zeros((1, 2, len(keys.shared)))
    assert decode(space, DEFAULT, keys, (1,), [], factors, ((),)) == (1,)


def test_how_demos_end_is_a_choice_of_its_own_and_shared() -> None:
    ending = Block("toy/ending", "toy", "ending", (Arm(""), Arm("e:toy")))
    keys = EffectKeys.of(Space((*SPACE.blocks, ending)), share_credit=True)
    assert keys.of_candidate((0, 0, 0, 1)) == {"ending:toy/ending:1": 1.0}
    assert "ending:toy/ending:1" in keys.shared
    model = EffectModel(keys)
    for example in range(8):
        for arm in (0, 1):
            model.observe((0, 1, 0, arm), example, 0.1 * example - 0.5 * arm)
    model.fit()
    mean, deviation = model.effect("ending:toy/ending:1")
    assert mean < -2 * deviation


def test_each_ending_has_effects_of_sequence_of_its_own() -> None:
    slots = tuple(
        Block(f"toy/demo{number}", "toy", "demo", (Arm(""), Arm(f"d:{number}")), stratum=stratum)
        for number, stratum in enumerate("xy")
    )
    ending = Block("toy/ending", "toy", "ending", (Arm(""), Arm("e:toy")))
    keys = EffectKeys.of(Space((*slots, ending)), share_credit=True)
    kinds = ("count", "recent", "first", "last")
    plain, alike = keys.of_candidate((1, 1, 0)), keys.of_candidate((1, 1, 1))
    assert {name: plain[name] for name in ("first:toy:0:x", "last:toy:0:y")} == {
        "first:toy:0:x": 1.0,
        "last:toy:0:y": 1.0,
    }
    assert {
        name.replace(":1:", ":0:"): weight
        for name, weight in alike.items()
        if name.partition(":")[0] in kinds
    } == {name: weight for name, weight in plain.items() if name.partition(":")[0] in kinds}
    assert not {name for name in plain if name.partition(":")[0] in kinds} & set(alike)
    assert {*plain, *alike} <= set(keys.shared)
    # The class shown last helps as demos are shown and hurts with the ending: one effect for both could say neither.
    model = EffectModel(keys)
    for example in range(8):
        for arms, loss in (((1, 0, 0), 0.2), ((0, 1, 0), 0.8), ((1, 0, 1), 0.8), ((0, 1, 1), 0.2)):
            model.observe(arms, example, loss)
    model.fit()
    for kind in kinds:
        assert model.effect(f"{kind}:toy:0:x")[0] < 0.0 < model.effect(f"{kind}:toy:1:x")[0]


def test_an_ending_must_earn_what_it_costs() -> None:
    endings = tuple(
        Block(f"{name}/ending", name, "ending", (Arm(""), Arm(f"e:{name}"))) for name in ("toy", "p")
    )
    keys = EffectKeys.of(Space((*SPACE.blocks, *endings)), share_credit=True)
    assert [keys.cost((0, 1, 0, *arms)) for arms in ((0, 0), (1, 0), (1, 1))] == pytest.approx(
        [0.0, 0.03, 0.06]
    )
    model = EffectModel(keys)
    for example in range(24):
        for arm in (0, 1):
            model.observe((0, 1, 0, arm, 0), example, 0.1 * (example % 8) - 0.01 * arm)
    model.fit()
    values = [model.value((0, 1, 0, arm, 0))[0] for arm in (0, 1)]
    assert model.effect("ending:toy/ending:1")[0] < 0.0 and values[0] < values[1]
    assert model.worths([(0, 1, 0, 0, 0), (0, 1, 0, 1, 0)], model.mean, lambda _: 0.0) == pytest.approx(
        values
    )


@pytest.mark.parametrize(("worth", "arm"), [(-0.01, 0), (-0.1, 1)])
def test_a_merged_program_is_charged_for_its_ending_too(worth: float, arm: int) -> None:
    ending = Block("toy/ending", "toy", "ending", (Arm(""), Arm("e:toy")))
    keys = EffectKeys.of(Space((*SPACE.blocks, ending)), share_credit=True)
    factors = np.zeros((1, 2, len(keys.shared)))
    factors[0, :, keys.shared.index("ending:toy/ending:1")] = (1e6, 1e6 * worth)
    allowed = ((range(5), range(5), range(2)),)
    assert decode(keys.space, DEFAULT, keys, (1,), [], factors, allowed) == (1, 0, 0, arm)


def test_requests_that_go_out_together_tell_each_worker_what_the_others_know() -> None:
    server, _ = small_machines(dataclasses.replace(DEFAULT, active_workers=3))
    asked = [one.message for one in server.start() if isinstance(one, Send)]
    known = {"w0": 1.0, "w1": 10.0, "w2": 100.0}
    for request in asked:
        assert isinstance(request, StepRequest)
        effects = np.full_like(request.effects, known[request.worker])
        sent = server.receive(
            dataclasses.replace(step_reply(request, request.consensus), effects=effects, calls=1)
        )
    found = {one.message.worker: one.message for one in sent if isinstance(one, Send)}
    assert set(found) == set(known)
    for name, request in found.items():
        assert isinstance(request, StepRequest)
        np.testing.assert_array_equal(request.effects, sum(known.values()) - known[name])


def test_a_posterior_that_rounding_made_indefinite_is_drawn_from_all_the_same() -> None:
    """Thousands of equal losses leave nothing to tell apart: the inverse is then exact to no more digits than it has."""
    model = observed(count=40)
    model.covariance = model.covariance.copy()
    values, vectors = np.linalg.eigh(model.covariance)
    values[0] = -1e-6 * values[-1]
    model.covariance = (vectors * values) @ vectors.T
    rng = np.random.default_rng(0)
    draws = np.array([model.sample(rng)[model.own] for _ in range(4000)]) - model.mean[model.own]
    found = draws.T @ draws / len(draws)
    assert np.max(np.abs(found - model.covariance)) < 0.1 * values[-1]
    along = draws @ vectors[:, 0]
    assert np.max(np.abs(along)) < 1e-9  # what cannot vary does not
