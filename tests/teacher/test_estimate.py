"""What a dry run says against what is then spent."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from asking import endpoint, some_requests
from hostile_server import HostileServer

from quantlab.errors import DataError
from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint, Price
from quantlab.teacher.client import gather
from quantlab.teacher.estimate import Counter, complete, estimate, guess_tokens
from quantlab.teacher.ledger import Request

FAULTS = {"429": 0.03, "500": 0.03, "schema": 0.01, "twice": 0.05}


def near(estimated: float, spent: float) -> bool:
    return abs(estimated - spent) <= 0.05 * spent


def embedded_counter() -> Any:
    from tokenizers import Tokenizer

    import quantlab

    file = Path(quantlab.__file__).parent / "models" / "embedded" / "base" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_with_a_tokenizer_and_expected_answers(tmp_path: Path) -> None:
    count = embedded_counter()
    requests = some_requests(200)
    texts = {
        r.messages[0]["content"]: f"SELECT name FROM items WHERE price >= {n};"
        for n, r in enumerate(requests)
    }
    with HostileServer(
        {"500": 0.03}, count=count, answer=lambda messages, body: texts[messages[0]["content"]]
    ) as server:
        asked = endpoint(server, tokenizer="embedded:base")
        expected = [Counter(asked).text(texts[r.messages[0]["content"]]) for r in requests]
        before = estimate(requests, asked, tmp_path / "l.db", expected)
        assert not (tmp_path / "l.db").exists()
        spent = gather(requests, asked, tmp_path / "l.db", Silent(), period=1.0).spending
        assert (before.requests, before.cached, before.input_tokens) == (200, 0, spent.input_tokens)
        assert before.output_tokens == spent.output_tokens
        assert before.usd == pytest.approx(spent.usd)
        after = estimate(requests, asked, tmp_path / "l.db", expected)
        assert (after.requests, after.cached, after.usd) == (0, 200, 0.0)


def test_calibrated_by_the_ledger(tmp_path: Path) -> None:
    """The server counts in another way than the guess: forty answers teach the rest."""
    requests = some_requests(300)
    with HostileServer(FAULTS, seed=3) as server:
        asked = endpoint(server)
        first = gather(requests[:40], asked, tmp_path / "l.db", Silent(), period=1.0)
        assert first.failed == {}
        before = estimate(requests, asked, tmp_path / "l.db")
        assert (before.requests, before.cached) == (260, 40) and "corrected by 40" in before.basis
        spent = gather(requests, asked, tmp_path / "l.db", Silent(), period=1.0).spending
        assert near(before.requests, spent.requests)
        assert near(before.input_tokens, spent.input_tokens)
        assert near(before.output_tokens, spent.output_tokens)
        assert near(before.usd, spent.usd)


def test_nothing_is_known(tmp_path: Path) -> None:
    asked = Endpoint(model="nobody/knows", price=Price(input=1.0, output=2.0))
    requests = some_requests(2, max_tokens=100)
    found = estimate(requests * 2, asked, tmp_path / "l.db")
    assert (found.requests, found.cached, found.output_tokens) == (2, 0, 50)
    assert found.usd == pytest.approx((found.input_tokens + 2 * found.output_tokens) / 1e6)
    assert "25%" in found.basis
    with pytest.raises(ValueError, match="expected answers"):
        estimate(requests, asked, tmp_path / "l.db", [1])
    with pytest.raises(DataError):
        estimate(requests, asked.model_copy(update={"tokenizer": "embedded:none"}), tmp_path / "l.db")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert estimate(some_requests(3), Endpoint(model="gpt-4o"), tmp_path / "l.db").usd > 0


def test_the_guess() -> None:
    korean = "안녕하세요, 제 이름은 GPT-4o입니다. 저는 새로운 유형의 언어 모델입니다, 만나서 반갑습니다!"
    english = "Hello, my name is GPT-4o. I'm a new type of language model, it's nice to meet you!"
    assert guess_tokens(korean) == pytest.approx(27, abs=3)  # what OpenAI says of GPT-4o's encoding
    assert guess_tokens(english) == pytest.approx(24, abs=3)
    assert guess_tokens("") == 0
    for text in (korean * 20, "\n\n\n", "a" * 500, "\U0001f600" * 9, "表の名前", "12345678"):
        assert 0 < guess_tokens(text) <= len(text.encode())


def test_reservations_are_never_below_bytes_or_what_was_seen() -> None:
    asked = Endpoint(model="gpt-4o")
    counter = Counter(asked)
    for request in some_requests(5):
        assert counter.request(request) <= counter.worst(request)
        counter.learn(request, 3 * counter.request(request))
    assert counter.worst(request) >= 3 * counter.request(request)
    wild = Request(({"role": "user", "content": "x" * 10},), {}, "")
    counter.learn(wild, 10**6)
    assert counter.worst(wild) < 100


def test_a_chat_template_is_counted(tmp_path: Path) -> None:
    from serving import chat_model

    folder = chat_model(tmp_path / "chat")
    request = some_requests(1)[0]
    asked = Endpoint(model="x", tokenizer=str(folder))
    plain = Counter(asked.model_copy(update={"tokenizer": "embedded:base"}))
    assert Counter(asked).text("SELECT 1;") == plain.text("SELECT 1;")
    assert Counter(asked).request(request) != plain.request(request)


def test_requests_are_completed_from_the_endpoint() -> None:
    asked = Endpoint(model="x", max_tokens=77, temperature=0.5)
    bare = Request(({"role": "user", "content": "x"},), {}, "")
    assert complete(bare, asked).parameters == {"max_tokens": 77, "temperature": 0.5}
    own = Request(bare.messages, {"max_completion_tokens": 5, "temperature": 0.0}, "")
    assert complete(own, asked) == own
    assert json.dumps(dict(complete(bare, asked).parameters))
