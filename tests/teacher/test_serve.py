"""End to end against `transformers serve` with the embedded model: answers to questions, and verdicts with a schema."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import chat_model

from quantlab.progress import Silent
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.client import gather
from quantlab.teacher.estimate import estimate
from quantlab.teacher.ledger import Request
from quantlab.text2sql.prompt.prompt import build_prompt

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
DDL = "CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT, level INTEGER);"
QUESTIONS = ("이름을 모두 보여줘", "플레이어는 몇 명이야?", "레벨이 10 이상인 플레이어의 이름은?")
VERDICT = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "schema": {"type": "object", "properties": {"yes": {"type": "boolean"}}},
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = chat_model(tmp_path_factory.mktemp("serve") / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", script, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder.parent / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
    try:
        _wait(process, port, log)
        yield Endpoint(
            model=str(folder),
            endpoint=f"http://127.0.0.1:{port}/v1",
            tokenizer=str(folder),
            concurrency=2,
            timeout=60.0,
            rpm=600,
        )
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def test_answers_and_verdicts(served: Endpoint, tmp_path: Path) -> None:
    answers = [
        Request(({"role": "user", "content": build_prompt(ddl, question)},), {"max_tokens": 24}, question)
        for ddl in (DDL, DDL.replace("level", "rank"))
        for question in QUESTIONS
    ]
    before = estimate(answers, served, tmp_path / "l.db")
    gathered = gather(answers, served, tmp_path / "l.db", Silent(), purpose="answer")
    assert gathered.failed == {} and gathered.stopped is None
    assert all(answer is not None and "SELECT" in answer.text for answer in gathered.answers)
    assert "no usage reported" not in gathered.faults
    assert gathered.spending.requests == before.requests == 6
    assert gathered.spending.input_tokens == before.input_tokens  # counted with the model's own tokenizer
    assert gathered.spending.usd == 0.0

    judged = [
        Request(
            ({"role": "user", "content": f"{question}\n{answer.text}\nyes or no?"},),
            {"max_tokens": 12, "response_format": VERDICT},
            question,
        )
        for question, answer in zip(QUESTIONS, gathered.answers[:3], strict=True)
        if answer is not None
    ]
    verdicts = gather(
        judged,
        served.model_copy(update={"attempts": 2}),
        tmp_path / "l.db",
        Silent(),
        accept=lambda text: None if text.startswith("{") else "not JSON",
        purpose="judge",
        period=1.0,
    )
    # A base model knows no JSON, and this server ignores the schema: what matters is that nothing unfit is kept.
    assert verdicts.spending.requests > 0
    for index, answer in enumerate(verdicts.answers):
        assert (answer is None) == (index in verdicts.failed)
        assert answer is not None or "not JSON" in verdicts.failed[index]
    assert gather(answers, served, tmp_path / "l.db", Silent()).spending.cached == 6
