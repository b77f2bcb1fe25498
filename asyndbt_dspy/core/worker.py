"""``WorkerState``: every transition of a worker. Events in, instructions out; no I/O, no clock (``algorithm.md`` 6).

=============  =========================  ==========================================
state          event                      instructions, next state
=============  =========================  ==========================================
idle           StepRequest                Evaluate -> scoring
idle           RoundRequest               Evaluate -> scoring
idle           RaceRequest                Evaluate -> scoring (from here on no other request)
scoring        Scored (its task)          Send(reply) -> idle
any            Stop                       Wait -> stopped
=============  =========================  ==========================================

Requests come in one order: versions rise, the rounds of a version precede its steps, the units of the race rise and
follow everything else. Anything else raises ``ProtocolError`` and changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.estimators import Undescribed, cross_entropy_loss, margin_loss, soft_score
from asyndbt_dspy.core.late_arms import LateArms
from asyndbt_dspy.core.lower_level import worker_round
from asyndbt_dspy.core.messages import (
    Evaluate,
    Instruction,
    Outcome,
    RaceReply,
    RaceRequest,
    RoundReply,
    RoundRequest,
    Scored,
    Send,
    StepReply,
    StepRequest,
    Stop,
    Wait,
    WorkerEvent,
)
from asyndbt_dspy.core.policies import Batch, Policy, WorkerSpace
from asyndbt_dspy.core.posterior import make_policy
from asyndbt_dspy.core.simplex import FloatArray, Layout, exponentiated_step, project_blocks
from asyndbt_dspy.core.snapshots import snapshot
from asyndbt_dspy.core.validation import check_request, check_scored
from asyndbt_dspy.errors import ProtocolError

_ADAM_DECAY = (0.9, 0.999)
_ADAM_EPSILON = 1e-8


class Adam:
    """Adam's direction for a bracket (Kingma & Ba 2015); the caller multiplies it by the step size."""

    def __init__(self, length: int) -> None:
        self.first = np.zeros(length)
        self.second = np.zeros(length)
        self.steps = 0

    def direction(self, bracket: FloatArray) -> FloatArray:
        self.steps += 1
        keep, keep_square = _ADAM_DECAY
        self.first = keep * self.first + (1 - keep) * bracket
        self.second = keep_square * self.second + (1 - keep_square) * bracket**2
        mean = self.first / (1 - keep**self.steps)
        square = self.second / (1 - keep_square**self.steps)
        return np.asarray(mean / (np.sqrt(square) + _ADAM_EPSILON))


class WorkerState:
    """One worker: its distributions, its policy, and the task it has in hand.

    Args:
        name: Unique among workers.
        index: Its place in the server's order; with ``seed`` and the local step it keys the random numbers.
        spaces: What it may draw.
        config: Constants of the run.
        examples: Number of its estimate examples, at least 1.
        use_distributions: The loss is what ``config.loss`` says where the LM reports distributions, else ``1 - score``.
        policy: Replaces the policy that ``config`` names (a toy problem with exact gradients, say).
    """

    def __init__(
        self,
        name: str,
        index: int,
        spaces: WorkerSpace,
        config: AlgorithmConfig,
        *,
        examples: int,
        seed: int = 0,
        use_distributions: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self.name = name
        self.index = index
        self.spaces = spaces
        self.config = config
        self.seed = seed
        self.use_distributions = use_distributions
        self.policy: Policy = policy or make_policy(spaces, config, examples)
        self.shared_effects = self.policy.share().shape[1]
        self.p = spaces.lower.uniform()
        self.q = spaces.upper.uniform()
        self.arms = LateArms(spaces.space)
        self.step = 0
        self.task = 0
        self.last_order: tuple[float, ...] = (0, -1, 0, 0)
        self.stopped = False
        self._adam = (Adam(spaces.lower.length), Adam(spaces.upper.length))
        self._undescribed = Undescribed()
        self._pending: StepRequest | RoundRequest | RaceRequest | None = None
        self._batch: Batch | None = None

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index, step])

    @property
    def pending(self) -> StepRequest | RoundRequest | RaceRequest | None:
        """The request in hand, ``None`` when idle."""
        return self._pending

    def receive(self, event: WorkerEvent) -> list[Instruction]:
        """Take one event; return what the engine must do next.

        Raises:
            ProtocolError: the event does not fit the state. Nothing changed.
        """
        if not isinstance(event, (StepRequest, RoundRequest, RaceRequest, Scored, Stop)):
            raise ProtocolError(
                f"worker {self.name!r} takes no {type(event).__name__}; it may be meant for the server"
            )
        if event.worker != self.name:
            raise ProtocolError(f"worker {self.name!r} got an event addressed to {event.worker!r}")
        if isinstance(event, Stop):
            self.stopped = True
            return [Wait("stopped by the server")]
        if self.stopped:
            raise ProtocolError(f"worker {self.name!r} is stopped and got {type(event).__name__}")
        if isinstance(event, Scored):
            return self._scored(event)
        if self._pending is not None:
            held = type(self._pending).__name__
            raise ProtocolError(
                f"worker {self.name!r} has a {held} in hand and got another {type(event).__name__}"
            )
        return self._begin(event)

    def _begin(self, request: StepRequest | RoundRequest | RaceRequest) -> list[Instruction]:
        check_request(self, request)
        self.last_order = self.order_of(request)
        self._pending = request
        if isinstance(request, RaceRequest):
            rows = tuple(request.examples for _ in request.candidates)
            return [self._evaluate(request.candidates, rows, held_out=True)]
        self.step += 1
        p = self.p
        if isinstance(request, RoundRequest):
            p = request.start
        else:
            self.policy.merge(request.effects)
            if request.open and request.open != self.arms.open:
                before = self.arms.open
                self.arms.join(request.open)
                p = self.p = self.arms.admit(self.p, before)
        p = self.arms.read(p)
        size = getattr(request, "minibatch", 0) or self.config.minibatch
        self._batch = self.policy.draw(p, self.q, self._rng(self.step), size)
        return [self._evaluate(self._batch.candidates, self._batch.examples, held_out=False)]

    def order_of(self, request: StepRequest | RoundRequest | RaceRequest) -> tuple[float, ...]:
        """Rises from request to request: (race?, version or unit, round; infinite for a step, repeat)."""
        if isinstance(request, RaceRequest):
            return (1, request.unit, 0, 0)
        if isinstance(request, RoundRequest):
            return (0, request.version, request.number, 0)
        return (0, request.version, math.inf, request.repeat)

    def _evaluate(
        self, candidates: tuple[Any, ...], examples: tuple[tuple[int, ...], ...], held_out: bool
    ) -> Evaluate:
        self.task += 1
        return Evaluate(self.name, self.task, candidates, examples, held_out)

    def _scored(self, event: Scored) -> list[Instruction]:
        request = self._pending
        if request is None or event.task != self.task:
            expected = self.task if request else None
            raise ProtocolError(f"worker {self.name!r} waits for task {expected}, got {event.task}")
        if isinstance(request, RaceRequest):
            check_scored(self.name, [request.examples] * len(request.candidates), event)
            self._pending = None
            return [Send(self._race_reply(request, event))]
        batch = self._batch
        assert batch is not None  # set together with _pending
        check_scored(self.name, batch.examples, event)
        self._pending = self._batch = None
        if isinstance(request, RoundRequest):
            return [Send(self._round_reply(request, batch, event))]
        return [Send(self._step_reply(request, batch, event))]

    def _losses(self, event: Scored) -> list[FloatArray]:
        rows = [[(self._score(one), self._soft_loss(one)) for one in row] for row in event.outcomes]
        for row in rows:
            for score, soft in row:
                self._undescribed.note(score, soft)
        return [np.array([self._undescribed.loss(score, soft) for score, soft in row]) for row in rows]

    def _score(self, outcome: Outcome) -> float | None:
        return 0.0 if _failed(outcome) and self.config.missing_is_zero else outcome.score

    def _soft_loss(self, outcome: Outcome) -> float | None:
        """The loss by the LM's distribution, ``None`` where there is none."""
        if not self.use_distributions or outcome.score is None:
            return None
        if self.config.loss == "margin" and outcome.margin is not None:
            return margin_loss(outcome.margin, outcome.score)
        return cross_entropy_loss(outcome.cross_entropy)

    def _step_reply(self, request: StepRequest, batch: Batch, event: Scored) -> StepReply:
        config = self.config
        losses = self._losses(event)
        estimate = self.policy.update(self.arms.read(self.p), self.q, batch, losses)
        shrink = (1.0 + request.staleness) ** -0.5 if config.stale_step else 1.0
        pull = request.duals + request.plane_push + config.penalty * np.sign(self.p - request.consensus)
        p = self._moved(self.spaces.lower, self.p, estimate.lower + pull, config.lower_step * shrink, level=0)
        upper = estimate.upper + request.plane_push_upper
        q = self._moved(self.spaces.upper, self.q, upper, config.upper_step * shrink, level=1)
        surrogate = estimate.surrogate.moved(p, q - self.q)
        self.p, self.q = p, q
        answered = np.concatenate([row[np.isfinite(row)] for row in losses] or [np.zeros(0)])
        shared = self.spaces.space.is_shared
        return StepReply(
            worker=self.name,
            version=request.version,
            lower=self.p,
            upper=self.q if config.hypergradient else None,
            gradient=surrogate.gradient,
            curvature=surrogate.curvature,
            cross=surrogate.cross if config.hypergradient else None,
            effects=self.policy.share(),
            nominations=tuple(
                one for one in self.policy.nominate(self.arms.read(p), q) if shared(one.candidate)
            ),
            calls=event.calls,
            missing=sum(_failed(one) for row in event.outcomes for one in row),
            loss=float(answered.mean()) if answered.size else float("nan"),
            repeat=request.repeat,
        )

    def _moved(
        self, layout: Layout, vector: FloatArray, bracket: FloatArray, step_size: float, level: int
    ) -> FloatArray:
        if self.config.adam:
            bracket = self._adam[level].direction(bracket)
        if self.config.geometry == "exponentiated":
            return exponentiated_step(layout, vector, bracket, step_size, self.config.floor)
        return project_blocks(layout, vector - step_size * bracket)

    def _round_reply(self, request: RoundRequest, batch: Batch, event: Scored) -> RoundReply:
        estimate = self.policy.update(self.arms.read(request.start), self.q, batch, self._losses(event))
        gradient = estimate.surrogate.at(request.start)
        columns = (one[:, None] for one in (request.start, request.consensus, request.rho, gradient))
        p = worker_round(self.spaces.lower, self.config, *columns)[:, 0]
        return RoundReply(self.name, request.version, request.number, p, event.calls)

    def _race_reply(self, request: RaceRequest, event: Scored) -> RaceReply:
        scores = tuple(tuple(self._score(one) for one in row) for row in event.outcomes)
        soft = tuple(tuple(self._soft_score(one) for one in row) for row in event.outcomes)
        return RaceReply(self.name, request.unit, scores, soft, event.calls)

    def _soft_score(self, outcome: Outcome) -> float | None:
        """What the LM's distribution says of an answer in the race, in [0, 1]."""
        if self.config.loss == "margin" and outcome.margin is not None and outcome.score is not None:
            return soft_score(outcome.margin)
        return None if outcome.cross_entropy is None else float(np.exp(-outcome.cross_entropy))

    def snapshot(self) -> dict[str, Any]:
        """Plain data by which two states can be compared: equal states have equal snapshots."""
        return snapshot(self)


def _failed(outcome: Outcome) -> bool:
    return outcome.score is None and not outcome.skipped
