"""Train the model that ships with quantlab, from nothing: ``python -m tools.ko_text2sql.train_embedded``.

A Llama of 5.8 million parameters with a byte-level BPE of 4,096 tokens, trained on the project's own synthetic text
(``tools.ko_text2sql.corpus``: schemas, SQL with questions as comments, Korean and English prose). Everything is
seeded; the same machine, thread count and versions give the same weights. Matrices are optimised with Muon (Jordan
et al. 2024, ``torch.optim.Muon``), the rest with AdamW; the learning rate is constant and falls to zero over the last
third.

Writes the model directory (bfloat16 safetensors, tokenizer, configuration) and a training record (tokens, loss curve,
time, device). On two CPU cores with AVX512-BF16 it takes a little more than an hour, on a GPU minutes; on other CPUs
nine hours, of which torch's Muon, whose own products are in bfloat16, takes three quarters.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.models.precision import computed_in
from quantlab.paths import DATA, PACKAGE, atomic_write_text
from tools.ko_text2sql.corpus import documents

VOCABULARY = 4096
CONTEXT = 1024  # positions
END = "<|endoftext|>"  # between documents: the only thing that ends one
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TOKENIZER_SEED, TRAINING_SEED = 1, 2


def train_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level BPE; digits stay single, so that numbers are copied digit by digit."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first ``tokens`` tokens of the corpus, int32 [tokens], documents ended by END."""
    ids: list[int] = []
    source = documents(TRAINING_SEED)
    while len(ids) < tokens:
        for encoded in tokenizer(list(islice(source, 500)), verbose=False)["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids[:tokens], dtype=torch.int32)


def build_model(tokenizer: Any, seed: int) -> Any:
    """The untrained model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
        **SHAPE,
    )
    return LlamaForCausalLM(config)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(inner, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int, warmup: int = 20, decay: float = 0.35) -> float:
    """Factor of the learning rate: up, constant, then linearly to zero."""
    falling = int(steps * decay)
    return min(1.0, (step + 1) / warmup, (steps - step) / falling)


@torch.no_grad()
def heldout_loss(model: Any, tokenizer: Any, device: str, windows: int = 24, length: int = 512) -> float:
    """Mean loss in nats a token on the first windows of the held-out text."""
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[: windows * length * 6], verbose=False)["input_ids"][: windows * length]
    rows = torch.tensor(ids, device=device).view(-1, length)
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def train(args: argparse.Namespace) -> None:
    """The whole run, from corpus to files."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.time()
    tokenizer = train_tokenizer(islice(documents(TOKENIZER_SEED), args.tokenizer_documents))
    per_step = args.batch * args.length
    data = token_stream(tokenizer, args.steps * per_step + 1)
    model = build_model(tokenizer, args.seed).to(device).train()
    optims = optimizers(model, args.muon_lr, args.adam_lr)
    base = [[g["lr"] for g in o.param_groups] for o in optims]
    order = torch.randperm(args.steps * args.batch, generator=torch.Generator().manual_seed(args.seed))
    curve: list[dict[str, float]] = []
    running = 0.0
    low = computed_in(torch.bfloat16, device) == torch.bfloat16
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(data)} tokens, {device}", flush=True
    )
    for step in range(args.steps):
        picked = order[step * args.batch : (step + 1) * args.batch] * args.length
        rows = torch.stack([data[i : i + args.length] for i in picked.tolist()]).long().to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate(step, args.steps)
        for optim, rates in zip(optims, base, strict=True):
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optim.step()
            optim.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % args.every == 0 or step == args.steps - 1:
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * per_step,
                "train_loss": round(running, 4),
                "heldout_loss": round(heldout_loss(model, tokenizer, device), 4),
                "seconds": round(time.time() - started, 1),
            }
            curve.append(entry)
            left = (time.time() - started) / (step + 1) * (args.steps - step - 1)
            print(json.dumps(entry), f"about {left / 60:.0f} min left", flush=True)
            save(model, tokenizer, args.out)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": SHAPE | {"vocab_size": VOCABULARY},
        "tokens": args.steps * per_step,
        "seconds": round(time.time() - started, 1),
        "device": f"{platform.machine()} {device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "arguments": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in ("out", "record")
        },
        "curve": curve,
    }
    atomic_write_text(args.record, json.dumps(record, indent=1) + "\n")


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the model in bfloat16, with its tokenizer."""
    from transformers import LlamaForCausalLM

    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PACKAGE / "models" / "embedded" / "base")
    parser.add_argument("--record", type=Path, default=Path("results/embedded-base/training.json"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--tokenizer-documents", type=int, default=8000)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations on held-out text")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
