"""How well a run used its workers, read off its recorded events: the same for every engine."""

from __future__ import annotations

from asyndbt_dspy.core.messages import (
    RaceReply,
    RaceRequest,
    RoundReply,
    RoundRequest,
    Scored,
    StepReply,
    StepRequest,
    WorkerLost,
)
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.protocols import SERVER, Recorded


class RunMeter:
    """An observer that holds a few numbers, however long the run.

    Attributes:
        contributions: Answers that the server took: steps, rounds and race units.
        busy_s: Worker -> seconds from a request to its result.
        steps: Steps that came back during the search.
        largest_staleness: Of those, in updates of z.
        search_end_s: Time at which the race began, or the run ended.
        end_s: Time of the newest event.
    """

    def __init__(self, server: ServerState) -> None:
        self.server = server
        self.contributions = 0
        self.busy_s = dict.fromkeys((member.name for member in server.members), 0.0)
        self.steps = 0
        self.largest_staleness = 0
        self.search_end_s = 0.0
        self.end_s = 0.0
        self._version = server.version
        self._was_search = True
        self._staleness_sum = 0
        self._begun_s: dict[str, float] = {}
        self._left_s: dict[str, float] = {}  # worker -> when it was set aside

    def __call__(self, recorded: Recorded) -> None:
        event = recorded.event
        self.end_s = max(self.end_s, recorded.time_s)
        if isinstance(event, StepRequest | RoundRequest | RaceRequest):
            self._begun_s[event.worker] = recorded.time_s
        elif isinstance(event, Scored):
            self._end_work(event.worker, recorded.time_s)
        elif isinstance(event, WorkerLost):
            self._end_work(event.worker, recorded.time_s)
            self._left_s[event.worker] = recorded.time_s
        elif isinstance(event, StepReply | RoundReply | RaceReply):
            self.contributions += 1
            if isinstance(event, StepReply) and self._was_search:
                self._note_lateness(self._version - event.version)
        if recorded.machine == SERVER:
            self._version = self.server.version
            if self._was_search:  # the event that opens the race is the last of the search
                self.search_end_s = recorded.time_s
            self._was_search = self.server.race is None

    def _end_work(self, worker: str, time_s: float) -> None:
        self.busy_s[worker] += time_s - self._begun_s.pop(worker, time_s)

    def _note_lateness(self, late: int) -> None:
        self.steps += 1
        self._staleness_sum += late
        self.largest_staleness = max(self.largest_staleness, late)

    @property
    def mean_staleness(self) -> float:
        return self._staleness_sum / self.steps if self.steps else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the live workers' time spent evaluating, in [0, 1]; 0 for a run without time."""
        there = sum(self._left_s.get(worker, self.end_s) for worker in self.busy_s)
        cut_short = sum(self.end_s - begun for begun in self._begun_s.values())
        return (sum(self.busy_s.values()) + cut_short) / there if there else 0.0
