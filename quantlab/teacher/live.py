"""The live transport: one loop over the requests that are due.

A request is sent when three agree: the concurrency, which grows by one for every answer until the first trouble, by
one for every round of answers after it, and halves on 429 and timeouts (additive increase, multiplicative decrease, as
in TCP); the budgets in the ledger (`quantlab.teacher.budget`); and a pause that a server asked for with Retry-After,
which holds for all requests. A failed attempt is repeated after a random part of an exponentially growing time ("full
jitter"), `attempts` times at most. An answer is committed to the ledger before it is counted or returned.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from quantlab.errors import QuantlabError
from quantlab.progress import Progress
from quantlab.teacher.budget import mark_sent, now, reserve
from quantlab.teacher.job import Job
from quantlab.teacher.transport import Outcome, Slot, Wire

T = TypeVar("T")
LONGEST_PAUSE = 600.0  # seconds; a server that asks for more is asked again in another run
HOPELESS = 5  # requests refused as malformed, with no answer so far, after which the rest is not tried
GRACE = 15.0  # seconds beyond the timeout for which an attempt holds its request
LOOK_AGAIN = 0.25  # seconds between two looks at what other processes of the ledger do
LATE = 0.05  # seconds after its reservation from which on a request counts as sent later


class Throttle:
    """The adaptive number of requests in flight."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling, self.limit = ceiling, float(min(4, ceiling))
        self._steady, self._cut_at = False, 0.0

    def success(self) -> None:
        step = 1.0 / self.limit if self._steady else 1.0
        self.limit = min(self.limit + step, float(self.ceiling))

    def trouble(self, sent_at: float) -> None:
        """Halve, once for all requests that were in flight together."""
        if sent_at >= self._cut_at:
            self.limit = max(self.limit / 2, 1.0)
            self._cut_at = time.monotonic()
        self._steady = True


@dataclass
class _Item:
    key: str
    tries: int = 0
    bare: bool = False  # response_format was refused: asked without it
    why: str = ""


class Live:
    """The loop. Everything in it runs in one thread; the ledger's writes wait in another."""

    def __init__(self, job: Job, todo: Sequence[str], progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.endpoint = job.endpoint
        self.ready = deque(_Item(key) for key in todo)
        self.later: list[tuple[float, int, _Item]] = []
        self.flying: set[asyncio.Task[None]] = set()
        self.throttle = Throttle(self.endpoint.concurrency)
        self.paused_until = 0.0
        self.fatal: QuantlabError | None = None
        self.refusals = 0
        self.dropped: dict[str, str] = {}  # parameters that this server refuses → their other name, or ""
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self.order = 0

    async def run(self) -> None:
        self.wire = Wire(self.endpoint)
        try:
            while self._more():
                waited = await self._start_some()
                await self._settle_some(waited)
        finally:
            for task in self.flying:
                task.cancel()
            await asyncio.gather(*self.flying, return_exceptions=True)
            self.disk.shutdown(wait=True)
            self.job.close_unsent()
            await self.wire.close()
        if self.fatal is not None:
            raise self.fatal

    def _more(self) -> bool:
        if self.fatal is not None or self.job.stopped is not None:
            return bool(self.flying)
        return bool(self.ready or self.later or self.flying)

    async def _start_some(self) -> float | None:
        """Send what may go now. Returns for how many seconds nothing else can, None: until something ends."""
        while self.fatal is None and self.job.stopped is None:
            at = time.monotonic()
            while self.later and self.later[0][0] <= at:
                self.ready.append(heapq.heappop(self.later)[2])
            if not self.ready:
                return self.later[0][0] - at if self.later else None
            if len(self.flying) >= int(self.throttle.limit):
                return None
            if at < self.paused_until:
                return self.paused_until - at
            item = self.ready.popleft()
            ask = self.job.ask(item.key, self.endpoint.timeout + GRACE)
            reply = await self._disk(reserve, self.job.ledger, ask, self.job.limits)
            if reply.kind == "go":
                task = asyncio.create_task(self._one(item, reply.attempt, now()))
                self.flying.add(task)
            elif reply.kind == "known" and reply.answer is not None:
                self.job.take_recorded(item.key, reply.answer)
            elif reply.kind == "busy":
                self._postpone(item, min(max(reply.seconds, 0.05), LOOK_AGAIN))
            elif reply.kind == "wait":
                self.ready.appendleft(item)
                return min(reply.seconds, LOOK_AGAIN)
            else:
                self.job.stop(reply.why)
            for task in [task for task in self.flying if task.done()]:
                self._collect(task)
        return None

    async def _settle_some(self, seconds: float | None) -> None:
        if not self.flying:
            if seconds is not None:
                await asyncio.sleep(seconds)
            return
        done, _ = await asyncio.wait(self.flying, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._collect(task)

    def _collect(self, task: asyncio.Task[None]) -> None:
        self.flying.discard(task)
        task.result()  # an error of ours ends the whole

    async def _disk(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run what waits for the disk in its thread, to its end even when this task is cancelled."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self.disk, functools.partial(work, *arguments)))

    async def _one(self, item: _Item, attempt: int, reserved: float) -> None:
        """One attempt from sending to the ledger."""
        job, started = self.job, time.monotonic()

        async def leaving() -> None:
            if now() - reserved > LATE:
                await self._disk(mark_sent, job.ledger, attempt)

        slot = Slot(leaving)
        try:
            outcome = await self.wire.send(self._body(item), slot)
        except BaseException:
            job.lost(item.key, attempt, "uncertain" if slot.out else "refused", "interrupted", 0.0)
            raise
        seconds = time.monotonic() - started
        why: str | None = outcome.fault
        if outcome.text is not None:
            arguments = (outcome.input_tokens, outcome.output_tokens, outcome.finish, seconds)
            why = await self._disk(job.answered, item.key, attempt, outcome.text, *arguments)
            self.throttle.success()
            if why is None:
                self._learned(item)
                return
            why = f"unusable: {why}"
        elif outcome.fate == "paid":
            counts = (outcome.input_tokens or 0, outcome.output_tokens or 0)
            await self._disk(job.empty, item.key, attempt, *counts, outcome.fault, seconds)
        else:
            await self._disk(job.lost, item.key, attempt, outcome.fate, outcome.fault, seconds)
        self._again(item, outcome, str(why), started)

    def _learned(self, item: _Item) -> None:
        self.refusals = -1  # the endpoint answers: from now on a refusal concerns its request alone
        if item.bare and "response_format" not in self.dropped:
            self.dropped["response_format"] = ""
            self.progress.note(
                f"{self.endpoint.model}: this server refuses response_format; asked without it"
            )

    def _again(self, item: _Item, outcome: Outcome, why: str, started: float) -> None:
        """After a failed attempt: give up, or when to try again."""
        if outcome.fatal is not None:
            self.fatal = self.fatal or outcome.fatal
            return
        if outcome.broke:
            self.job.stop(f"the endpoint takes no more requests from this account ({outcome.broke})")
            return
        if outcome.refusal:
            self._refused(item, outcome)
            return
        item.tries += 1
        item.why = why + "".join(f" ({text})" for text in outcome.hints.values())
        if outcome.status == 429 or outcome.fault == "timeout":
            self.throttle.trouble(started)
        if outcome.wait is not None and outcome.wait > LONGEST_PAUSE:
            self.job.stop(f"the endpoint asks to wait {outcome.wait:.0f} s")
            return
        if item.tries >= self.endpoint.attempts:
            self.job.fail(item.key, f"{item.why}, {item.tries} attempts")
            return
        self._postpone(item, self._backoff(item.tries, outcome))

    def _backoff(self, tries: int, outcome: Outcome) -> float:
        """Seconds. A limit per minute needs longer waits than a stumble; both scale with the period."""
        base = self.job.limits.period / (30 if outcome.status == 429 else 120)
        wait = random.uniform(0, min(base * 2 ** (tries - 1), self.job.limits.period))
        if outcome.wait is None:
            return wait
        if outcome.status in (429, 503):
            self.paused_until = max(self.paused_until, time.monotonic() + outcome.wait)
        return outcome.wait + min(wait, base)

    def _refused(self, item: _Item, outcome: Outcome) -> None:
        """400 and its like: without the parameter that is not understood, or not at all."""
        other = self._other_name(item, outcome)
        if other is not None:
            name, new = other
            if name == "response_format":
                item.bare = True
            else:
                self.dropped[name] = new
                said = f"sent as {new}" if new else "left out"
                self.progress.note(f"{self.endpoint.model}: this server refuses {name}; {said}")
            self.ready.appendleft(item)
            return
        self.job.fail(item.key, outcome.refusal)
        if self.refusals >= 0:
            self.refusals += 1
            if self.refusals >= HOPELESS:
                self.fatal = QuantlabError(
                    f"{self.endpoint.endpoint} refused the first {HOPELESS} requests: {outcome.refusal}",
                    hint="do model, max_tokens and the address fit together?",
                )

    def _other_name(self, item: _Item, outcome: Outcome) -> tuple[str, str] | None:
        """Which parameter to change: reasoning models want max_completion_tokens and no temperature; many servers
        know no response_format."""
        body, said = self._body(item), f"{outcome.hints.get('param', '')} {outcome.refusal}"
        if "max_tokens" in body and "max_completion_tokens" in said:
            return "max_tokens", "max_completion_tokens"
        if "temperature" in body and "temperature" in said:
            return "temperature", ""
        if "response_format" in body:
            return "response_format", ""
        return None

    def _body(self, item: _Item) -> dict[str, Any]:
        request = self.job.requests[item.key]
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": [dict(m) for m in request.messages]}
        for name, value in request.parameters.items():
            new = self.dropped.get(name, name)
            if new and not (item.bare and name == "response_format"):
                body[new] = value
        return body

    def _postpone(self, item: _Item, seconds: float) -> None:
        self.order += 1
        heapq.heappush(self.later, (time.monotonic() + seconds, self.order, item))
