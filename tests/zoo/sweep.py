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
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
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


def examine(
    name: str, folder: Path, widths: Sequence[int] = (8, 4), methods: Sequence[str] = METHODS
) -> dict[str, Any]:
    """What comes of one architecture: ``right``, ``wrong``, ``refused``, ``error``, or ``unbuilt``."""
    import torch

    from quantlab.errors import QuantlabError
    from tests.conftest import byte_tokenizer

    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        logits_of(
            builder.write(folder / "model", name, byte_tokenizer()), torch.ones(1, SEQ_LEN, dtype=torch.int64)
        )
    except Exception as error:
        return {"verdict": "unbuilt", "why": f"{type(error).__name__}: {str(error)[:120]}"}
    try:
        found = measured(folder, widths, methods)
        wrong = misses(found["errors"])
        found |= {"verdict": "wrong" if wrong else "right", "why": " ".join(wrong)}
    except QuantlabError as error:
        found |= {"verdict": "refused", "why": str(error).replace(str(folder / "model"), name)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('site-packages/')[2]}:{where.lineno}"
        found |= {"verdict": "error", "why": f"{type(error).__name__}: {str(error)[:200]} ({place})"}
    return found | {"seconds": time.perf_counter() - started}


def misses(errors: Mapping[str, float]) -> list[str]:
    """Which of the errors, by method and width, are too large: at 8 bits beyond ``RIGHT``, at 4 beyond rtn's."""
    wrong = [key for key, value in errors.items() if key.endswith("-8") and not value < RIGHT]
    return wrong + [
        key for key, value in errors.items() if key.endswith("-4") and not value <= errors["rtn-4"]
    ]


def measured(folder: Path, widths: Sequence[int], methods: Sequence[str]) -> dict[str, Any]:
    """Relative errors of the logits on the calibration rows, by method and width, of the model in ``folder``; in which
    format, and what stayed in 16 bits."""
    from transformers import AutoTokenizer

    from quantlab.calibration import read_texts, token_rows
    from quantlab.commands.defaults import settle
    from quantlab.models.blockwise import layers_of
    from quantlab.models.safetensors.files import open_files
    from quantlab.progress import Silent
    from quantlab.quant.jobs import selection
    from quantlab.quant.pipeline import Job, quantize
    from quantlab.recipe.quantize import QuantizeRecipe

    files, text = open_files(folder / "model"), folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    jobs = []
    for bits in widths:
        for method in methods:
            asked: dict[str, Any] = {"method": method, "bits": bits, "group_size": group_size(files)}
            if method != "rtn":
                asked["calibration"] = {"source": str(text), "rows": ROWS, "seq_len": SEQ_LEN}
            recipe = settle(QuantizeRecipe.model_validate(asked), files)
            jobs.append(Job(f"{method}-{bits}", recipe, folder / f"{method}-{bits}"))
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    rows = token_rows(read_texts(str(text)), tokenizer, rows=ROWS, seq_len=SEQ_LEN, seed=0)

    expected = logits_of(files.path, rows)
    quantize(jobs, files, device="cpu", progress=Silent())
    errors = {job.name: difference(logits_of(job.out, rows), expected) for job in jobs}
    chosen, layers = selection(jobs[0].recipe, files), layers_of(files)
    weights = sum(math.prod(layers.shapes[layer]) for layer in chosen.widths)
    return {
        "errors": errors,
        "formats": {job.name: job.recipe.format for job in jobs},
        "kept": sorted(set(chosen.kept.values())),
        "share": round(weights / files.params, 4),
        "architecture": layers.architecture,
    }


def group_size(files: Any) -> int | str:
    """32 where it divides the inputs of every layer, else ``auto``."""
    from quantlab.models.blockwise import layers_of

    return "auto" if any(columns % 32 for _, columns in layers_of(files).shapes.values()) else 32


def logits_of(path: Path, rows: Any) -> tuple[Any, list[Any]]:
    """What plain transformers computes for token ids [rows, tokens], in float32: logits, and for every layer of experts
    which of them each token goes to [rows, tokens, chosen]."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantlab.models.experts import merged

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise RuntimeError(f"missing {sorted(info['missing_keys'])[:2]}")
    routes: list[Any] = []

    def routed(module: Any, args: tuple[Any, ...]) -> None:
        if len(args) > 1:
            routes.append(args[1].sort(dim=-1).values.reshape(*rows.shape, -1))

    for experts in merged(model).values():
        experts.register_forward_pre_hook(routed)
    with torch.no_grad():
        return model.eval()(input_ids=rows, use_cache=False).logits, routes


def difference(found: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> float:
    """Relative error of the logits, over the tokens that go to the same experts in every layer, and so do all before
    them in their row: where two experts score alike, rounding sends a token to the other, whose function is another."""
    import torch

    alike = torch.ones(expected[0].shape[:2], dtype=torch.bool)
    for one, other in zip(found[1], expected[1], strict=True):
        alike &= (one == other).all(dim=-1)
    alike = alike.long().cumprod(dim=1).bool()
    if alike.float().mean() < LEAST:
        alike[:] = True
    return float((found[0] - expected[0])[alike].norm() / expected[0][alike].norm())


LEAST = 0.2  # share of the tokens that must be left to compare
ROWS, SEQ_LEN = 8, 64
TEXT = " ".join(
    f"word{i * 7919 % 1009} {'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i * i % 97}" for i in range(600)
)

if __name__ == "__main__":
    main()
