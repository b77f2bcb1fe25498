"""An OpenAI-compatible HTTP server on loopback, with faults on demand and a count of everything that it saw.

A real socket and a real HTTP client on the other side: what a test shows here holds for retries, cut connections and
bills as they are on the wire. It runs in a thread with an event loop of its own, so that programs in threads, tasks
of any loop, and other processes can all call it. Standard library only.

    with Provider(answer=lambda messages: "[[ ## label ## ]]\\nyes") as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal

from asyndbt_dspy.errors import ConfigurationError

Messages = list[dict[str, Any]]
FaultKind = Literal["none", "slow", "status", "broken_json", "cut", "never"]
_BILLED_FAULTS = ("none", "slow", "broken_json", "cut", "never")
_MAX_BODY_BYTES = 64 * 2**20
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


@dataclass(frozen=True)
class Fault:
    """How the provider treats one request.

    Attributes:
        kind: ``none`` answers; ``slow`` answers after ``seconds``; ``status`` answers with an error status;
            ``broken_json`` answers 200 with half of the body; ``cut`` closes the connection in the middle of the body;
            ``never`` reads the request and stays silent until the client leaves or the server stops.
        seconds: Delay before the answer, >= 0; for any kind.
        status: HTTP status of ``status``, in [400, 599].
        retry_after_s: Sent as ``retry-after`` with ``status``; ``None`` sends none.
        code: The provider's own error code of ``status``; ``None`` picks the usual one.
        message: What ``status`` says in words.
    """

    kind: FaultKind = "none"
    seconds: float = 0.0
    status: int = 500
    retry_after_s: float | None = None
    code: str | None = None
    message: str = "scripted fault"

    @property
    def is_billed(self) -> bool:
        """Whether tokens were generated: an error status costs nothing, everything else the full price."""
        return self.kind in _BILLED_FAULTS


@dataclass(frozen=True)
class Call:
    """One request that reached the provider.

    Attributes:
        number: 0, 1, 2, … in order of arrival.
        at_s: Arrival by the provider's clock, seconds.
        model, key: What the client asked for, and its API key (without ``Bearer``).
        prompt_tokens, completion_tokens: As billed; 0 where the fault is not billed.
        fault: How it was treated.
        delivered: Whether a complete, valid answer was handed to the operating system.
        body: The request's JSON.
    """

    number: int
    at_s: float
    model: str
    key: str
    fault: Fault
    prompt_tokens: int = 0
    completion_tokens: int = 0
    delivered: bool = False
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Provider:
    """The server; use it as a context manager.

    Args:
        answer: ``messages -> text``.
        fault: ``Call -> Fault``: how to treat a request (``Call`` has its number, model, key and body).
        prompt_dollars_per_million, completion_dollars_per_million: Prices of the bill.
        latency_s: Delay of every answer, >= 0.
        requests_per_window: (count, seconds): more requests than that in any window are answered 429.
        keep_bodies: Keep the requests' JSON in ``calls`` (off for long loads).
        clock: Seconds since any fixed point.

    Attributes:
        url: ``http://127.0.0.1:<port>/v1``.
        calls: Every request, in order of arrival.
        most_in_flight: The largest number of requests in progress at a time.
        dead: Models, or keys, that are answered 401 from now on.
    """

    def __init__(
        self,
        answer: Callable[[Messages], str] = lambda messages: "ok",
        *,
        fault: Callable[[Call], Fault] = lambda call: Fault(),
        prompt_dollars_per_million: float = 0.0,
        completion_dollars_per_million: float = 0.0,
        latency_s: float = 0.0,
        requests_per_window: tuple[int, float] | None = None,
        keep_bodies: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if latency_s < 0:
            raise ConfigurationError(f"latency_s={latency_s} must be >= 0")
        self.answer = answer
        self.fault = fault
        self.latency_s = latency_s
        self.requests_per_window = requests_per_window
        self.keep_bodies = keep_bodies
        self.clock = clock
        self.url = ""
        self.calls: list[Call] = []
        self.most_in_flight = 0
        self.dead: set[str] = set()
        self._prices = [
            Decimal(str(price)) / 10**6
            for price in (prompt_dollars_per_million, completion_dollars_per_million)
        ]
        self._in_flight = 0
        self._window: deque[float] = deque()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.base_events.Server | None = None
        self._thread: threading.Thread | None = None
        self._connections: set[asyncio.Task[None]] = set()

    # -- life

    def start(self) -> Provider:
        """Listen on a free port of 127.0.0.1."""
        ready = threading.Event()

        def serve() -> None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(
                asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
            )
            ready.set()
            self._loop.run_forever()
            self._loop.run_until_complete(self._shut())
            self._loop.close()

        self._thread = threading.Thread(target=serve, name="loopback-provider", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the loopback provider did not start within 10 s")
        assert self._server is not None
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def stop(self) -> None:
        """Close every connection, silent ones included, and end the thread."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def __enter__(self) -> Provider:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def _shut(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # -- what it saw

    @property
    def attempts(self) -> int:
        return len(self.calls)

    @property
    def tokens(self) -> int:
        """Tokens billed, delivered or not."""
        return sum(call.tokens for call in self.seen())

    @property
    def dollars(self) -> Decimal:
        """The bill, exact."""
        return sum((self.price(call) for call in self.seen()), Decimal(0))

    def price(self, call: Call) -> Decimal:
        return call.prompt_tokens * self._prices[0] + call.completion_tokens * self._prices[1]

    def seen(self, *, model: str | None = None, key: str | None = None) -> list[Call]:
        """The requests so far, of one model or key if asked."""
        with self._lock:
            calls = list(self.calls)
        return [call for call in calls if model in (None, call.model) and key in (None, call.key)]

    def faults(self) -> Counter[str]:
        return Counter(call.fault.kind for call in self.seen())

    def most_in_window(self, seconds: float) -> int:
        """The largest number of requests that arrived in any window of this length."""
        return most_in_window([call.at_s for call in self.seen()], seconds)

    # -- HTTP

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that leaves in the middle is part of the play.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._request(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False ends the connection."""
        line = await reader.readline()
        if not line:
            return False
        headers = await _read_headers(reader)
        size = int(headers.get("content-length", "0"))
        if size > _MAX_BODY_BYTES:
            return False
        text = await reader.readexactly(size) if size else b"{}"
        if not line.split()[1].endswith(b"/chat/completions"):
            writer.write(_http(404, _error_body(404, f"no such path: {line!r}", None)))
            await writer.drain()
            return True
        body = json.loads(text)
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return await self._complete(body, headers, reader, writer)
        finally:
            with self._lock:
                self._in_flight -= 1

    async def _complete(
        self,
        body: dict[str, Any],
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        call = self._record(body, headers.get("authorization", "").removeprefix("Bearer "))
        fault = call.fault
        await asyncio.sleep(self.latency_s + fault.seconds)
        if fault.kind == "never":
            await reader.read()  # until the client closes its end
            return False
        if fault.kind == "status":
            extra = {} if fault.retry_after_s is None else {"retry-after": f"{fault.retry_after_s:g}"}
            body_bytes = _error_body(fault.status, fault.message, fault.code)
            writer.write(_http(fault.status, body_bytes, extra))
            await writer.drain()
            return True
        reply = self._reply(call, body)
        if fault.kind == "cut":
            head = _http(200, reply)
            writer.write(head[: len(head) - len(reply) // 2])
            await writer.drain()
            return False
        writer.write(_http(200, reply[: len(reply) // 2] if fault.kind == "broken_json" else reply))
        await writer.drain()
        if fault.kind in ("none", "slow"):
            with self._lock:
                self.calls[call.number] = replace(self.calls[call.number], delivered=True)
        return True

    def _record(self, body: dict[str, Any], key: str) -> Call:
        """Note the request, decide how to treat it, and bill it: a bill does not wait for the client."""
        now, model = self.clock(), str(body.get("model", ""))
        kept = body if self.keep_bodies else {}
        with self._lock:
            call = Call(len(self.calls), now, model, key, Fault(), body=body)
            fault = self._fault_of(call)
            if fault.is_billed:
                text = self.answer(body["messages"])
                prompt, completion = count_tokens(body["messages"]), _completion_tokens(text, body)
                call = replace(call, prompt_tokens=prompt, completion_tokens=completion)
            call = replace(call, fault=fault, body=kept)
            self.calls.append(call)
        return call

    def _fault_of(self, call: Call) -> Fault:
        if call.model in self.dead or call.key in self.dead:
            return Fault("status", status=401)
        if self.requests_per_window is not None:
            count, seconds = self.requests_per_window
            while self._window and self._window[0] <= call.at_s - seconds:
                self._window.popleft()
            if len(self._window) >= count:
                wait = self._window[0] + seconds - call.at_s
                return Fault("status", status=429, retry_after_s=wait)
            self._window.append(call.at_s)
        return self.fault(call)

    def _reply(self, call: Call, body: dict[str, Any]) -> bytes:
        text = self.answer(body["messages"])
        whole = _words(text)
        is_cut = call.completion_tokens < len(whole)
        message = {
            "role": "assistant",
            "content": " ".join(whole[: call.completion_tokens]) if is_cut else text,
        }
        return json.dumps(
            {
                "id": f"loopback-{call.number}",
                "object": "chat.completion",
                "created": 0,
                "model": call.model,
                "choices": [
                    {"index": 0, "message": message, "finish_reason": "length" if is_cut else "stop"}
                ],
                "usage": {
                    "prompt_tokens": call.prompt_tokens,
                    "completion_tokens": call.completion_tokens,
                    "total_tokens": call.tokens,
                },
            }
        ).encode()


def most_in_window(times_s: Sequence[float], seconds: float) -> int:
    """The largest number of ``times_s`` within any half-open window of this length."""
    ordered, first, most = sorted(times_s), 0, 0
    for last, at in enumerate(ordered):
        while ordered[first] <= at - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def count_tokens(messages: Messages) -> int:
    """Tokens of a prompt as this provider counts them: words and single marks, four more per message."""
    return sum(4 + len(_words(_text(message.get("content")))) for message in messages)


def _completion_tokens(text: str, body: Mapping[str, Any]) -> int:
    cap = body.get("max_completion_tokens") or body.get("max_tokens")
    count = max(1, len(_words(text)))
    return count if cap is None else min(count, int(cap))


def _words(text: str) -> list[str]:
    return text.split()


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content or () if isinstance(part, dict))


async def _read_headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _error_body(status: int, message: str, code: str | None) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return json.dumps(
        {"error": {"message": message, "type": kind, "code": code or _CODES.get(status)}}
    ).encode()


def _http(status: int, body: bytes, extra: Mapping[str, str] | None = None) -> bytes:
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(extra or {})}
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
