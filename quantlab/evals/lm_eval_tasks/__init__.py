"""The Korean Text2SQL questions as tasks of EleutherAI's lm-evaluation-harness, for any of its backends.

    lm_eval --tasks quantlab_ko_text2sql --include_path "$(python -m quantlab.evals.lm_eval_tasks)" --model hf …

`quantlab_ko_text2sql` are the test questions, `quantlab_ko_text2sql_dev` the development ones. The harness finds
tasks in its own package and in the folders of `--include_path`; it has no entry points for those of other
packages, so this package prints its folder when it is run. Within quantlab `lm-eval:quantlab_ko_text2sql` needs
no path. What the YAML files call is in `ko_text2sql.py`.
"""

from __future__ import annotations

from pathlib import Path

from quantlab.errors import RecipeError
from quantlab.paths import file_digest, find_source, short_hash
from quantlab.registry.tasks import LmEvalOptions, PromptOptions
from quantlab.text2sql.prompt.template import choose_template

FOLDER = Path(__file__).resolve().parent
OWN = "quantlab_ko_text2sql"  # what the names of quantlab's own tasks begin with


def options_digest(options: LmEvalOptions) -> str:
    """Names the task files of `include_path`, and how quantlab's own questions are asked; "" without them."""
    asked = []
    if options.task.startswith(OWN) and (wish := options.prompt) != PromptOptions():
        asked = [
            "prompt",
            choose_template(wish.language, wish.file, ["한국어"]).digest,
            wish.model_dump_json(),
        ]
    if not options.include_path:
        return short_hash(asked) if asked else ""
    folder = find_source(options.include_path)
    if not folder.is_dir():
        raise RecipeError(f"tasks.lm_eval.include_path: {folder} is not a directory")
    return short_hash([file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()] + asked)
