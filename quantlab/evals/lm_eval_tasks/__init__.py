"""The Korean Text2SQL questions as tasks of EleutherAI's lm-evaluation-harness, for any of its backends.

    lm_eval --tasks quantlab_ko_text2sql --include_path "$(python -m quantlab.evals.lm_eval_tasks)" --model hf …

`quantlab_ko_text2sql` are the test questions, `quantlab_ko_text2sql_dev` the development ones. The harness finds
tasks in its own package and in the folders of `--include_path`; it has no entry points for those of other
packages, so this package prints its folder when it is run. Within quantlab `lm-eval:quantlab_ko_text2sql` needs
no path. What the YAML files call is in `ko_text2sql.py`.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
