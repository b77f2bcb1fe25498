"""Workers as Ray actors: on a cluster of three nodes on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Worker, WorkerFailedError, scripted_lm
from asyndbt_dspy.core.messages import Evaluate, Scored, decode, encode
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import Engine, Evaluator
from asyndbt_dspy.runs.journal import read_journal
from asyndbt_dspy.testing.conformance import Delays, EngineConformance, VirtualTime

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'asyndbt-dspy[ray]'")
import ray_hosts as hosts  # noqa: E402 - imports what only the extra's tests need
from ray.cluster_utils import Cluster  # noqa: E402

from asyndbt_dspy.engines.ray import RayEngine  # noqa: E402

HERE = str(Path(__file__).parent)
ENV = {"env_vars": {"PYTHONPATH": os.pathsep.join([HERE, str(Path(__file__).parents[2])])}}
NODE = {"num_cpus": 2, "object_store_memory": 80 * 1024 * 1024}
PATIENCE_S = 240
"""Nothing takes so long even on a busy machine; it is below pytest's limit, which would hide what was waited for."""

# Each actor is a process that imports DSPy: where cores are few and busy, that alone takes a minute.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(2):
        found.add_node(**NODE, resources={"spot": 4})
    ray.init(address=found.address, namespace="asyndbt", log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def engine(setup: str = "make", **options: Any) -> RayEngine:
    options = {"num_cpus": 0.1, "runtime_env": ENV, "start_timeout_s": PATIENCE_S, **options}
    return RayEngine(f"ray_hosts:{setup}", **options)


def workers(count: int = 3, **options: Any) -> list[Worker]:
    return [Worker(f"w{number}", hosts.examples(40, 100 * number), **options) for number in range(count)]


def optimizer(where: RayEngine | None, count: int = 3, **options: Any) -> AsynDBT:
    lm = {} if where else {"lm": scripted_lm(hosts.answer, name="colors")}
    options = {"budget": Budget(metric_calls=150), "deterministic": True, "progress": False, **options}
    return AsynDBT(
        options.pop("metric", hosts.metric),
        workers=options.pop("workers", None) or workers(count, **lm),
        engine=where,
        instructions={"self": [hosts.MAGIC]},
        **options,
    )


def compiled(where: RayEngine | None, **options: Any) -> tuple[dspy.Module, AsynDBT]:
    made = optimizer(where, **options)
    with dspy.context(adapter=dspy.JSONAdapter()):
        return made.compile(dspy.Predict(hosts.Sort)), made


async def lose_node(cluster: Any, where: RayEngine, worker: str) -> None:
    """The node under this worker's actor is gone, with all that runs on it."""
    actor = ray._private.state.actors(where._actors[worker]._actor_id.hex())
    node = next(one for one in cluster.worker_nodes if one.node_id == actor["Address"]["NodeID"])
    await asyncio.to_thread(cluster.remove_node, node, False)
    # By itself the actor would notice only after a while, and answer meanwhile.
    with contextlib.suppress(ProcessLookupError):
        os.kill(actor["Pid"], signal.SIGKILL)


def lines(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    return [line.split() for line in path.read_text().splitlines()]


def recorded_keys(run_dir: Path) -> Counter[str]:
    entries = [entry for path in run_dir.rglob("workers/*.jsonl") for entry in read_journal(path)]
    return Counter(entry["key"] for entry in entries if entry["kind"] == "rollout")


# ------------------------------------------------------------------------------------------------ the engine


class ScoredElsewhere:
    """Every evaluation is made on its worker's actor and must come back as it is made here."""

    def __init__(self, evaluator: Evaluator, where: RayEngine) -> None:
        self._evaluator = evaluator
        self._where = where

    async def evaluate(self, request: Evaluate) -> Scored:
        here = await self._evaluator.evaluate(request)
        # Waited for without the loop: the suite's virtual time counts turns of it.
        actor = self._where._actors[request.worker]
        there = decode(json.loads(ray.get(actor.call.remote("evaluate", json.dumps(encode(request))))))
        assert there.outcomes == here.outcomes
        return there if there.calls == here.calls else here


class TestRay(EngineConformance):
    @pytest.fixture(autouse=True)
    def tables(self, cluster: Any) -> None:
        self.where = engine("make_table", name="tables", keep_actors=True)
        asyncio.run(self.where.start({f"w{number}": 4 for number in range(3)}))

    def build(
        self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf
    ) -> tuple[Engine, Evaluator]:
        virtual = VirtualTime(ScoredElsewhere(evaluator, self.where), delays, answer_timeout_s)
        self.where.engine = LocalEngine(answer_timeout_s=answer_timeout_s, clock=virtual.clock)
        return self.where, virtual


# ---------------------------------------------------------------------------------------------- whole compiles


def test_the_cluster_finds_the_same_program_as_this_process(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    here, local = compiled(None)
    there, remote = compiled(engine(arguments={"log": str(log)}))
    assert there.dump_state() == here.dump_state()
    assert there.signature.instructions == hosts.MAGIC
    assert remote.result.metric_calls == local.result.metric_calls
    made = lines(log)
    assert {worker for worker, *_ in made} == {"w0", "w1", "w2"}
    assert len({pid for _, pid, _ in made}) == 3
    assert str(os.getpid()) not in {pid for _, pid, _ in made}
    spent = {use.name: use.lm_calls for use in remote.result.workers}
    assert spent == Counter(worker for worker, *_ in made), "tokens and calls are counted where they are made"


def test_an_actor_reads_its_own_shard_and_no_example_travels(cluster: Any) -> None:
    where = engine(arguments={f"w{n}": {"count": 40, "start": 100 * n} for n in range(3)}, name="shards")
    sent: list[str] = []
    ask = where.call

    async def call(worker: str, method: str, payload: str) -> str:
        sent.append(payload)
        return await ask(worker, method, payload)

    where.call = call  # type: ignore[method-assign]
    compiled(where)
    requests = [json.loads(one) for one in sent if one]
    assert len(requests) >= 150
    assert not any("content" in one for one in requests)
    assert not any("item 101 " in json.dumps(one["example"]) for one in requests)


def test_workers_of_one_node_have_a_gpu_each(cluster: Any, tmp_path: Path) -> None:
    """Ray takes a node's word for its GPUs, so that their placement can be tried where there are none."""
    log = tmp_path / "gpus"
    node = cluster.add_node(**NODE, num_gpus=2)
    try:
        compiled(engine("make_with_gpu", name="gpus", num_gpus=1, arguments={"log": str(log)}), count=2)
    finally:
        cluster.remove_node(node)
    assert sorted(lines(log)) in ([["w0", "0"], ["w1", "1"]], [["w0", "1"], ["w1", "0"]])
    with pytest.raises(ConfigurationError, match=r"no place on the cluster within 2 s.*'GPU': 1"):
        compiled(engine(name="no-gpus", num_gpus=1, start_timeout_s=2), count=1)


def test_without_deterministic_too(cluster: Any) -> None:
    # A busy machine makes stragglers of anybody, and a race of few examples shows too little: neither is what is asked here.
    patient: dict[str, Any] = {"straggler_factor": None, "config": {"accept_z": 0.0}}
    program, made = compiled(engine(name="free"), deterministic=False, **patient)
    assert program.signature.instructions == hosts.MAGIC
    assert made.result.metric_calls <= 150


def test_actors_end_with_the_compile_unless_they_are_kept(cluster: Any) -> None:
    compiled(engine(name="gone"), count=2)
    until = time.monotonic() + PATIENCE_S
    while "gone/w0" in {one["name"] for one in ray.util.list_named_actors(all_namespaces=True)}:
        assert time.monotonic() < until, "Ray takes its time to forget a killed actor, but not so long"
        time.sleep(0.05)
    compiled(engine(name="kept", keep_actors=True), count=2)
    assert ray.get_actor("kept/w0", namespace="asyndbt")
    where = engine(name="kept", arguments={"count": 1})  # built otherwise, so it is not taken over
    asyncio.run(where.start({"w0": 8, "w1": 8}))
    assert json.loads(asyncio.run(where.call("w0", "describe", "")))["examples"] == 1
    where.stop()


def test_a_node_dies_in_the_middle_and_nothing_recorded_is_lost(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    expected, _ = compiled(None)
    where = engine("make_slow", name="dying", arguments={"log": str(log)}, resources={"w1": {"spot": 1}})
    made = optimizer(where, run_dir=tmp_path / "run")
    is_lost = False
    ask = where.call

    async def call(worker: str, method: str, payload: str) -> str:
        nonlocal is_lost
        # A call of its own, so that there is one for the actor to answer elsewhere.
        if worker == "w1" and not is_lost and len(lines(log)) > 60:
            is_lost = True
            await lose_node(cluster, where, "w1")
        return await ask(worker, method, payload)

    where.call = call  # type: ignore[method-assign]
    with dspy.context(adapter=dspy.JSONAdapter()):
        program = made.compile(dspy.Predict(hosts.Sort))
    cluster.add_node(**NODE, resources={"spot": 4})
    assert is_lost
    assert program.dump_state() == expected.dump_state()
    assert not any(worker.set_aside for worker in made.result.workers)
    pids = {pid for worker, pid, _ in lines(log) if worker == "w1"}
    assert len(pids) == 2, "the actor went on elsewhere"
    keys = recorded_keys(tmp_path / "run")
    assert len(keys) == made.result.metric_calls
    assert set(keys.values()) == {1}
    assert len(lines(log)) - len(keys) <= 8, "only what the node had in hand was asked again"


def test_a_worker_whose_node_is_gone_for_good_is_set_aside(
    cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.add_node(**NODE, resources={"rare": 1})
    where = engine(
        "make_slow", name="rare", arguments={"log": os.devnull}, resources={"w2": {"rare": 1}}, recover_s=1.0
    )
    asked: Counter[str] = Counter()
    is_lost = False
    ask = where.call

    async def call(worker: str, method: str, payload: str) -> str:
        nonlocal is_lost
        asked[worker] += 1
        if worker == "w2" and asked["w2"] == 5:  # two are those of the setup
            is_lost = True
            await lose_node(cluster, where, "w2")
        # The others would spend the budget before the worker is missed; they go on without it.
        while worker != "w2" and is_lost and "worker 'w2' is set aside" not in caplog.text:
            await asyncio.sleep(0.01)
        return await ask(worker, method, payload)

    where.call = call  # type: ignore[method-assign]
    # Calls that are held are no stragglers.
    program, made = compiled(where, deterministic=False, straggler_factor=None)
    gone = made.result.workers[2]
    assert "did not come back within 1 s" in gone.set_aside
    assert "'rare': 1" in gone.set_aside
    assert program.signature.instructions == hosts.MAGIC


def test_an_actor_that_is_built_again_and_finds_no_place_is_not_waited_for_without_end(cluster: Any) -> None:
    cluster.add_node(**NODE, resources={"rare": 1})
    where = engine(name="homeless", resources={"rare": 1}, recover_s=1.0)

    async def go() -> None:
        await where.start({"w0": 8})
        killed = where._actors["w0"]
        await lose_node(cluster, where, "w0")
        ray.kill(killed)
        for _ in range(2):  # one call loses the actor, the other begins without it
            with pytest.raises(
                WorkerFailedError, match=r"did not come back within 1 s.*no place yet.*'rare': 1"
            ):
                await where.call("w0", "describe", "")
        assert where._actors["w0"]._actor_id != killed._actor_id

    asyncio.run(go())
    where.stop()


def test_a_server_that_is_restarted_finds_its_workers_and_pays_nothing_twice(
    cluster: Any, tmp_path: Path
) -> None:
    log = tmp_path / "calls"

    def go(stop_at: int | None, resume: bool) -> tuple[dspy.Module, AsynDBT]:
        where = engine(name="living", arguments={"log": str(log)}, keep_actors=True)
        made = optimizer(where, run_dir=tmp_path / "run", resume=resume)
        if stop_at is not None:
            ask = where.call

            async def call(worker: str, method: str, payload: str) -> str:
                if len(lines(log)) >= stop_at:
                    made.stop()
                return await ask(worker, method, payload)

            where.call = call  # type: ignore[method-assign]
        with dspy.context(adapter=dspy.JSONAdapter()):
            return made.compile(dspy.Predict(hosts.Sort)), made

    expected, whole = compiled(None)
    go(70, resume=False)
    before = lines(log)
    program, made = go(None, resume=True)
    assert program.dump_state() == expected.dump_state()
    after = lines(log)
    assert 70 <= len(before) < len(after) == whole.result.metric_calls
    assert {pid for _, pid, _ in after} == {pid for _, pid, _ in before}, "the same actors, still loaded"
    assert made.result.metric_calls == whole.result.metric_calls


def killed_server(address: str, log: str, run_dir: str) -> None:
    """Compiles, in a process of its own, until 70 calls were paid for; then it is gone."""
    ray.init(address=address, namespace="asyndbt", log_to_driver=False)
    where = engine("make_late", name="orphans", arguments={"log": log})
    ask = where.call

    async def call(worker: str, method: str, payload: str) -> str:
        answer = await ask(worker, method, payload)
        if len(lines(Path(log))) >= 70:
            # The answer is paid for and not recorded yet: there is one to be heard of later.
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    where.call = call  # type: ignore[method-assign]
    with dspy.context(adapter=dspy.JSONAdapter()):
        optimizer(where, run_dir=run_dir).compile(dspy.Predict(hosts.Sort))


def test_a_server_killed_with_9_leaves_answers_that_the_next_one_does_not_pay_for_again(
    cluster: Any, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    given = (cluster.address, str(log), str(tmp_path / "run"))
    command = [sys.executable, "-c", f"import test_ray; test_ray.killed_server(*{given!r})"]
    environment = {**os.environ, **ENV["env_vars"]}
    done = subprocess.run(command, env=environment, timeout=PATIENCE_S, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    recorded = recorded_keys(tmp_path / "run")
    before = lines(log)
    assert len(recorded) < len(before), "some were paid for and never heard of"
    expected, whole = compiled(None)
    where = engine("make_late", name="orphans", arguments={"log": str(log)})
    program, made = compiled(where, run_dir=tmp_path / "run", resume=True)
    assert program.dump_state() == expected.dump_state()
    assert len(lines(log)) == whole.result.metric_calls == made.result.metric_calls
    assert {pid for _, pid, _ in lines(log)} == {pid for _, pid, _ in before}
    assert set(recorded_keys(tmp_path / "run").values()) == {1}


def test_an_actor_that_is_killed_for_good_is_built_again(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    expected, _ = compiled(None)
    where = engine("make_slow", name="killed", arguments={"log": str(log)})
    killed: list[Any] = []
    ask = where.call

    async def call(worker: str, method: str, payload: str) -> str:
        if worker == "w1" and not killed and len(lines(log)) > 60:
            killed.append(where._actors["w1"])
            ray.kill(killed[0])
        return await ask(worker, method, payload)

    where.call = call  # type: ignore[method-assign]
    program, made = compiled(where)
    assert killed
    assert program.dump_state() == expected.dump_state()
    assert not any(worker.set_aside for worker in made.result.workers)
    assert len({pid for worker, pid, _ in lines(log) if worker == "w1"}) == 2


def test_kept_actors_do_not_outlive_their_code(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import ray_hosts\n\ndef make(worker):\n    return ray_hosts.make(worker, count={})\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = os.pathsep.join([str(tmp_path), ENV["env_vars"]["PYTHONPATH"]])
    found = []
    for count in (1, 1, 2):
        (tmp_path / "changing.py").write_text(code.format(count), encoding="utf-8")
        where = RayEngine(
            "changing:make",
            num_cpus=0.1,
            runtime_env={"env_vars": {"PYTHONPATH": folders}},
            name="changing",
            keep_actors=True,
        )
        asyncio.run(where.start({"w0": 1}))
        described = json.loads(asyncio.run(where.call("w0", "describe", "")))
        found.append((where._actors["w0"]._actor_id.hex(), described["examples"]))
    where.keep_actors = False
    where.stop()
    assert [examples for _, examples in found] == [1, 1, 2]
    assert found[0][0] == found[1][0] != found[2][0]


def test_an_argument_for_all_workers_may_be_an_object(cluster: Any) -> None:
    where = engine("make_with_settings", name="settings", arguments={"settings": {"count": 3}})
    asyncio.run(where.start({"w0": 1}))
    assert json.loads(asyncio.run(where.call("w0", "describe", "")))["examples"] == 3
    where.stop()


# --------------------------------------------------------------------------------------------- what cannot work


def test_what_cannot_be_built_or_placed_is_said(cluster: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'w0' could not be built by 'ray_hosts:make_broken'.*no weights here"
    ):
        compiled(engine("make_broken", name="broken"), count=1)
    with pytest.raises(ConfigurationError, match="other predictors or signatures"):
        compiled(engine("make_other", name="other"), count=1)
    with pytest.raises(ConfigurationError, match=r"no place on the cluster within 2 s.*'gpu_a100': 1"):
        compiled(engine(name="nowhere", resources={"gpu_a100": 1}, start_timeout_s=2), count=1)


def test_what_cannot_be_kept_over_nodes_is_refused_before_anything_starts() -> None:
    for budget, named in ((Budget(lm_calls=9), "lm_calls"), (Budget(tokens=9, metric_calls=9), "tokens")):
        with pytest.raises(ConfigurationError, match=f"cap on {named} cannot be kept over the nodes"):
            compiled(engine(), budget=budget, deterministic=False)
    with pytest.raises(ConfigurationError, match="requests_per_minute belong to the LM"):
        compiled(engine(), workers=workers(1, requests_per_minute=60))
    with pytest.raises(ConfigurationError, match="a teacher runs on no node"):
        optimizer(engine()).compile(dspy.Predict(hosts.Sort), teacher=dspy.Predict(hosts.Sort))
    with pytest.raises(ConfigurationError, match=r"resources name \['w9'\], and the workers are"):
        asyncio.run(engine(resources={"w9": {"spot": 1}}).start({"w0": 1}))
    for settings, said in (
        ({"setup": "hosts.make"}, "must be 'package.module:function'"),
        ({"setup": "hosts:make", "arguments": {"data": {1, 2}}}, "must be JSON data"),
        ({"setup": "hosts:make", "name": ""}, "name='' must not be empty"),
        ({"setup": "hosts:make", "recover_s": 0}, "recover_s=0 must be > 0 seconds"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            RayEngine(**settings)
