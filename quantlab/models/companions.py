"""What belongs to a model beside its weights and config.json and goes with every checkpoint made from it: the
tokenizer, the processor of a model that sees, the generation config, and the code that its configuration names
(``remote_code``). No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantlab.models.remote_code import named_code
from quantlab.models.safetensors.durable import sync_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def copy_companions(source: Path, target: Path) -> None:
    """Copy them from the model directory ``source`` to the checkpoint ``target``."""
    for name in (*TOKENIZER_FILES, *named_code(source)):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
            sync_file(target / name)
