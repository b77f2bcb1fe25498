"""What happens to attempts that are cancelled, and to those that are under way when the run is over."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import dspy
import pytest
from metering import PRICE, call_many, lm_on, until
from virtual_loop import run_virtually

from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.testing.provider import Fault, Provider

both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])


def outcome_in_thread(lm: dspy.LM) -> None:
    with contextlib.suppress(Exception):
        lm("question")


@both_engines
def test_a_cancelled_call_is_counted_by_both_sides_and_charged(engine: str) -> None:
    """Cancelled at once, early and in the middle."""
    with Provider(fault=lambda call: Fault("slow", seconds=1.5) if call.number >= 9 else Fault()) as provider:
        ledger = Ledger()
        lm = metered(lm_on(provider, engine), ledger=ledger, worker="a", prices=PRICE)

        async def run() -> None:
            await asyncio.gather(
                *[lm.acall(f"warm {number}") for number in range(9)]
            )  # clients and pools exist
            tasks = [asyncio.ensure_future(lm.acall(f"question {number}")) for number in range(9)]
            for number, task in enumerate(tasks):
                asyncio.get_running_loop().call_later((number % 3) * 0.15, task.cancel)
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(run())
        line = ledger.line("a")
        assert (line.attempts, line.answers) == (provider.attempts, 9)
        assert line.cut == provider.attempts - 9 > 0
        assert line.cut_tokens >= sum(call.tokens for call in provider.calls[9:])
        assert ledger.spent.reserved_tokens == 0


def test_what_is_cancelled_on_a_loop_that_stood_still_still_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its time went by while the loop did not run: it needs turns of the loop, not seconds."""
    monkeypatch.setattr("asyndbt_dspy.lms.metered._SEND_GRACE_S", 0.0)
    sent: list[str] = []

    class Unused:
        def complete(self, request: Any) -> Any:
            raise NotImplementedError

    class Slow:
        async def complete(self, request: Any) -> Any:
            for _ in range(12):  # to connect, to shake hands, to write
                await asyncio.sleep(0.001)
            sent.append(request.messages[-1].text)
            await asyncio.Event().wait()

    ledger = Ledger()
    lm = metered(
        dspy.LM("slow", engine=Unused(), async_engine=Slow(), cache=False), ledger=ledger, worker="a"
    )

    async def run() -> None:
        task = asyncio.ensure_future(lm.acall("question"))
        while not ledger.line("a").attempts:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(run())
    assert sent == ["question"]
    assert (ledger.line("a").attempts, ledger.line("a").cut) == (1, 1)


@both_engines
@pytest.mark.parametrize("hangs", [False, True])
def test_a_closed_ledger_lets_nothing_out_and_waits_a_second_for_what_is_under_way(
    engine: str, hangs: bool
) -> None:
    """A call in a thread, which nobody can cancel."""
    with Provider(fault=lambda call: Fault("never") if hangs else Fault("slow", seconds=0.3)) as provider:
        ledger = Ledger()
        lm = metered(lm_on(provider, engine), ledger=ledger, worker="a", prices=PRICE)
        thread = threading.Thread(target=outcome_in_thread, args=(lm,), daemon=True)

        async def run() -> float:
            thread.start()
            await until(lambda: provider.attempts)
            begun = asyncio.get_running_loop().time()
            await ledger.aclose()
            return asyncio.get_running_loop().time() - begun

        took_s = asyncio.run(run())
        line = ledger.line("a")
        assert (line.attempts, line.answers, line.in_flight) == ((1, 0, 1) if hangs else (1, 1, 0))
        assert 0.9 < took_s < 1.9 if hangs else took_s < 0.9
        assert asyncio.run(call_many(lm, 3, in_flight=3)) == {"budget": 3}
        assert provider.attempts == 1
    thread.join(12)
