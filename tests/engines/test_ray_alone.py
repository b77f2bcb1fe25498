"""What of the Ray engine needs no cluster: what it passes to Ray, and when a worker is given up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyndbt_dspy import ConfigurationError, WorkerFailedError

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'asyndbt-dspy[ray]'")
from ray.exceptions import RayActorError  # noqa: E402

from asyndbt_dspy.engines.ray import RayEngine  # noqa: E402

HERE = str(Path(__file__).parent)


def make_engine(**options: Any) -> RayEngine:
    return RayEngine("ray_hosts:make", **options)


def test_a_folder_of_this_machine_is_shipped_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes no local ``working_dir`` or ``py_modules`` for a single actor."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        raise ConnectionError("none here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    env = {"working_dir": HERE, "py_modules": ["s3://b/m.zip", HERE], "env_vars": {"A": "1"}}
    one = make_engine(runtime_env=env)
    with pytest.raises(ConfigurationError, match="no Ray cluster"):
        asyncio.run(one.start({"w0": 1}))
    assert asked[0]["runtime_env"] == {"working_dir": HERE, "py_modules": ["s3://b/m.zip", HERE]}
    assert one._runtime_env_of_actors() == {"env_vars": {"A": "1"}}
    at_an_address = make_engine(runtime_env={"working_dir": "s3://b/w.zip"})
    with pytest.raises(ConfigurationError, match="no Ray cluster"):
        asyncio.run(at_an_address.start({"w0": 1}))
    assert "runtime_env" not in asked[1]
    assert at_an_address._runtime_env_of_actors() == {"working_dir": "s3://b/w.zip"}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ConfigurationError, match="Ray is connected already: pass it there"):
        asyncio.run(one.start({"w0": 1}))


@pytest.mark.parametrize(("works_s", "answered"), [(100.0, True), (1.0, False)])
def test_an_actor_that_was_back_for_long_may_be_lost_once_more_and_one_that_dies_at_once_is_not_back(
    monkeypatch: pytest.MonkeyPatch, works_s: float, answered: bool
) -> None:
    now, losses = [0.0], [0]

    async def ask(actor: Any, method: str, payload: str) -> str:
        if losses[0] >= 9:
            return "answer"
        losses[0] += 1
        now[0] += works_s
        raise RayActorError(error_msg="the node is gone")

    async def is_back(worker: str, actor: Any, within_s: float) -> None:
        now[0] += 8.0

    async def at_once(seconds: float) -> None: ...

    one = make_engine(recover_s=30.0)
    one._actors["w0"], one._concurrency = "an actor", {"w0": 1}
    monkeypatch.setattr(one, "_ask", ask)
    monkeypatch.setattr(one, "_return_of", is_back)
    monkeypatch.setattr("asyndbt_dspy.engines.ray.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("asyndbt_dspy.engines.ray.asyncio.sleep", at_once)
    if answered:
        assert asyncio.run(one.call("w0", "run", "{}")) == "answer"
    else:
        with pytest.raises(WorkerFailedError, match="did not come back within 30 s"):
            asyncio.run(one.call("w0", "run", "{}"))
        assert losses[0] < 9
