"""A model that can be served: the embedded one with a chat template, which is no more than its contents in a row."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantlab.models.safetensors.files import open_files

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def chat_model(folder: Path) -> Path:
    shutil.copytree(open_files("embedded:base").path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
