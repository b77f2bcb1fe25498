"""What server and workers accept: everything is checked before anything is stored.

All functions raise ``ProtocolError`` that names the field, what it holds and what it should, and change nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.messages import (
    Outcome,
    RaceReply,
    RaceRequest,
    RoundReply,
    RoundRequest,
    Scored,
    StepReply,
    StepRequest,
)
from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.core.space import Space
from asyndbt_dspy.errors import ConfigurationError, ProtocolError

_FLOAT = np.dtype(np.float64)
_NUMBER = (int, float)

if TYPE_CHECKING:
    from asyndbt_dspy.core.server import ServerState
    from asyndbt_dspy.core.worker import WorkerState


def check_config(names: Sequence[str], config: AlgorithmConfig, calls: int | None = None) -> None:
    """Refuse settings that cannot work with these workers (``ConfigurationError``)."""
    if not names:
        raise ConfigurationError("0 workers; give at least one")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigurationError(f"worker names must be unique; used twice: {twice}; rename one of each")
    if config.active_workers > len(names):
        raise ConfigurationError(
            f"active_workers={config.active_workers} exceeds the {len(names)} workers; set at most {len(names)}"
        )
    if config.aggregator == "trimmed_mean" and 2 * config.trim >= len(names):
        raise ConfigurationError(
            f"trim={config.trim} cuts {2 * config.trim} of {len(names)} workers; set trim below {len(names) / 2:g}"
        )
    if calls is not None and calls < 0:
        raise ConfigurationError(f"calls={calls} must be >= 0; set the budget to at least one step")


# ------------------------------------------------------------------------------------------------ at the server


def check_step_reply(server: ServerState, number: int, reply: StepReply, calls: int) -> None:
    """Refuse a step that answers no request or another one, is too late, or holds anything that is no point of its space.

    Args:
        calls: Rollouts that the step may have cost.
    """
    sent, repeat = server.roster.outstanding.get(number), server.roster.repeats.get(number, 0)
    if sent is None:
        raise ProtocolError(f"{_sender(reply)} owes no step and sent one of {reply.version}")
    if reply.version != sent:
        raise ProtocolError(f"{_sender(reply)} was sent version {sent} and answers version {reply.version}")
    if reply.repeat != repeat:
        raise ProtocolError(
            f"{_sender(reply)} was sent step {repeat} of version {sent} and answers step {reply.repeat}"
        )
    late, limit = server.version - reply.version, server.synchrony.staleness - 1
    if late > limit and server.phase != "race":
        raise ProtocolError(f"{_sender(reply)} is {late} updates late; the bound is {limit}")
    _check_distribution(reply, "p", server.layout, reply.lower)
    _check_upper(server, number, reply)
    length = server.layout.length
    _check_array(reply, "gradient", reply.gradient, (length,))
    if reply.curvature is not None:
        _check_array(reply, "curvature", reply.curvature, (length, length))
    _check_effects(reply, reply.effects, server.effects.columns)
    _check_count(reply, "calls", reply.calls, calls)
    _check_count(reply, "missing", reply.missing, calls)
    if not isinstance(reply.loss, float):
        raise ProtocolError(f"{_sender(reply)} sent loss {reply.loss!r}; it must be a number")
    _check_nominations(reply, server.space, reply.nominations)


def _check_nominations(origin: object, space: Space, nominations: tuple[Nomination, ...]) -> None:
    if not isinstance(nominations, tuple):
        raise ProtocolError(
            f"{_sender(origin)} sent nominations of type {type(nominations).__name__}; it must be a tuple"
        )
    for one in nominations:
        if not isinstance(one, Nomination) or not isinstance(one.candidate, tuple):
            raise ProtocolError(f"{_sender(origin)} nominated {one!r}, which is no candidate")
        _check_candidate(origin, space, one.candidate)
        if not (_is_finite(one.value) and _is_finite(one.deviation) and space.is_shared(one.candidate)):
            raise ProtocolError(
                f"{_sender(origin)} nominated {one}: private arms or values that are not finite"
            )


def _check_upper(server: ServerState, number: int, reply: StepReply) -> None:
    if not server.config.hypergradient:
        if reply.upper is not None or reply.cross is not None:
            raise ProtocolError(f"{_sender(reply)} sent its q, which stays with its worker here")
        return
    layout = server.q_layouts[number]
    _check_distribution(reply, "q", layout, reply.upper)
    if reply.cross is not None:
        _check_array(reply, "cross", reply.cross, (server.layout.length, layout.length))


def check_round_reply(server: ServerState, number: int, expected: int, reply: RoundReply) -> None:
    """Refuse a round's result of another round or version, or a p that is no distribution."""
    if (reply.version, reply.number) != (server.version, expected):
        raise ProtocolError(
            f"{_sender(reply)} answers round {reply.number} of version {reply.version}; "
            f"round {expected} of version {server.version} is open"
        )
    _check_distribution(reply, "p", server.layout, reply.lower)
    _check_count(reply, "calls", reply.calls, server.step_calls(number))


def check_race_reply(request: RaceRequest, reply: RaceReply) -> None:
    """Refuse rows that do not fit the unit, scores that are no finite numbers, or costs that cannot be."""
    lengths = [len(request.examples)] * len(request.candidates)
    for name, rows in (("scores", reply.scores), ("soft_scores", reply.soft_scores)):
        if not isinstance(rows, tuple) or [_length(row) for row in rows] != lengths:
            raise ProtocolError(
                f"{_sender(reply)}: race unit {reply.unit} needs {name} in rows of lengths {lengths}"
            )
        if not all(value is None or _is_finite(value) for row in rows for value in row):
            raise ProtocolError(
                f"{_sender(reply)}: race unit {reply.unit} holds {name} that are no finite numbers"
            )
    if not all(value is None or 0.0 <= value <= 1.0 for row in reply.soft_scores for value in row):
        raise ProtocolError(f"{_sender(reply)}: race unit {reply.unit} holds a soft score outside of [0, 1]")
    _check_count(reply, "calls", reply.calls, sum(lengths))


# ------------------------------------------------------------------------------------------------ at a worker


def check_request(worker: WorkerState, request: StepRequest | RoundRequest | RaceRequest) -> None:
    """Refuse a request that is older than the last one, or holds anything of another shape or no finite numbers."""
    if isinstance(request, RaceRequest):
        _check_race_request(worker, request)
    else:
        _check_variables(worker, request)
    if worker.order_of(request) <= worker.last_order:
        raise ProtocolError(
            f"{_sender(request)} is a repetition or late: {worker.order_of(request)} after {worker.last_order}"
        )


def _check_variables(worker: WorkerState, request: StepRequest | RoundRequest) -> None:
    lower, upper = worker.spaces.lower, worker.spaces.upper
    _check_count(request, "version", request.version)
    _check_distribution(request, "consensus", lower, request.consensus)
    if isinstance(request, RoundRequest):
        _check_count(request, "number", request.number)
        _check_distribution(request, "start", lower, request.start)
        _check_array(request, "rho", request.rho, (lower.length,))
        return
    _check_count(request, "staleness", request.staleness)
    _check_count(request, "repeat", request.repeat)
    _check_count(request, "minibatch", request.minibatch, worker.config.minibatch)
    if request.open != ():
        worker.arms.check(_sender(request), request.open)
    _check_array(request, "duals", request.duals, (lower.length,))
    _check_array(request, "plane_push", request.plane_push, (lower.length,))
    _check_array(request, "plane_push_upper", request.plane_push_upper, (upper.length,))
    _check_effects(request, request.effects, worker.shared_effects)


def _check_race_request(worker: WorkerState, request: RaceRequest) -> None:
    _check_count(request, "unit", request.unit)
    if not isinstance(request.candidates, tuple) or not isinstance(request.examples, tuple):
        raise ProtocolError(f"{_sender(request)} needs tuples of candidates and of examples")
    for candidate in request.candidates:
        _check_candidate(request, worker.spaces.space, candidate)
    for example in request.examples:
        _check_count(request, "example", example)


def check_scored(worker: str, rows: Sequence[Sequence[int]], event: Scored) -> None:
    """Refuse outcomes that do not fit the rollouts asked for, or that are neither finite numbers nor missing."""
    sender = f"task {event.task} of worker {worker!r}"
    lengths = [len(row) for row in rows]
    if not isinstance(event.outcomes, tuple) or [_length(row) for row in event.outcomes] != lengths:
        raise ProtocolError(f"{sender} needs outcomes in rows of lengths {lengths}")
    for one in (outcome for row in event.outcomes for outcome in row):
        if not isinstance(one, Outcome) or not (one.score is None or _is_finite(one.score)):
            raise ProtocolError(
                f"{sender} holds {one!r}; a score is a finite number, or None where it is missing"
            )
        if one.skipped is not False and not (one.skipped is True and one.score is None):
            raise ProtocolError(
                f"{sender} holds skipped={one.skipped!r}; only what has no score can be skipped"
            )
        if one.cross_entropy is not None and not (_is_finite(one.cross_entropy) and one.cross_entropy >= 0):
            raise ProtocolError(
                f"{sender} holds cross-entropy {one.cross_entropy!r}; it must be finite and >= 0"
            )
        if one.margin is not None and not _is_finite(one.margin):
            raise ProtocolError(f"{sender} holds margin {one.margin!r}; it must be finite")
    _check_count(sender, "calls", event.calls, sum(lengths))


# ------------------------------------------------------------------------------------------------ parts


def _sender(origin: object) -> str:
    """Where a value came from, for the text of an error: put together only where there is one."""
    if isinstance(origin, str):
        return origin
    worker = getattr(origin, "worker", "?")
    if isinstance(origin, StepRequest | RoundRequest | RaceRequest):
        return f"the {type(origin).__name__} to worker {worker!r}"
    return f"worker {worker!r}"


def _check_candidate(origin: object, space: Space, candidate: Any) -> None:
    try:
        space.check(candidate)
    except (ConfigurationError, TypeError) as error:
        raise ProtocolError(f"{_sender(origin)} names a candidate that does not exist: {error}") from error


def _check_distribution(origin: object, name: str, layout: Layout, values: Any) -> None:
    if not _is_float_array(values) or not layout.is_distribution(values):
        raise ProtocolError(
            f"{_sender(origin)} holds a {name} that is no point of its simplexes: {_short(values)}"
        )


def _check_array(origin: object, name: str, values: Any, shape: tuple[int, ...]) -> None:
    if not _is_float_array(values) or values.shape != shape:
        raise ProtocolError(
            f"{_sender(origin)} holds {name} = {_short(values)}; it must be float64 of shape {shape}"
        )
    flat = values if values.ndim == 1 else values.ravel()
    # The sum of squares is finite wherever all values are, unless it overflows; it costs a fraction of asking each.
    if not math.isfinite(flat.dot(flat)) and not np.isfinite(values).all():
        raise ProtocolError(f"{_sender(origin)} holds {name} with values that are not finite")


def _is_float_array(values: Any) -> bool:
    if type(values) is np.ndarray and values.dtype is _FLOAT:
        return True
    return isinstance(values, np.ndarray) and values.dtype == _FLOAT


def _check_effects(origin: object, values: Any, columns: int) -> None:
    _check_array(origin, "effects", values, (2, columns))
    if columns and values[0, values[0].argmin()] < 0:
        raise ProtocolError(
            f"{_sender(origin)} holds effects with a negative precision {float(values[0].min())}"
        )


def _check_count(origin: object, name: str, value: Any, limit: int | None = None) -> None:
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise ProtocolError(
            f"{_sender(origin)} holds {name}={value!r}; it must be 0..{'' if limit is None else limit}"
        )


def _is_finite(value: Any) -> bool:
    if type(value) is float:  # most numbers
        return math.isfinite(value)
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def _length(row: Any) -> int:
    return len(row) if isinstance(row, tuple) else -1


def _short(values: Any) -> str:
    if not isinstance(values, np.ndarray):
        return repr(values)
    return np.array2string(values.ravel()[:8], precision=4) + (
        f" … {values.shape}" if values.size > 8 else ""
    )
