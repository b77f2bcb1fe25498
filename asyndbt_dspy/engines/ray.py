"""Workers as actors of a Ray cluster (extra ``ray``).

Server and workers of the algorithm stay in the process that compiles, with journal, rollout cache and budget; what goes
to the cluster is the work: rollouts, as JSON strings, each idempotent by its key. An actor builds its worker's program, LM
and shard by calling ``setup``, a function named ``"package.module:function"``. Nothing is pickled but strings.

Actors are named and detached: they outlive a process that is killed, and the process that goes on finds them again with their
LMs loaded. A lost node costs the calls that it had in hand; they are made again where Ray restarts the actor.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from asyndbt_dspy.core.messages import StopSearch
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import Engine, Evaluator, Observer, WorkerFailedError
from asyndbt_dspy.errors import ConfigurationError

_NAMESPACE = "asyndbt"
_OF_JOBS = ("working_dir", "py_modules")
"""Parts of a ``runtime_env`` whose local folders Ray ships with a job, and with nothing smaller."""
_LONGEST_PAUSE_S = 2.0
_SPARE_CALLS = 2
"""Of an actor, beside its rollouts: who asks what it is need not wait for them."""
_LOST = (
    RayActorError,
    ObjectLostError,
    NodeDiedError,
    LocalRayletDiedError,
    WorkerCrashedError,
    OutOfMemoryError,
)
"""A call may or may not have been made. ``ActorDiedError`` and ``ActorUnavailableError`` are among them."""


class RayEngine:
    """Runs the rollouts of a compile on actors, one per worker.

    Args:
        setup: ``"package.module:function"``, importable on every node; ``function(worker, **arguments)`` returns the worker's
            ``RolloutHost``: program, metric, LM, examples.
        arguments: Of ``setup`` beside the worker's name: for all workers, or per worker (``{"w0": {…}}``). JSON data, such as
            a path: the shard is read where it is used.
        address: Of the cluster, as ``ray.init`` takes it; ``None`` starts one on this machine. Unused where Ray runs already.
        resources: Custom resources of an actor, for all (``{"gpu_a100": 1}``) or per worker (``{"w0": {"gpu_a100": 1}}``).
        num_cpus, num_gpus: Of each actor; fractions share.
        runtime_env: Of the actors, as Ray takes it: environment variables, packages, a working directory. A ``working_dir`` or
            ``py_modules`` on this machine goes with the job, so it needs an engine that connects to Ray by itself.
        name: Of the actors. Compiles that run at the same time need different ones.
        start_timeout_s: How long building the workers may take: finding nodes and loading models.
        recover_s: How long an actor that was lost may take to come back; then its worker is set aside.
        keep_actors: Leave the actors, with what they have loaded, for the next compile with this ``name``.
        engine: Decides the order of events where ``run`` is called directly; ``None``: ``LocalEngine``.

    Raises:
        ConfigurationError: a setting that cannot work.
    """

    def __init__(
        self,
        setup: str,
        *,
        arguments: Mapping[str, Any] | None = None,
        address: str | None = "auto",
        resources: Mapping[str, Any] | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        runtime_env: Mapping[str, Any] | None = None,
        name: str = "asyndbt",
        start_timeout_s: float = 600.0,
        recover_s: float = 300.0,
        keep_actors: bool = False,
        engine: Engine | None = None,
    ) -> None:
        module, separator, function = setup.partition(":")
        if not (module and separator and function):
            raise ConfigurationError(f"setup={setup!r} must be 'package.module:function'")
        if not name:
            raise ConfigurationError(f"name={name!r} must not be empty: the actors are found by it")
        try:
            json.dumps(dict(arguments or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"arguments must be JSON data, such as paths: {error}") from error
        for label, seconds in (("start_timeout_s", start_timeout_s), ("recover_s", recover_s)):
            if not seconds > 0:
                raise ConfigurationError(f"{label}={seconds!r} must be > 0 seconds")
        self.setup = setup
        self.arguments = dict(arguments or {})
        self.address = address
        self.resources = dict(resources or {})
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self.runtime_env = dict(runtime_env or {})
        self.name = name
        self.start_timeout_s = start_timeout_s
        self.recover_s = recover_s
        self.keep_actors = keep_actors
        self.engine = engine
        self._inner: Engine = engine or LocalEngine()
        self._actors: dict[str, Any] = {}
        self._absent: set[str] = set()  # workers whose actor was lost and has not been heard of since
        self._concurrency: dict[str, int] = {}

    # ------------------------------------------------------------------ the engine

    async def run(
        self,
        server: ServerState,
        workers: Sequence[WorkerState],
        evaluator: Evaluator,
        observers: Sequence[Observer] = (),
    ) -> None:
        """See ``Engine.run``; ``evaluator`` reaches the actors through ``call``."""
        if self.engine is not None:
            self._inner = self.engine
        await self._inner.run(server, workers, evaluator, observers)

    def stop_search(self, stop: StopSearch) -> None:
        self._inner.stop_search(stop)

    # ------------------------------------------------------------------ the cluster

    async def start(self, workers: Mapping[str, int]) -> None:
        """Build an actor per worker, or find those of a process that was killed.

        Args:
            workers: Name -> calls that it may have in flight.

        Raises:
            ConfigurationError: no cluster, a setup that fails, or resources that no node has.
        """
        self._check_names(workers)
        of_job = {name: one for name, one in self.runtime_env.items() if name in _OF_JOBS and _is_here(one)}
        if ray.is_initialized():
            if of_job:
                raise ConfigurationError(
                    f"runtime_env has {of_job} of this machine, which Ray ships with a whole job, and Ray is connected "
                    f"already: pass it there, ray.init(…, runtime_env={of_job}), and leave it out here"
                )
        else:
            options: dict[str, Any] = {"include_dashboard": False} if self.address is None else {}
            options |= {"runtime_env": of_job} if of_job else {}
            try:
                ray.init(address=self.address, namespace=_NAMESPACE, log_to_driver=False, **options)
            except ConnectionError as error:
                raise ConfigurationError(
                    f"no Ray cluster at address={self.address!r}: {error}. Start one with `ray start --head`, or pass "
                    "address=None for one on this machine"
                ) from error
        self._concurrency = dict(workers)
        self._absent.clear()
        searches = [asyncio.ensure_future(self._find(worker)) for worker in workers]
        try:
            await asyncio.gather(*searches)
        finally:
            for one in searches:
                one.cancel()
            await asyncio.gather(*searches, return_exceptions=True)

    def stop(self) -> None:
        """End the actors, unless they are to be kept."""
        actors, self._actors = self._actors, {}
        if not self.keep_actors and ray.is_initialized():
            for actor in actors.values():
                ray.kill(actor)

    async def call(self, worker: str, method: str, payload: str) -> str:
        """``method`` of this worker's host. It may be made twice, so it must be idempotent.

        Raises:
            WorkerFailedError: the actor was lost and did not come back within ``recover_s``.
        """
        lost_at: float | None = None
        pause = 0.05
        while True:
            actor, asked_at = self._actors[worker], math.inf
            try:
                if worker in self._absent:
                    lost_at = lost_at or time.monotonic()
                    left_s = lost_at + self.recover_s - time.monotonic()
                    await self._return_of(worker, actor, max(_LONGEST_PAUSE_S, left_s))
                asked_at = time.monotonic()
                return str(await self._ask(actor, method, payload))
            except _LOST as error:
                self._absent.add(worker)
                now = time.monotonic()
                if lost_at is None or now - asked_at > self.recover_s:
                    lost_at = now  # it was back for so long that this is another loss; one that dies at once is not back
                if now - lost_at > self.recover_s:
                    raise self._not_back(worker, _short(error)) from error
                is_dead = isinstance(error, ActorDiedError)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)
            if is_dead and self._actors.get(worker) is actor:  # killed, so that Ray itself restarts nothing
                self._actors[worker] = self._get(worker)

    async def _return_of(self, worker: str, actor: Any, within_s: float) -> None:
        """Wait for an actor that was lost. A call would wait without end for one that finds no place."""
        try:
            await asyncio.wait_for(actor.fingerprint.remote(), within_s)
        except asyncio.TimeoutError as error:
            raise self._not_back(worker, "it has no place yet") from error
        self._absent.discard(worker)

    def _not_back(self, worker: str, said: str) -> WorkerFailedError:
        return WorkerFailedError(
            f"its actor was lost and did not come back within {self.recover_s:g} s ({said}); a node "
            f"with {self._needs(worker)} is needed"
        )

    async def _ask(self, actor: Any, method: str, payload: str) -> Any:
        reference = actor.call.remote(method, payload)
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            raise WorkerFailedError(f"{self.setup} raised: {_short(error)}") from error

    async def _find(self, worker: str) -> None:
        """This worker's actor: the one that is there if it was built alike, else a new one."""
        print_ = self._fingerprint(worker)
        for _ in range(2):
            actor = self._get(worker)
            self._actors[worker] = actor
            try:
                found = await asyncio.wait_for(actor.fingerprint.remote(), self.start_timeout_s)
            except (asyncio.TimeoutError, GetTimeoutError) as error:
                ray.kill(actor)
                raise ConfigurationError(
                    f"worker {worker!r} found no place on the cluster within {self.start_timeout_s:g} s; a node with "
                    f"{self._needs(worker)} is needed. The cluster has {ray.cluster_resources()}"
                ) from error
            except RayActorError as error:
                raise ConfigurationError(
                    f"worker {worker!r} could not be built by {self.setup!r}: {_short(error)}"
                ) from error
            if found == print_:
                return
            ray.kill(actor)  # left by a compile with another setup
            await asyncio.sleep(0.2)
        raise ConfigurationError(
            f"an actor named {self._label(worker)!r} is in use by another compile; give each its own RayEngine(name=…)"
        )

    def _get(self, worker: str) -> Any:
        return (
            ray.remote(HostActor)
            .options(
                name=self._label(worker),
                namespace=_NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=self.num_cpus,
                num_gpus=self.num_gpus,
                resources=self._resources(worker),
                runtime_env=self._runtime_env_of_actors() or None,
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=_SPARE_CALLS + self._concurrency[worker],
            )
            .remote(self.setup, worker, json.dumps(self._arguments(worker)), self._fingerprint(worker))
        )

    def _runtime_env_of_actors(self) -> dict[str, Any]:
        return {
            name: one for name, one in self.runtime_env.items() if name not in _OF_JOBS or not _is_here(one)
        }

    def _check_names(self, workers: Mapping[str, int]) -> None:
        """Resources given per worker must name workers: Ray would wait for a node with ``w9`` of something."""
        unknown = sorted(
            name
            for name, value in self.resources.items()
            if isinstance(value, Mapping) and name not in workers
        )
        if unknown:
            raise ConfigurationError(
                f"resources name {unknown}, and the workers are {sorted(workers)}; name a worker, or give "
                '{"resource": amount} for all'
            )

    def _of_worker(self, given: Mapping[str, Any], worker: str) -> Mapping[str, Any]:
        """The worker's part of what is given per worker, or all of what is given for all."""
        is_per_worker = all(
            name in self._concurrency and isinstance(value, Mapping) for name, value in given.items()
        )
        if not is_per_worker:
            return given
        found = given.get(worker, {})
        assert isinstance(found, Mapping)
        return found

    def _label(self, worker: str) -> str:
        return f"{self.name}/{worker}"

    def _resources(self, worker: str) -> dict[str, float]:
        return dict(self._of_worker(self.resources, worker))

    def _arguments(self, worker: str) -> dict[str, Any]:
        return dict(self._of_worker(self.arguments, worker))

    def _needs(self, worker: str) -> str:
        return str({"CPU": self.num_cpus, "GPU": self.num_gpus, **self._resources(worker)})

    def _fingerprint(self, worker: str) -> str:
        """What an actor was built from; another one is not taken over."""
        content = [
            self.setup,
            _source_of(self.setup.partition(":")[0]),  # kept actors must not outlive their code
            worker,
            self._arguments(worker),
            self._concurrency[worker],
            self._needs(worker),
            self.runtime_env,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _is_here(given: Any) -> bool:
    """Whether a working directory or modules, or one of them, are on this machine, and not at an address."""
    entries = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return not all(isinstance(one, str) and "://" in one for one in entries)


class HostActor:
    """A worker on its node. Ray makes it; ``setup`` fills it."""

    def __init__(self, setup: str, worker: str, arguments: str, fingerprint: str) -> None:
        module, _, function = setup.partition(":")
        self._host = getattr(importlib.import_module(module), function)(worker, **json.loads(arguments))
        self._fingerprint = fingerprint

    async def fingerprint(self) -> str:
        return self._fingerprint

    async def call(self, method: str, payload: str) -> str:
        return str(await getattr(self._host, method)(payload))


def _source_of(module: str) -> str:
    """A hash of the module's source here; empty where it is on the nodes alone."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    if spec is None or not spec.has_location or spec.origin is None:
        return ""
    return hashlib.sha256(pathlib.Path(spec.origin).read_bytes()).hexdigest()


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
