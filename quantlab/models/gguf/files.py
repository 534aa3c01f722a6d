"""A GGUF file as the model files that the rest works with.

Configuration, tokenizer and chat template are written once into a folder of the cache, from which transformers loads
them and checkpoints get theirs; the folder's name is made of the header, so another file has another. Tensors are read
from the GGUF file itself. Nothing is written for a file that is refused. No torch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from quantlab import __version__
from quantlab.errors import MachineError
from quantlab.models.gguf.config import Described, describe
from quantlab.models.gguf.header import Header, read_header
from quantlab.models.gguf.tokenizer import tokenizer_files
from quantlab.models.safetensors.files import ModelFiles, TensorInfo
from quantlab.models.safetensors.weight_files import WeightFiles, read_json
from quantlab.paths import cache_folder, short_hash

LAYOUT = "1"  # of the folder; another one when the same header is written differently


def open_gguf(name: str, file: Path) -> ModelFiles:
    """The model in a GGUF file, which the user called ``name``.

    Raises:
        DataError: a damaged file, or one of an architecture or tokenizer that is not read.
        MachineError: the cache cannot be written.
    """
    header = read_header(file)
    described = describe(header, name)
    path = _folder(header, described, name)
    return ModelFiles(
        name, path, read_json(path / "config.json"), _infos(described, file), WeightFiles((file,), None, ()),
        plain=described.plain, encoding=described.encoding,
    )  # fmt: skip


def with_tensors(files: ModelFiles) -> ModelFiles:
    """A checkpoint whose weights are one GGUF file, with the tensors of that file; configuration and tokenizer are
    those beside it.

    Raises:
        DataError: as :func:`open_gguf`.
    """
    (file,) = files.weight_files
    described = describe(read_header(file), files.name)
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    return replace(
        files,
        config=config,
        tensors=_infos(described, file),
        plain=described.plain,
        encoding=described.encoding,
    )


def _infos(described: Described, file: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, file, "F32", reader.shape, reader.start, reader=reader)
        for name, reader in described.tensors.items()
    }


def _folder(header: Header, described: Described, called: str) -> Path:
    """The folder with everything but the weights; written beside and renamed, as others may write it too."""
    folder = cache_folder() / "gguf" / short_hash([header.digest, __version__, LAYOUT])
    if (folder / "config.json").is_file():
        return folder
    config = described.config
    contents = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(_generation(header, config), indent=2) + "\n",
        **tokenizer_files(header.metadata, config["vocab_size"], config["max_position_embeddings"], called),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            for file, content in contents.items():
                (beside / file).write_text(content, encoding="utf-8")
            os.replace(beside, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # nobody else has written it meanwhile
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise MachineError(
            f"cannot write {folder}: {error.strerror or error}",
            hint="set QUANTLAB_CACHE to a folder that can be",
        ) from error
    return folder


def _generation(header: Header, config: dict[str, object]) -> dict[str, object]:
    """generation_config.json: a text may end with a turn (``eot``) as well."""
    found: dict[str, object] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    turn = header.metadata.get("tokenizer.ggml.eot_token_id")
    if isinstance(turn, int) and "eos_token_id" in found and turn != found["eos_token_id"]:
        found["eos_token_id"] = [found["eos_token_id"], turn]
    return found
