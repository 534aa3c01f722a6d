"""What the tests of the teacher share: requests, endpoints, and a rule for the hostile server's answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hostile_server import HostileServer, fingerprint

from quantlab.recipe.distill import Endpoint
from quantlab.teacher.job import Gathered
from quantlab.teacher.ledger import Request


def some_requests(count: int, max_tokens: int = 60) -> list[Request]:
    parameters = {"max_tokens": max_tokens, "temperature": 0.0}
    text = (
        "가격이 {} 이상인 상품의 이름을 모두 보여줘. CREATE TABLE items (id INTEGER, name TEXT, price REAL);"
    )
    return [
        Request(({"role": "user", "content": text.format(number)},), parameters, f"question {number}")
        for number in range(count)
    ]


def endpoint(server: HostileServer, **options: Any) -> Endpoint:
    return Endpoint(**{"model": "gpt-4o", "endpoint": server.url, "timeout": 10.0} | options)


def accept(text: str) -> str | None:
    try:
        return None if "for" in json.loads(text) else "no field `for`"
    except ValueError:
        return "not JSON"


def check_answers(requests: Sequence[Request], gathered: Gathered) -> None:
    """Everything is answered, every answer by the request that it belongs to."""
    assert gathered.failed == {} and gathered.stopped is None
    for request, answer in zip(requests, gathered.answers, strict=True):
        assert answer is not None
        assert json.loads(answer.text)["for"] == fingerprint([dict(m) for m in request.messages])
