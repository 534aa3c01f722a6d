"""The script for machines with a GPU, as far as one without can try it: refusal, limits, the file, the floor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"gpu": "NVIDIA H200"}


@pytest.fixture(autouse=True, scope="module")
def beside() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def part(name: str, code: str, seconds: float = 60, needs: tuple[str, ...] = ()) -> Any:
    """A part that runs some Python, which finds its folder in ``sys.argv[1]``."""
    from gpu_checks import Part

    return Part(name, seconds, lambda folder: [sys.executable, "-c", code, str(folder)], needs)


def left(numbers: str) -> str:
    return f"import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'numbers.json').write_text('{numbers}'); "


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["bash", "gpu_checks.sh"], [sys.executable, "gpu_checks.py"]])
def test_without_a_gpu_it_says_so_in_one_line_and_stops(command: list[str], tmp_path: Path) -> None:
    program = [command[0], str(BENCHMARKS / command[1]), "--out", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHON": sys.executable, "VENV": str(tmp_path / "venv")}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 3
    assert done.stderr == "no NVIDIA GPU that torch can use on this machine: nothing was run\n"
    assert not done.stdout and not list(tmp_path.iterdir())


def test_one_part_that_hangs_and_one_that_fails_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_checks import run_all

    hangs = left('{"half": 1}') + "import time; print('begun', flush=True); time.sleep(600)"
    parts = [
        part("hangs", hangs, seconds=3),
        part("fails", "import sys; print('first'); sys.exit('no such thing')"),
        part("lacks", "", needs=("torch", "no_such_module")),
        part("succeeds", left('{"ms": [1.5, 2]}')),
    ]
    out = tmp_path / "new" / "h200.json"
    started = time.monotonic()
    returned = run_all(parts, out, MACHINE)
    assert time.monotonic() - started < 30
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content == returned and content["machine"] == MACHINE
    assert list(content["parts"]) == ["hangs", "fails", "lacks", "succeeds"]
    hung, failed, lacked, done = content["parts"].values()
    assert hung["status"] == "timeout" and 3 <= hung["seconds"] < 10
    assert hung["numbers"] == {"half": 1} and hung["said"] == ["begun"] and hung["limit"] == 3
    assert failed["status"] == "failed" and failed["said"] == ["first", "no such thing"]
    assert lacked == {"status": "skipped", "seconds": 0.0, "why": "not here: no_such_module"}
    assert done["status"] == "ok" and done["numbers"] == {"ms": [1.5, 2]} and "said" not in done
    assert [p.name for p in out.parent.iterdir()] == ["h200.json"]
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["hangs", "timeout"], ["fails", "failed"], ["lacks", "skipped"], ["succeeds", "ok"]
    ]  # fmt: skip


def test_a_part_takes_its_children_with_it() -> None:
    from gpu_checks import run_part

    nap = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    found = run_part(part("hangs", nap + "print(p.pid, flush=True); p.wait()"), 4)
    child = int(found["said"][0])
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("the child of a part that was stopped still runs")


def test_the_file_is_whole_after_every_part(tmp_path: Path) -> None:
    from gpu_checks import run_all

    out = tmp_path / "out.json"
    look = f"import json, pathlib; print(len(json.loads(pathlib.Path({str(out)!r}).read_text())['parts'])); 1 / 0"
    content = run_all([part("first", ""), part("second", look)], out, MACHINE)
    assert content["parts"]["second"]["said"][0] == "1"


def test_all_parts_share_the_time_there_is(tmp_path: Path) -> None:
    from gpu_checks import LEAST, run_all

    sleep = "import time; time.sleep(600)"
    parts = [part("takes it all", sleep, seconds=2), part("comes too late", sleep)]
    content = run_all(parts, tmp_path / "out.json", MACHINE, seconds=LEAST + 1)
    first, second = content["parts"].values()
    assert first["status"] == "timeout"
    assert second == {"status": "skipped", "seconds": 0.0, "why": "no time was left"}


def test_no_directory_and_no_secret_reaches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checks import run_all

    monkeypatch.setenv("SOME_API_TOKEN", "tok-0123456789")
    says = (
        f"import os, sys; print(os.environ['SOME_API_TOKEN'], {str(Path.home() / 'x')!r}); "
        "print('File \"/home/alice/venv/lib/torch/x.py\", line 3; 5 tok/s, a / b, https://example.org/a/b'); 1 / 0"
    )
    out = tmp_path / "out.json"
    run_all([part("fails", says)], out, MACHINE)
    text = out.read_text(encoding="utf-8")
    assert "0123456789" not in text and "alice" not in text and str(Path.home()) not in text
    said = json.loads(text)["parts"]["fails"]["said"]
    assert said[:2] == ["*** x", 'File "x.py", line 3; 5 tok/s, a / b, https://example.org/a/b']


def test_the_outcomes_of_tests_are_numbers(tmp_path: Path) -> None:
    from gpu_checks import Part, run_part

    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )

    def command(folder: Path) -> list[str]:
        report = f"--junitxml={folder / 'tests.xml'}"
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            str(tmp_path),
            report,
        ]

    found = run_part(Part("tests", 60, command, ()), 60)
    assert found["status"] == "failed"
    counts = {"passed": 1, "failure": 1, "error": 0, "skipped": 1}
    assert {key: found["numbers"][key] for key in counts} == counts
    assert [name.rpartition("::")[2] for name in found["numbers"]["wrong"]] == ["test_b"]


def test_every_part_can_be_started_and_nine_minutes_are_not_exceeded(tmp_path: Path) -> None:
    from gpu_checks import PARTS, SECONDS, file_name

    assert SECONDS == 540
    assert [p.name for p in PARTS] == ["tests", "kernel", "blocks", "bitsandbytes", "formats", "demo"]
    for one in PARTS:
        command = one.command(tmp_path)
        assert command[0] == sys.executable and 0 < one.seconds < SECONDS
    assert file_name("NVIDIA H200") == "nvidia-h200.json" and file_name("//") == "gpu.json"


# The arithmetic floor


def test_the_floor_counts_what_a_block_really_multiplies() -> None:
    from arithmetic import operations
    from random_llama import Shape
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaModel

    shape = Shape(hidden=32, blocks=1, heads=4, kv_heads=2, ffn=48, vocab=64)
    model = LlamaModel(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=64, attn_implementation="eager",
        )
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 16, dtype=torch.int64))
    attention = 4 * 48 * 16 * 32  # scores and values of all positions, of which the mask leaves half
    rotary = sum(counter.get_flop_counts().get("LlamaModel.rotary_emb", {}).values())
    counted = counter.get_total_flops() - rotary
    assert operations(shape, 3, 16).forward == pytest.approx(counted - attention / 2, rel=0.01)


def test_the_floor_of_a_model_by_hand() -> None:
    from arithmetic import Operations, operations, solves
    from random_llama import SHAPES, Shape

    assert Operations(6.0, 4.0, 2.0).seconds(half=2.0, single=3.0) == 5.0
    found = operations(Shape(hidden=4, blocks=1, heads=2, kv_heads=1, ffn=6), 2, 3)
    assert found.forward == 2 * 6 * (8 * 4 + 4 * 4 + 12 * 4 + 4 * 6) + 2 * 6 * 3 * 4
    assert found.moments == 6 * (3 * 16 + 36)
    assert found.solving == pytest.approx(8 * 16 + 4 * 16 + 12 * 16 + 4 * 36 + 2 / 3 * (3 * 64 + 216))
    assert solves(SHAPES["8b"]) == {
        "q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)
    }  # fmt: skip


def test_the_floor_lies_below_what_a_real_walk_takes(tmp_path: Path) -> None:
    """At this machine's own rates: a number above it would be no floor."""
    from arithmetic import operations
    from gpu_parts import Watch, made
    from random_llama import Shape, build, random_rows, text_of_rows

    shape = Shape(hidden=256, blocks=3, heads=4, kv_heads=2, ffn=512, vocab=512, dtype="float32")
    model = build(tmp_path / "model", shape)
    text = tmp_path / "rows.txt"
    text.write_text(text_of_rows(random_rows(512, 8, 128)), encoding="utf-8")
    recipe = {
        "method": "gptq", "bits": 4, "group_size": 128, "symmetric": True,
        "calibration": {"source": str(text), "rows": 8, "seq_len": 128},
    }  # fmt: skip
    watch = Watch()
    made(recipe, str(model), tmp_path / "out", device="cpu", progress=watch)
    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - started)
    assert len(watch.seconds) == 3
    assert 0 < operations(shape, 8, 128).seconds(rate, rate) < watch.seconds[1]
