"""A Hugging Face tokenizer as a GGUF file holds it: tokens, their kinds, merges or scores, and how text is cut first.

Two families are written. Byte-level BPE (``gpt2`` to llama.cpp) has its merges in the file, and a name for how text
is cut before them, of which llama.cpp knows a list: it is found by what the tokenizer makes of a fixed text, as
llama.cpp's converter does, or else by the tokenizer's own description of the cutting. SentencePiece's BPE (``llama``)
is recognised by its fallback to bytes; a token's score there is minus the rank of the first merge that makes it,
which is the order in which they are merged.

Read from ``tokenizer.json`` alone. Not covered: unigram and WordPiece models.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import DataError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer

LARGEST = 256 * 2**20  # bytes of tokenizer.json
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
NEVER_MERGED = -1e6  # score of a token that no merge makes

# What the converter of llama.cpp encodes to tell tokenizers apart.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3"
    " 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======="
    " нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure"
    " I'll make it, 'D you like some tea? We'Ve a'lL"
)
# sha256 of the resulting list of tokens, as Python writes it: the table of llama.cpp's converter, for the architectures
# that are written here.
BY_PROBE = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a tokenizer describes its cutting: its steps, each of what decides.
BY_STEPS = {
    (("words",),): "gpt-2",
    (("digits", True), ("words",)): "smollm",
    (("split", _WORDS % "{1,3}"),): "llama-bpe",
    (("split", _WORDS % ""),): "qwen2",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int, called: str) -> None:
    """Write the tokenizer in ``folder``, filled up to ``vocabulary`` tokens, and the chat template.

    Raises:
        DataError: there is no tokenizer.json, it is damaged, of a kind that is not covered, or cuts text in a way that
            llama.cpp has no name for.
    """
    from gguf import SpecialVocab
    from tokenizers import Tokenizer

    held = read_tokenizer(folder, called)
    model = held["model"]
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(held, vocabulary, called, pieces)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else cutting(held, library, called))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(model["merges"], tokens, kinds))
        writer.add_add_space_prefix(_prefixed(held))
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=not pieces and bool(model.get("merges")), n_vocab=vocabulary)
    ids = library.encode("a").ids
    for name, place in (("bos", 0), ("eos", -1)):
        number = special.special_token_ids.get(name)
        special.add_special_token[name] = number is not None and ids[place] == number
    special.add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path, called: str) -> dict[str, Any]:
    """The content of tokenizer.json, as far as it is relied on.

    Raises:
        DataError: as :func:`add_tokenizer`.
    """
    file = folder / "tokenizer.json"
    try:
        if file.stat().st_size > LARGEST:
            raise DataError(f"{called}: {file} has more than {LARGEST} bytes")
        held = json.loads(file.read_text(encoding="utf-8"))
        model, added = held["model"], held.get("added_tokens") or []
        kind = model.get("type", "BPE")
        vocabulary, merges = model["vocab"], model.get("merges", [])
        sound = (
            isinstance(vocabulary, dict) and isinstance(merges, list)
            and all(type(i) is int for i in vocabulary.values())
            and all(type(token["id"]) is int and isinstance(token["content"], str) for token in added)
        )  # fmt: skip
    except OSError as error:
        raise DataError(
            f"{called}: no tokenizer.json, which the tokenizer of a GGUF file is made of",
            hint="AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) writes one",
        ) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{called}: {file} is not a tokenizer: {type(error).__name__}: {error}") from error
    if not sound:
        raise DataError(f"{called}: {file} is not a tokenizer: its vocabulary is not one")
    if kind != "BPE":
        raise DataError(f"{called}: a GGUF file's tokenizer is BPE here, not {kind}")
    return dict(held)


def cutting(held: dict[str, Any], library: Tokenizer, called: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges.

    Raises:
        DataError: llama.cpp has none that is known here.
    """
    digest = sha256(str(library.encode(PROBE).ids).encode()).hexdigest()
    found = BY_PROBE.get(digest) or BY_STEPS.get(steps(held.get("pre_tokenizer")))
    if found is None:
        raise DataError(
            f"{called}: its tokenizer cuts text in a way that llama.cpp has no known name for (hash {digest})",
            hint="known are those of Llama 3, SmolLM, Mistral, Qwen 2 and 3, Phi, Pythia, DeepSeek, GPT-2 and GPT-4o",
        )
    return found


def steps(described: Any) -> tuple[tuple[Any, ...], ...]:
    """What decides in a tokenizer's description of its cutting; bytes that are only renamed do not."""
    if not isinstance(described, dict):
        return ()
    kind = described.get("type")
    if kind == "Sequence":
        return tuple(step for part in described.get("pretokenizers", []) for step in steps(part))
    if kind == "ByteLevel":
        return (("words",),) if described.get("use_regex", True) else ()
    if kind == "Digits":
        return (("digits", bool(described.get("individual_digits"))),)
    if kind == "Split" and isinstance(described.get("pattern"), dict):
        return (("split", described["pattern"].get("Regex")),)
    return ((str(kind),),)


def _tokens(held: dict[str, Any], count: int, called: str, pieces: bool) -> tuple[list[bytes], list[int]]:
    """Tokens and their kinds by number."""
    tokens, kinds = [f"[PAD{i}]".encode() for i in range(count)], [UNUSED] * count
    unknown = held["model"].get("unk_token")
    named = [(text, number, NORMAL) for text, number in held["model"]["vocab"].items()]
    for token in held.get("added_tokens") or []:
        control = token.get("special") or looks_special(token["content"])
        text = token["content"] if control else token["content"].replace("\u2581", " ")
        named.append((text, token["id"], CONTROL if control else USER_DEFINED))
    for text, number, kind in named:
        if not 0 <= number < count:
            raise DataError(f"{called}: token {text!r} has number {number}, the model has {count} tokens")
        if pieces and text == unknown:
            kind = UNKNOWN
        elif pieces and kind == NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = BYTE
        tokens[number], kinds[number] = text.encode("utf-8", "surrogatepass"), kind
    return tokens, kinds


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token though it is not marked as one."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _scores(merges: list[Any], tokens: list[bytes], kinds: list[int]) -> list[float]:
    rank: dict[bytes, int] = {}
    for i, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault((left + right).encode("utf-8", "surrogatepass"), i)
    return [
        float(-rank[token]) if kind == NORMAL and token in rank else (NEVER_MERGED if kind == NORMAL else 0.0)
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _prefixed(held: dict[str, Any]) -> bool:
    """Whether a space is put before text."""
    normalizer, cut = held.get("normalizer") or {}, held.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Prepend" for part in parts) or (
        cut.get("type") == "Metaspace" and cut.get("prepend_scheme", "always") != "never"
    )
