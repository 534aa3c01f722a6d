"""Which tests run when: `make fast`, `make test`, `make test-all`.

`make fast` runs FAST: files whose tests start no process, load no model and train nothing; a test of them that starts a
process fails there. `make test` leaves out EXHAUSTIVE: long tables of cases of which a few stay, and whole runs of
which a smaller one stays. `make test-all`, and every change, run everything.
"""

from __future__ import annotations

# Files, relative to tests/.
FAST: frozenset[str] = frozenset({})

# Files, or file::test, relative to tests/.
EXHAUSTIVE: frozenset[str] = frozenset({})


def tiers_of(file: str, test: str) -> tuple[str, ...]:
    """The marks of a test function in a file (relative to tests/)."""
    exhaustive = file in EXHAUSTIVE or f"{file}::{test}" in EXHAUSTIVE
    return ("exhaustive",) if exhaustive else ("fast",) if file in FAST else ()
