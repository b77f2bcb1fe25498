"""The loopback provider: what it answers, how it fails, and that it counts right."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from decimal import Decimal
from typing import Any

import pytest
from metering import until

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.testing.provider import Call, Fault, Provider, count_tokens, most_in_window


def ask(
    provider: Provider, *, timeout: float = 5.0, key: str = "k", **body: Any
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request over a fresh connection."""
    host = provider.url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=timeout)
    text = json.dumps({"model": "m", "messages": [{"role": "user", "content": "one two"}], **body})
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", text, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    finally:
        connection.close()


def test_it_answers_counts_and_bills() -> None:
    prices = {"prompt_dollars_per_million": 100.0, "completion_dollars_per_million": 1000.0}
    with Provider(lambda messages: messages[-1]["content"] + " three", **prices) as provider:
        status, _, text = ask(provider, model="m1", key="k1")
        _, _, cut = ask(provider, max_tokens=2)
    body = json.loads(text)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "one two three")
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    assert json.loads(cut)["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "one two"},
        "finish_reason": "length",
    }
    assert [call.delivered for call in provider.calls] == [True, True]
    assert provider.tokens == 9 + 8
    assert provider.dollars == Decimal("0.0062")
    assert [call.number for call in provider.seen(model="m1", key="k1")] == [0]


@pytest.mark.parametrize("kind", ["broken_json", "cut", "never"])
def test_faults_that_are_billed_but_bring_no_answer(kind: Any) -> None:
    with Provider(fault=lambda call: Fault(kind)) as provider:
        if kind == "broken_json":
            status, _, text = ask(provider)
            assert status == 200
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)
        else:
            expected = http.client.IncompleteRead if kind == "cut" else socket.timeout
            with pytest.raises(expected):
                ask(provider, timeout=0.3)
        assert provider.faults() == {kind: 1}
        assert provider.tokens > 0
        assert not provider.calls[0].delivered


def test_an_error_status_costs_nothing_and_may_ask_for_a_pause() -> None:
    with Provider(fault=lambda call: Fault("status", status=429, retry_after_s=1.5)) as provider:
        status, headers, text = ask(provider)
    assert (status, headers["retry-after"]) == (429, "1.5")
    assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"
    assert (provider.attempts, provider.tokens) == (1, 0)


def test_faults_are_scripted_by_the_request() -> None:
    def fault(call: Call) -> Fault:
        return Fault("status", status=503) if call.model == "bad" and call.number < 2 else Fault()

    with Provider(fault=fault) as provider:
        statuses = [ask(provider, model=model)[0] for model in ("good", "bad", "bad")]
        provider.dead.add("k")
        statuses.append(ask(provider)[0])
    assert statuses == [200, 503, 200, 401]


def test_it_can_be_slow_and_serve_others_meanwhile() -> None:
    def fault(call: Call) -> Fault:
        return Fault("slow", seconds=0.4) if call.number == 0 else Fault()

    async def run() -> list[float]:
        start_s = time.monotonic()

        async def one() -> float:
            await asyncio.to_thread(ask, provider)
            return time.monotonic() - start_s

        first = asyncio.ensure_future(one())
        await until(lambda: provider.attempts)
        return [await one(), await first]

    with Provider(fault=fault) as provider:
        quick_s, slow_s = asyncio.run(run())
    assert quick_s < slow_s
    assert slow_s >= 0.4
    assert provider.most_in_flight == 2


def test_it_can_keep_a_limit_of_its_own() -> None:
    clock = iter([0.0, 1.0, 2.0, 61.0])
    with Provider(requests_per_window=(2, 60.0), clock=lambda: next(clock)) as provider:
        answers = [ask(provider) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 429, 200]
    assert float(answers[2][1]["retry-after"]) == 58.0


def test_one_connection_serves_many_requests() -> None:
    with Provider() as provider:
        host = provider.url.removeprefix("http://").removesuffix("/v1")
        connection = http.client.HTTPConnection(host, timeout=5)
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", json.dumps({"messages": []}))
            assert connection.getresponse().read()
        connection.close()
    assert provider.attempts == 3


def test_stopping_frees_silent_connections() -> None:
    provider = Provider(fault=lambda call: Fault("never")).start()
    host, port = provider.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        text = b'{"messages": []}'
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 16\r\n\r\n" + text)
        while not provider.attempts:
            time.sleep(0.005)
        start_s = time.monotonic()
        provider.stop()
        assert connection.recv(100) == b""
    assert time.monotonic() - start_s < 3


def test_windows_and_tokens() -> None:
    assert most_in_window([0, 0.5, 0.99, 1.0, 1.2], 1.0) == 4
    assert most_in_window([], 1.0) == 0
    assert count_tokens([{"content": "a b"}, {"content": [{"type": "text", "text": "c"}]}]) == 11
    with pytest.raises(ConfigurationError, match="latency_s=-1 must be >= 0"):
        Provider(latency_s=-1)
