"""The OpenAI Batch API: upload a file of requests, wait, collect the answers, at the `batch` share of the price.

https://platform.openai.com/docs/guides/batch: a JSONL of {custom_id, method, url, body}, `files.create`,
`batches.create`, `batches.retrieve` until it ends, then an output and an error file whose lines stand in any order.

Nothing is submitted twice. Before a batch is created, its attempts are in the ledger under a random name, and that
name is in the batch's metadata: a run that was killed, or whose creation went unanswered, finds the batch again
by its id or by that name. An open batch holds its requests as a process holds those in flight. Lines that failed
or expired cost nothing and go into a next batch, `attempts` batches at most for each request.
"""

from __future__ import annotations

import functools
import io
import json
import random
import time
import uuid
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from quantlab.errors import QuantlabError
from quantlab.progress import Progress
from quantlab.teacher.budget import Ask, reserve
from quantlab.teacher.job import Job
from quantlab.teacher.ledger import Request, canonical
from quantlab.teacher.owners import is_gone
from quantlab.teacher.transport import Outcome, open_sync, read_completion, refusal_of

T = TypeVar("T")
MOST_LINES = 50_000
MOST_BYTES = 150_000_000  # of the 200 MB that the API takes
HOLD_SECONDS = 30 * 3600.0  # a batch ends within 24 hours; its attempts are held for longer
ENDED = ("completed", "failed", "expired", "cancelled")
NAME = "quantlab"  # the metadata field that holds a batch's random name
LOOK_BACK = 200  # batches of the account that are searched for one whose creation went unanswered


def run_batches(job: Job, todo: Sequence[str], progress: Progress, poll: float) -> None:
    """Answer `todo` through batches; open ones of earlier runs are collected first.

    Raises:
        QuantlabError: the endpoint refuses the key, has no Batch API, or refuses a whole batch.
    """
    _Batches(job, todo, progress, poll).run()


class _Batches:
    def __init__(self, job: Job, todo: Sequence[str], progress: Progress, poll: float) -> None:
        self.job, self.progress, self.poll = job, progress, poll
        self.left = dict.fromkeys(todo)
        self.tries: Tally[str] = Tally()
        self.why: dict[str, str] = {}
        self.api = open_sync(job.endpoint)

    def run(self) -> None:
        try:
            self._adopt()
            while True:
                self._wait_for(self._open())
                self._give_up_some()
                if not self.left or self.job.stopped is not None or not self._submit():
                    return
        finally:
            self.api.client.close()

    # -- batches in the ledger --

    def _open(self) -> list[tuple[str, str]]:
        """(name, id) of the batches of this account that have not been collected."""
        sql = "SELECT name, id FROM batches WHERE scope = ? AND state = 'open' ORDER BY created"
        return [(name, ident) for name, ident in self.job.ledger.rows(sql, (self.job.scope,))]

    def _adopt(self) -> None:
        """Batches that were about to be created when a run ended: the account knows whether they exist."""
        sql = "SELECT name, owner FROM batches WHERE scope = ? AND state = 'creating'"
        for name, owner in self.job.ledger.rows(sql, (self.job.scope,)):
            if not is_gone(owner):
                continue  # another process is about to create it
            found = self._search(name)
            if found is not None:
                self._state(name, "open", found)
            else:
                self._release(name, "never created")

    def _search(self, name: str) -> str | None:
        listed = self._call(lambda: list(_first(self.api.client.batches.list(limit=100), LOOK_BACK)))
        for batch in listed:
            if (batch.metadata or {}).get(NAME) == name:
                return str(batch.id)
        return None

    def _state(self, name: str, state: str, ident: str | None = None) -> None:
        with self.job.ledger.transaction() as connection:
            connection.execute(
                "UPDATE batches SET state = ?, id = coalesce(?, id) WHERE name = ?", (state, ident, name)
            )

    def _release(self, name: str, fault: str) -> None:
        """Nothing more comes from this batch: its open attempts cost nothing."""
        for attempt, key in self._attempts(name):
            self.job.lost(key, attempt, "refused", fault, 0.0)
        self._state(name, "closed")

    def _attempts(self, name: str) -> list[tuple[int, str]]:
        sql = "SELECT id, key FROM attempts WHERE owner = ? AND state IN ('sent', 'uncertain')"
        return [(number, key) for number, key in self.job.ledger.rows(sql, (_owner(name),))]

    # -- submitting --

    def _submit(self) -> bool:
        """One batch of what is left and affordable. False when there is nothing to do but what others are doing."""
        name = uuid.uuid4().hex
        chosen: dict[str, str] = {}
        size, busy = 0, 0
        with self.job.ledger.transaction() as connection:
            connection.execute(
                "INSERT INTO batches VALUES (?, ?, ?, NULL, 'creating', ?)",
                (name, self.job.scope, self.job.owner, time.time()),
            )
        for key in list(self.left):
            line = self._line(key)
            if len(chosen) == MOST_LINES or size + len(line) > MOST_BYTES:
                break
            ask = self.job.ask(key, HOLD_SECONDS)
            mine = Ask(key, _owner(name), ask.input_tokens, ask.output_tokens, ask.usd, ask.seconds)
            reply = reserve(self.job.ledger, mine, self.job.limits)
            if reply.kind == "go":
                chosen[key] = line
                size += len(line)
            elif reply.kind == "known" and reply.answer is not None:
                self._taken(key)
                self.job.take_recorded(key, reply.answer)
            elif reply.kind == "busy":
                busy += 1
            elif reply.kind == "stop":
                self.job.stop(reply.why)
                break
            else:  # the money is reserved by requests in flight: their true price decides about the rest
                busy += 1
                break
        if chosen:
            self._create(name, chosen)
            return True
        self._state(name, "closed")
        if busy:
            time.sleep(self.poll)
        return bool(busy)

    def _line(self, key: str) -> str:
        request = self.job.requests[key]
        body = {"model": self.job.endpoint.model, "messages": list(request.messages), **request.parameters}
        row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return canonical(row) + "\n"

    def _create(self, name: str, chosen: Mapping[str, str]) -> None:
        self.tries.update(chosen.keys())
        content = "".join(chosen.values()).encode()
        files, batches = self.api.client.files, self.api.client.batches
        try:
            file = self._call(
                lambda: files.create(file=(f"{name}.jsonl", io.BytesIO(content)), purpose="batch")
            )
            ident = self._call(
                lambda: (
                    batches.create(
                        input_file_id=file.id,
                        endpoint="/v1/chat/completions",
                        completion_window="24h",
                        metadata={NAME: name},
                    ).id
                ),
                instead=lambda: self._search(name),
            )
        except _Unanswered:
            raise  # it may exist: the next run looks for it
        except QuantlabError:
            self._release(name, "not submitted")
            raise
        self._state(name, "open", ident)
        self.progress.note(
            f"{self.job.endpoint.model}: batch {ident} with {len(chosen)} requests is submitted"
        )

    # -- collecting --

    def _wait_for(self, batches: Sequence[tuple[str, str]]) -> None:
        for name, ident in batches:
            while True:
                batch = self._call(functools.partial(self.api.client.batches.retrieve, ident))
                if batch.status in ENDED:
                    break
                time.sleep(self.poll)
            self._collect(name, batch)

    def _collect(self, name: str, batch: Any) -> None:
        """Every line of both files, then what no line speaks of."""
        attempts = {key: attempt for attempt, key in self._attempts(name)}
        strangers: dict[str, tuple[int, Outcome]] = {}
        for ident in (batch.output_file_id, batch.error_file_id):
            if ident:
                text = self._call(functools.partial(self.api.client.files.content, ident)).text
                for line in _lines(text):
                    self._read(line, attempts, strangers)
        self._keep_strangers(batch, strangers)
        said = "; ".join(str(e.message) for e in (batch.errors.data or [])) if batch.errors else ""
        self._release(name, f"batch {batch.status}")
        if batch.status == "failed":
            raise QuantlabError(
                f"the endpoint refused batch {batch.id}: {self.api.scrub(said) or 'it does not say why'}",
                hint="nothing of it was answered or paid; is the model one that the Batch API has?",
            )

    def _read(
        self, line: str, attempts: Mapping[str, int], strangers: dict[str, tuple[int, Outcome]]
    ) -> None:
        try:
            row = json.loads(line)
            key = row["custom_id"]
            response = row.get("response") or {}
            body, status = response.get("body"), int(response.get("status_code") or 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.job.faults["garbled line"] += 1
            return
        attempt = attempts.get(key)
        if attempt is None:
            return  # another process has collected it
        if status == 200 and key not in self.job.requests:
            strangers[key] = attempt, read_completion(json.dumps(body))
        elif status != 200:
            fault = str(status) if status else str((row.get("error") or {}).get("code") or "error")
            self.job.lost(key, attempt, "refused", fault, 0.0)
            said = body.get("error", {}).get("message", "") if isinstance(body, dict) else ""
            self.why[key] = f"{fault} {self.api.scrub(str(said))}".strip()
            if status in (400, 413, 422) and key in self.left:
                self._taken(key)
                self.job.fail(key, self.why[key])
        else:
            self._answer(key, attempt, read_completion(json.dumps(body)))

    def _answer(self, key: str, attempt: int, outcome: Outcome) -> None:
        if outcome.text is None:
            counts = (outcome.input_tokens or 0, outcome.output_tokens or 0)
            self.job.empty(key, attempt, *counts, outcome.fault, 0.0)
            self.why[key] = outcome.fault
            return
        why = self.job.answered(
            key, attempt, outcome.text, outcome.input_tokens, outcome.output_tokens, outcome.finish, 0.0
        )
        if why is None:
            self._taken(key)
        else:
            self.why[key] = f"unusable: {why}"

    def _keep_strangers(self, batch: Any, strangers: Mapping[str, tuple[int, Outcome]]) -> None:
        """Answers to requests of an earlier recipe: paid for, so they are kept, for whoever asks that again."""
        if not strangers:
            return
        text = self._call(lambda: self.api.client.files.content(batch.input_file_id).text)
        for line in _lines(text):
            row = json.loads(line)
            if row["custom_id"] in strangers:
                body = row["body"]
                rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
                attempt, outcome = strangers[row["custom_id"]]
                self.job.keep(attempt, Request(tuple(body["messages"]), rest, ""), row["custom_id"], outcome)

    def _taken(self, key: str) -> None:
        self.left.pop(key, None)

    def _give_up_some(self) -> None:
        for key in [key for key in self.left if self.tries[key] >= self.job.endpoint.attempts]:
            self._taken(key)
            self.job.fail(key, f"{self.why.get(key, 'no answer')}, {self.tries[key]} attempts")

    # -- HTTP --

    def _call(self, work: Callable[[], T], instead: Callable[[], T | None] | None = None) -> T:
        """Do it, again after a while when the endpoint stumbles. `instead` looks whether it happened anyway."""
        import openai

        for tries in range(1, self.job.endpoint.attempts + 1):
            try:
                return work()
            except openai.APIStatusError as error:
                outcome = refusal_of(error, self.api)
                if outcome.fatal is not None:
                    raise outcome.fatal from None
                why = outcome.refusal or outcome.broke or f"status {outcome.status}"
                if outcome.refusal or outcome.broke:
                    raise QuantlabError(f"{self.job.endpoint.endpoint} refused: {why}") from None
                wait = outcome.wait or 0.0
            except openai.APIConnectionError as error:
                why, wait = type(error).__name__, 0.0
            self.job.faults[f"batch: {why}"] += 1
            time.sleep(wait + random.uniform(0, min(0.5 * 2 ** (tries - 1), 60.0) * min(1.0, self.poll)))
            found = instead() if instead is not None else None
            if found is not None:
                return found
        raise _Unanswered(
            f"{self.job.endpoint.endpoint} does not answer: {why}, {tries} attempts",
            hint="run the same command again: batches that were submitted are picked up",
        )


class _Unanswered(QuantlabError):
    """Whether it happened is not known."""


def _owner(name: str) -> str:
    return f"batch:{name}"


def _first(pages: Any, most: int) -> Iterator[Any]:
    """The pages of a list are fetched as they are iterated over."""
    for number, row in enumerate(pages):
        if number == most:
            return
        yield row


def _lines(text: str) -> list[str]:
    """Lines of JSON. Not splitlines(): U+2028 and its like are allowed inside a JSON string."""
    return [line for line in text.split("\n") if line.strip()]
