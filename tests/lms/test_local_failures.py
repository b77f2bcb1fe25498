"""That nobody waits for ever: answers without a choice, and failures of the engine's thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import dspy
import pytest
from dspy.lm15 import ServerError
from local_tiny import object_format, request, scheduler_of, tiny_lm


class OneValue(dspy.Signature):
    """Say what is left to say."""

    question: str = dspy.InputField()
    label: Literal["only"] = dspy.OutputField()


@pytest.fixture
def lm() -> Iterator[dspy.LM]:
    made = tiny_lm(num_retries=0)
    with dspy.context(lm=made, adapter=dspy.JSONAdapter()):
        yield made
    made.engine.close()


def test_an_answer_that_is_forced_whole_needs_no_pass(lm: dspy.LM) -> None:
    only = object_format(label={"const": "only"}, sure={"type": "boolean", "const": True})
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(lm, request("?", response_format=only))]
        waiting.append(pool.submit(asyncio.run, lm.acall(request("?", response_format=only))))
        responses = [future.result(timeout=60) for future in waiting]
    for response in responses:
        assert json.loads(response.text) == {"label": "only", "sure": True}
        assert response.finish_reason == "stop"
    assert scheduler_of(lm).passes == 0
    assert dspy.Predict(OneValue)(question="?").label == "only"


def test_a_job_that_cannot_begin_is_settled(lm: dspy.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ids: Any) -> Any:
        raise MemoryError("no tree")

    with monkeypatch.context() as broken, ThreadPoolExecutor(1) as pool:
        broken.setattr(scheduler_of(lm).cache, "match", fail)
        with pytest.raises(ServerError, match="no tree"):
            pool.submit(lm.engine.complete, request("first")).result(timeout=60)
    assert lm(request("second", max_tokens=2)).usage.output_tokens <= 2


def test_no_request_comes_in_while_a_failed_thread_clears_up(
    lm: dspy.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_of(lm)
    clear = scheduler.cache.clear
    open_to_others: list[bool] = []

    def clear_and_look() -> None:
        # `submit` takes this lock: a request that gets it now would be run by a new thread on state that goes.
        look = threading.Thread(
            target=lambda: open_to_others.append(scheduler._condition.acquire(blocking=False))
        )
        look.start()
        look.join()
        clear()

    def fail(planned: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(scheduler.cache, "clear", clear_and_look)
        broken.setattr(scheduler, "_run", fail)
        with pytest.raises(ServerError, match="no memory"):
            lm.engine.complete(request("first"))
    assert open_to_others == [False]
    assert lm(request("second", max_tokens=2)).usage.output_tokens <= 2
