"""How a verb ends: exceptions become one message and an exit code, stdout stays clean, signals leave a good state.

Exit codes: 0 done; 2 recipe or arguments; 3 the machine; 4 data or model; 1 everything else. No traceback unless
`--debug`. Libraries that print on stdout are sent to stderr while work goes on, so that `--json` is one document.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from quantlab.errors import MachineError, QuantlabError

RESUME = "run the same command with --resume to continue"


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C. A BaseException: nothing on the way may take it for a failed sample."""


@contextlib.contextmanager
def guarded(*, debug: bool = False, as_json: bool = False, interrupted: str = "") -> Iterator[None]:
    """Run a verb's work; leaves the process through SystemExit with the right code when it fails. ``interrupted``:
    what to do when it was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    except Interrupted:
        _fail(QuantlabError("interrupted", hint=interrupted), debug, as_json)
    except QuantlabError as error:
        _fail(error, debug, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader went away: nothing more to say
        raise SystemExit(1) from None
    except Exception as error:
        _fail(_known(error), debug, as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _known(error: Exception) -> QuantlabError:
    """A foreign exception as one of ours: a full disk and exhausted memory are the machine's."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            f"no space left on the disk: {error.filename or error}", hint="free some, or use --out"
        )
    if isinstance(error, MemoryError) or name in ("OutOfMemoryError", "AcceleratorError"):
        return MachineError(
            f"out of memory: {error}", hint="use --device cpu, or a smaller batch (--set tasks...)"
        )
    return QuantlabError(f"{name}: {error}", hint="--debug shows where")


def _fail(error: QuantlabError, debug: bool, as_json: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    if as_json:
        print_json(
            {"status": "error", "exit_code": error.exit_code, "message": str(error), "hint": error.hint}
        )
    raise SystemExit(error.exit_code)


@contextlib.contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """Whatever is printed inside goes to stderr, also by C code and child processes"""
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a real file (a test's buffer)
        with contextlib.redirect_stdout(sys.stderr):
            _keep_environment()
            yield
        return
    kept = os.dup(number)
    os.dup2(2, number)
    try:
        _keep_environment()
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)


def _keep_environment() -> None:
    """What libraries read from the environment on import, or would do to it, unless the user has set it.

    OpenMP's threads spin while they wait for each other; with anything else running on the machine that makes a small
    model many times slower, so they give up spinning early. gptqmodel's tokenizer package moves the Hugging Face cache
    of the whole process into a temporary directory when HF_HOME is not set.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("HF_HOME", str(cache / "huggingface"))
    os.environ.setdefault("GPTQMODEL_DISABLE_GIL_WARNING", "1")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=1, default=str))
