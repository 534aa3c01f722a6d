"""A GGUF file as llama.cpp computes it, where tasks expect a model of transformers.

Tasks feed token ids and look at logits; this does both through ``llama-cpp-python``, one row at a time, on the CPU,
with llama.cpp's defaults (keys and values in float16, kernels that compute with quantized activations), which is what
its users get. Ids are those of the model's own tokenizer, as for every other model. Not covered: GPUs, batches of rows,
quantized caches, lm-eval.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlab.errors import DataError, MachineError, first_line
from quantlab.models.load import LoadedModel, load_tokenizer
from quantlab.models.safetensors.files import GGUF, ModelFiles, open_files

RUNTIME, PACKAGE = "llama.cpp", "llama-cpp-python"
SHORTEST = 512  # tokens of a context


def gguf_of(files: ModelFiles) -> Path:
    """The GGUF file that holds a model.

    Raises:
        DataError: it is held in something else. MachineError: llama-cpp-python is not installed.
    """
    found = [file for file in files.weight_files if file.suffix == GGUF]
    if len(found) != 1:
        raise DataError(f"{files.name}: {RUNTIME} runs GGUF files, this is none", hint=f"give a {GGUF} file")
    if find_spec("llama_cpp") is None:
        raise MachineError(f"{RUNTIME} needs {PACKAGE}", hint=f"pip install {PACKAGE}")
    return found[0]


def open_model(ref: str | Path, trust_remote_code: bool = False) -> LoadedModel:
    """A GGUF file to be measured.

    Raises:
        DataError, MachineError: as :func:`gguf_of`; or llama.cpp cannot read it.
    """
    from transformers import AutoConfig, GenerationConfig

    files = open_files(ref)
    file = gguf_of(files)
    try:
        generation = GenerationConfig.from_pretrained(files.path)
    except OSError:  # there is none
        generation = GenerationConfig()
    model = LlamaCppModel(file, AutoConfig.from_pretrained(files.path), generation)
    tokenizer = load_tokenizer(files, trust_remote_code)
    return LoadedModel(
        model,
        tokenizer,
        "cpu",
        files.name,
        files.path,
        files.size_bytes,
        model.params,
        runtime=runtime_name(),
    )


def runtime_name() -> str:
    """llama.cpp and the version of the package that brings it."""
    try:
        return f"{RUNTIME} ({PACKAGE} {version(PACKAGE)})"
    except PackageNotFoundError:
        return RUNTIME


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens that were fed of a row, in place of their keys and values: llama.cpp keeps those of the last row."""

    tokens: list[int]


@dataclass
class Output:
    """What a forward pass gives: ``logits`` float32 [rows, positions, vocabulary], and what to go on with."""

    logits: torch.Tensor
    past_key_values: Row


class LlamaCppModel:
    """One file. Keys and values of the row that was fed last are kept; going on with another feeds it again.

    Raises:
        DataError: llama.cpp cannot read the file.
    """

    most_rows = 1  # that are generated together
    dtype = RUNTIME

    def __init__(self, file: Path, config: Any, generation_config: Any) -> None:
        import llama_cpp

        self.library, self.file = llama_cpp, file
        self.config, self.generation_config = config, generation_config
        self._llama: Any = None
        self._every, self._size = False, 0  # whether it gives logits of every position; tokens of its context
        self._row: Row | None = None
        self._end: Any = None  # closes what is open
        self._ready(SHORTEST, every=False)
        opened: Any = self._llama
        self.params = int(llama_cpp.llama_model_n_params(opened.model))
        self.vocabulary = int(opened.n_vocab())

    def modules(self) -> Iterator[Any]:
        """None of torch's."""
        return iter(())

    def __call__(self, *args: Any, **keys: Any) -> Output:
        return self.forward(*args, **keys)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Row | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Output:
        """Logits of ``input_ids`` int64 [rows, tokens], of the last position alone with ``logits_to_keep`` 1. With
        ``past_key_values`` of the last output: of the last position, behind the row that gave it."""
        if past_key_values is None:
            every = logits_to_keep != 1
            self._ready(input_ids.shape[1], every=every)
            rows = [row.tolist() for row in input_ids]
            logits = torch.stack([self._fed(row, every=every) for row in rows])
            self._row = Row(rows[-1])
        else:
            before, more = past_key_values.tokens, input_ids[0].tolist()
            forgotten = self._ready(len(before) + len(more), every=False)
            if forgotten or past_key_values is not self._row:
                logits = self._fed(before + more, every=False)[None]
            else:
                logits = self._fed(more, every=False, anew=False)[None]
            self._row = Row(before + more)
        return Output(logits, self._row)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: Any,
        stopping_criteria: Any,
    ) -> torch.Tensor:
        """Greedy decoding of one row [1, tokens] until a criterion or ``max_length`` ends it; the row with its
        answer."""
        if len(input_ids) != 1:
            raise ValueError(f"{RUNTIME} generates one row at a time")
        length = int(generation_config.max_length)
        self._ready(length, every=False)
        output = self.forward(input_ids, logits_to_keep=1)
        while input_ids.shape[1] < length:
            token = output.logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, 1]
            input_ids = torch.cat([input_ids, token], dim=1)
            if bool(stopping_criteria(input_ids, None).all()):
                break
            output = self.forward(token, past_key_values=output.past_key_values)
        return input_ids

    def _ready(self, tokens: int, *, every: bool) -> bool:
        """Have a context of at least so many tokens; returns whether it is a new one, which remembers nothing."""
        if self._llama is not None:
            if self._size >= tokens and self._every == every:
                return False
            self._end()
        self._every, self._size = every, max(SHORTEST, 1 << (tokens - 1).bit_length())
        threads = torch.get_num_threads()
        try:
            self._llama = self.library.Llama(
                model_path=str(self.file), n_ctx=self._size, logits_all=every, n_gpu_layers=0,
                n_threads=threads, n_threads_batch=threads, verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{self.file}: {RUNTIME} cannot read it: {first_line(error)}") from error
        self._end = weakref.finalize(self, self._llama.close)  # at the latest while Python still stands
        return True

    def _fed(self, tokens: list[int], *, every: bool, anew: bool = True) -> torch.Tensor:
        """Logits behind ``tokens``, of every one [tokens, vocabulary] or of the last [1, vocabulary]. ``anew``: they
        begin a row."""
        if anew:
            self._llama.reset()
        self._llama.eval(tokens)
        if every:
            return torch.from_numpy(self._llama.scores[: len(tokens)].copy())
        pointer = self.library.llama_get_logits_ith(self._llama.ctx, -1)
        last = np.ctypeslib.as_array(pointer, shape=(1, self.vocabulary))
        return torch.from_numpy(last.copy())
