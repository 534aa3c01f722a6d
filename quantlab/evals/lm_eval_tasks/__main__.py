"""`python -m quantlab.evals.lm_eval_tasks` prints the folder for `lm_eval --include_path`."""

from __future__ import annotations

from quantlab.evals.lm_eval_tasks import FOLDER

if __name__ == "__main__":
    print(FOLDER)
