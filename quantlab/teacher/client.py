"""Asking many things at once: `gather` sends requests through the transport that an endpoint has, and returns answers.

The transports: `live` (an HTTP request for each), `batch_api`, and `local` for models and files of this machine. All
write to one ledger, so what one of them was answered, none of them asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from quantlab.progress import Progress
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.job import Accept, Gathered, Job, Spending
from quantlab.teacher.ledger import Ledger, Request
from quantlab.teacher.live import Live

__all__ = ["Accept", "Gathered", "Spending", "gather"]

T = TypeVar("T")


def gather(
    requests: Sequence[Request],
    endpoint: Endpoint,
    ledger: Path,
    progress: Progress,
    *,
    accept: Accept | None = None,
    purpose: str = "",
    period: float = 60.0,
    poll: float = 30.0,
) -> Gathered:
    """An answer for every request: from the ledger where there is one, else asked, paid for once, and kept.

    Args:
        accept: says why an answer's text is unusable, None when it is fine. An unusable answer is paid but not kept,
            and asked for again within `endpoint.attempts`.
        purpose: what the answers are for ("answer", "judge"); `max_usd` and `max_requests` bound what the
            ledger has recorded for this model, endpoint and purpose, in all runs together.
        period: seconds that `rpm` and `tpm` are counted over. poll: seconds between two looks at a batch.

    Raises:
        MachineError: no API key. QuantlabError: the endpoint refuses the key or the model. RecipeError: the budgets
        cannot be held. DataError: a damaged ledger or file of answers. What was answered before is in the ledger.
    """
    with Ledger(ledger) as book:
        job = Job(requests, endpoint, book, accept=accept, purpose=purpose, period=period)
        with progress.task(f"teacher: {endpoint.model}", total=len(requests)) as advance:
            job.advance = advance
            todo = job.load()
            if todo:
                _ask(job, todo, progress, poll)
        _report(job, progress)
        return job.gathered()


def _ask(job: Job, todo: Sequence[str], progress: Progress, poll: float) -> None:
    model = job.endpoint.model
    if model.startswith("file:"):
        from quantlab.teacher.local import answer_from_file

        _from_here(job, todo, answer_from_file)
    elif model.startswith("hf:"):
        from quantlab.teacher.local import answer_with_model

        _from_here(job, todo, answer_with_model)
    elif job.endpoint.batch:
        from quantlab.teacher.batch_api import run_batches

        job.prepare(todo)
        run_batches(job, todo, progress, poll)
    else:
        job.prepare(todo)
        # Cancelled by a signal, whose own handler runs when the block ends.
        with _signals_after() as cancel_on_signal, contextlib.suppress(asyncio.CancelledError):
            asyncio.run(cancel_on_signal(Live(job, todo, progress).run()))


def _from_here(job: Job, todo: Sequence[str], answer: Callable[..., dict[str, str]]) -> None:
    """A teacher on this machine: no budgets, no attempts."""

    def done(key: str, found: Any, why: str | None) -> None:
        job.count_free(found)
        if why is None:
            job.finish(key, found)
        else:
            job.fail(key, why)

    pairs = [(key, job.requests[key]) for key in todo]
    limit = job.limits.max_requests
    if limit is not None:
        left = max(limit - job.ledger.totals(job.scope).sent, 0)
        if left < len(pairs):
            pairs = pairs[:left]
            job.stop(f"max_requests {limit} is reached")
    for key, why in answer(pairs, job.endpoint, job.ledger, job.scope, job.accept, done).items():
        job.fail(key, why)


def _report(job: Job, progress: Progress) -> None:
    if job.faults:
        counts = ", ".join(f"{count} × {name}" for name, count in job.faults.most_common())
        progress.note(f"{job.endpoint.model}: {counts}")
    if job.spending.uncertain:
        progress.note(
            f"{job.endpoint.model}: {job.spending.uncertain} requests went out and nothing complete came back; "
            f"they may have been billed for up to {job.spending.uncertain_usd:.4f} USD more"
        )
    if job.stopped is not None:
        progress.note(f"{job.endpoint.model}: stopped: {job.stopped}")


@contextlib.contextmanager
def _signals_after() -> Iterator[Callable[[Coroutine[Any, Any, T]], Coroutine[Any, Any, T]]]:
    """Ctrl-C and SIGTERM cancel the loop's work first, which closes the attempts in flight, and then do what their
    handlers do. An exception raised by a handler inside the loop could be swallowed by it."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda work: work
        return
    caught: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if callable(handler)}

    async def watched(work: Coroutine[Any, Any, T]) -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(number: int) -> None:
            caught.append((number, None))
            task.cancel()

        for number in before:
            loop.add_signal_handler(number, cancel, number)
        try:
            return await work
        finally:
            for number in before:
                loop.remove_signal_handler(number)

    try:
        yield watched
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in caught:
        before[number](number, frame)
