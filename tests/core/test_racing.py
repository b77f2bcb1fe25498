"""The final race: paired, under a budget, without waiting for stragglers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.handover import Handover
from asyndbt_dspy.core.messages import RaceReply, RaceRequest
from asyndbt_dspy.core.racing import RaceState
from asyndbt_dspy.core.roster import Member
from asyndbt_dspy.errors import ProtocolError

DEFAULT = AlgorithmConfig().accept_z
CONFIG = AlgorithmConfig(race_candidates=7, accept_z=0.0)
STUDENT = (0, 0)
CHALLENGERS = [(1, 0), (2, 0), (3, 0), (1, 1)]
HOLDINGS = {"a": 12, "b": 8, "c": 4}

Score = Callable[[tuple[int, ...], str, int], float | None]


def race(calls: int = 400, challengers: list[tuple[int, ...]] | None = None, **changes: object) -> RaceState:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    return RaceState(STUDENT, CHALLENGERS if challengers is None else challengers, HOLDINGS, calls, config)


def reply(request: RaceRequest, score: Score, calls: int | None = None) -> RaceReply:
    rows = tuple(
        tuple(score(one, request.worker, example) for example in request.examples)
        for one in request.candidates
    )
    paid = sum(value is not None for row in rows for value in row) if calls is None else calls
    return RaceReply(request.worker, request.unit, rows, tuple((None,) * len(row) for row in rows), paid)


def run(state: RaceState, score: Score, workers: tuple[str, ...] = ("a", "b", "c")) -> list[RaceRequest]:
    """Every worker answers at once, in turn."""
    units: list[RaceRequest] = []
    for _ in range(1000):
        if state.done:
            return units
        for worker in workers:
            request = state.assign(worker)
            if request is not None:
                units.append(request)
                state.receive(reply(request, score))
    pytest.fail("the race does not end")


def difficult(candidate: tuple[int, ...], worker: str, example: int) -> float:
    """Examples differ far more than candidates do: only pairing sees that (2, 0) is always .1 better."""
    return (example * 37 % 10) / 10 + {(2, 0): 0.1, (3, 0): -0.1}.get(candidate, 0.0)


def test_the_best_challenger_wins_although_examples_differ_far_more() -> None:
    state = race()
    run(state, difficult)
    assert state.winner() == (2, 0)
    best = {one.candidate: one for one in state.standings()}[(2, 0)]
    assert best.advantage == pytest.approx(0.1)
    assert best.error < 0.2
    assert best.in_race
    assert best.low < best.mean < best.high
    student = state.standings()[0]
    assert (student.candidate, student.advantage, student.error) == (STUDENT, 0.0, 0.0)


def test_all_candidates_of_a_heat_meet_the_same_examples_and_the_student_is_in_every_heat() -> None:
    units = run(race(calls=130), difficult)
    assert {example for unit in units for example in unit.examples} <= set(range(12))
    assert all(unit.candidates[0] == STUDENT for unit in units)
    seen = [(unit.worker, example) for unit in units for example in unit.examples]
    assert len(seen) == len(set(seen))  # no example twice
    assert [len(unit.candidates) for unit in units] == sorted(
        (len(unit.candidates) for unit in units), reverse=True
    )
    assert 2 <= len(units[-1].candidates) < len(units[0].candidates)


@pytest.mark.parametrize(
    ("better", "accept_z", "wins"),
    [(12, 0, 0), (14, 0, 1), (14, 1, 0), (15, 1, 1), (16, 1.645, 0), (16, DEFAULT, 0), (17, DEFAULT, 1)],
)
def test_the_student_stays_unless_beaten_by_standard_errors(better: int, accept_z: float, wins: int) -> None:
    """Better on 14 of 24 examples is 0.8 standard errors ahead, 15 is 1.2, 16 is 1.7, 17 is 2.2; 12 is a tie."""
    state = race(challengers=[(1, 0)], accept_z=accept_z)
    places = [(worker, number) for worker in HOLDINGS for number in range(HOLDINGS[worker])]
    run(state, lambda candidate, *place: float((places.index(place) < better) == (candidate == (1, 0))))
    assert state.winner() == (wins, 0)


@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_never_exceeded_and_a_rich_race_uses_it(
    calls: int, chunk: int, challengers: int
) -> None:
    candidates = [(number, 1) for number in range(1, challengers + 1)]
    state = RaceState(STUDENT, candidates, HOLDINGS, calls, CONFIG, chunk=chunk)
    units = run(state, difficult)
    spent = sum(len(unit.candidates) * len(unit.examples) for unit in units)
    assert spent + state.calls_left == calls or not units
    assert spent <= calls
    if challengers and calls >= 2:
        assert units
    if challengers == 1:
        assert spent >= min(calls - 1, 2 * 24)


def test_what_cost_nothing_is_given_back() -> None:
    state = race()
    request = state.assign("a")
    assert request is not None
    before = state.calls_left
    state.receive(reply(request, difficult, calls=1))
    assert state.calls_left == before + len(request.candidates) * len(request.examples) - 1


def test_a_small_budget_runs_fewer_candidates() -> None:
    assert len(race(calls=400).candidates) == 5
    sizes = [len(race(calls=calls).candidates) for calls in range(2, 400, 9)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2
    assert len(race(calls=400, race_candidates=2).candidates) == 3
    broke = race(calls=1)
    assert broke.done
    assert broke.winner() == STUDENT
    assert math.isnan(broke.standings()[0].mean)


def test_without_examples_or_challengers_there_is_nothing_to_race() -> None:
    empty = RaceState(STUDENT, CHALLENGERS, {"a": 0}, 100, CONFIG)
    assert empty.done
    assert empty.winner() == STUDENT
    assert race(challengers=[STUDENT]).done


def test_a_heat_closes_without_its_stragglers() -> None:
    """Worker c holds a sixth of the examples: the first heat does not wait for it, and its late answer still counts."""
    state = race(calls=120)
    slow = state.assign("c")
    assert slow is not None
    while state.heat == 1:
        for worker in ("a", "b"):
            request = state.assign(worker)
            if request is not None:
                state.receive(reply(request, difficult))
    assert state.heat == 2
    assert len(state.running) < 5
    state.receive(reply(slow, difficult))
    assert ("c", slow.examples[0]) in state.results[0]
    run(state, difficult)
    assert state.winner() == (2, 0)


def test_the_last_heat_waits_for_everybody() -> None:
    state = race(calls=1000, challengers=[(2, 0)])
    held = state.assign("c")
    assert held is not None
    for _ in range(50):
        for worker in ("a", "b"):
            request = state.assign(worker)
            if request is not None:
                state.receive(reply(request, difficult))
    assert not state.done
    state.receive(reply(held, difficult))
    run(state, difficult)
    assert state.done


def test_paid_units_are_waited_for_when_no_further_heat_is_possible() -> None:
    state = race(calls=5 * 12, challengers=CHALLENGERS)
    units = {worker: state.assign(worker) for worker in ("a", "b", "c")}
    state.calls_left = 0  # nothing for another heat
    order = [unit for unit in units.values() if unit is not None]
    order.sort(key=lambda unit: -len(unit.examples))
    while len(order) > 1:
        unit = order.pop(0)
        state.receive(reply(unit, difficult, calls=len(unit.candidates) * len(unit.examples)))
        assert not state.done
        for worker in ("a", "b"):
            more = state.assign(worker)
            if more is not None:
                order.insert(0, more)
    state.receive(reply(order[0], difficult))
    assert state.done


def test_a_lost_workers_units_and_examples_leave_the_race() -> None:
    state = race()
    held = state.assign("b")
    assert held is not None
    assert state.lose("b") == len(held.candidates) * len(held.examples)
    assert state.lose("b") == 0
    assert state.assign("b") is None
    with pytest.raises(ProtocolError, match="has no race unit 1 in hand"):
        state.receive(reply(held, difficult))
    units = run(state, difficult, ("a", "c"))
    assert {unit.worker for unit in units} == {"a", "c"}
    assert state.winner() == (2, 0)


def test_losing_everybody_ends_the_race() -> None:
    state = race()
    for worker in HOLDINGS:
        state.assign(worker)
        state.lose(worker)
    assert state.done
    assert state.winner() == STUDENT


def test_missing_results_leave_the_pair_out() -> None:
    """(2, 0) misses what it would have lost: pairs, not means, decide. A challenger without results cannot win."""

    def patchy(candidate: tuple[int, ...], worker: str, example: int) -> float | None:
        if candidate == (1, 1):
            return None
        if candidate == (2, 0) and example % 2:
            return None
        return difficult(candidate, worker, example)

    state = race()
    run(state, patchy)
    assert state.winner() == (2, 0)
    assert {one.candidate: one for one in state.standings()}[(2, 0)].advantage == pytest.approx(0.1)
    silent = race(challengers=[(1, 1)])
    run(silent, patchy)
    assert silent.winner() == STUDENT


def test_the_order_of_arrival_changes_no_bit_of_the_standings() -> None:
    def standings(seed: int) -> str:
        state = RaceState(STUDENT, [(2, 0)], {"a": 9, "b": 9, "c": 9}, 54, CONFIG, chunk=4)
        rng = np.random.default_rng(seed)
        out: list[RaceRequest] = []
        while not state.done:
            for worker in rng.permutation(["a", "b", "c"]).tolist():
                request = state.assign(worker)
                if request is not None:
                    out.append(request)
            unit = out.pop(int(rng.integers(len(out))))
            state.receive(
                reply(
                    unit,
                    lambda candidate, worker, example: 0.1 * example + candidate[0] / 7 + ord(worker) / 3,
                )
            )
        return repr(state.standings())

    assert len({standings(seed) for seed in range(6)}) == 1


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(2, 400))
def test_every_worker_contributes_in_proportion_to_what_it_holds(counts: list[int], calls: int) -> None:
    holdings = {f"w{number}": count for number, count in enumerate(counts)}
    state = RaceState(STUDENT, [(1, 0)], holdings, calls, CONFIG)
    size = sum(state.quota.values())
    assert size == min(calls // 2, sum(counts))
    for name, share in state.quota.items():
        assert abs(share - size * holdings[name] / sum(counts)) < 1


# ------------------------------------------------------------------------------------- work of a worker that is gone

MEMBERS = [Member(name, (), count, group="one") for name, count in HOLDINGS.items()]


def handed_on(calls: int = 400, lost: tuple[str, ...] = (), **changes: object) -> RaceState:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    living = set(HOLDINGS) - set(lost)
    return RaceState(STUDENT, CHALLENGERS, HOLDINGS, calls, config, living=living, handover=Handover(MEMBERS))


def examples_of(units: list[RaceRequest], handover: Handover) -> list[tuple[str, int]]:
    """(holder, example) of every unit, from the numbers that its worker was given."""
    names = {
        worker: {
            handover.number(worker, holder, one): (holder, one)
            for holder in HOLDINGS
            for one in range(HOLDINGS[holder])
        }
        for worker in HOLDINGS
    }
    return [names[unit.worker][one] for unit in units for one in unit.examples]


def test_examples_of_a_group_have_one_number_each_own_ones_first() -> None:
    handover = Handover(MEMBERS)
    for worker, count in HOLDINGS.items():
        numbers = [handover.number(worker, worker, one) for one in range(count)]
        others = [
            handover.number(worker, holder, one)
            for holder in HOLDINGS
            if holder != worker
            for one in range(HOLDINGS[holder])
        ]
        assert numbers + others == list(range(sum(HOLDINGS.values())))


def test_what_a_lost_worker_had_in_hand_and_not_begun_is_run_by_those_that_hold_it() -> None:
    state = handed_on(calls=2000)
    first = state.assign("a")
    assert first is not None
    in_hand = len(first.candidates) * len(first.examples)
    assert state.lose("a") == in_hand
    units = run(state, difficult, ("b", "c"))
    found = examples_of(units, state.handover)
    assert sorted(found) == sorted((name, one) for name, count in HOLDINGS.items() for one in range(count))
    assert set(state.results[0]) == set(found)


def test_examples_of_who_was_lost_before_the_race_are_run_too() -> None:
    state = handed_on(calls=2000, lost=("b",))
    found = examples_of(run(state, difficult, ("a", "c")), state.handover)
    assert ("b", 7) in found and ("b", 0) in found


def test_what_nobody_else_holds_is_left_out() -> None:
    lonely = [dataclasses.replace(one, group="" if one.name == "a" else "one") for one in MEMBERS]
    state = RaceState(STUDENT, CHALLENGERS, HOLDINGS, 2000, CONFIG, handover=Handover(lonely))
    state.lose("a")
    run(state, difficult, ("b", "c"))
    assert {worker for results in state.results for worker, _ in results} == {"b", "c"}
    state = handed_on(calls=2000)
    state.lose("b")
    state.lose("c")
    state.lose("a")  # no heir is left for anything
    assert state.done and not state.unused


def test_no_more_is_handed_on_than_the_budget_reaches() -> None:
    state = handed_on(calls=5 * 24)  # exactly one heat of everything for all five
    request = state.assign("a")
    assert request is not None
    paid = state.lose("a")
    units = run(state, difficult, ("b", "c"))
    assert paid + sum(len(one.candidates) * len(one.examples) for one in units) <= 5 * 24
    assert state.calls_left >= 0


def test_a_unit_of_a_heat_that_is_over_is_not_run_again() -> None:
    state = handed_on(calls=240)
    late = state.assign("c")
    assert late is not None
    while state.heat == 1:
        request = state.assign("a") or state.assign("b")
        assert request is not None
        state.receive(reply(request, difficult))
    state.lose("c")
    units = run(state, difficult, ("a", "b"))
    lost = {("c", one) for one in late.examples}
    assert not lost & set(examples_of(units, state.handover))


# -------------------------------------------------------------------------------------------------- noisy scores


def tossing(worth: dict[tuple[int, ...], float], seed: int) -> Score:
    """A judge: right or wrong by an example's difficulty, and then wrong at every third toss."""
    rng = np.random.default_rng(seed)

    def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
        is_right = (example * 0.37 + len(worker)) % 1 < worth.get(candidate, 0.5)
        return float(is_right != (rng.random() < 1 / 3))

    return score


def asked(units: list[RaceRequest]) -> int:
    return max(sum(example in unit.examples for unit in units if unit.worker == "a") for example in range(12))


def test_a_noisy_race_asks_again_while_it_is_undecided() -> None:
    def play(repeats: bool, seed: int) -> tuple[RaceState, int]:
        state = race(calls=2000, repeats=repeats, challengers=[(1, 0)])
        return state, asked(run(state, tossing({(1, 0): 0.8}, seed)))

    for seed in range(5):
        once, times = play(False, seed)
        assert times == 1
        again, many = play(True, seed)
        assert many > 1 or abs(once.standings()[1].advantage) >= 2 * once.standings()[1].error
        assert all(one.count == 24 for one in again.standings()), "an example counts once"
    wins = {
        repeats: sum(play(repeats, seed)[0].winner() == (1, 0) for seed in range(40))
        for repeats in (False, True)
    }
    assert wins[True] >= wins[False] + 3
    assert wins[True] >= 36


def test_a_race_that_is_decided_does_not_ask_again() -> None:
    state = race(calls=2000, repeats=True, challengers=[(1, 0)])
    assert asked(run(state, lambda candidate, *_: float(candidate == (1, 0)))) == 1


def test_repetitions_keep_to_the_budget_and_to_what_is_held() -> None:
    state = race(calls=300, repeats=True)
    units = run(state, lambda candidate, worker, example: None if example == 3 else 0.5)
    paid = sum(len(one.candidates) * (len(one.examples) - one.examples.count(3)) for one in units)
    assert 250 < paid <= 300
    state = race(calls=2000, repeats=True, challengers=[(1, 0)])
    state.lose("a")
    assert {one.worker for one in run(state, tossing({}, 0), ("b", "c"))} == {"b", "c"}


def test_the_mean_over_repetitions_leaves_out_what_is_missing() -> None:
    state = race(repeats=True)
    for score, soft in ((None, None), (1.0, 0.5), (None, None), (0.0, 0.7), (0.5, None)):
        state._note(0, ("a", 0), score, soft)
    assert state.results[0]["a", 0] == (0.5, None)
    state._note(0, ("a", 1), 1.0, 0.5)
    state._note(0, ("a", 1), 0.0, 0.7)
    assert state.results[0]["a", 1] == pytest.approx((0.5, 0.6))


# --------------------------------------------------------------------------------------------- helping each other out


def helping(lms: dict[str, str], speeds: dict[str, float] | None = None, **changes: object) -> RaceState:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    members = [dataclasses.replace(one, lm=lms[one.name]) for one in MEMBERS]
    return RaceState(STUDENT, [(1, 0)], HOLDINGS, 48, config, handover=Handover(members), speeds=speeds)


def takers(state: RaceState, workers: tuple[str, ...]) -> dict[str, set[str]]:
    """Holder -> who ran its examples, where only ``workers`` ever ask."""
    found: dict[str, set[str]] = {}
    while True:
        units = [unit for unit in map(state.assign, workers) if unit is not None]
        if not units:
            return found
        for unit in units:
            for holder, _ in examples_of([unit], state.handover):
                found.setdefault(holder, set()).add(unit.worker)
            state.receive(reply(unit, difficult))


def test_who_has_nothing_left_helps_those_with_the_same_examples_and_lm() -> None:
    same = dict.fromkeys(HOLDINGS, "m")
    assert takers(helping(same), ("c",)) == {"a": {"c"}, "b": {"c"}, "c": {"c"}}
    assert takers(helping(same | {"a": "other"}), ("c",)) == {"b": {"c"}, "c": {"c"}}
    assert takers(helping(same, balance=False), ("c",)) == {"c": {"c"}}
    alone = RaceState(STUDENT, [(1, 0)], HOLDINGS, 48, CONFIG)
    assert (unit := alone.assign("c")) is not None
    assert (unit.examples, alone.assign("c")) == ((0, 1, 2, 3), None)


def test_the_one_that_is_furthest_behind_is_helped_and_slow_ones_help_nobody() -> None:
    same = dict.fromkeys(HOLDINGS, "m")
    state = helping(same, speeds={"b": 0.1})
    while state.quota.get("c"):
        assert state.assign("c") is not None
    assert (unit := state.assign("c")) is not None
    assert {holder for holder, _ in examples_of([unit], state.handover)} == {"b"}
    assert set(takers(helping(same, speeds={"b": 0.9}), ("b",))) == {"b"}


def test_a_slow_worker_begins_little_at_a_time() -> None:
    state = RaceState(STUDENT, [(1, 0)], HOLDINGS, 48, CONFIG, speeds={"a": 0.2})
    assert (slow := state.assign("a")) is not None
    assert (fast := state.assign("b")) is not None
    assert len(slow.examples) == 3  # a fifth of its twelve
    assert len(fast.examples) == 8


def test_a_slow_worker_begins_nothing_that_others_would_have_done_before_it_is_back() -> None:
    """c, fifty times slower, gets nothing while a and b are there to run its examples; once both are lost, it does."""
    same = dict.fromkeys(HOLDINGS, "m")
    state = helping(same, speeds={"c": 0.02})
    assert state.quota["c"]
    assert state.assign("c") is None
    assert helping(same | {"c": "other"}, speeds={"c": 0.02}).assign("c") is not None
    assert helping(same, speeds={"c": 0.4}).assign("c") is not None
    state.lose("a")
    state.lose("b")
    assert state.assign("c") is not None
