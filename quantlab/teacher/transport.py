"""One request over HTTP: the key, the client, what can come back, and what each of it means.

Built on `openai.AsyncOpenAI` with its own retries off, because an attempt has to be in the ledger before it is sent.
Every request has a connection of its own: on a kept-alive one a server that answers twice would answer the next
request with the last one's text.

What is known of the money: an answer that came completely is paid. A refusal (429, 5xx) and a connection that was never
made are not. Everything between (no answer in time, a reset, an answer cut short) is uncertain.
"""

from __future__ import annotations

import asyncio
import contextvars
import email.utils
import ipaddress
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from quantlab.errors import DataError, MachineError, QuantlabError
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.budget import Fate
from quantlab.teacher.replies import join_events, message_text
from quantlab.textfile import MARK, parse_json

GATEWAY_TIMEOUTS = (408, 504, 524)  # somebody gave up waiting; what stood behind may have gone on
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
CONNECT_SECONDS = 10.0
CHARACTERS = 300  # of a server's complaint that are passed on


@dataclass
class Slot:
    """Follows one request out: `out` once its first byte may have left. `leaving` is told right before."""

    leaving: Callable[[], Awaitable[None]]
    out: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. With `text` a complete answer, otherwise a `fault` and its `fate`.
    `wait`: seconds that the server asks for. `refusal`: the request itself is refused, and why;
    `fatal`: every request would be; `broke`: the account has no money left."""

    fate: Fate
    fault: str = ""
    text: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish: str = ""
    wait: float | None = None
    status: int = 0
    refusal: str = ""
    fatal: QuantlabError | None = None
    broke: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)


_SLOT: contextvars.ContextVar[Slot | None] = contextvars.ContextVar("slot", default=None)


def find_key(endpoint: Endpoint) -> str:
    """The API key from the environment; servers on this machine need none.

    Raises:
        MachineError: the variable is not set, or holds something that no header can carry. Its value is not shown.
    """
    name = endpoint.api_key_env
    key = os.environ.get(name, "").strip()
    if not key:
        if is_loopback(endpoint):
            return "none"
        raise MachineError(
            f"no API key for {endpoint.endpoint}: the environment variable {name} is not set",
            hint=f"export {name}=…, or name another variable with api_key_env",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise MachineError(
            f"the environment variable {name} does not hold an API key", hint="is a line break in it?"
        )
    return key


def is_loopback(endpoint: Endpoint) -> bool:
    host = urlsplit(str(endpoint.endpoint)).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Api:
    """An endpoint and its key, for messages that must not show it. `client` is the SDK's, opened by whoever uses it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.client: Any = None
        self._key = find_key(endpoint)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.endpoint})"

    def scrub(self, text: str) -> str:
        """A server's words without the key, which some servers repeat, cut to a readable length."""
        if self._key != "none":
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:CHARACTERS]

    def settings(self) -> dict[str, Any]:
        return {"api_key": self._key, "base_url": self.endpoint.endpoint, "max_retries": 0}


def open_sync(endpoint: Endpoint) -> Api:
    """For the Batch API, which waits most of the time."""
    import openai

    api = Api(endpoint)
    http = openai.DefaultHttpx2Client(
        timeout=_timeout(endpoint), trust_env=not is_loopback(endpoint), follow_redirects=False
    )
    api.client = openai.OpenAI(http_client=http, **api.settings())
    return api


class Wire(Api):
    """An open client. `send` never raises for what a server or the network does."""

    def __init__(self, endpoint: Endpoint) -> None:
        import openai

        super().__init__(endpoint)
        http = openai.DefaultAsyncHttpx2Client(
            timeout=_timeout(endpoint),
            limits=_limits(),
            trust_env=not is_loopback(endpoint),  # a proxy has no business on this machine
            follow_redirects=False,
            event_hooks={"request": [_trace_request]},
        )
        self.client = openai.AsyncOpenAI(http_client=http, **self.settings())

    async def close(self) -> None:
        await self.client.close()

    async def send(self, body: Mapping[str, Any], slot: Slot) -> Outcome:
        """One attempt, over in `endpoint.timeout` seconds."""
        import openai

        _SLOT.set(slot)
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                raw = await self.client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
                text, kind = raw.http_response.text, raw.headers.get("content-type", "")
        except (TimeoutError, openai.APITimeoutError):
            return self._unanswered(slot, "timeout")
        except openai.APIStatusError as error:
            return refusal_of(error, self)
        except openai.APIConnectionError as error:
            return self._unanswered(slot, "reset" if slot.out else "no connection", error)
        except (openai.OpenAIError, ValueError, OSError):
            return self._unanswered(slot, "garbled")
        return read_completion(text, kind)

    def _unanswered(self, slot: Slot, fault: str, error: Exception | None = None) -> Outcome:
        why = type(error.__cause__).__name__ if error is not None and error.__cause__ is not None else ""
        return Outcome("uncertain" if slot.out else "refused", fault, hints={"why": why} if why else {})


def refusal_of(error: Any, api: Api) -> Outcome:
    """An `openai.APIStatusError` as an outcome."""
    status = int(error.status_code)
    said = api.scrub(str(error.message))
    wait = retry_after(error.response.headers)
    code = str(getattr(error, "code", "") or getattr(error, "type", "") or "")
    if status == 402 or (status == 429 and code in NO_MONEY):
        return Outcome("refused", str(status), status=status, broke=said)
    if status in GATEWAY_TIMEOUTS:
        return Outcome("uncertain", str(status), status=status, wait=wait)
    if status in (409, 425, 429) or status >= 500:
        return Outcome("refused", str(status), status=status, wait=wait)
    if status in (400, 413, 422):
        hints = {"param": str(getattr(error, "param", "") or "")}
        return Outcome("refused", str(status), status=status, refusal=f"{status}: {said}", hints=hints)
    return Outcome("refused", str(status), status=status, fatal=_fatal(status, said, api.endpoint))


def _fatal(status: int, said: str, endpoint: Endpoint) -> QuantlabError:
    where = endpoint.endpoint
    if status in (401, 403):
        return QuantlabError(
            f"{where} refused the API key ({status}): {said}",
            hint=f"is the key in the environment variable {endpoint.api_key_env} the right one, and may it use "
            f"{endpoint.model}?",
        )
    if status == 404:
        return QuantlabError(
            f"{where} knows no model {endpoint.model!r}, or is not the address of an API (404): {said}",
            hint="the address usually ends in /v1",
        )
    return QuantlabError(f"{where} answered with status {status}: {said}")


def _timeout(endpoint: Endpoint) -> Any:
    import httpx2

    return httpx2.Timeout(endpoint.timeout, connect=min(CONNECT_SECONDS, endpoint.timeout))


def _limits() -> Any:
    import httpx2

    return httpx2.Limits(max_connections=None, max_keepalive_connections=0)


async def _trace_request(request: Any) -> None:
    slot = _SLOT.get()
    if slot is None:
        return

    async def trace(event: str, info: Any) -> None:
        if event.endswith(("send_request_headers.started", "send_connection_init.started")):
            slot.out = True
            await slot.leaving()

    request.extensions["trace"] = trace


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait from `retry-after-ms` or `Retry-After` (seconds or an HTTP date), None when neither says."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    try:
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
    except (OverflowError, ValueError):
        return None


def read_completion(text: str, content_type: str = "") -> Outcome:
    """A body of status 200 as an outcome: JSON, or server-sent events from servers that only stream."""
    try:
        streamed = "event-stream" in content_type
        body = join_events(text) if streamed else parse_json(text.lstrip(MARK), "the answer")
    except (DataError, ValueError):
        return Outcome("uncertain", "garbled")
    return outcome_of(body)


def outcome_of(body: Any) -> Outcome:
    """A completion, which came whole in whatever way, as an outcome."""
    inputs, outputs = _usage(body)
    try:
        choice = body["choices"][0]
        content = message_text(choice["message"])
    except (KeyError, IndexError, TypeError):
        content = None
    if content is None:
        fate: Fate = "uncertain" if inputs is None or outputs is None else "paid"
        return Outcome(fate, "no answer in it", None, inputs, outputs)
    content = content.encode(
        "utf-8", "replace"
    ).decode()  # halves of surrogate pairs are valid JSON, but no text
    return Outcome("paid", "", content, inputs, outputs, str(choice.get("finish_reason") or ""))


def _usage(body: Any) -> tuple[int | None, int | None]:
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None, None
    found = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    counts = [n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 else None for n in found]
    return counts[0], counts[1]
