"""Data that give one id to several rows, as the published BIRD Mini-Dev does: how the rows are called, what the user is
told, and which predictions belong to which of them."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import make_database, write_csv, write_json, write_jsonl

from quantlab.errors import DataError
from quantlab.evals import text2sql
from quantlab.evals.text2sql import evaluate
from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.registry.tasks import Text2SqlOptions
from quantlab.text2sql.data.dataset import digest, distinct_ids, id_notes, load_items
from quantlab.text2sql.data.item import BadRow
from quantlab.text2sql.data.predictions import read_judge, read_predictions
from tests import command

ROOT = Path(__file__).resolve().parents[2]
IDS = ["470", "471", "472", "1031", "471", "1031", "9", "1031"]
CALLED = ["470", "471", "472", "1031", "471#2", "1031#2", "9", "1031#3"]
QUERIES = [f"SELECT Name, {number} FROM singer" for number in range(len(IDS))]
NOTE = "gives 2 ids (471, 1031) to several rows: the later ones are called 471#2, 1031#2, 1031#3"


def bird_rows(ids: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "question_id": int(name),
            "db_id": "concerts",
            "question": f"question {number}",
            "evidence": "",
            "SQL": query,
        }
        for number, (name, query) in enumerate(zip(ids, QUERIES, strict=False))
    ]


def plain_rows(ids: list[Any]) -> list[dict[str, Any]]:
    row = {"db_id": 1, "context": "CREATE TABLE singer (Name TEXT);"}
    return [
        row | {"question": f"question {n}", "answer": query} | ({} if name is None else {"id": name})
        for n, (name, query) in enumerate(zip(ids, QUERIES, strict=False))
    ]


@pytest.fixture
def bird(tmp_path: Path) -> Path:
    folder = tmp_path / "bird"
    make_database(folder / "dev_databases" / "concerts" / "concerts.sqlite")
    write_json(folder / "mini_dev_sqlite.json", bird_rows(IDS))
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", plain_rows(IDS))


def sources(bird: Path, plain: Path) -> list[str]:
    return [f"bird:{bird}", str(plain)]


# Names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "a"], ["a", "a#2"]),
        (["a", "b", "a", "a", "b"], ["a", "b", "a#2", "a#3", "b#2"]),
        (["a", "a", "a#2"], ["a", "a##2", "a#2"]),
        (["a#2", "a", "a"], ["a#2", "a", "a##2"]),
        (["a", "a#2", "a#2", "a"], ["a", "a#2", "a#2#2", "a##2"]),
        (["", "", "#2"], ["", "##2", "#2"]),
        (["a", "a", "a#2", "a##2", "a##2"], ["a", "a###2", "a#2", "a##2", "a##2#2"]),
    ],
)
def test_distinct_ids(names: list[str], expected: list[str]) -> None:
    assert distinct_ids(names) == expected


def test_distinct_ids_never_collide() -> None:
    rng = random.Random(0)
    alphabet = ["a", "a#2", "a#3", "a##2", "a#2#2", "a##2#2", "#", "", "a#"]
    for _ in range(2000):
        names = rng.choices(alphabet, k=rng.randint(0, 9))
        found = distinct_ids(names)
        assert len(set(found)) == len(names)
        assert all(
            new == old for n, (old, new) in enumerate(zip(names, found, strict=True)) if old not in names[:n]
        )
        assert set(names) <= set(found) and distinct_ids(names) == found


def test_rows_are_called_apart_and_the_user_is_told(bird: Path, plain: Path) -> None:
    for source in sources(bird, plain):
        items = load_items(source)
        assert [item.id for item in items] == CALLED
        assert [item.question for item in items] == [f"question {n}" for n in range(8)]
        assert id_notes(items, source) == [f"{source} {NOTE}"]
        assert digest(items) == digest(load_items(source))
        for limit in range(1, 9):  # a limit changes no row's id
            some = load_items(source, limit)
            assert [item.id for item in some] == [CALLED[i * 8 // limit] for i in range(limit)]


def test_data_without_repeats_have_no_note(tmp_path: Path, plain: Path) -> None:
    source = str(write_jsonl(tmp_path / "once.jsonl", plain_rows(["a", "b", None])))
    items = load_items(source)
    assert [item.id for item in items] == ["a", "b", "3"] and id_notes(items, source) == []
    assert all(item.shared_id == "" for item in items)
    assert id_notes(load_items(str(plain), 2), "x") == [
        "x gives 1 id (471) to several rows: the later ones are called 471#2"
    ]
    assert id_notes(load_items(str(plain), 1), "x") == []


@pytest.mark.parametrize(
    ("ids", "called"),
    [
        ([7, "7"], ["7", "7#2"]),
        ([2, None], ["2", "2#2"]),  # a row without an id is called by its line
        ([None, 1], ["1", "1#2"]),
        ([1.0, "1.0", True, "True"], ["1.0", "1.0#2", "True", "True#2"]),
        (["가", "가", "가#2"], ["가", "가##2", "가#2"]),
        (["", ""], ["", "#2"]),
    ],
)
def test_plain_rows(tmp_path: Path, ids: list[Any], called: list[str]) -> None:
    items = load_items(str(write_jsonl(tmp_path / "x.jsonl", plain_rows(ids))))
    assert [item.id for item in items] == called


def test_a_row_that_cannot_be_read_keeps_its_place(tmp_path: Path) -> None:
    rows = plain_rows(["a", "a", "a"])
    rows[1]["answer"] = ""
    bad: list[BadRow] = []
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, 3])
    items = load_items(str(path), bad=bad)
    assert [item.id for item in items] == ["a", "a#3"] and len(bad) == 2
    assert id_notes(items, "x") == ["x gives 1 id (a) to several rows: the later ones are called a#3"]


def test_other_adapters(tmp_path: Path) -> None:
    """Their ids are the numbers of the rows; BIRD's may meet those of rows without one."""
    rows = bird_rows(["2", "5", "7"])
    del rows[1]["question_id"]
    make_database(tmp_path / "dev_databases" / "concerts" / "concerts.sqlite")
    write_json(tmp_path / "dev.json", rows)
    assert [item.id for item in load_items(f"bird:{tmp_path}:dev")] == ["2", "2#2", "7"]
    make_database(tmp_path / "database" / "concerts" / "concerts.sqlite")
    twice = [{"db_id": "concerts", "question": "?", "query": "SELECT 1", "id": 4}] * 2
    write_json(tmp_path / "spider" / "dev.json", twice)
    make_database(tmp_path / "spider" / "database" / "concerts" / "concerts.sqlite")
    assert [item.id for item in load_items(f"spider:{tmp_path / 'spider'}")] == ["1", "2"]
    columns = {"db_name": "concerts", "question": "?", "query": "SELECT 1", "id": "4"}
    write_csv(tmp_path / "q.csv", [columns, columns])
    assert [item.id for item in load_items(f"sql-eval:{tmp_path / 'q.csv'}")] == ["1", "2"]
    ko = {"id": "4", "db_id": 1, "context": "CREATE TABLE t (a INT);", "question": "?", "answer": "SELECT 1"}
    write_jsonl(tmp_path / "test.jsonl", [ko, ko])
    assert [item.id for item in load_items(f"ko_text2sql:{tmp_path / 'test.jsonl'}")] == ["1", "2"]


# Predictions


def lines(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / "p.jsonl", rows)


def by_id(ids: list[Any], texts: list[str] | None = None) -> list[dict[str, Any]]:
    return [{"id": n, "prediction": t} for n, t in zip(ids, texts or QUERIES, strict=True)]


SHUFFLED = [7, 4, 0, 6, 3, 1, 5, 2]  # 1031#3, 471#2, …


@pytest.mark.parametrize(
    "rows",
    [
        [{"prediction": text} for text in QUERIES],
        by_id(IDS),
        by_id([int(name) for name in IDS]),
        by_id(CALLED),
        by_id([CALLED[n] for n in SHUFFLED], [QUERIES[n] for n in SHUFFLED]),
        # The order counts among those of an id alone.
        by_id([IDS[n] for n in (1, 4, 3, 5, 7, 6, 2, 0)], [QUERIES[n] for n in (1, 4, 3, 5, 7, 6, 2, 0)]),
        # One of three by its own name, the others by the id that they share.
        by_id(["470", "471", "472", "1031", "471", "1031#2", "9", "1031"]),
        by_id(
            ["1031#3", "470", "471", "472", "1031", "471#2", "1031", "9"],
            [QUERIES[n] for n in (7, 0, 1, 2, 3, 4, 5, 6)],
        ),
    ],
)
def test_predictions_fit(bird: Path, plain: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for source in sources(bird, plain):
        assert read_predictions(lines(tmp_path, rows), load_items(source)) == QUERIES


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (IDS[:4] + IDS[5:], "p.jsonl:2: '471' is the id of 2 questions, and the file has 1 of it"),
        (IDS[:5] + IDS[6:], "p.jsonl:4: '1031' is the id of 3 questions, and the file has 2 of it"),
        ([*IDS, "471"], "p.jsonl:9: more lines than the 2 questions of that id for '471'"),
        ([*IDS, "470"], "p.jsonl:9: a second line for '470'"),
        ([*CALLED, "471#2"], "p.jsonl:9: a second line for '471#2'"),
        ([*CALLED, "471"], "p.jsonl:9: a second line for '471'"),
        ([*IDS, "471#3"], "p.jsonl:9: the data have no question '471#3'"),
        (["470", "472", "1031", "1031", "9", "1031"], "no prediction for 471, 471#2"),
        ([name for name in CALLED if name != "471"], "no prediction for 471"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit(
    bird: Path, plain: Path, tmp_path: Path, ids: list[str], words: str
) -> None:
    for source in sources(bird, plain):
        with pytest.raises(DataError) as caught:
            read_predictions(lines(tmp_path, by_id(ids, ["x"] * len(ids))), load_items(source))
        assert words in str(caught.value)
        if "is the id of" in words:
            assert "471, 471#2" in caught.value.hint or "1031, 1031#2, 1031#3" in caught.value.hint


def test_a_judge_of_some(plain: Path, tmp_path: Path) -> None:
    items = load_items(str(plain))

    def judge(*names: str) -> dict[str, bool]:
        rows = [{"id": name, "answer": n % 2 == 0} for n, name in enumerate(names)]
        return {name: yes for name, (yes, _) in read_judge(lines(tmp_path, rows), items).items()}

    assert judge("471", "471", "9") == {"471": True, "471#2": False, "9": True}
    assert judge("471#2", "1031#3") == {"471#2": True, "1031#3": False}
    assert judge("471#2", "471") == {"471#2": True, "471": False}
    with pytest.raises(DataError, match="'471' is the id of 2 questions"):
        judge("9", "471")


# What the user sees


def quantlab(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return command.quantlab(
        *arguments, cwd=cwd, code=code, environment={"QUANTLAB_CACHE": str(cwd / "cache")}
    )


def test_a_benchmark_with_repeats_through_the_command_line(bird: Path, tmp_path: Path) -> None:
    scored = ("evaluate", "--data", "bird:bird", "--predictions")
    lines(tmp_path, by_id(IDS))
    said = quantlab(*scored, "p.jsonl", cwd=tmp_path).stdout
    assert "8 predictions on bird:bird: 8 ok" in said and f"bird:bird {NOTE}" in said
    (run,) = (tmp_path / "results" / "runs").iterdir()
    details = json.loads((run / "run.json").read_text(encoding="utf-8"))["tasks"]["text2sql"]["details"]
    assert details["notes"] == [f"bird:bird {NOTE}"]
    samples = run / "samples" / "text2sql.jsonl"
    assert [json.loads(line)["id"] for line in samples.read_text(encoding="utf-8").split("\n")[:-1]] == CALLED
    (tmp_path / "again.jsonl").write_bytes(samples.read_bytes())  # the samples of a run can be scored again
    again = json.loads(quantlab(*scored, "again.jsonl", "--json", cwd=tmp_path).stdout)
    assert again["metrics"]["n_ok"] == 8 and again["details"]["notes"] == [f"bird:bird {NOTE}"]
    lines(tmp_path, by_id(IDS[:4] + IDS[5:], QUERIES[:4] + QUERIES[5:]))
    error = quantlab(*scored, "p.jsonl", cwd=tmp_path, code=4).stderr
    assert "error: p.jsonl:2: '471' is the id of 2 questions" in error and "471, 471#2" in error


def test_a_model_measured_on_repeats(bird: Path) -> None:
    class Listening(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    progress = Listening()
    options = Text2SqlOptions(data=f"bird:{bird}", max_new_tokens=1)
    result = evaluate(load_model("embedded:base", device="cpu"), options, progress=progress)
    assert f"bird:{bird} {NOTE}" in progress.said and result.details["notes"] == [f"bird:{bird} {NOTE}"]
    assert [sample.id for sample in result.samples] == CALLED
    assert text2sql.summarize(result.samples)["items"] == 8
