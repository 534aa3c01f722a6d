"""Quantizes a tiny model of every causal language model that transformers has, reads it back with plain transformers,
and prints what came of it.

    python -m tests.zoo.sweep [--out FILE] [--processes N] [MODEL_TYPE...]

For each architecture: rtn, gptq and awq at 8 bits, which must give the original's logits within 3 %, and at 4 bits,
where gptq and awq must come closer to the original on the calibration rows than rtn does. Every architecture has a
process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.zoo import builder

SECONDS = 300.0  # that one architecture may take
RIGHT = 0.03  # relative error of the logits at 8 bits
METHODS = ("rtn", "gptq", "awq")
# Encoders, encoder-decoders and wrappers around a language model are not swept: they are refused by kind.
OTHERS = frozenset({
    "bart", "beam", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small",
    "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus",
    "plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
    "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "git", "moshi", "musicgen",
    "musicgen_melody", "reformer", "blt", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified",
    "gemma4_assistant", "gemma4_unified_assistant", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize",
    "qwen3_5", "qwen3_5_moe", "qwen4_exp", "dots3_note", "phi4_multimodal",
})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="quantize every architecture and read it back")
    parser.add_argument("types", nargs="*", help="model types; all when none is named")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    import_everything()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = asked.types or [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if n not in OTHERS]
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(asked.processes) as pool:
        for name, found in zip(names, pool.map(apart, names), strict=True):
            results[name] = found
            print(line(name, found), flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(results, indent=1))
    counts: dict[str, int] = {}
    for found in results.values():
        counts[found["verdict"]] = counts.get(found["verdict"], 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))


def import_everything() -> None:
    import compressed_tensors  # type: ignore[import-untyped] # noqa: F401
    import gptqmodel  # noqa: F401
    import optimum.gptq  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    from quantlab.models.load import quiet_libraries
    from quantlab.quant import pipeline  # noqa: F401

    quiet_libraries()
    torch.set_num_threads(1)


def line(name: str, found: dict[str, Any]) -> str:
    errors = " ".join(f"{key} {value:.4f}" for key, value in found.get("errors", {}).items())
    return f"{found['verdict']:8s} {name:24s} {found.get('seconds', 0):5.1f}s {errors} {found.get('why', '')}"


def apart(name: str) -> dict[str, Any]:
    """:func:`examine` in a forked process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with tempfile.TemporaryDirectory() as folder:
            theirs.send(examine(name, Path(folder)))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else {"verdict": "slow", "why": f"more than {SECONDS:.0f} s"}
    except EOFError:
        return {"verdict": "died"}
    finally:
        process.kill()
        process.join()


def examine(name: str, folder: Path) -> dict[str, Any]:
    """What comes of one architecture: ``right``, ``wrong``, ``refused``, ``error``, or ``unbuilt``."""
    from quantlab.errors import QuantlabError

    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        from tests.conftest import byte_tokenizer

        builder.write(folder / "model", name, byte_tokenizer())
    except Exception as error:
        return {"verdict": "unbuilt", "why": f"{type(error).__name__}: {str(error)[:120]}"}
    try:
        found = measured(folder)
        wrong = [key for key, value in found["errors"].items() if key.endswith("8") and not value < RIGHT]
        rounded = found["errors"]["rtn-4"]
        wrong += [key for key, value in found["errors"].items() if key[-2:] == "-4" and not value <= rounded]
        found |= {"verdict": "wrong" if wrong else "right", "why": " ".join(wrong)}
    except QuantlabError as error:
        found |= {"verdict": "refused", "why": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('site-packages/')[2]}:{where.lineno}"
        found |= {"verdict": "error", "why": f"{type(error).__name__}: {str(error)[:200]} ({place})"}
    return found | {"seconds": time.perf_counter() - started}


def measured(folder: Path) -> dict[str, Any]:
    """Relative errors of the logits on the calibration rows, by method and width."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantlab.commands.defaults import settle
    from quantlab.models.safetensors.files import open_files
    from quantlab.progress import Silent
    from quantlab.quant.pipeline import Job, quantize
    from quantlab.recipe.quantize import QuantizeRecipe

    model = folder / "model"
    files = open_files(model)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    calibration = {"source": str(folder / "text.txt"), "rows": 8, "seq_len": 64}
    jobs = []
    for bits in (8, 4):
        for method in METHODS:
            asked: dict[str, Any] = {"method": method, "bits": bits}
            if method != "rtn":
                asked["calibration"] = calibration
            recipe = settle(QuantizeRecipe.model_validate(asked), files)
            jobs.append(Job(f"{method}-{bits}", recipe, folder / f"{method}-{bits}"))
    rows = calibration_ids(folder, model)

    def logits(path: Path) -> torch.Tensor:
        subject, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"] and path != model:
            raise RuntimeError(f"missing {sorted(info['missing_keys'])[:2]}")
        with torch.no_grad():
            return subject.eval()(input_ids=rows, use_cache=False).logits

    expected = logits(model)
    outcomes = quantize(jobs, str(model), device="cpu", progress=Silent())
    errors = {}
    for job, _ in zip(jobs, outcomes, strict=True):
        errors[job.name] = ((logits(job.out) - expected).norm() / expected.norm()).item()
    return {"errors": errors}


def calibration_ids(folder: Path, model: Path) -> Any:
    from transformers import AutoTokenizer

    from quantlab.calibration import read_texts, token_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_rows(read_texts(str(folder / "text.txt")), tokenizer, rows=8, seq_len=64, seed=0)


TEXT = " ".join(
    f"word{i * 7919 % 1009} {'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i * i % 97}" for i in range(600)
)

if __name__ == "__main__":
    main()
