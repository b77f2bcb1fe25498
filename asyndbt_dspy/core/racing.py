"""The final race: paired successive halving of candidates on held-out examples under a budget (``algorithm.md`` 7.7).

Every candidate of a heat meets the same examples, so that differences are paired and an example's difficulty cancels.
The student runs in every heat and is returned unless something clearly beats it. Examples stay with the workers that hold them;
a heat closes without its stragglers once three quarters of its examples are in, and late results still count.

Work goes where it is done soonest: a slow worker gets a smaller part of a heat, and none that others with its examples would
have done before it is back; the last heat leaves out what only slow workers have not begun, a quarter of it at most. Work of
a worker that is gone goes to those that hold its examples too, as far as the budget reaches; where nobody does, it is left out.
Workers with the same examples and the same LM help each other out.

With ``repeats`` finalists that two standard errors do not tell apart meet their examples again while calls are left. An example
still counts once, with the mean of what it came to, so that intervals do not shrink below what the examples allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.handover import Handover
from asyndbt_dspy.core.messages import RaceReply, RaceRequest
from asyndbt_dspy.core.pacing import LATE
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Candidate
from asyndbt_dspy.core.validation import check_race_reply
from asyndbt_dspy.errors import ProtocolError

_QUORUM = 0.75
_FIRST_HEAT = 6
"""Examples that the first heat should have; with less budget fewer candidates run."""
_INTERVAL_Z = 1.96
_LOOKED_AT = 256
"""Workers among whom the one that is furthest behind is looked for."""
_DECIDED = 2.0
"""Standard errors of a paired difference beyond which noise need not be averaged out any more (ahead: at least what wins)."""

Result = tuple[float | None, float | None]
"""Score, and probability of the right answer where the LM reports it."""


@dataclass(frozen=True)
class Standing:
    """How one candidate stands.

    Attributes:
        candidate: One arm per block.
        mean: Mean score over its examples, NaN before the first.
        low, high: 95 % interval of ``mean`` (normal approximation).
        count: Examples scored.
        advantage: Mean paired difference of race values to the student, 0 for the student.
        error: Standard error of ``advantage``, ``inf`` below two pairs.
        in_race: Whether it was still running when the race ended.
    """

    candidate: Candidate
    mean: float
    low: float
    high: float
    count: int
    advantage: float
    error: float
    in_race: bool


class RaceState:
    """Units of work handed to workers, and what came back. Pure: the server drives it.

    Args:
        student: The candidate that changes nothing.
        candidates: Challengers, best first; as many as the budget can tell apart will run.
        holdings: Held-out examples per worker; of those that are gone, where somebody living holds them too.
        calls: Rollouts the race may spend.
        chunk: Largest number of rollouts per unit of work.
        speeds: Worker -> rollouts per second in units of the usual worker's; default 1. Less than 1: slow.
        living: Workers that can be asked; ``None``: all of ``holdings``.
        handover: Who may run whose examples; ``None``: everybody only its own.
    """

    def __init__(
        self,
        student: Candidate,
        candidates: Sequence[Candidate],
        holdings: Mapping[str, int],
        calls: int,
        config: AlgorithmConfig,
        chunk: int = 48,
        speeds: Mapping[str, float] | None = None,
        living: Collection[str] | None = None,
        handover: Handover | None = None,
    ) -> None:
        self.config = config
        self.chunk = chunk
        self.living = set(holdings if living is None else living)
        self._gone = [name for name in holdings if name not in self.living]
        self.handover = handover or Handover()
        self.speeds = dict.fromkeys(holdings, 1.0) | dict(speeds or {})
        self._slow = {name: None for name, speed in self.speeds.items() if speed < 1.0}
        # In the order of the numbers: whoever numbers the examples mixes them, and may balance every beginning.
        self.unused = {name: list(range(count)) for name, count in holdings.items()}
        self._holdings = dict(holdings)
        self._times: dict[tuple[int, tuple[str, int]], int] = {}
        examples = sum(holdings.values())
        challengers = [one for one in dict.fromkeys(candidates) if one != student]
        affordable = calls // max(1, 2 * min(_FIRST_HEAT, examples)) - 1
        challengers = challengers[: max(1, min(config.race_candidates, affordable))]
        self.candidates: tuple[Candidate, ...] = (student, *challengers)
        self.running = list(range(len(self.candidates)))
        self.calls_left = calls if len(self.candidates) * min(1, examples) <= calls else 0
        self.heat = 0
        self.outstanding: dict[int, RaceRequest] = {}
        self.results: tuple[dict[tuple[str, int], Result], ...] = tuple({} for _ in self.candidates)
        self.quota: dict[str, int] = {}
        self.units = 0
        self.done = False
        self._quota_left = 0  # examples of the heat that nobody has begun
        self._under_way = 0  # examples of the heat that are out
        self._heat_units: dict[int, int] = {}
        self._most_begun: dict[str, int] = {}
        self._held: dict[int, tuple[str, tuple[int, ...]]] = {}  # unit -> holder, its numbers of the examples
        self._heat_size = 0
        self._last_units = False
        self._open_heat()

    def _open_heat(self) -> None:
        if not any(self.unused.values()) and self._may_repeat():
            self.unused = {name: list(range(self._holdings[name])) for name in self.unused}
        left = {name: len(numbers) for name, numbers in self.unused.items() if numbers}
        heats_left = max(1, math.ceil(math.log2(max(2, len(self.running)))) if len(self.running) > 2 else 1)
        affordable = self.calls_left // heats_left // max(1, len(self.running))
        size = min(affordable, sum(left.values()))
        if size < 1 or len(self.running) < 2:
            self._last_units = True
            self.done = not self.outstanding  # what is paid for is waited for
            return
        self.heat += 1
        shares = _apportion(left, size, self.speeds)
        self.quota = {name: share for name, share in shares.items() if share}
        self._quota_left, self._under_way = size, 0
        self._heat_size = size
        # A slow worker begins no more at a time than the others can do meanwhile.
        each = size / sum(left.values())
        self._most_begun = {
            name: max(1, math.ceil(each * left[name] * self.speeds[name]))
            for name in self._slow
            if name in left
        }
        self._heat_units = {}

    def assign(self, worker: str) -> RaceRequest | None:
        """The next unit for an idle worker, ``None`` if there is nothing for it now."""
        holder = None if self.done else self._next_holder(worker)
        if holder is None:
            return None
        count = max(1, min(self.quota[holder], self.chunk // len(self.running)))
        if self._helps(worker):  # what it has not begun, others may take
            count = min(count, math.ceil(self.quota[holder] / 2))
        count = min(count, self._most_begun.get(worker, count))
        if self._would_be_last(worker, count):
            return None
        held = tuple(self.unused[holder][:count])
        self.unused[holder] = self.unused[holder][count:]
        self.quota[holder] -= count
        if not self.quota[holder]:
            del self.quota[holder]
        self._quota_left -= count
        self._under_way += count
        self.calls_left -= count * len(self.running)
        self.units += 1
        examples = tuple(self.handover.number(worker, holder, one) for one in held)
        request = RaceRequest(
            worker, self.units, tuple(self.candidates[one] for one in self.running), examples
        )
        self.outstanding[self.units] = request
        self._heat_units[self.units] = count
        self._held[self.units] = holder, held
        return request

    def _next_holder(self, worker: str) -> str | None:
        """Whose examples this worker runs next: its own, else of one that is gone, else of the one that is furthest behind."""
        if worker in self.quota:
            return worker
        gone = (name for name in self._gone if name in self.quota and self.handover.may_take(worker, name))
        orphaned = next(gone, None)
        if orphaned is not None:
            return orphaned
        if worker in self._slow or not self._helps(worker):
            return None
        found = (name for name in self.quota if self.handover.may_help(worker, name))
        return max(
            islice(found, _LOOKED_AT), key=lambda name: self.quota[name] / self.speeds[name], default=None
        )

    def _would_be_last(self, worker: str, count: int) -> bool:
        """Whether those that may take a slow worker's examples would be done with everything before it is with ``count``."""
        if worker not in self._slow or not self._helps(worker):
            return False
        helpers = sum(
            1 for name in self.living if name not in self._slow and self.handover.may_help(name, worker)
        )
        later = 0 if self._is_last_heat() else sum(map(len, self.unused.values())) - self._quota_left
        # The next heats run at most half of the challengers, on what no heat has met.
        left = self._quota_left * len(self.running) + later * (1 + len(self.running) // 2)
        own = LATE * count * len(self.running) / self.speeds[worker]
        return helpers > 0 and own > min(left, self.calls_left) / helpers

    def _helps(self, worker: str) -> bool:
        return self.config.balance and self.handover.is_shared(worker)

    def receive(self, reply: RaceReply) -> None:
        """Take a unit's results.

        Raises:
            ProtocolError: a unit that this worker does not have in hand, or rows that do not fit it.
        """
        request = self.outstanding.get(reply.unit) if isinstance(reply.unit, int) else None
        if request is None or request.worker != reply.worker:
            raise ProtocolError(f"worker {reply.worker!r} has no race unit {reply.unit} in hand")
        check_race_reply(request, reply)
        del self.outstanding[reply.unit]
        self._under_way -= self._heat_units.pop(reply.unit, 0)
        holder, held = self._held.pop(reply.unit)
        self.calls_left += len(request.candidates) * len(request.examples) - reply.calls
        for candidate, scores, soft in zip(request.candidates, reply.scores, reply.soft_scores, strict=True):
            number = self.candidates.index(candidate)
            for example, score, probability in zip(held, scores, soft, strict=True):
                self._note(number, (holder, example), score, probability)
        self._advance()

    def _note(self, number: int, place: tuple[str, int], score: float | None, soft: float | None) -> None:
        """The mean over repetitions; one that is missing changes nothing."""
        results, key = self.results[number], (number, place)
        known = results.get(place)
        if known is None or known[0] is None:
            results[place] = (score, soft)
        elif score is not None:
            times = self._times[key] = self._times.get(key, 1) + 1
            weight = 1.0 / times
            mean = known[0] + weight * (score - known[0])
            both = None if soft is None or known[1] is None else known[1] + weight * (soft - known[1])
            results[place] = (mean, both)

    def _may_repeat(self) -> bool:
        """Whether asking again can change the outcome: scores are noisy, and the finalists are not told apart."""
        if not (self.config.repeats and any(self.results)) or len(self.running) < 2:
            return False
        mean, error = max(self._paired(number) for number in self.running[1:])
        pairs = len(self.results[0])
        return -_DECIDED * error < mean < max(_DECIDED, bar(self.config.accept_z, pairs)) * error

    def lose(self, worker: str) -> int:
        """A worker is gone: others take over what it held, or it leaves the race. Returns the rollouts it had in hand."""
        self.living.discard(worker)
        self._gone.append(worker)
        self.speeds[worker] = 1.0
        self._slow.pop(worker, None)
        units = {unit: one for unit, one in self.outstanding.items() if one.worker == worker}
        for unit in units:
            del self.outstanding[unit]
            self._take_back(unit)
        for name in [one for one in self._gone if not self.handover.has_heir(one, self.living)]:
            self._quota_left -= self.quota.pop(name, 0)
            self.unused.pop(name, None)
            self._gone.remove(name)
        self._advance()
        return sum(len(one.candidates) * len(one.examples) for one in units.values())

    def _take_back(self, unit: int) -> None:
        """A unit will not be answered: as much of it as the budget still reaches is to be handed out again."""
        holder, held = self._held.pop(unit)
        count = self._heat_units.pop(unit, 0)  # 0: of an earlier heat, which is over
        self._under_way -= count
        affordable = self.calls_left // len(self.running) - self._quota_left
        again = 0 if self._last_units else max(0, min(count, affordable))
        if again:
            self.unused[holder] = [*held[:again], *self.unused[holder]]
            self.quota[holder] = self.quota.get(holder, 0) + again
            self._quota_left += again

    def _advance(self) -> None:
        if self._last_units:
            self.done = not self.outstanding
            return
        waiting = self._under_way + self._quota_left
        if waiting > (1.0 - _QUORUM) * self._heat_size:
            return
        if not self._is_last_heat() or not waiting:
            self._halve()
            return
        if self.quota and all(self.speeds[name] < 1.0 for name in self.quota):
            self.quota, self._quota_left = {}, 0
            self._last_units, self.done = True, not self.outstanding

    def _is_last_heat(self) -> bool:
        return len(self.running) <= 2

    def _halve(self) -> None:
        challengers = sorted(self.running[1:], key=lambda one: -self._paired(one)[0])
        keep = challengers if self._is_last_heat() else challengers[: math.ceil(len(challengers) / 2)]
        self.running = [0, *sorted(keep)]
        self.quota, self._quota_left = {}, 0
        self._open_heat()

    def _gain(self, own: Result, students: Result) -> float:
        """Difference of race values. What the LM's distribution says counts where it is known of both: of one alone, two
        scales would be compared, and a right label that the metric refuses would be worse than a near miss.
        """
        (score, soft), (base, base_soft) = own, students
        if score is None or base is None or soft is None or base_soft is None:
            return _score_gain(own, students)
        weight = self.config.race_soft
        return ((1.0 - weight) * score + weight * soft) - ((1.0 - weight) * base + weight * base_soft)

    def _paired(
        self, number: int, gain: Callable[[Result, Result], float] | None = None
    ) -> tuple[float, float]:
        """Mean and standard error of the difference to the student, over examples that both answered.

        ``gain``: What is compared of a pair of results; by default their race values.
        """
        differences = self._differences(number, gain or self._gain)
        if not len(differences):
            return -math.inf, math.inf
        return float(differences.mean()), standard_error(differences)

    def _differences(self, number: int, gain: Callable[[Result, Result], float]) -> FloatArray:
        own, students = self.results[number], self.results[0]
        # In one order: sums must not depend on which arrived first.
        pairs = [gain(own[place], students[place]) for place in sorted(own.keys() & students)]
        return np.array([pair for pair in pairs if math.isfinite(pair)])

    def winner(self) -> Candidate:
        """The running challenger that is furthest ahead, if it beats the student by ``accept_z`` standard errors.

        With few examples it takes more of them, as in Student's t test: their spread is not known well either.
        Race values also count how sure the LM is. That tells candidates apart, but nobody is served by a program that is
        surer and no better: the metric alone must show ``accept_score_z`` standard errors of the advantage.
        """
        best, advantage = 0, 0.0
        for number in self.running[1:]:
            mean, error = self._paired(number)
            pairs = len(self._differences(number, self._gain))
            needed = bar(self.config.accept_z, pairs) * error if self.config.accept_z else 0.0
            if mean > max(advantage, needed) and self._shows(number):
                best, advantage = number, mean
        return self.candidates[best]

    def _shows(self, number: int) -> bool:
        """Whether a challenger is far enough ahead by the metric alone."""
        mean, error = self._paired(number, _score_gain)
        least = min(self.config.accept_score_z, self.config.accept_z)
        return mean >= (least * error if least else 0.0)

    def standings(self) -> tuple[Standing, ...]:
        """The student first, then the challengers in the order they entered."""
        rows = []
        for number, candidate in enumerate(self.candidates):
            found = [result[0] for _, result in sorted(self.results[number].items(), key=itemgetter(0))]
            scores = np.array([score for score in found if score is not None])
            mean = float(scores.mean()) if len(scores) else math.nan
            half = _INTERVAL_Z * standard_error(scores)
            low, high = mean - half, mean + half
            if (
                len(scores) and scores.min() >= 0.0 and scores.max() <= 1.0
            ):  # a share has no interval outside [0, 1]
                low, high = max(low, 0.0), min(high, 1.0)
            advantage, error = (0.0, 0.0) if number == 0 else self._paired(number)
            in_race = number in self.running
            rows.append(Standing(candidate, mean, low, high, len(scores), advantage, error, in_race))
        return tuple(rows)


def bar(accept_z: float, pairs: int) -> float:
    """Standard errors that ``accept_z`` comes to with so many pairs: the same quantile of Student's t.

    By the expansion of Fisher and Cornish (Abramowitz & Stegun 26.7.5), two terms; infinite below two pairs.
    """
    if pairs < 2:
        return math.inf
    z, degrees = accept_z, pairs - 1
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _score_gain(own: Result, students: Result) -> float:
    return math.nan if own[0] is None or students[0] is None else own[0] - students[0]


def standard_error(values: FloatArray) -> float:
    """Of the mean of these values; ``inf`` below two."""
    if len(values) < 2:
        return math.inf
    # One pseudo-observation of each extreme keeps ten equal scores from looking certain.
    spread = float(np.var(values, ddof=1)) + 0.25 / len(values)
    return math.sqrt(spread / len(values))


def _apportion(holdings: Mapping[str, int], total: int, speeds: Mapping[str, float]) -> dict[str, int]:
    """Split ``total`` over workers in proportion to what they hold and to their speeds, never more than they hold.

    Largest remainders, ties to the earlier worker; what is full leaves its surplus to the others.
    """
    weights = {name: count * speeds[name] for name, count in holdings.items()}
    full: dict[str, int] = {}
    while True:
        left, whole = total - sum(full.values()), sum(weights.values())
        exact = {name: left * weight / whole for name, weight in weights.items()}
        over = [name for name, value in exact.items() if value > holdings[name]]
        if not over:
            break
        for name in over:
            full[name] = holdings[name]
            del weights[name]
    shares = {name: full.get(name, int(exact.get(name, 0.0))) for name in holdings}
    left = total - sum(shares.values())
    for name in sorted(exact, key=lambda name: shares[name] - exact[name]) * 2:
        if left and shares[name] < holdings[name]:
            shares[name] += 1
            left -= 1
    return shares
