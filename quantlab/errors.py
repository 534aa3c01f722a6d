"""One family of errors, each with the exit code the command line ends with.

`str(error)` is one clear message; `hint` says what to do about it. The command line prints both and no
traceback (unless `--debug`), so raise these for everything a user can cause or repair.
"""

from __future__ import annotations


class QuantlabError(Exception):
    """Something failed that is not the recipe's, the machine's or the data's fault."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(QuantlabError):
    """The recipe or the arguments are wrong: file, line, key, what was expected, the nearest valid name."""

    exit_code = 2


class MachineError(QuantlabError):
    """This machine lacks something: the hint says what to install or which flag avoids it."""

    exit_code = 3


class DataError(QuantlabError):
    """The data or the model is bad: the message says which file, and which row or tensor."""

    exit_code = 4


class NotANumber(DataError):
    """A measurement came out as NaN: of this model and task nothing can be said; others may still be measured."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """What a foreign exception says, fit for one line: libraries append lists of several hundred names."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
