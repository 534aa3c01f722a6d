"""One `gather`: which requests are open, what each may cost, what came back, and what was spent on it.

Shared by the transports, which only differ in how a request travels. Requests that are equal are asked once.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from quantlab.errors import RecipeError
from quantlab.progress import Advance
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.budget import Ask, Fate, Limits, settle, sweep
from quantlab.teacher.estimate import Counter, complete
from quantlab.teacher.ledger import Answer, Ledger, Request, Totals, request_key
from quantlab.teacher.local import identity
from quantlab.teacher.owners import this_process
from quantlab.teacher.prices import cost, price_of
from quantlab.teacher.transport import Outcome

Accept = Callable[[str], str | None]
GO_ON = "what was answered is kept; raise {} and run the same command to go on"


@dataclass(frozen=True)
class Spending:
    """What one `gather` spent. `requests` were answered completely and paid, usable or not; `cached` ones were in
    the ledger before. `uncertain` requests went out and nothing complete came back: they may have been billed for up to
    `uncertain_usd`, which `usd` does not hold. `refused` ones (429, 5xx, no connection) cost nothing."""

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    uncertain: int = 0
    uncertain_usd: float = 0.0
    refused: int = 0


@dataclass(frozen=True)
class Gathered:
    """`answers` in the order of the requests. `failed`: index → why there is no usable answer. `stopped`: why the whole
    ended early, and how to go on; requests that were not reached are neither answered nor failed.
    `faults` counts what went wrong on the way by name (`429`, `timeout`, `unusable`, …). `total` is what the ledger has
    recorded for this model, endpoint and purpose in all runs."""

    answers: list[Answer | None]
    failed: dict[int, str]
    spending: Spending
    stopped: str | None = None
    faults: dict[str, int] = field(default_factory=dict)
    total: Totals = field(default_factory=Totals)


class Job:
    """The state of one `gather`; every change of the ledger goes through here."""

    def __init__(
        self,
        requests: Sequence[Request],
        endpoint: Endpoint,
        ledger: Ledger,
        *,
        accept: Accept | None,
        purpose: str,
        period: float,
    ) -> None:
        self.endpoint, self.ledger, self.accept = endpoint, ledger, accept
        self.model = identity(endpoint)
        self.owner = f"{this_process()}#{uuid.uuid4().hex[:8]}"  # one process may gather in two threads
        self.price = None if endpoint.local else price_of(endpoint.model, endpoint.price, endpoint.batch)
        self.counter: Counter | None = None  # opened when something has to be asked
        budget = f"{endpoint.endpoint} {self.model}"
        self.limits = Limits(
            scope=" ".join(filter(None, [budget, purpose])),
            budget=None if endpoint.local or endpoint.batch else budget,
            rpm=endpoint.rpm,
            tpm=endpoint.tpm,
            max_usd=endpoint.max_usd,
            max_requests=endpoint.max_requests,
            period=period,
        )
        self.requests: dict[str, Request] = {}
        self.keys: list[str] = []
        for request in requests:
            whole = complete(request, endpoint)
            self.keys.append(request_key(self.model, whole))
            self.requests.setdefault(self.keys[-1], whole)
        self.times = Tally(self.keys)
        self.answers: dict[str, Answer] = {}
        self.failed: dict[str, str] = {}
        self.faults: Tally[str] = Tally()
        self.spending = Spending()
        self.stopped: str | None = None
        self.advance: Advance = _ignore
        self.worst: dict[str, int] = {}

    @property
    def scope(self) -> str:
        return self.limits.scope

    def load(self) -> list[str]:
        """Take what the ledger has; returns the keys that are left, in order."""
        found = self.ledger.get_many(self.requests)
        for key, answer in found.items():
            self.take_recorded(key, answer)
        return [key for key in self.requests if key not in found]

    def take_recorded(self, key: str, answer: Answer) -> None:
        """An answer that somebody paid for earlier. One that `accept` refuses today is not paid for again."""
        why = self.accept(answer.text) if self.accept is not None else None
        if why is None:
            self.answers[key] = answer
        else:
            self.failed[key] = f"its recorded answer is unusable: {why}"
        self.spending = replace(self.spending, cached=self.spending.cached + self.times[key])
        self.advance(self.times[key])

    def prepare(self, todo: Sequence[str]) -> None:
        """Before the first request: the counter, the price, and whether the budgets admit every request at all.

        Raises:
            RecipeError: `max_usd` without a price, or a request that is larger than `tpm`.
        """
        if not todo:
            return
        sweep(self.ledger, self.scope, self.owner)
        self.counter = Counter(self.endpoint, self.ledger)
        if self.price is None and self.limits.max_usd is not None:
            raise RecipeError(
                f"max_usd cannot be held: no price is known for {self.endpoint.model}",
                hint="set price: {input: …, output: …}, dollars for a million tokens, or add the model to prices.yaml",
            )
        if self.limits.budget is None or self.limits.tpm is None:
            return
        for key in todo:
            ask = self.ask(key, 0.0)
            if ask.input_tokens + ask.output_tokens > self.limits.tpm:
                raise RecipeError(
                    f"tpm {self.limits.tpm} is less than one request may take: {self.requests[key].label} has about "
                    f"{ask.input_tokens} input tokens and max_tokens {ask.output_tokens}",
                    hint="raise tpm, or lower max_tokens",
                )

    def ask(self, key: str, seconds: float) -> Ask:
        """What the request may take at worst."""
        assert self.counter is not None
        request = self.requests[key]
        if self.counter.tokenizer is None or key not in self.worst:
            self.worst[key] = self.counter.worst(request)
        outputs = request.max_tokens or self.endpoint.max_tokens
        usd = cost(self.price, self.worst[key], outputs)
        return Ask(key, self.owner, self.worst[key], outputs, usd, seconds)

    def answered(
        self,
        key: str,
        attempt: int,
        text: str,
        inputs: int | None,
        outputs: int | None,
        finish: str,
        seconds: float,
    ) -> str | None:
        """A complete answer came: paid, and kept unless `accept` refuses it. Returns why it is unusable.
        Tokens that the server did not report are counted here, and marked so."""
        assert self.counter is not None
        request, counted = self.requests[key], inputs is not None and outputs is not None
        if inputs is not None:
            self.counter.learn(request, inputs)
        inputs = self.counter.request(request) if inputs is None else inputs
        outputs = self.counter.text(text) if outputs is None else outputs
        answer = Answer(text, inputs, outputs, cost(self.price, inputs, outputs), finish, seconds)
        why = "refused by a rule that failed itself"  # what is recorded should `accept` raise
        try:
            why = (self.accept(text) if self.accept is not None else None) or ""
        finally:
            closed = settle(
                self.ledger,
                attempt,
                "paid",
                outcome=why and "unusable",
                seconds=seconds,
                spent=answer,
                keep=None if why else (key, self.model, request),
                counted=counted,
            )
            if closed:
                self._count_paid(answer)
        if not counted:
            self.faults["no usage reported"] += 1
        if why:
            self.faults["unusable"] += 1
            return why
        self.finish(key, answer)
        return None

    def keep(self, attempt: int, request: Request, key: str, outcome: Outcome) -> None:
        """A paid answer to something that this job does not ask."""
        inputs, outputs = outcome.input_tokens or 0, outcome.output_tokens or 0
        text = outcome.text or ""
        spent = Answer(text, inputs, outputs, cost(self.price, inputs, outputs), outcome.finish, 0.0)
        kept = (key, self.model, request) if outcome.text is not None else None
        if settle(self.ledger, attempt, "paid", outcome=outcome.fault, spent=spent, keep=kept):
            self._count_paid(spent)

    def empty(self, key: str, attempt: int, inputs: int, outputs: int, fault: str, seconds: float) -> None:
        """The server reports tokens but no answer: paid for nothing."""
        spent = Answer("", inputs, outputs, cost(self.price, inputs, outputs), "", seconds)
        if settle(self.ledger, attempt, "paid", outcome=fault, seconds=seconds, spent=spent):
            self._count_paid(spent)
        self.faults[fault] += 1

    def lost(self, key: str, attempt: int, fate: Fate, fault: str, seconds: float) -> None:
        """No answer came: `refused` or `uncertain`."""
        if not settle(self.ledger, attempt, fate, outcome=fault, seconds=seconds):
            return
        self.faults[fault] += 1
        spent = self.spending
        if fate == "refused":
            self.spending = replace(spent, refused=spent.refused + 1)
        else:
            row = self.ledger.rows("SELECT usd FROM attempts WHERE id = ?", (attempt,))[0]
            self.spending = replace(
                spent, uncertain=spent.uncertain + 1, uncertain_usd=spent.uncertain_usd + row[0]
            )

    def close_unsent(self) -> None:
        """Attempts that were reserved and never begun, because the work was interrupted."""
        sql = "SELECT id, key FROM attempts WHERE scope = ? AND state = 'sent' AND owner = ?"
        for attempt, key in self.ledger.rows(sql, (self.scope, self.owner)):
            self.lost(key, attempt, "refused", "interrupted", 0.0)

    def finish(self, key: str, answer: Answer) -> None:
        self.answers[key] = answer
        self.advance(self.times[key])

    def fail(self, key: str, why: str) -> None:
        self.failed[key] = why
        self.advance(self.times[key])

    def stop(self, why: str) -> None:
        """A limit is reached (first word of `why`): nothing more is sent."""
        name = why.split()[0]
        raised = name if name in ("max_usd", "max_requests") else "the account's limit"
        self.stopped = f"{why}; {GO_ON.format(raised)}"

    def count_free(self, answer: Answer) -> None:
        """An answer made or found on this machine."""
        self._count_paid(answer)

    def _count_paid(self, answer: Answer) -> None:
        spent = self.spending
        self.spending = replace(
            spent,
            requests=spent.requests + 1,
            input_tokens=spent.input_tokens + answer.input_tokens,
            output_tokens=spent.output_tokens + answer.output_tokens,
            usd=math.fsum([spent.usd, answer.usd]),
        )

    def gathered(self) -> Gathered:
        return Gathered(
            [self.answers.get(key) for key in self.keys],
            {index: self.failed[key] for index, key in enumerate(self.keys) if key in self.failed},
            self.spending,
            self.stopped,
            dict(self.faults),
            self.ledger.totals(self.scope),
        )


def _ignore(units: float = 1) -> None:
    pass
