"""``ServerState``: every transition of the server. Events in, instructions out; no I/O, no clock (``algorithm.md`` 6).

=========  ==============================  ===========================================================
phase      event                           what happens
=========  ==============================  ===========================================================
search     StepReply                       stored; S answers in and nobody too late -> iteration
rounds     StepReply                       stored for the next iteration; its worker joins the rounds
rounds     RoundReply                      all live workers in -> next round, after K -> planes, search
race       StepReply                       only its cost counts; its worker joins the race
race       RaceReply                       to the race; last heat closed -> Finish
any        WorkerLost                      the worker's p, theta, a[v], d[v] leave every sum
any        ArmsJoined                      requests from now on say so; in the race nothing
search     StopSearch                      -> race (or Finish); ``is_dry``: when what is under way is over
rounds     StopSearch                      the running round ends, then -> race (or Finish at once)
race       StopSearch                      with ``race=False`` -> Finish, else nothing
=========  ==============================  ===========================================================

An iteration: store p, q -> z -> lambda -> drop -> theta -> refresh planes -> send. Messages that do not fit are refused
with ``ProtocolError`` and change nothing. Sums run in worker order, never in order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from asyndbt_dspy.core import cuts
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.consensus import update_consensus, update_duals
from asyndbt_dspy.core.decoding import decode, finalists, safest
from asyndbt_dspy.core.effects import EffectKeys
from asyndbt_dspy.core.final import kept_back, learned, open_race
from asyndbt_dspy.core.late_arms import LateArms
from asyndbt_dspy.core.lateness import Distances
from asyndbt_dspy.core.lower_level import LowerEstimate, Surrogate, buffered_estimate
from asyndbt_dspy.core.messages import (
    ArmsJoined,
    Finish,
    Instruction,
    RaceReply,
    RoundReply,
    Send,
    ServerEvent,
    StepReply,
    StepRequest,
    Stop,
    StopSearch,
    Wait,
    WorkerLost,
)
from asyndbt_dspy.core.pacing import Paces, Synchrony
from asyndbt_dspy.core.policies import Nomination, WorkerSpace
from asyndbt_dspy.core.racing import RaceState
from asyndbt_dspy.core.roster import Member as Member
from asyndbt_dspy.core.roster import Roster
from asyndbt_dspy.core.rounds import BarrierRounds, RefreshSchedule
from asyndbt_dspy.core.shared_effects import SharedEffects
from asyndbt_dspy.core.simplex import FloatArray, Layout, rows_of, shared
from asyndbt_dspy.core.snapshots import snapshot
from asyndbt_dspy.core.space import Candidate, Space
from asyndbt_dspy.core.validation import check_config, check_round_reply, check_step_reply
from asyndbt_dspy.errors import ProtocolError

_FREE_STEPS = 4
"""Steps in a row of every worker that cost no call: a small space can be exhausted before the budget is."""
_FEW = (0.25, 0.5)
"""Share of the workers that a run in which nobody waits leaves behind at the end of its search: more if last steps are short."""

Phase = Literal["search", "rounds", "race", "finished"]


class ServerState:
    """Consensus, duals, planes, budget and race of one run.

    Args:
        space: Blocks and arms (identities, no texts).
        members: All workers; their order is the order of every sum.
        config: Constants of the run.
        calls: Rollouts the run may spend, ``None`` for no bound.

    Raises:
        ConfigurationError: no workers, a name used twice, more active workers than there are, or ``calls < 0``.
    """

    def __init__(
        self,
        space: Space,
        members: Sequence[Member],
        config: AlgorithmConfig,
        calls: int | None = None,
    ) -> None:
        check_config([member.name for member in members], config, calls)
        self.space = space
        self.members = tuple(members)
        self.config = config
        self.layout = Layout(tuple(len(block.arms) for block in space.lower))
        self.numbers = {member.name: number for number, member in enumerate(members)}
        self.keys = EffectKeys.of(space, config.share_credit)
        count, length = len(members), self.layout.length
        self.p: FloatArray = np.tile(self.layout.uniform(), (count, 1))
        self.z: FloatArray = self.layout.uniform()
        self.duals: FloatArray = np.zeros((count, length))
        self.live: FloatArray = np.ones(count)
        uppers = self.q_layouts = shared([WorkerSpace(space, member.allowed).upper for member in members])
        widths = [layout.length if config.hypergradient else 0 for layout in uppers]
        self.q_owner: FloatArray = np.repeat(np.arange(count, dtype=np.float64), widths)
        self.q: FloatArray = np.concatenate(
            [layout.uniform() for layout, width in zip(uppers, widths, strict=True) if width] or [np.zeros(0)]
        )
        self.planes: tuple[cuts.Plane, ...] = ()
        self._pushes = cuts.Pushes(self.layout, uppers, widths)
        self.surrogates: list[Surrogate | None] = [None] * count
        self.estimate: LowerEstimate | None = None  # the last phi
        columns = len(self.keys.shared) if config.share_effects and config.policy == "posterior" else 0
        self.effects = SharedEffects(config, count, columns)
        self.nominations: dict[int, tuple[Nomination, ...]] = {}
        self.version = 0
        self.phase: Phase = "search"
        self.race: RaceState | None = None
        self.finish_reason = ""
        self.winner: Candidate = space.student
        self.arms = LateArms(space)
        self.staleness = [0] * count
        self.distances = Distances(count, self.z, self.layout, config.stale_step and config.keep_busy)
        self.paces, self.synchrony = Paces(count, config), Synchrony(config)
        self.roster = Roster(count, self.paces.fewest if config.keep_busy else config.minibatch)
        self.arrived: dict[int, StepReply] = {}
        self.in_race: set[int] = set()
        self.calls_spent = 0
        self.race_calls = kept_back(config, self.members, calls)
        self.calls_left = None if calls is None else calls - self.race_calls
        self._calm, self._free_steps, self._has_paid, self.has_nothing_new = 0, [0] * count, False, False
        self._rounds: BarrierRounds | None = None
        self._schedule = RefreshSchedule(config)
        self._least_step = min(self.step_calls(number) for number in range(count))
        self._started, self._stop_reason = False, ""
        self.race_most: int | None = None

    # ------------------------------------------------------------------ events

    def start(self) -> list[Instruction]:
        """The first requests, or the end of a search that can afford none or has no choice.

        Raises:
            ProtocolError: called twice.
        """
        if self._started:
            raise ProtocolError("the run was started already; build a new ServerState for another one")
        self._started = True
        if not any(self.space.has_choice(member.allowed) for member in self.members):
            return self._finish("there is nothing to search")
        return self._send_steps(self._alive()) or self._end_search("the budget is below one step")

    def receive(self, event: ServerEvent) -> list[Instruction]:
        """Take one event; return what the engine must do next (``ProtocolError``, and no change, if it does not fit)."""
        if self.phase == "finished":
            raise ProtocolError(f"the run is over ({self.finish_reason}); got {type(event).__name__}")
        if not self._started:
            raise ProtocolError(f"got {type(event).__name__} before start()")
        if not isinstance(event, (StepReply, RaceReply, RoundReply, WorkerLost)):  # most events first
            if isinstance(event, StopSearch):
                return self._stop_search(event)
            if isinstance(event, ArmsJoined):
                return self.arms.take(event, self.phase)
            raise ProtocolError(
                f"the server takes no {type(event).__name__}; it may have been addressed to a worker"
            )
        number = self.numbers.get(event.worker) if isinstance(event.worker, str) else None
        if number is None:
            raise ProtocolError(f"unknown worker {event.worker!r}; known: {sorted(self.numbers)}")
        if not self.live[number]:
            raise ProtocolError(f"worker {event.worker!r} was set aside and sent a {type(event).__name__}")
        if isinstance(event, StepReply):
            return self._step_reply(number, event)
        if isinstance(event, RaceReply):
            return self._race_reply(number, event)
        return self._lose(number) if isinstance(event, WorkerLost) else self._round_reply(number, event)

    def _step_reply(self, number: int, reply: StepReply) -> list[Instruction]:
        reserved = self.step_calls(number)
        check_step_reply(self, number, reply, reserved)
        self.roster.take_back(number)
        self.paces.take_back(number, reserved)
        self._settle(reserved, reply.calls)
        self._free_steps[number] = 0 if reply.calls else self._free_steps[number] + 1
        self.nominations[number] = reply.nominations
        if self.phase == "race":
            return self._race_on([number])
        self.staleness[number] = self.version - reply.version
        self.arrived[number] = reply
        self.distances.take_back(number)
        if self._rounds is not None:
            return self._send_round([number])
        return self._send_further(number, reply) or self._advance()

    def _settle(self, reserved: int, calls: int) -> None:
        self.calls_spent += calls
        self._has_paid |= calls > 0
        if self.calls_left is not None:
            self.calls_left += reserved - calls

    def step_calls(self, number: int) -> int:
        """Rollouts that one step of this worker may cost."""
        own = self.members[number].step_calls
        return self.config.draws * self.roster.minibatch[number] if own is None else own

    # -------------------------------------------------------------- iterations

    def _alive(self) -> list[int]:
        return self.roster.living

    def _may_iterate(self) -> bool:
        # Whoever is kept busy answers more than once: an update is made of S answers then, not of S workers.
        answers = self.roster.answers if self.config.keep_busy else len(self.arrived)
        enough = answers >= min(self.synchrony.active, len(self._alive()))
        if not self.arrived or not (enough or self._is_over_but_for_slow_ones()):
            return False
        return self.version + 1 - self.roster.oldest(self.version + 1) <= self.synchrony.staleness - 1

    def _is_over_but_for_slow_ones(self) -> bool:
        """The budget is handed out, and who still works on it is slow or one of few: nobody waits for these."""
        busy = self.roster.outstanding
        if not busy or not self.roster.idle:
            return not busy
        few = self.config.keep_busy and len(busy) <= _FEW[self.paces.tapers] * len(self._alive())
        return few or all(self.paces.speed(number) < 1.0 for number in reversed(busy))  # newest first

    def _advance(self) -> list[Instruction]:
        if not self._may_iterate():
            if self._is_over_but_for_slow_ones():  # one of whom may hold up the next update
                self._store_arrived()
                return self._end_search()
            return [Wait(f"{len(self.arrived)} of {self.synchrony.active} active workers have answered")]
        active = sorted(self.arrived)
        moved = self._iterate(active)
        self.version += 1
        self.arrived = {}
        self.roster.count_anew()
        self.paces.refresh()
        late = self.version - self.roster.oldest(self.version)
        self.synchrony.adapt(self.paces.slowest, len(self._alive()), late)
        if self._is_stationary(moved):
            return self._end_search(f"stationary: step norm {moved:.3g} <= {self.config.stationarity:g}")
        if self.version >= self.config.iterations:
            return self._end_search(f"{self.version} iterations done")
        # Without a number of calls a toy problem, which never pays, goes on, and who waits for arms that are to join.
        may_end = self.calls_left is not None or (self._has_paid and not self.arms.are_awaited)
        self.has_nothing_new = all(self._free_steps[number] >= _FREE_STEPS for number in self._alive())
        if may_end and self.has_nothing_new:
            return self._end_search("nothing new to score: every draw is known already")
        if self._schedule.is_due(self.version, len(active), len(self._alive())) and self.layout.length:
            started = self._refresh_planes(active)
            if started:
                return started
        return self._continue(active)

    def _continue(self, active: list[int]) -> list[Instruction]:
        """Requests to those that an empty budget had left idle (they waited longest), then to those that answered."""
        busy = self.roster.outstanding
        answered = [number for number in active if self.live[number] and number not in busy]
        sent = self._send_steps(sorted(self.roster.idle.difference(answered)) + answered)
        if self.arrived and (not sent or self._may_iterate()):  # answers that came in while rounds ran
            return [*sent, *self._advance()]
        if sent:
            return sent
        if not self._is_over_but_for_slow_ones():
            return [Wait("the budget of the search is handed out; the last steps are under way")]
        return self._end_search()

    def _iterate(self, active: list[int]) -> float:
        """Store p, q -> z -> lambda -> drop -> theta; returns the squared norm of the scaled step."""
        moved = 0.0
        if self.config.stationarity:
            for number in active:
                step = (self.arrived[number].lower - self.p[number]) / max(self.config.lower_step, 1e-12)
                moved += float(step @ step)
        self._store_arrived()
        rows, before = np.flatnonzero(self.live), self.z
        push = cuts.consensus_push(self.planes, self.layout)
        points = self.distances.points(self.p, self.z, rows, self.roster.answers)
        self.z = update_consensus(self.layout, self.config, self.z, points, self.duals[rows], push)
        moved += float(np.sum((self.z - before) ** 2)) / max(self.config.consensus_step, 1e-12) ** 2
        self.planes = cuts.update(self.config, self.planes, self.p, self.z, self.q, self.live, self.q_owner)
        self.duals[active] = update_duals(self.config, self.duals[active], self.p[active], self.z)
        return moved

    def _store_arrived(self) -> None:
        for number, reply in sorted(self.arrived.items()):
            self.p[number] = reply.lower
            self.distances.take_in(number)
            if reply.upper is not None:
                self.q[self.q_owner == number] = reply.upper
            self.surrogates[number] = Surrogate(reply.gradient, reply.lower, reply.curvature, reply.cross)
            self.effects.store(number, reply.effects)

    def _is_stationary(self, moved: float) -> bool:
        self._calm = self._calm + 1 if moved <= self.config.stationarity else 0
        return self.config.stationarity > 0 and self._calm >= self.config.patience

    # ------------------------------------------------------------------ planes

    def _refresh_planes(self, active: list[int]) -> list[Instruction]:
        """Buffered: new planes at once, nobody waits. Rounds: start the barrier and return its requests."""
        if self.version - 1 >= self.config.plane_iterations and not (
            self.planes and self.config.rekey_planes
        ):
            return []
        if self.config.buffered_lower:
            self._add_planes(
                buffered_estimate(self.layout, self.config, self.p, self.z, self.surrogates, self.q_owner)
            )
            return []
        if not self._round_affordable():
            return []
        self.phase = "rounds"
        self._rounds = BarrierRounds.start(self.p, self.z, self._alive(), active)
        return self._send_round([number for number in self._alive() if number not in self.roster.outstanding])

    def _add_planes(self, phi: LowerEstimate) -> None:
        self.estimate = phi
        points = self.p, self.z, phi, self.q, self.q_owner, self.live
        self.planes = cuts.refresh(self.layout, self.config, self.planes, self.version - 1, *points)

    # ------------------------------------------------- rounds (the barrier form)

    def _round_affordable(self) -> bool:
        cost = sum(self.step_calls(number) for number in self._alive()) * self.config.lower_rounds
        return not self._stop_reason and (self.calls_left is None or self.calls_left >= cost)

    def _send_round(self, numbers: list[int]) -> list[Instruction]:
        rounds = self._rounds
        assert rounds is not None  # only called while rounds run
        sent: list[Instruction] = []
        for number in numbers:
            self._reserve(number)
            sent.append(Send(rounds.request(self.members[number].name, number, self.version)))
        return sent or [Wait("workers still busy with a step join the rounds later")]

    def _round_reply(self, number: int, reply: RoundReply) -> list[Instruction]:
        rounds = self._rounds
        if rounds is None or number not in rounds.asked:
            raise ProtocolError(f"worker {reply.worker!r} owes no round and sent one (number {reply.number})")
        check_round_reply(self, number, rounds.number, reply)
        self._settle(self.step_calls(number), reply.calls)
        rounds.take(number, reply.lower)
        return self._close_round(rounds)

    def _close_round(self, rounds: BarrierRounds) -> list[Instruction]:
        if rounds.waiting:
            return [Wait(f"round {rounds.number}: {len(rounds.waiting)} workers to answer")]
        rounds.close(self.layout, self.config, self._alive())
        if rounds.number < self.config.lower_rounds and not self._stop_reason:
            return self._send_round(sorted(rounds.waiting))
        self._rounds, self.phase = None, "search"
        if self._stop_reason:
            return self._end_search(self._stop_reason)
        self._add_planes(rounds.estimate)
        return self._continue(rounds.resume)

    # ------------------------------------------------------------------ sending

    def _reserve(self, number: int) -> None:
        if self.calls_left is not None:
            self.calls_left -= self.step_calls(number)

    def _send_steps(self, numbers: list[int]) -> list[Instruction]:
        """Requests to these workers, as far as the budget of the search reaches."""
        if self._stop_reason or (self.calls_left is not None and self.calls_left < self._least_step):
            self.roster.idle.update(numbers)
            return []
        sent: list[Instruction] = []
        effects = self.effects.of_others(rows_of(numbers))
        # An index each: to walk an array costs numpy more, for one worker most.
        for place, number in enumerate(numbers):
            if self._hand_out(number):
                sent.append(Send(self._step_request(number, effects[place])))
        return sent

    def _hand_out(self, number: int) -> bool:
        """Reserve a step's calls for this worker and note it as begun; ``False``, and idle, where they are not left."""
        roster, left = self.roster, self.calls_left
        roster.minibatch[number] = self.paces.minibatch(number, left, len(roster.living))
        if left is not None:
            left -= self.step_calls(number)
            if left < 0:
                roster.idle.add(number)
                return False
            self.calls_left = left
        roster.hand_out(number, self.version)
        self.distances.hand_out(number, self.z)
        self.paces.hand_out(number)
        return True

    def _send_further(self, number: int, reply: StepReply) -> list[Instruction]:
        """The next minibatch for a worker that would wait for others, unless it costs nothing: then it never would end."""
        if not (self.config.keep_busy and reply.calls) or self._may_iterate():
            return []
        if reply.version == self.version and self.roster.repeats[number] + 1 >= self.config.max_staleness:
            return []
        return self._send_steps([number])

    def _step_request(self, number: int, effects: FloatArray) -> StepRequest:
        push, push_upper = self._pushes.of(self.planes, number)
        return StepRequest(
            worker=self.members[number].name,
            version=self.version,
            consensus=self.z,  # every update makes a new z
            duals=self.duals[number].copy(),  # requests do not see later updates
            plane_push=push,
            plane_push_upper=push_upper,
            effects=effects,
            staleness=self.staleness[number],
            repeat=self.roster.repeats[number],
            minibatch=self.roster.minibatch[number] % self.config.minibatch,
            open=self.arms.said,
        )

    def _lose(self, number: int) -> list[Instruction]:
        self.live[number] = 0.0
        self.arrived.pop(number, None)
        self.effects.forget(number)
        self.surrogates[number] = None
        self.in_race.discard(number)
        self.paces.forget(number)
        asked = self._rounds is not None and self._rounds.lose(number)
        if self.roster.lose(number) or asked:
            self.calls_spent += self.step_calls(number)  # what was in flight counts as spent
        if self.race is not None:
            self.calls_spent += self.race.lose(self.members[number].name)
        if not self._alive():
            return self._finish("every worker was set aside")
        if self.race is not None:
            return self._race_on()
        return self._advance() if self._rounds is None else self._close_round(self._rounds)

    def _stop_search(self, event: StopSearch) -> list[Instruction]:
        if self.race is not None:
            return [Wait("the race runs")] if event.race else self._finish(event.reason)
        self.race_most = self.race_most if event.calls is None else event.calls
        if event.race and (event.is_dry or (self.config.race and self._rounds is not None)):
            self._stop_reason = event.reason
            return self._advance() if self._rounds is None else [Wait("the running round ends first")]
        if not self.config.race:
            return self._end_search(event.reason)
        if not event.race:
            self.winner = safest(self.space.student, [self.nominations.get(one, ()) for one in self._alive()])
            return self._finish(event.reason)
        return self._end_search(event.reason)

    def finalists(self) -> tuple[Candidate, ...]:
        """Candidates for the race, most promising first, the student not among them."""
        return tuple(one for one in finalists(*learned(self)) if one != self.space.student)

    def _end_search(self, reason: str = "") -> list[Instruction]:
        self.finish_reason = reason or self._stop_reason or "the budget of the search is spent"
        if not self.config.race:
            self.winner = decode(*learned(self))
        challengers = self.finalists() if self.config.race else ()
        if not challengers:
            return self._finish(self.finish_reason)
        self.phase = "race"
        self.race = open_race(self, challengers)
        return self._race_on()

    def _race_reply(self, number: int, reply: RaceReply) -> list[Instruction]:
        if self.race is None or number not in self.in_race:
            raise ProtocolError(f"worker {reply.worker!r} owes no race unit and sent unit {reply.unit}")
        heat = self.race.heat
        self.race.receive(reply)
        self.calls_spent += reply.calls
        self.in_race.discard(number)
        return self._race_on([number] if self.race.heat == heat else None)

    def _race_on(self, numbers: Sequence[int] | None = None) -> list[Instruction]:
        """Units for those of ``numbers`` (``None``: of all workers) that have nothing in hand."""
        race = self.race
        assert race is not None  # only called once the race runs
        sent: list[Instruction] = []
        for number in self._alive() if numbers is None else numbers:
            if number not in self.roster.outstanding and number not in self.in_race:
                request = race.assign(self.members[number].name)
                if request is not None:
                    self.in_race.add(number)
                    sent.append(Send(request))
        if race.done:
            return self._finish(self.finish_reason)
        return sent or [Wait("race units are out")]

    def _finish(self, reason: str) -> list[Instruction]:
        self.finish_reason = reason
        if self.race is not None:
            self.winner = self.race.winner()
        self.phase = "finished"
        return [*(Send(Stop(self.members[number].name)) for number in self._alive()), Finish(reason)]

    def snapshot(self) -> Mapping[str, Any]:
        """Plain data by which two states can be compared: equal states have equal snapshots."""
        return snapshot(self)
