"""Frozen, versioned messages between server and workers, events, instructions, and their dict codec.

Directions::

    server -> worker   StepRequest, RoundRequest, RaceRequest, Stop
    worker -> server   StepReply, RoundReply, RaceReply
    engine -> server   WorkerLost, StopSearch, ArmsJoined  (events of the outside world)
    engine -> worker   Scored                              (what an Evaluate instruction came to)
    machine -> engine  Send, Wait, Finish, Evaluate        (instructions; never ``None``)

Arrays are float64 and read-only by convention. ``encode``/``decode`` round-trip every message exactly through JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Candidate
from asyndbt_dspy.errors import ProtocolError

FORMAT = 6
"""Version of the codec. A decoder reads its own and older formats; what an older one can say is still said in it."""


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Do one step of the main loop with these variables.

    Attributes:
        worker: Name of the addressee.
        version: Updates of z so far.
        consensus: z, shape ``[D]``.
        duals: theta[v], shape ``[D]``.
        plane_push: ``sum_l lambda_l a_l[v]``, shape ``[D]``.
        plane_push_upper: ``sum_l lambda_l d_l[v]``, shape ``[Q_v]``.
        effects: What the other workers learned, shape ``[2, shared]`` (``[2, 0]`` if nothing is exchanged).
        staleness: Updates of z by which this worker's previous message was late.
        repeat: 0 for the first step from this version's z, then 1, 2, ….
        minibatch: Examples per draw; 0 for as many as ``AlgorithmConfig`` says.
        open: Per lower-level block how many arms have joined; empty: as at the start.
    """

    worker: str
    version: int
    consensus: FloatArray
    duals: FloatArray
    plane_push: FloatArray
    plane_push_upper: FloatArray
    effects: FloatArray
    staleness: int = 0
    repeat: int = field(default=0, metadata={"since": 2})
    minibatch: int = field(default=0, metadata={"since": 3})
    open: tuple[int, ...] = field(default=(), metadata={"since": 4})


@dataclass(frozen=True, slots=True)
class StepReply:
    """One step's result.

    Attributes:
        version, repeat: Those of the request it answers.
        lower: p[v], shape ``[D]``.
        upper: q[v], shape ``[Q_v]`` where planes carry the q-part, else ``None``: q stays with its worker.
        gradient: Lower-level estimate for the server's rounds, shape ``[D]``.
        curvature: Shape ``[D, D]`` or ``None``.
        cross: Shape ``[D, Q_v]`` or ``None``.
        effects: This worker's factor over shared arms, shape ``[2, shared]``.
        nominations: Candidates proposed for the race. Only shared arms.
        calls: Rollouts paid for in this step.
        missing: Rollouts that failed for reasons outside the program; skipped ones did not.
        loss: Mean loss of the step's rollouts, NaN if all are missing.
    """

    worker: str
    version: int
    lower: FloatArray
    upper: FloatArray | None
    gradient: FloatArray
    curvature: FloatArray | None
    cross: FloatArray | None
    effects: FloatArray
    nominations: tuple[Nomination, ...]
    calls: int
    missing: int
    loss: float
    repeat: int = field(default=0, metadata={"since": 2})


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """One communication round of the lower-level estimate (barrier form): ``z`` and ``rho[v]``, shapes ``[D]``."""

    worker: str
    version: int
    number: int
    start: FloatArray
    consensus: FloatArray
    rho: FloatArray


@dataclass(frozen=True, slots=True)
class RoundReply:
    """The worker's p after round ``number``, shape ``[D]``."""

    worker: str
    version: int
    number: int
    lower: FloatArray
    calls: int


@dataclass(frozen=True, slots=True)
class RaceRequest:
    """Score ``candidates`` on the worker's held-out examples numbered ``examples``."""

    worker: str
    unit: int
    candidates: tuple[Candidate, ...]
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RaceReply:
    """Held-out results.

    Attributes:
        scores: Per candidate and example; ``None`` where missing.
        soft_scores: How far the LM's distribution is from or beyond the right answer, in [0, 1] (``estimators.soft_score``),
            where it reports one, else ``None``; same shape.
    """

    worker: str
    unit: int
    scores: tuple[tuple[float | None, ...], ...]
    soft_scores: tuple[tuple[float | None, ...], ...]
    calls: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing more to do for this worker."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The engine set a worker aside: no answer in time, or an LM that fails again and again."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopSearch:
    """The outside world ends the search (deadline, interrupt, spent dollars): go on to the race.

    Attributes:
        race: False ends the run at once, with the best candidate so far.
        calls: Rollouts that the race can pay for or has time for, at most; ``None``: nobody knows.
        is_dry: No call of the search is paid for any more: steps under way answer with what they have, and are waited for
            unless they are slow. Else nothing is waited for.
    """

    reason: str
    race: bool = True
    calls: int | None = field(default=None, metadata={"since": 6})
    is_dry: bool = field(default=False, metadata={"since": 6})


@dataclass(frozen=True, slots=True)
class ArmsJoined:
    """Arms that were kept for later may be drawn from now on (``late_arms``).

    Attributes:
        open: Per lower-level block how many arms, counted from arm 0, have joined by now.
    """

    open: tuple[int, ...] = field(metadata={"since": 4})


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rollout's result as the algorithm sees it; ``score`` is ``None`` where it is missing.

    Attributes:
        score: The metric.
        cross_entropy: ``-ln P(right answer)`` in nats where the LM reported a distribution.
        margin: ``ln P(right answer) - ln P(best other answer)`` in nats, likewise; above 0 where the answer is right.
        skipped: It was not made, because it would tell nothing (the candidate shows the example): nothing failed.
    """

    score: float | None
    cross_entropy: float | None = None
    margin: float | None = None
    skipped: bool = field(default=False, metadata={"since": 5})


@dataclass(frozen=True, slots=True)
class Scored:
    """What ``Evaluate`` number ``task`` came to.

    Attributes:
        outcomes: Per candidate, per example.
        calls: Rollouts paid for (cached ones are free).
    """

    worker: str
    task: int
    outcomes: tuple[tuple[Outcome, ...], ...]
    calls: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Instruction of a worker: score ``candidates[i]`` on examples ``examples[i]``.

    Attributes:
        held_out: Whether the numbers are of the race examples instead of the estimate examples.
    """

    worker: str
    task: int
    candidates: tuple[Candidate, ...]
    examples: tuple[tuple[int, ...], ...]
    held_out: bool


@dataclass(frozen=True, slots=True)
class Send:
    """Instruction: carry ``message`` to the other side."""

    message: ToWorker | ToServer


@dataclass(frozen=True, slots=True)
class Wait:
    """Instruction: nothing to do until the next event. ``reason`` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Instruction: the run is over. ``reason`` says which stopping rule held."""

    reason: str


ToWorker = StepRequest | RoundRequest | RaceRequest | Stop
ToServer = StepReply | RoundReply | RaceReply
ServerEvent = StepReply | RoundReply | RaceReply | WorkerLost | StopSearch | ArmsJoined
WorkerEvent = StepRequest | RoundRequest | RaceRequest | Stop | Scored
Instruction = Send | Wait | Finish | Evaluate

_CODEC = {
    kind.__name__: kind
    for kind in (
        StepRequest,
        StepReply,
        RoundRequest,
        RoundReply,
        RaceRequest,
        RaceReply,
        Stop,
        WorkerLost,
        StopSearch,
        ArmsJoined,
        Outcome,
        Scored,
        Evaluate,
        Nomination,
    )
}


def encode(message: Any) -> Any:
    """Plain strict JSON data: ``{"format": …, "type": …, …}``.

    Dataclasses become ``{"type": …, …}``, arrays ``{"array": …, "shape": …}``, tuples lists, and numbers that are not
    finite ``{"float": "nan"}``. A field that came with a later format is left out while it holds its default.
    """
    return {"format": _format(message), **_encode(message)}


def _format(value: Any) -> int:
    """The oldest format that can say all of ``value``."""
    if isinstance(value, tuple):
        return max(map(_format, value), default=1)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return 1
    found = 1
    for name, since, default in _fields(type(value)):
        said = getattr(value, name)
        if since == 1 or said != default:
            found = max(found, since)
            found = max(found, _format(said))
    return found


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, int, Any], ...]:
    """Per field of a message its name, the format that it came with, and its default."""
    return tuple(
        (one.name, int(one.metadata.get("since", 1)), one.default) for one in dataclasses.fields(kind)
    )


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        written = {"type": type(value).__name__}
        for name, since, default in _fields(type(value)):
            said = getattr(value, name)
            if since == 1 or said != default:
                written[name] = _encode(said)
        return written
    if isinstance(value, np.ndarray):
        return {"array": [_encode(item) for item in value.ravel().tolist()], "shape": list(value.shape)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decode(state: Any) -> Any:
    """Inverse of ``encode``; reads this format and older ones.

    Raises:
        ProtocolError: no message, a newer format, an unknown type, or a field that does not belong to it.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("format"), int):
        raise ProtocolError(f"no encoded message: {str(state)[:80]!r} has no format number")
    if not 1 <= state["format"] <= FORMAT:
        raise ProtocolError(
            f"format {state['format']} is not known here (1..{FORMAT}); update asyndbt-dspy to read it"
        )
    try:
        return _decode({name: value for name, value in state.items() if name != "format"})
    except (TypeError, ValueError, KeyError) as error:
        raise ProtocolError(
            f"message {state.get('type')!r} does not fit format {state['format']}: {error}"
        ) from error


def _decode(state: Any) -> Any:
    if isinstance(state, list):
        return tuple(_decode(item) for item in state)
    if not isinstance(state, Mapping):
        return state
    if "float" in state:
        return float(state["float"])
    if "array" in state:
        return np.array([_decode(item) for item in state["array"]], dtype=np.float64).reshape(state["shape"])
    kind = _CODEC.get(str(state.get("type")))
    if kind is None:
        raise ProtocolError(f"unknown message type {state.get('type')!r}; known: {sorted(_CODEC)}")
    return kind(**{name: _decode(value) for name, value in state.items() if name != "type"})
