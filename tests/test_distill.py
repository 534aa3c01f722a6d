"""`quantlab distill` as a user runs it: a server that speaks the OpenAI protocol, a judge, and what is left behind."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import QuantlabError, RecipeError
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.load import parse_recipe
from quantlab.runs.run import read_jsonl
from quantlab.text2sql.data.dataset import load_items
from tests import command

ROOT = Path(__file__).parents[1]
KEY = "sk-a-secret-nobody-may-see-4711"
RECIPE = """
kind: distill
student: {{model: embedded:base, mode: lora, lora: {{r: 4, alpha: 8, dropout: 0.0}}}}
teacher: {{endpoint: "{url}", model: gold, api_key_env: TEST_TEACHER_KEY, price: {{input: 1000, output: 1000}}}}
judge: {{endpoint: "{url}", model: gold, api_key_env: TEST_TEACHER_KEY, price: {{input: 1000, output: 1000}}}}
data: {{source: ko_text2sql/train.jsonl, limit: 24, filters: [parses, select, binds, executes, judge], holdout_db: 1}}
train: {{max_steps: 2, batch_size: 1, packing: shared, eval_share: 0.1}}
evaluate: [text2sql]
tasks: {{text2sql: {{data: ko_text2sql/dev.jsonl, limit: 4, max_new_tokens: 32}}}}
"""


class Gold(BaseHTTPRequestHandler):
    """Answers a question of the bundled rows with its SQL, and judges everything right; counts what it is asked."""

    answers: dict[str, str]
    asked: list[str]
    authorized: set[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = "\n".join(message["content"] for message in body["messages"])
        self.authorized.add(str(self.headers["Authorization"]))
        self.asked.append(said)
        if "response_format" in body:
            text = json.dumps({"why": "it does", "answer": "yes"})
        else:
            text = next((sql for question, sql in self.answers.items() if question in said), "SELECT 1;")
        reply = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, type[Gold]]]:
    items = load_items("ko_text2sql/train.jsonl", 24)
    kind = type(
        "Handler",
        (Gold,),
        {"answers": {i.question: i.answer for i in items}, "asked": [], "authorized": set()},
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", kind
        httpd.shutdown()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def quantlab(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return command.quantlab(*arguments, cwd=cwd, code=code, environment={"TEST_TEACHER_KEY": KEY})


@pytest.fixture(scope="module")
def story(
    server: tuple[str, type[Gold]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """A dry run, a run that a budget stops, and the run that goes on from there."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "r.yaml").write_text(RECIPE.format(url=server[0]), encoding="utf-8")
    said = ""
    dry = json.loads(quantlab("distill", "r.yaml", "--dry-run", "--json", cwd=folder).stdout)
    assert not server[1].asked
    (cell,) = dry["cells"]
    assert cell["estimates"]["teacher gold"]["requests"] == 24
    stopped = quantlab("distill", "r.yaml", "--set", "teacher.max_usd=2.4", cwd=folder, code=1)
    assert "max_usd" in stopped.stderr and "is kept" in stopped.stderr
    assert 0 < 0.11 * len(server[1].asked) < 2.4
    said += stopped.stdout + stopped.stderr
    done = quantlab("distill", "r.yaml", "--json", cwd=folder)
    said += done.stdout + done.stderr
    return folder, json.loads(done.stdout), said


def test_from_teacher_to_measured_student(
    story: tuple[Path, dict[str, Any], str], server: tuple[str, type[Gold]]
) -> None:
    folder, summary, _ = story
    (cell,) = summary["cells"]
    spent = {one["for"]: one for one in cell["spending"]}
    assert spent["answer"]["requests"] + spent["answer"]["cached"] == 24
    assert spent["answer"]["cached"] > 0  # what the stopped run had paid for
    asked = server[1].asked
    assert len(set(asked)) == len(asked), "a request was paid twice"
    assert spent["answer"]["usd"] == pytest.approx(0.11 * spent["answer"]["requests"])
    rows = {row["stage"]: row for row in summary["rows"]}
    assert rows["student"]["parent"] == rows["base"]["run_id"] and rows["student"]["method"] == "lora"
    assert rows["student"]["judge"] is not None and rows["base"]["judge"] is not None
    record = json.loads((folder / "results" / "runs" / cell["run_id"] / "run.json").read_text())
    assert record["judge"]["n"] == 4
    gain = record["before_after"]["gain"]
    assert gain["total"] == gain["learned_to_stop"] + gain["learned_sql"] + gain["not_stopping"]
    card = (Path(folder) / cell["checkpoint"] / "README.md").read_text(encoding="utf-8")
    assert "student by lora" in card and "cut at the first statement" in card


def test_the_key_is_sent_and_written_nowhere(
    story: tuple[Path, dict[str, Any], str], server: tuple[str, type[Gold]]
) -> None:
    folder, _, said = story
    assert server[1].authorized == {f"Bearer {KEY}"}
    assert KEY not in said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_the_student_loads_with_transformers_alone(story: tuple[Path, dict[str, Any], str]) -> None:
    from transformers import AutoModelForCausalLM

    folder, summary, _ = story
    model = AutoModelForCausalLM.from_pretrained(folder / summary["cells"][0]["checkpoint"])
    assert sum(p.numel() for p in model.parameters()) == 5_770_496


def test_resume_repeats_nothing(
    story: tuple[Path, dict[str, Any], str], server: tuple[str, type[Gold]]
) -> None:
    folder, summary, _ = story
    before = len(server[1].asked)
    again = json.loads(quantlab("distill", "r.yaml", "--json", "--resume", cwd=folder).stdout)
    assert again["cells"][0]["run_id"] == summary["cells"][0]["run_id"]
    assert len(server[1].asked) == before
    refused = quantlab("distill", "r.yaml", cwd=folder, code=2)
    assert "--resume" in refused.stderr


def with_evidence(number: int, place: str = "매장") -> dict[str, Any]:
    """A row whose evidence alone tells it from its neighbours."""
    return {
        "id": f"{place}-{number}",
        "db_id": place,
        "context": f"CREATE TABLE {place} (id INT, kind INT, city TEXT);",
        "question": f"{place} 가운데 특별한 것은?",
        "answer": f"SELECT id FROM {place} WHERE kind = {number};",
        "evidence": f"특별한 {place}은 kind = {number}\r\n(도시와 무관)",
    }


def test_evidence_from_the_file_to_teacher_judge_and_student(
    server: tuple[str, type[Gold]], tmp_path: Path
) -> None:
    """Rows that differ in their evidence alone: all are asked about, judged, kept and learned, evidence and all."""
    rows = [with_evidence(number) for number in range(6)]
    rows.append({key: value for key, value in with_evidence(9).items() if key != "evidence"})
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "test.jsonl", [with_evidence(number, "도서") for number in range(2)])
    (tmp_path / "r.yaml").write_text(RECIPE.format(url=server[0]), encoding="utf-8")
    before = len(server[1].asked)
    server[1].answers["CREATE TABLE 매장"] = "SELECT id FROM 매장;"  # to all of them the same
    places = ("--set", "data.source=rows.jsonl", "--set", "tasks.text2sql.data=test.jsonl")
    done = json.loads(quantlab("distill", "r.yaml", "--json", *places, cwd=tmp_path).stdout)
    asked = server[1].asked[before:]
    answers = [said for said in asked if "<sql>" not in said]
    assert len(answers) == len(rows)
    for row in rows:
        shown = f"<evidence>\n{row.get('evidence')}\n</evidence>"
        assert sum(shown in said for said in answers) == ("evidence" in row)
        assert sum(shown in said for said in asked if "<sql>" in said) == ("evidence" in row)
    (kept,) = (tmp_path / "results" / "data").glob("*/train.jsonl")
    learned = {row["id"]: row.get("evidence") for row in read_jsonl(kept)}
    assert learned == {row["id"]: row.get("evidence") for row in rows}
    assert done["cells"][0]["numbers"]["steps"] == 2


def test_evidence_that_is_no_text_is_said_before_any_work(tmp_path: Path) -> None:
    rows = [with_evidence(1), {**with_evidence(2), "evidence": ["kind = 2"]}]
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "r.yaml").write_text("kind: distill\nstudent: {model: embedded:base}\n", encoding="utf-8")
    named = "rows.jsonl:2: 'evidence' must be text, found a list"
    learned = ("--set", "data.source=rows.jsonl", "--dry-run")
    # left out, as any unreadable row
    assert named in quantlab("distill", "r.yaml", *learned, cwd=tmp_path).stdout
    asked = ("--set", "tasks.text2sql.data=rows.jsonl", "--dry-run")
    assert named in quantlab("distill", "r.yaml", *asked, cwd=tmp_path, code=4).stderr
    assert not (tmp_path / "results").exists()


def recipe(text: str) -> DistillRecipe:
    found = parse_recipe("kind: distill\nstudent: {model: embedded:base}\n" + text, "r.yaml")
    assert isinstance(found, DistillRecipe)
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {filters: [judge]}\n", "r.yaml:3: data.filters: the rule `judge` needs"),
        ("train: {loss: jsd}\n", "r.yaml:3: train.logits: loss jsd needs"),
        ("train: {logits: {model: x}}\n", "loss sft has no use for it"),
        ("teacher: {model: gpt-4o, endpoint: 'http://me:pw@host/v1'}\n", "no user, password or query"),
        ("teacher: {model: 'file:a.jsonl', endpoint: 'http://host/v1'}\n", "is on this machine"),
        ("teacher: {model: gpt-4o, rmp: 3}\n", "did you mean 'rpm'?"),
        ("train: {packing: shared}\ndata: {format: text}\n", "plain texts share no DDL"),
        ("data: {filters: [parses, parses]}\n", "a rule is named twice"),
    ],
)
def test_recipes_that_cannot_mean_anything_are_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(text)
    assert said in str(error.value)


def test_budgets_are_no_part_of_what_a_recipe_is() -> None:
    one = recipe("teacher: {model: gpt-4o, max_usd: 1, rpm: 10}\n")
    assert one.digest() == recipe("teacher: {model: gpt-4o, max_usd: 9, attempts: 2}\n").digest()
    assert one.digest() != recipe("teacher: {model: gpt-4o, temperature: 1}\n").digest()
    assert issubclass(RecipeError, QuantlabError)
