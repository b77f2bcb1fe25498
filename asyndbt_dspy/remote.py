"""Rollouts elsewhere: what travels is JSON, and each side builds what it needs.

``RolloutHost`` is a worker's side: program, metric, LM and shard. ``RemoteRunner`` stands in for ``RolloutRunner`` on the
compiling side, and ``RemoteLM`` for an LM that is only loaded there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.deploy.fingerprints import signature_record
from asyndbt_dspy.engines.protocols import RemoteRollouts
from asyndbt_dspy.errors import ConfigurationError, MetricError, WorkerFailedError
from asyndbt_dspy.lms.callers import calling_as, current_caller
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.lms.identity import is_deterministic, lm_identity
from asyndbt_dspy.programs.copies import copy_program
from asyndbt_dspy.programs.metrics import Metric
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner
from asyndbt_dspy.programs.usage import tracking_usage, usage_of
from asyndbt_dspy.recording.identities import code_identity, example_digest, structure_identity, versions
from asyndbt_dspy.recording.rollout_codec import (
    UnrecordableError,
    decode_rollout,
    decode_trace,
    encode_rollout,
    is_json,
)
from asyndbt_dspy.workers import Worker

logger = logging.getLogger(__name__)

_REMEMBERED = 10_000
"""Answers that a host keeps, for a server that was killed before it heard of them."""
_PROGRAMS = 64


class RolloutHost:
    """A worker's program, metric, LM and shard, where its rollouts are made.

    Args:
        program: Like the one that is compiled: the same predictors, with the same signatures.
        metric: Like that of the compile.
        lm: For predictors without an LM of their own.
        examples: The shard, held-out examples included. An example that is not among them travels with the request.
        adapter: DSPy's prompt format.
    """

    def __init__(
        self,
        program: dspy.Module,
        metric: Metric,
        *,
        lm: Any,
        examples: Sequence[dspy.Example] = (),
        adapter: Any = None,
    ) -> None:
        self.program = program
        self.metric = metric
        self.lm = lm
        self.adapter = adapter
        self._examples = {example_digest(one): one for one in examples}
        self._runners: dict[float, RolloutRunner] = {}
        self._programs: OrderedDict[str, dspy.Module] = OrderedDict()
        self._answers: OrderedDict[str, asyncio.Future[str]] = OrderedDict()
        self._waiting: Counter[str] = Counter()

    async def describe(self, payload: str) -> str:
        """What the compiling side must know before the first rollout."""
        holders = (self.lm, getattr(self.lm, "engine", None))
        lengths = [getattr(one, "context_tokens", None) for one in holders]
        return json.dumps(
            {
                "lm": lm_identity(self.lm),
                "deterministic": is_deterministic(self.lm),
                "context_tokens": next((one for one in lengths if isinstance(one, int)), None),
                "examples": len(self._examples),
                "structure": _structure(self.program),
                "metric": code_identity(self.metric)[1:],
                "adapter": _adapter_name(self.adapter),
                "versions": versions(),
            }
        )

    async def rollout(self, payload: str) -> str:
        """One rollout. A key that was answered before is answered alike; one under way is waited for."""
        request = json.loads(payload)
        key = request["key"]
        answer = self._answers.get(key)
        if answer is None:
            if request["example"] not in self._examples and "content" not in request:
                return json.dumps({"unknown_example": True})
            limited = asyncio.wait_for(self._made(request), request["timeout_s"])
            answer = self._answers[key] = asyncio.ensure_future(limited)
            if len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
        self._waiting[key] += 1
        try:
            found = await asyncio.shield(answer)
        except asyncio.TimeoutError:
            found = json.dumps({"late": True})
        except asyncio.CancelledError:
            if self._waiting[key] == 1:  # nobody wants it any more; what hangs must not answer the next one
                answer.cancel()
                self._forget(key, answer)
            raise
        except Exception:
            self._forget(key, answer)
            raise
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
        if json.loads(found).get("score") is None:  # a failure is no answer: the next time it is tried again
            self._forget(key, answer)
        return found

    def _forget(self, key: str, answer: asyncio.Future[str]) -> None:
        if self._answers.get(key) is answer:
            del self._answers[key]

    async def _made(self, request: Mapping[str, Any]) -> str:
        program = self._build(request["program"])
        example = self._examples.get(request["example"]) or _example_of(request["content"])
        failure_score = request["failure_score"]
        runner = self._runners.setdefault(
            failure_score, RolloutRunner(self.metric, failure_score=failure_score)
        )
        with calling_as(request["worker"]), tracking_usage() as tracker:
            try:
                found = await runner.run(
                    program, example, lm=self.lm, adapter=self.adapter, trace=request["trace"]
                )
            except MetricError as error:
                return json.dumps({"metric_error": str(error)})
        return json.dumps({**_encoded(found, program), "usage": list(usage_of(tracker))})

    def _build(self, state: str) -> dspy.Module:
        """The program with the instructions and demos of a candidate."""
        name = hashlib.sha256(state.encode()).hexdigest()
        program = self._programs.get(name)
        if program is None:
            program = self._programs[name] = copy_program(self.program)
            _load(program, json.loads(state))
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(name)
        return program


class RemoteLM(dspy.BaseLM):  # type: ignore[misc]
    """Stands for an LM that is loaded elsewhere: its identity without its weights."""

    def __init__(self, worker: str, described: Mapping[str, Any]) -> None:
        identity = described["lm"]
        model = identity.get("model", "") if isinstance(identity, Mapping) else ""
        super().__init__(model=model or "remote", cache=False)
        self.worker = worker
        self.remote_identity = identity
        self.is_deterministic = bool(described["deterministic"])
        self.context_tokens = described["context_tokens"]

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ConfigurationError(
            f"the LM of worker {self.worker!r} is on its node and only answers rollouts; give a proposer an LM of its own"
        )

    async def aforward(self, *_: Any, **__: Any) -> Any:
        return self.forward()


class RemoteRunner:
    """Takes the place of ``RolloutRunner``: makes rollouts where their worker is.

    Args:
        channel: The started engine.
        repeatable: Workers of which one answer may stand for another, also after a restart.
        run_id: Of the run in all its processes: what a process never heard of, the next one is told.
        timeout_s: Of one rollout, counted where it is made: the time in which a lost worker comes back is not in it.
    """

    def __init__(
        self,
        channel: RemoteRollouts,
        *,
        failure_score: float,
        repeatable: frozenset[str],
        run_id: str = "",
        timeout_s: float = 120.0,
    ) -> None:
        self.failure_score = failure_score
        self.timeout_s = timeout_s
        self._channel = channel
        self._repeatable = repeatable
        self._run_id = run_id or uuid.uuid4().hex
        self._times: Counter[str] = Counter()
        self._states: weakref.WeakKeyDictionary[dspy.Module, str] = weakref.WeakKeyDictionary()

    async def run(
        self,
        program: dspy.Module,
        example: dspy.Example,
        *,
        lm: Any = None,
        adapter: Any = None,
        trace: bool = False,
    ) -> Rollout:
        """See ``RolloutRunner.run``; LM and adapter are the worker's own."""
        worker = current_caller()
        request = self._request(worker, program, example, trace)
        request["key"] = self._next_key(worker, request)
        request["timeout_s"] = self.timeout_s
        answer = json.loads(await self._channel.call(worker, "rollout", json.dumps(request)))
        if answer.get("unknown_example"):
            request["content"] = _content_of(example)
            answer = json.loads(await self._channel.call(worker, "rollout", json.dumps(request)))
        if "late" in answer:
            said = f"no answer within {self.timeout_s:g} s"
            return Rollout(None, failure=FailureKind.TRANSIENT, error=said, seconds=self.timeout_s)
        if "metric_error" in answer:
            raise MetricError(answer["metric_error"])
        recorded = decode_rollout({**answer, "key": ""})
        _add_usage(recorded.usage)
        if recorded.trace is None:
            return recorded.rollout
        return replace(recorded.rollout, trace=decode_trace(recorded.trace, program))

    def note_paid(self, program: dspy.Module, example: dspy.Example, *, trace: bool = False) -> None:
        """See ``Runner.note_paid``."""
        worker = current_caller()
        if worker not in self._repeatable:
            self._next_key(worker, self._request(worker, program, example, trace))

    def _request(
        self, worker: str, program: dspy.Module, example: dspy.Example, trace: bool
    ) -> dict[str, Any]:
        state = self._states.get(program)
        if state is None:
            # Keys are not sorted: prompts show dicts and models in their own order.
            state = self._states[program] = json.dumps(_dump(program))
        return {
            "worker": worker,
            "program": state,
            "example": example_digest(example),
            "trace": trace,
            "failure_score": self.failure_score,
        }

    def _next_key(self, worker: str, request: Mapping[str, Any]) -> str:
        """Equal keys mean one answer. Where answers differ from time to time, each time has its own."""
        content = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if worker in self._repeatable:
            return content
        number = self._times[content]
        self._times[content] += 1
        return f"{self._run_id}/{content}/{number}"

    def close(self) -> None:
        """Nothing is held here."""


async def elsewhere(
    engine: RemoteRollouts,
    budget: Budget,
    student: dspy.Module,
    teacher: dspy.Module | None,
    workers: Sequence[Worker],
    metric: Metric,
) -> list[Worker]:
    """Build the workers where they are to run; here stand-ins take the places of their LMs.

    Raises:
        ConfigurationError: what cannot be kept over processes, or a worker with another program.
    """
    caps = [name for name in ("lm_calls", "tokens", "dollars") if getattr(budget, name) is not None]
    if caps:
        raise ConfigurationError(
            f"a cap on {', '.join(caps)} cannot be kept over the nodes of a cluster; cap metric_calls or seconds"
        )
    if teacher is not None:
        raise ConfigurationError(
            "a teacher runs on no node of the cluster; bootstrap with it first, and pass its demos in the program"
        )
    for worker in workers:
        here = ("lm", "requests_per_minute", "tokens_per_minute", "hedge_after_s")
        given = [name for name in here if getattr(worker, name) is not None]
        if given:
            raise ConfigurationError(
                f"worker {worker.name!r}: {', '.join(given)} belong to the LM, which the setup builds on its node; give them there"
            )
    await engine.start({worker.name: worker.max_concurrency for worker in workers})
    try:
        expected = _structure(student)
        texts = await asyncio.gather(*(engine.call(one.name, "describe", "") for one in workers))
        found = []
        for worker, text in zip(workers, texts, strict=True):
            described = json.loads(text)
            _check_alike(worker.name, described, expected, metric)
            found.append(replace(worker, lm=RemoteLM(worker.name, described)))
    except WorkerFailedError as error:
        engine.stop()
        raise ConfigurationError(f"a worker could not be asked for its LM: {error}") from error
    except BaseException:
        engine.stop()
        raise
    return found


def _dump(program: dspy.Module) -> dict[str, Any]:
    """Instructions and demos per predictor, as JSON data."""
    found = {}
    for name, predictor in program.named_predictors():
        bare = predictor.__class__.__new__(predictor.__class__)
        bare.__dict__.update(predictor.__dict__)
        bare.lm, bare.traces, bare.train, bare.demos = None, [], [], []
        demos = [{key: _dump_value(value) for key, value in sorted(demo.items())} for demo in predictor.demos]
        found[name] = {**bare.dump_state(), "demos": demos}
    return found


def _load(program: dspy.Module, state: Mapping[str, Any]) -> None:
    for name, predictor in program.named_predictors():
        lm = predictor.lm
        demos = [{key: _load_value(value) for key, value in demo.items()} for demo in state[name]["demos"]]
        predictor.load_state({**state[name], "demos": demos})
        predictor.lm = lm


def _dump_value(value: Any) -> Any:
    """A demo's value in the form that DSPy's adapters give it in a prompt.

    They number the items of a list in a text field, but not those of a tuple or set, so these stay apart: ``[value]``
    or ``{"tuple": value}``.
    """
    plain = serialize_for_json(value)
    return {"tuple": plain} if isinstance(plain, list) and not isinstance(value, list) else [plain]


def _load_value(encoded: Any) -> Any:
    return tuple(encoded["tuple"]) if isinstance(encoded, Mapping) else encoded[0]


def _check_alike(worker: str, described: Mapping[str, Any], structure: Any, metric: Metric) -> None:
    if described["structure"] != structure:
        raise ConfigurationError(
            f"worker {worker!r} has a program with other predictors or signatures than the one that is compiled; "
            "its setup must build the same program"
        )
    for what, here in (("adapter", _adapter_name(dspy.settings.adapter)), ("versions", versions())):
        if described[what] != here:
            raise ConfigurationError(
                f"worker {worker!r} runs with {what} {described[what]}, and the compile with {here}: prompts would differ; "
                "use the same on every node"
            )
    if described["metric"] != json.loads(json.dumps(code_identity(metric)[1:])):
        logger.warning(
            "The metric of worker %r is another one than that of the compile; its own is what counts.", worker
        )


def _adapter_name(adapter: Any) -> str:
    """The prompt format in words; the default where none is set."""
    return type(adapter or dspy.settings.adapter or dspy.ChatAdapter()).__qualname__


def _structure(program: dspy.Module) -> Any:
    """Strict JSON data that differs where a candidate of one program is none of the other.

    A class counts by its source, not by its module: what is a script here is a module there.
    """
    fields = {
        name: signature_record(predictor.signature)["sha256"]
        for name, predictor in program.named_predictors()
    }
    modules = {type(module).__module__ for _, module in program.named_sub_modules()}
    return _without(modules, json.loads(json.dumps([structure_identity(program), fields], default=str)))


def _without(modules: set[str], value: Any) -> Any:
    """``value`` without the names of ``modules`` before the names in them."""
    if isinstance(value, list):
        return [_without(modules, one) for one in value]
    if isinstance(value, dict):
        return {key: _without(modules, one) for key, one in value.items()}
    if isinstance(value, str):
        return next((value[len(one) + 1 :] for one in modules if value.startswith(f"{one}.")), value)
    return value


def _encoded(rollout: Rollout, program: dspy.Module) -> dict[str, Any]:
    """As JSON; a trace that JSON cannot carry makes no demo, and its score counts all the same."""
    try:
        return encode_rollout(rollout, program)
    except UnrecordableError as error:
        logger.warning("A trace cannot travel (%s); no demo is made of it.", str(error).split(":", 1)[0])
        return encode_rollout(replace(rollout, trace=[], prediction=None), program)


def _content_of(example: dspy.Example) -> dict[str, Any]:
    fields = dict(example.items())
    odd = {name: type(value).__qualname__ for name, value in fields.items() if not is_json(value)}
    if odd:
        raise ConfigurationError(
            f"an example that its worker does not hold cannot travel as JSON ({odd}); let the setup load it"
        )
    return {"fields": fields, "inputs": sorted(example.inputs().keys())}


def _example_of(content: Mapping[str, Any]) -> dspy.Example:
    return dspy.Example(content["fields"]).with_inputs(*content["inputs"])


def _add_usage(usage: tuple[int, int, int]) -> None:
    """As if the calls had been made here: the evaluator counts what its tracker sees."""
    tracker = dspy.settings.usage_tracker
    if tracker is not None:
        for number in range(usage[0]):
            first = {"prompt_tokens": usage[1], "completion_tokens": usage[2]}
            tracker.add_usage(
                "remote", first if number == 0 else {"prompt_tokens": 0, "completion_tokens": 0}
            )
