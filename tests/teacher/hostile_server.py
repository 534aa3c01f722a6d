"""An OpenAI-compatible server on loopback that misbehaves as told, and keeps its own books.

    with HostileServer({"429": 0.05, "hang": 0.01}) as server:
        ... endpoint=server.url ...
        server.arrivals

Faults before anything is generated, which cost nothing: `429` (bare), `429-after` (Retry-After as milliseconds, seconds
or a date in turn), `500`, `refuse` (the connection is closed unread). After an answer was generated, which is billed
but does not arrive: `hang`, `reset` (half of it, then RST), `truncated` (JSON that ends in the middle). Delivered
completely: `schema` (well-formed, but not what was asked), `twice` (the response is sent two times over), none.

Every answer names the hash of its messages, so that a test sees when one reached the wrong request. Tokens are counted
by `count`, the prompt's with 4 a message and 3 a request. The Batch API (`/files`, `/batches`) runs its lines through
the same books.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

UNPAID = ("429", "429-after", "500", "refuse")
UNDELIVERED = ("hang", "reset", "truncated")


def quarter(text: str) -> int:
    """A token for every three bytes: unlike the client's own guess."""
    return -(-len(text.encode()) // 3)


def fingerprint(messages: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Arrival:
    """One request as the server saw it. Times are of the monotonic clock."""

    at: float
    who: str
    fault: str
    input_tokens: int
    output_tokens: int = 0
    done: float = 0.0
    billed: bool = False
    delivered: bool = False


@dataclass
class Batch:
    """A batch and its file; `lines` are answered when it has been looked at `patience` times."""

    id: str
    file: str
    metadata: dict[str, str]
    looks: int = 0
    status: str = "validating"
    output: str | None = None
    error: str | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})


class HostileServer:
    """See the module. `answer(messages, body)` may replace the text, `content(text)` what the message holds; `raw`
    leaves characters unescaped in JSON, `line_end` ends the lines of a stream; `status` answers every request with one
    status; `refuses` names body parameters that get 400; `latency` seconds pass before each answer."""

    def __init__(
        self,
        faults: dict[str, float] | None = None,
        *,
        seed: int = 0,
        latency: float = 0.01,
        count: Callable[[str], int] = quarter,
        answer: Callable[[list[dict[str, str]], dict[str, Any]], str] | None = None,
        status: int | None = None,
        body: str | None = None,
        refuses: tuple[str, ...] = (),
        usage: bool = True,
        stream: bool = False,
        retry_after: str | None = None,
        content: Callable[[str], Any] | None = None,
        raw: bool = False,
        line_end: str = "\n",
    ) -> None:
        self.faults, self.latency, self.count, self.answer = faults or {}, latency, count, answer
        self.status, self.body, self.refuses, self.usage, self.stream = status, body, refuses, usage, stream
        self.retry_after, self.content, self.raw, self.line_end = retry_after, content, raw, line_end
        self.random = random.Random(seed)
        self.arrivals: list[Arrival] = []
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.flying = self.most_flying = 0
        self.files: dict[str, str] = {}
        self.batches: dict[str, Batch] = {}
        self.patience = 2
        self.lose_batch_reply = 0  # so many creations happen, but their answer is a 500
        self._turn = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> HostileServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    # -- the books --

    def billed(self) -> tuple[int, int, int]:
        """(answers, input tokens, output tokens) that were generated and delivered completely."""
        rows = [a for a in self.arrivals if a.delivered]
        return len(rows), sum(a.input_tokens for a in rows), sum(a.output_tokens for a in rows)

    def undelivered(self) -> tuple[int, int, int]:
        """(answers, input tokens, output tokens) that were generated and did not arrive."""
        rows = [a for a in self.arrivals if a.billed and not a.delivered]
        return len(rows), sum(a.input_tokens for a in rows), sum(a.output_tokens for a in rows)

    def delivered_per_request(self) -> Counter[str]:
        """How often each request was answered in a usable way."""
        return Counter(a.who for a in self.arrivals if a.delivered and a.fault != "schema")

    def most_in_window(self, period: float) -> tuple[int, int, int]:
        """The fullest window of `period` seconds: requests, tokens counted on arrival, tokens when answered."""
        arrived = sorted((a.at, a.input_tokens + a.output_tokens) for a in self.arrivals)
        finished = sorted((a.done, a.input_tokens + a.output_tokens) for a in self.arrivals if a.billed)
        return (
            _fullest([(at, 1) for at, _ in arrived], period),
            _fullest(arrived, period),
            _fullest(finished, period),
        )

    # -- HTTP --

    def _serve(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return False
        length = re.search(r"(?im)^content-length: (\d+)", head)
        raw = await reader.readexactly(int(length.group(1))) if length else b""
        method, path = head.split()[:2]
        self.paths.append(f"{method} {path}")
        self.headers.append(head)
        path = path.split("?")[0].removeprefix("/v1")
        if path == "/chat/completions":
            self.flying += 1
            self.most_flying = max(self.most_flying, self.flying)
            try:
                return await self._chat(json.loads(raw), writer)
            finally:
                self.flying -= 1
        status, reply = self._batch_api(method, path, head, raw)
        await _write(writer, status, reply)
        return True

    async def _chat(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        self.bodies.append(body)
        arrival = self._arrive(body)
        fault = arrival.fault
        if self.status is not None:
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            await _write(writer, self.status, self.body or _error("told to"), headers)
            return True
        refused = [name for name in self.refuses if name in body]
        if refused:
            text = _error(f"Unsupported parameter: {refused[0]!r}. Use 'max_completion_tokens'.", refused[0])
            if refused[0] != "max_tokens":
                text = _error(f"Unsupported parameter: {refused[0]!r}", refused[0])
            await _write(writer, 400, text)
            return True
        if fault in UNPAID:
            return await self._unpaid(fault, writer)
        await asyncio.sleep(self.latency)
        reply = self._complete(arrival, body)
        arrival.billed, arrival.done = True, time.monotonic()
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            _cut_off(writer, _response(200, reply)[: len(reply) // 2])
            return False
        if fault == "truncated":
            await _write(writer, 200, reply[: len(reply) // 2])
            return True
        kind = "text/event-stream" if self.stream else "application/json"
        if self.stream:
            reply = _events(reply, self._dumps).replace("\n", self.line_end)
        message = _response(200, reply, {"Content-Type": kind})
        arrival.delivered = True  # before the client can act on it
        writer.write(message * 2 if fault == "twice" else message)
        await writer.drain()
        return True

    def _arrive(self, body: dict[str, Any]) -> Arrival:
        prompt = sum(self.count(m["content"]) + 4 for m in body["messages"]) + 3
        arrival = Arrival(time.monotonic(), fingerprint(body["messages"]), self._pick(), prompt)
        self.arrivals.append(arrival)
        return arrival

    def _pick(self) -> str:
        draw = self.random.random()
        for fault, share in self.faults.items():
            draw -= share
            if draw < 0:
                return fault
        return ""

    async def _unpaid(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault == "refuse":
            _cut_off(writer, b"")
            return False
        headers = {}
        if fault == "429-after":
            self._turn += 1
            date = email.utils.formatdate(time.time() + 1, usegmt=True)
            headers = [{"retry-after-ms": "120"}, {"Retry-After": "0.1"}, {"Retry-After": date}][
                0 if self._turn % 9 < 6 else 1 if self._turn % 9 < 8 else 2
            ]
        await _write(writer, 500 if fault == "500" else 429, _error(f"fault {fault}"), headers)
        return True

    def _complete(self, arrival: Arrival, body: dict[str, Any]) -> str:
        if self.answer is not None:
            text = self.answer(body["messages"], body)
        elif arrival.fault == "schema":
            text = '{"wrong": tru'
        else:
            text = json.dumps({"for": arrival.who, "padding": "x" * self.random.randint(20, 44)})
        limit = body.get("max_tokens", body.get("max_completion_tokens", 10**9))
        arrival.output_tokens = min(self.count(text), limit)
        usage = {
            "prompt_tokens": arrival.input_tokens,
            "completion_tokens": arrival.output_tokens,
            "total_tokens": arrival.input_tokens + arrival.output_tokens,
        }
        content = text if self.content is None else self.content(text)
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        whole = {"id": f"chatcmpl-{len(self.arrivals)}", "object": "chat.completion", "created": 0}
        whole |= {"model": body["model"], "choices": [choice]}
        return self._dumps(whole | ({"usage": usage} if self.usage else {}))

    def _dumps(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=not self.raw)

    # -- the Batch API --

    def _batch_api(self, method: str, path: str, head: str, raw: bytes) -> tuple[int, str]:
        if (method, path) == ("POST", "/files"):
            name = f"file-{len(self.files)}"
            self.files[name] = _form_file(head, raw)
            return 200, json.dumps(_file_object(name))
        if (method, path) == ("POST", "/batches"):
            asked = json.loads(raw)
            batch = Batch(f"batch_{len(self.batches)}", asked["input_file_id"], asked.get("metadata") or {})
            batch.counts["total"] = len(self.files[batch.file].split("\n")) - 1
            self.batches[batch.id] = batch
            if self.lose_batch_reply:
                self.lose_batch_reply -= 1
                return 500, _error("created, but nobody will know")
            return 200, json.dumps(_batch_object(batch))
        if (method, path) == ("GET", "/batches"):
            rows = [_batch_object(batch) for batch in reversed(self.batches.values())]
            return 200, json.dumps({"object": "list", "data": rows, "has_more": False})
        if method == "GET" and path.startswith("/batches/"):
            batch = self.batches[path.split("/")[2]]
            self._look(batch)
            return 200, json.dumps(_batch_object(batch))
        if method == "GET" and path.endswith("/content"):
            return 200, self.files[path.split("/")[2]]
        return 404, _error(f"nothing at {path}")

    def _look(self, batch: Batch) -> None:
        batch.looks += 1
        if batch.status in ("completed", "expired", "failed"):
            return
        batch.status = "in_progress"
        if batch.looks < self.patience:
            return
        good, bad = [], []
        for line in self.files[batch.file].removesuffix("\n").split("\n"):
            row = json.loads(line)
            arrival = self._arrive(row["body"])
            answered = {"id": f"batch_req_{len(self.arrivals)}", "custom_id": row["custom_id"], "error": None}
            if arrival.fault in ("500", "429"):
                reply = {
                    "status_code": int(arrival.fault),
                    "request_id": "r",
                    "body": json.loads(_error("x")),
                }
                bad.append(json.dumps(answered | {"response": reply}))
                continue
            if arrival.fault == "refuse":
                code = {"code": "batch_expired", "message": "This request could not be executed in time."}
                bad.append(json.dumps(answered | {"response": None, "error": code}))
                continue
            arrival.billed = arrival.delivered = True
            body = json.loads(self._complete(arrival, row["body"]))
            good.append(
                self._dumps(answered | {"response": {"status_code": 200, "request_id": "r", "body": body}})
            )
        self.random.shuffle(good)
        batch.output, batch.error = f"{batch.file}-out", f"{batch.file}-err"
        self.files[batch.output], self.files[batch.error] = "\n".join(good) + "\n", "\n".join(bad)
        batch.counts |= {"completed": len(good), "failed": len(bad)}
        batch.status = "completed"


def _fullest(rows: list[tuple[float, int]], period: float) -> int:
    most = total = start = 0
    for at, amount in rows:
        total += amount
        while rows[start][0] <= at - period:
            total -= rows[start][1]
            start += 1
        most = max(most, total)
    return most


def _error(message: str, param: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": "test", "param": param, "code": None}})


def _response(status: int, body: str, headers: dict[str, str] | None = None) -> bytes:
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body.encode()))} | (headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n{body}".encode()


async def _write(
    writer: asyncio.StreamWriter, status: int, body: str, headers: dict[str, str] | None = None
) -> None:
    writer.write(_response(status, body, headers))
    await writer.drain()


def _cut_off(writer: asyncio.StreamWriter, first: bytes) -> None:
    """Send a part, then RST instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if first:
        writer.write(first)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _events(reply: str, dumps: Callable[[Any], str] = json.dumps) -> str:
    whole = json.loads(reply)
    content = whole["choices"][0]["message"]["content"]
    parts = (
        _pieces(content)
        if isinstance(content, str)
        else [[piece] for part in content for piece in _split(part)]
    )
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]} for part in parts
    ]
    last: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    chunks.append(last | ({"usage": whole["usage"]} if "usage" in whole else {}))
    return "".join(f"data: {dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def _pieces(text: str) -> list[str]:
    return [text[i : i + 7] for i in range(0, len(text), 7)] or [""]


def _split(part: Any) -> list[Any]:
    """A content part as the parts that chunks of a stream hold."""
    if isinstance(part, str):
        return list(_pieces(part))
    if isinstance(part.get("text"), str):
        return [part | {"text": piece} for piece in _pieces(part["text"])]
    return [part]


def _form_file(head: str, raw: bytes) -> str:
    """The part named `file` of a multipart form."""
    found = re.search(r"(?i)boundary=([^\s;]+)", head)
    assert found is not None
    boundary = found.group(1).strip('"').encode()
    for part in raw.split(b"--" + boundary):
        if b'name="file"' in part:
            return part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n").decode()
    raise AssertionError("no file in the form")


def _file_object(name: str) -> dict[str, Any]:
    kind = {"object": "file", "bytes": 1, "created_at": 0, "filename": "x.jsonl"}
    return {"id": name, "purpose": "batch", "status": "processed"} | kind


def _batch_object(batch: Batch) -> dict[str, Any]:
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "errors": None,
        "input_file_id": batch.file,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output,
        "error_file_id": batch.error,
        "created_at": 0,
        "request_counts": batch.counts,
        "metadata": batch.metadata,
    }
